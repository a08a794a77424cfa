// The two plugins as the harness knows them, written down here a second time on purpose: what the library does is
// compared with these tables, not with its own.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

namespace harness {

constexpr nvinfer1::DataType kInputTypes[] = {nvinfer1::DataType::kFLOAT, nvinfer1::DataType::kHALF,
                                              nvinfer1::DataType::kBF16};

// Fields for a creator that own their numbers. Integers are int32 and reals fp32, as the ONNX parser hands them over.
class Fields {
public:
    Fields& integer(const char* name, int32_t value) {
        integers_.push_back(std::make_unique<int32_t>(value));
        return add(name, integers_.back().get(), nvinfer1::PluginFieldType::kINT32, 1);
    }
    Fields& real(const char* name, float value) {
        reals_.push_back(std::make_unique<float>(value));
        return add(name, reals_.back().get(), nvinfer1::PluginFieldType::kFLOAT32, 1);
    }
    Fields& add(const char* name, const void* data, nvinfer1::PluginFieldType type, int32_t length) {
        fields_.emplace_back(name, data, type, length);
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return *this;
    }
    const nvinfer1::PluginFieldCollection* get() const { return &collection_; }

private:
    std::vector<std::unique_ptr<int32_t>> integers_;
    std::vector<std::unique_ptr<float>> reals_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_;
};

// Sizes of one call; `lead` is B, T of temporal attention and N of pre-processing.
struct Shape {
    std::vector<int64_t> lead;
    int64_t positions, heads, head_dim;
};

struct Table {
    std::string name;
    bool temporal;
    int scales, outputs;

    std::vector<std::vector<int64_t>> inputs(const Shape& shape, bool quantized) const {
        const int64_t channels = 3 * shape.heads * shape.head_dim, half = shape.head_dim / 2;
        const int64_t rope = temporal ? shape.lead[1] : shape.positions;
        std::vector<int64_t> qkv = shape.lead;
        qkv.insert(qkv.end(), {shape.positions, channels});
        std::vector<std::vector<int64_t>> all = {qkv,          {channels},   {shape.head_dim}, {shape.head_dim},
                                                 {rope, half}, {rope, half}};
        for (int i = 0; quantized && i < scales; ++i) all.push_back({});
        return all;
    }
    std::vector<int64_t> output(const Shape& shape) const {
        if (temporal) return {shape.lead[0], shape.lead[1], shape.positions, shape.heads * shape.head_dim};
        return {shape.lead[0], shape.heads, shape.positions, shape.head_dim};
    }
    // x the first input's type, f fp32, o the output's.
    std::string types(bool quantized) const {
        return "xxxxxx" + std::string(quantized ? scales : 0, 'f') + std::string(outputs, 'o');
    }
};

inline const Table kTemporal{"StivTemporalAttention", true, 1, 1};
inline const Table kSpatial{"StivSpatialQkv", false, 3, 3};

// The tensors of one call as TensorRT describes them to a plugin.
struct Descs {
    std::vector<nvinfer1::PluginTensorDesc> inputs, outputs;
};

Descs describe_call(const Table& table, const Shape& shape, nvinfer1::DataType type, bool quantized);

}  // namespace harness
