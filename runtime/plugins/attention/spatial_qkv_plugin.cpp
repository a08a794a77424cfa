#include "attention_plugin.h"
#include "plugin_spec.h"

namespace stiv {
namespace {

class SpatialQkvPlugin final : public AttentionPlugin {
public:
    explicit SpatialQkvPlugin(const nvinfer1::PluginFieldCollection* fields)
        : AttentionPlugin(kStivSpatialQkv, fields) {}

private:
    StivSpatialQkv arguments(const Call& call) const {
        StivSpatialQkv arguments{};
        arguments.rows = call.sizes[Symbol::kN];
        set_sizes(arguments, call, attributes_.real("epsilon"));
        arguments.query_scale = attributes_.real("query_scale");
        return arguments;
    }

    int32_t plan(const Call& call) const override {
        const StivSpatialQkv sizes = arguments(call);
        StivPlan plan;
        return stiv_spatial_qkv_plan(&sizes, &plan);
    }

    int32_t launch(const Call& call, const void* const* inputs, void* const* outputs, void* stream) const override {
        StivSpatialQkv all = arguments(call);
        set_inputs(all, inputs);
        if (call.output_dtype == STIV_FLOAT8_E4M3) {
            all.q_scale = static_cast<const float*>(inputs[6]);
            all.k_scale = static_cast<const float*>(inputs[7]);
            all.v_scale = static_cast<const float*>(inputs[8]);
        }
        all.q = outputs[0];
        all.k = outputs[1];
        all.v = outputs[2];
        return stiv_spatial_qkv(&all, stream);
    }
};

}  // namespace

AttentionPlugin* make_spatial_qkv(const nvinfer1::PluginFieldCollection* fields) {
    return new SpatialQkvPlugin(fields);
}

}  // namespace stiv
