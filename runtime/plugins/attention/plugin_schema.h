// What plugin_spec.h says about a plugin: its tensors, with shapes in symbols, and its attributes. The tables are
// written from runtime/plugins/spec.py.
#pragma once

#include <cstdint>

namespace stiv {

enum class Symbol { kNone, kB, kT, kS, kN, kDh };
constexpr int kSymbols = 6;

// numerator * [heads] * [symbol] / denominator.
struct Extent {
    int32_t numerator, denominator;
    bool times_heads;
    Symbol symbol;
};

enum class ElementType {
    kInput,  // the first input's
    kFloat32,
    kInputOrFloat8,  // the first input's; FP8 where the optional inputs, the scales, are given
};

constexpr int kMaximumRank = 4, kMaximumInputs = 9, kMaximumOutputs = 3, kMaximumAttributes = 3;

struct TensorSpec {
    const char* name;
    int32_t rank;
    Extent shape[kMaximumRank];
    ElementType type;
};

struct AttributeSpec {
    const char* name;
    bool integer;   // int32, else fp32
    bool required;  // else `fallback` where the node does not say
    float fallback;
};

// The optional inputs are the last ones: all are given, or none.
struct PluginSpec {
    const char* name;
    int32_t required_inputs, input_count, output_count, attribute_count;
    TensorSpec inputs[kMaximumInputs];
    TensorSpec outputs[kMaximumOutputs];
    AttributeSpec attributes[kMaximumAttributes];
};

}  // namespace stiv
