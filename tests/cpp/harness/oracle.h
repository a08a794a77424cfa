// What the plugins compute, in fp64 from the formulas of runtime/plugins/spec.py, each number with a bound on the error
// of a kernel that rounds q, k, the probabilities and the output to the type and computes in fp32 otherwise.
#pragma once

#include <cstdint>
#include <vector>

namespace harness {

struct Inputs {
    std::vector<double> qkv, bias, q_gamma, k_gamma, cos, sin;
    int64_t batch, frames, positions, heads, head_dim;  // of pre-processing: N, 1, S, H, Dh
    double epsilon, query_scale;
};

struct Expected {
    std::vector<double> value, bound;
};

// [B, T, S, H * Dh].
Expected temporal_attention(const Inputs& inputs, double roundoff);

// q, k and v, each [N, H, S, Dh].
std::vector<Expected> spatial_qkv(const Inputs& inputs, double roundoff);

// Adds what rounding to FP8 E4M3 with a scale does: half a step more, and saturation at 448.
void quantize(Expected& expected, double scale);

}  // namespace harness
