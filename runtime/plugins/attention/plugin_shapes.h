// Shapes of a plugin's tensors: symbols from the first input, all others from them. -1 is a size that is not known yet.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <string>

#include "plugin_schema.h"

namespace stiv {

constexpr int64_t kUnknown = -1;

// The values of the symbols of one call.
class Sizes {
public:
    // From qkv's shape; throws PluginError if its rank or its last size does not fit.
    Sizes(const PluginSpec& spec, int32_t heads, const nvinfer1::Dims& first_input);

    int64_t operator[](Symbol symbol) const { return values_[static_cast<int>(symbol)]; }
    int64_t heads() const { return heads_; }
    int64_t evaluate(const Extent& extent) const;

private:
    std::array<int64_t, kSymbols> values_;
    int64_t heads_;
};

// "[2, 5, 3, 288]"; sizes that are not known are "?".
std::string shape_text(const nvinfer1::Dims& dims);

// Throws PluginError unless `dims` is what `sizes` make of the tensor's shape. One number may be [] or [1].
void check_shape(const TensorSpec& tensor, const nvinfer1::Dims& dims, const Sizes& sizes);

// Writes the outputs' shapes as expressions of the first input's; throws PluginError if that does not fit.
void output_shapes(const PluginSpec& spec, int32_t heads, const nvinfer1::DimsExprs& first_input,
                   nvinfer1::DimsExprs* outputs, nvinfer1::IExprBuilder& builder);

}  // namespace stiv
