#include "attention_plugin.h"

#include <cstring>
#include <memory>
#include <vector>

#include "plugin_log.h"
#include "plugin_spec.h"

namespace stiv {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kSuccess = 0, kFailure = 1;

bool supported_input(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

int32_t kernel_dtype(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return STIV_FLOAT32;
        case DataType::kHALF: return STIV_FLOAT16;
        case DataType::kBF16: return STIV_BFLOAT16;
        case DataType::kFP8: return STIV_FLOAT8_E4M3;
        default: throw PluginError("tensors must be float32, float16 or bfloat16, outputs with scales float8_e4m3");
    }
}

DataType wanted_type(const TensorSpec& tensor, DataType first_input, bool quantized) {
    if (tensor.type == ElementType::kFloat32) return DataType::kFLOAT;
    return tensor.type == ElementType::kInputOrFloat8 && quantized ? DataType::kFP8 : first_input;
}

bool known(const Dims& dims) {
    for (int axis = 0; axis < dims.nbDims; ++axis)
        if (dims.d[axis] < 0) return false;
    return true;
}

}  // namespace

AttentionPlugin::AttentionPlugin(const PluginSpec& spec, const PluginFieldCollection* fields)
    : attributes_(spec, fields),
      spec_(spec),
      heads_(attributes_.integer("heads")),
      text_(attributes_.text()),
      fields_(attributes_.fields()),
      collection_{spec.attribute_count, fields_.data()} {}

nvinfer1::IPluginCapability* AttentionPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* AttentionPlugin::clone() noexcept {
    return guarded<nvinfer1::IPluginV3*>(spec_.name, nullptr, [&] { return make_plugin(spec_, &collection_); });
}

const char* AttentionPlugin::getPluginName() const noexcept { return spec_.name; }
const char* AttentionPlugin::getPluginVersion() const noexcept { return kPluginVersion; }
const char* AttentionPlugin::getPluginNamespace() const noexcept { return kPluginNamespace; }

int32_t AttentionPlugin::getNbOutputs() const noexcept { return spec_.output_count; }

int32_t AttentionPlugin::getOutputDataTypes(DataType* output_types, int32_t output_count, const DataType* input_types,
                                            int32_t input_count) const noexcept {
    return guarded(spec_.name, kFailure, [&] {
        check_counts(input_count, output_count);
        if (!supported_input(input_types[0]))
            throw PluginError(std::string(spec_.inputs[0].name) + " must be float32, float16 or bfloat16");
        for (int i = 0; i < output_count; ++i)
            output_types[i] = wanted_type(spec_.outputs[i], input_types[0], input_count == spec_.input_count);
        return kSuccess;
    });
}

int32_t AttentionPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                                         const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                                         int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept {
    return guarded(spec_.name, kFailure, [&] {
        check_counts(input_count, output_count);
        output_shapes(spec_, heads_, inputs[0], outputs, builder);
        return kSuccess;
    });
}

bool AttentionPlugin::supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                                int32_t input_count, int32_t output_count) noexcept {
    return guarded(spec_.name, false, [&] {
        check_counts(input_count, output_count);
        const PluginTensorDesc& tensor = tensors[position].desc;
        if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (position == 0) return supported_input(tensor.type);
        const TensorSpec& spec =
            position < input_count ? spec_.inputs[position] : spec_.outputs[position - input_count];
        return tensor.type == wanted_type(spec, tensors[0].desc.type, input_count == spec_.input_count);
    });
}

int32_t AttentionPlugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                                         const nvinfer1::DynamicPluginTensorDesc* outputs,
                                         int32_t output_count) noexcept {
    return guarded(spec_.name, kFailure, [&] {
        check_counts(input_count, output_count);
        std::vector<const PluginTensorDesc*> ins, outs;
        for (int i = 0; i < input_count; ++i) ins.push_back(&inputs[i].desc);
        for (int i = 0; i < output_count; ++i) outs.push_back(&outputs[i].desc);
        check_tensors(ins.data(), input_count, outs.data(), output_count);
        // Of a dynamic shape the profile's largest: too many frames are refused here rather than at run time.
        const Dims& dims = known(inputs[0].desc.dims) ? inputs[0].desc.dims : inputs[0].max;
        if (known(dims)) check_plan(dims, inputs[0].desc.type, outputs[0].desc.type);
        return kSuccess;
    });
}

