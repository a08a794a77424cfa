// What both attention plugins have in common: everything but the call of the kernel. TensorRT's three capabilities
// (core, build, runtime) are one object, driven by the plugin's table in plugin_spec.h.
//
// Every method logs one line and returns a failure when something does not fit. The output is FP8 where the scales are
// given, else of the first input's type. There is one kernel for each case, chosen by heuristics.h: no custom tactics.
#pragma once

#include <NvInferRuntime.h>

#include "kernels.h"
#include "plugin_attributes.h"
#include "plugin_shapes.h"

namespace stiv {

// Sizes and types of one call, as the C ABI wants them.
struct Call {
    Sizes sizes;
    int32_t dtype, output_dtype;
};

// What the arguments of both kernels have in common: sizes and types of a call, and the first six inputs.
template <class Arguments>
void set_sizes(Arguments& arguments, const Call& call, float epsilon) {
    arguments.positions = call.sizes[Symbol::kS];
    arguments.heads = call.sizes.heads();
    arguments.head_dim = call.sizes[Symbol::kDh];
    arguments.dtype = call.dtype;
    arguments.output_dtype = call.output_dtype;
    arguments.epsilon = epsilon;
}

template <class Arguments>
void set_inputs(Arguments& arguments, const void* const* inputs) {
    arguments.qkv = inputs[0];
    arguments.bias = inputs[1];
    arguments.q_gamma = inputs[2];
    arguments.k_gamma = inputs[3];
    arguments.cos = inputs[4];
    arguments.sin = inputs[5];
}

class AttentionPlugin : public nvinfer1::IPluginV3,
                        public nvinfer1::IPluginV3OneCore,
                        public nvinfer1::IPluginV3OneBuild,
                        public nvinfer1::IPluginV3OneRuntime {
public:
    AttentionPlugin(const PluginSpec& spec, const nvinfer1::PluginFieldCollection* fields);
    AttentionPlugin(const AttentionPlugin&) = delete;
    AttentionPlugin& operator=(const AttentionPlugin&) = delete;

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    const char* getPluginName() const noexcept override;
    const char* getPluginVersion() const noexcept override;
    const char* getPluginNamespace() const noexcept override;

    int32_t getNbOutputs() const noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t output_count,
                               const nvinfer1::DataType* input_types, int32_t input_count) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                            const nvinfer1::DimsExprs* shape_inputs, int32_t shape_input_count,
                            nvinfer1::DimsExprs* outputs, int32_t output_count,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                   int32_t input_count, int32_t output_count) noexcept override;
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                            const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept override;
    const char* getTimingCacheID() noexcept override;
    const char* getMetadataString() noexcept override;

    int32_t setTactic(int32_t tactic) noexcept override;
    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::PluginTensorDesc* outputs, int32_t output_count) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc* output_descs,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

protected:
    const Attributes attributes_;

private:
    // Both return a code of the C ABI.
    virtual int32_t plan(const Call& call) const = 0;
    virtual int32_t launch(const Call& call, const void* const* inputs, void* const* outputs, void* stream) const = 0;

    void check_counts(int32_t input_count, int32_t output_count) const;
    void check_tensors(const nvinfer1::PluginTensorDesc* const* inputs, int32_t input_count,
                       const nvinfer1::PluginTensorDesc* const* outputs, int32_t output_count) const;
    void check_plan(const nvinfer1::Dims& first_input, nvinfer1::DataType type, nvinfer1::DataType output_type) const;
    void check_code(int32_t code, const nvinfer1::Dims& first_input) const;
    Call call(const nvinfer1::Dims& first_input, nvinfer1::DataType type, nvinfer1::DataType output_type) const;

    const PluginSpec& spec_;
    const int32_t heads_;
    const std::string text_;
    const std::array<nvinfer1::PluginField, kMaximumAttributes> fields_;
    const nvinfer1::PluginFieldCollection collection_;
};

// The plugin of a table, or PluginError.
nvinfer1::IPluginV3* make_plugin(const PluginSpec& spec, const nvinfer1::PluginFieldCollection* fields);

// Each file of a plugin defines its own.
AttentionPlugin* make_temporal_attention(const nvinfer1::PluginFieldCollection* fields);
AttentionPlugin* make_spatial_qkv(const nvinfer1::PluginFieldCollection* fields);

}  // namespace stiv
