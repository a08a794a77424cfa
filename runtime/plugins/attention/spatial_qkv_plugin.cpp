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
        arguments.positions = call.sizes[Symbol::kS];
        arguments.heads = call.sizes.heads();
        arguments.head_dim = call.sizes[Symbol::kDh];
        arguments.dtype = call.dtype;
        arguments.output_dtype = call.output_dtype;
        arguments.epsilon = attributes_.real("epsilon");
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
        all.qkv = inputs[0];
        all.bias = inputs[1];
        all.q_gamma = inputs[2];
        all.k_gamma = inputs[3];
        all.cos = inputs[4];
        all.sin = inputs[5];
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