const char* AttentionPlugin::getTimingCacheID() noexcept { return text_.c_str(); }
const char* AttentionPlugin::getMetadataString() noexcept { return text_.c_str(); }

int32_t AttentionPlugin::setTactic(int32_t tactic) noexcept {
    return guarded(spec_.name, kFailure, [&] {
        if (tactic)
            throw PluginError("tactic " + std::to_string(tactic) + " is unknown; there is only the default, 0");
        return kSuccess;
    });
}

int32_t AttentionPlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                                       const PluginTensorDesc* outputs, int32_t output_count) noexcept {
    return guarded(spec_.name, kFailure, [&] {
        check_counts(input_count, output_count);
        std::vector<const PluginTensorDesc*> ins, outs;
        for (int i = 0; i < input_count; ++i) ins.push_back(&inputs[i]);
        for (int i = 0; i < output_count; ++i) outs.push_back(&outputs[i]);
        check_tensors(ins.data(), input_count, outs.data(), output_count);
        check_plan(inputs[0].dims, inputs[0].type, outputs[0].type);
        return kSuccess;
    });
}

int32_t AttentionPlugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc* output_descs,
                                 const void* const* inputs, void* const* outputs, void*,
                                 cudaStream_t stream) noexcept {
    return guarded(spec_.name, kFailure, [&] {
        const Call checked = call(input_descs[0].dims, input_descs[0].type, output_descs[0].type);
        check_code(launch(checked, inputs, outputs, stream), input_descs[0].dims);
        return kSuccess;
    });
}

nvinfer1::IPluginV3* AttentionPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

const PluginFieldCollection* AttentionPlugin::getFieldsToSerialize() noexcept { return &collection_; }

void AttentionPlugin::check_counts(int32_t input_count, int32_t output_count) const {
    if (input_count != spec_.required_inputs && input_count != spec_.input_count)
        throw PluginError("given " + std::to_string(input_count) + " inputs, want " +
                          std::to_string(spec_.required_inputs) + ", or " + std::to_string(spec_.input_count) +
                          " with scales");
    if (output_count != spec_.output_count)
        throw PluginError("given " + std::to_string(output_count) + " outputs, want " +
                          std::to_string(spec_.output_count));
}

void AttentionPlugin::check_tensors(const PluginTensorDesc* const* inputs, int32_t input_count,
                                    const PluginTensorDesc* const* outputs, int32_t output_count) const {
    const bool quantized = input_count == spec_.input_count;
    const Sizes sizes(spec_, heads_, inputs[0]->dims);
    const auto check = [&](const TensorSpec& spec, const PluginTensorDesc& tensor) {
        check_shape(spec, tensor.dims, sizes);
        if (tensor.type != wanted_type(spec, inputs[0]->type, quantized))
            throw PluginError(std::string(spec.name) + " has the wrong type; want " + spec_.inputs[0].name +
                              (quantized ? "'s type, float32 scales and float8_e4m3 outputs"
                                         : "'s type, and no float8_e4m3 without scales"));
    };
    for (int i = 0; i < input_count; ++i) check(spec_.inputs[i], *inputs[i]);
    for (int i = 0; i < output_count; ++i) check(spec_.outputs[i], *outputs[i]);
}

void AttentionPlugin::check_plan(const Dims& first_input, DataType type, DataType output_type) const {
    check_code(plan(call(first_input, type, output_type)), first_input);
}

void AttentionPlugin::check_code(int32_t code, const Dims& first_input) const {
    if (code)
        throw PluginError(std::string(stiv_error_string(code)) + " (" + spec_.inputs[0].name + " " +
                          shape_text(first_input) + ", " + text_ + ", code " + std::to_string(code) + ")");
}

Call AttentionPlugin::call(const Dims& first_input, DataType type, DataType output_type) const {
    return {Sizes(spec_, heads_, first_input), kernel_dtype(type), kernel_dtype(output_type)};
}

nvinfer1::IPluginV3* make_plugin(const PluginSpec& spec, const PluginFieldCollection* fields) {
    if (!std::strcmp(spec.name, kStivTemporalAttention.name)) return make_temporal_attention(fields);
    return make_spatial_qkv(fields);
}

}  // namespace stiv
