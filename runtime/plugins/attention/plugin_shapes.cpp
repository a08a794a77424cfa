#include "plugin_shapes.h"

#include <numeric>

#include "plugin_log.h"

namespace stiv {
namespace {

using nvinfer1::DimensionOperation;
using nvinfer1::IDimensionExpr;

// Of a size that is `numerator * [heads] * symbol`, as the first input's are.
int64_t factor(const Extent& extent, int64_t heads) { return extent.numerator * (extent.times_heads ? heads : 1); }

void check_divisible(const PluginSpec& spec, int64_t size, int64_t divisor, int64_t heads) {
    if (size % divisor)
        throw PluginError(std::string(spec.inputs[0].name) + "'s last size is " + std::to_string(size) +
                          ", which is not divisible by 3 * heads = " + std::to_string(3 * heads));
}

void check_rank(const TensorSpec& tensor, int32_t rank) {
    if (rank != tensor.rank)
        throw PluginError(std::string(tensor.name) + " has " + std::to_string(rank) + " dimensions, want " +
                          std::to_string(tensor.rank));
}

// One size of an output: a size of the first input, multiplied and divided.
const IDimensionExpr* expression(const PluginSpec& spec, const Extent& extent, int64_t heads,
                                 const nvinfer1::DimsExprs& first_input, nvinfer1::IExprBuilder& builder) {
    const int64_t multiplier = factor(extent, heads);
    if (extent.symbol == Symbol::kNone) return builder.constant(multiplier / extent.denominator);
    const TensorSpec& source = spec.inputs[0];
    int axis = 0;
    while (source.shape[axis].symbol != extent.symbol) ++axis;
    const int64_t divisor = extent.denominator * factor(source.shape[axis], heads);
    const int64_t common = std::gcd(multiplier, divisor);
    const IDimensionExpr* size = first_input.d[axis];
    if (multiplier != common)
        size = builder.operation(DimensionOperation::kPROD, *size, *builder.constant(multiplier / common));
    if (divisor != common)
        size = builder.operation(DimensionOperation::kFLOOR_DIV, *size, *builder.constant(divisor / common));
    return size;
}

}  // namespace

Sizes::Sizes(const PluginSpec& spec, int32_t heads, const nvinfer1::Dims& first_input) : heads_(heads) {
    const TensorSpec& source = spec.inputs[0];
    check_rank(source, first_input.nbDims);
    values_.fill(kUnknown);
    for (int axis = 0; axis < source.rank; ++axis) {
        const int64_t size = first_input.d[axis], divisor = factor(source.shape[axis], heads);
        if (size < 0) continue;
        check_divisible(spec, size, divisor, heads);
        values_[static_cast<int>(source.shape[axis].symbol)] = size / divisor;
    }
}

int64_t Sizes::evaluate(const Extent& extent) const {
    const int64_t value = extent.symbol == Symbol::kNone ? 1 : (*this)[extent.symbol];
    return value < 0 ? kUnknown : factor(extent, heads_) * value / extent.denominator;
}

std::string shape_text(const nvinfer1::Dims& dims) {
    std::string text = "[";
    for (int axis = 0; axis < dims.nbDims; ++axis)
        text += (axis ? ", " : "") + (dims.d[axis] < 0 ? std::string("?") : std::to_string(dims.d[axis]));
    return text + "]";
}

void check_shape(const TensorSpec& tensor, const nvinfer1::Dims& dims, const Sizes& sizes) {
    if (tensor.rank == 0 && dims.nbDims == 1 && (dims.d[0] == 1 || dims.d[0] < 0)) return;
    check_rank(tensor, dims.nbDims);
    nvinfer1::Dims wanted = dims;
    bool fits = true;
    for (int axis = 0; axis < tensor.rank; ++axis) {
        wanted.d[axis] = sizes.evaluate(tensor.shape[axis]);
        fits = fits && (dims.d[axis] < 0 || wanted.d[axis] < 0 || dims.d[axis] == wanted.d[axis]);
    }
    if (!fits)
        throw PluginError(std::string(tensor.name) + " is " + shape_text(dims) + ", want " + shape_text(wanted));
}

void output_shapes(const PluginSpec& spec, int32_t heads, const nvinfer1::DimsExprs& first_input,
                   nvinfer1::DimsExprs* outputs, nvinfer1::IExprBuilder& builder) {
    const TensorSpec& source = spec.inputs[0];
    check_rank(source, first_input.nbDims);
    for (int axis = 0; axis < source.rank; ++axis)
        if (first_input.d[axis]->isConstant())
            check_divisible(spec, first_input.d[axis]->getConstantValue(), factor(source.shape[axis], heads), heads);
    for (int i = 0; i < spec.output_count; ++i) {
        outputs[i].nbDims = spec.outputs[i].rank;
        for (int axis = 0; axis < spec.outputs[i].rank; ++axis)
            outputs[i].d[axis] = expression(spec, spec.outputs[i].shape[axis], heads, first_input, builder);
    }
}

}  // namespace stiv
