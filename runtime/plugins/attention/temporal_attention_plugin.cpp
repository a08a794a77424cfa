#include "attention_plugin.h"
#include "plugin_spec.h"

namespace stiv {
namespace {

class TemporalAttentionPlugin final : public AttentionPlugin {
public:
    explicit TemporalAttentionPlugin(const nvinfer1::PluginFieldCollection* fields)
        : AttentionPlugin(kStivTemporalAttention, fields) {}

private:
    StivTemporalAttention arguments(const Call& call) const {
        StivTemporalAttention arguments{};
        arguments.batch = call.sizes[Symbol::kB];
        arguments.frames = call.sizes[Symbol::kT];
        set_sizes(arguments, call, attributes_.real("epsilon"));
        return arguments;
    }

    int32_t plan(const Call& call) const override {
        const StivTemporalAttention sizes = arguments(call);
        StivPlan plan;
        return stiv_temporal_attention_plan(&sizes, &plan);
    }

    int32_t launch(const Call& call, const void* const* inputs, void* const* outputs, void* stream) const override {
        StivTemporalAttention all = arguments(call);
        set_inputs(all, inputs);
        if (call.output_dtype == STIV_FLOAT8_E4M3) all.output_scale = static_cast<const float*>(inputs[6]);
        all.output = outputs[0];
        return stiv_temporal_attention(&all, stream);
    }
};

}  // namespace

AttentionPlugin* make_temporal_attention(const nvinfer1::PluginFieldCollection* fields) {
    return new TemporalAttentionPlugin(fields);
}

}  // namespace stiv
