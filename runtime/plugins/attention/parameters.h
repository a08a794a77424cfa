// From the C ABI's untyped calls to the kernels' typed parameters, and from run-time head sizes to template arguments.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "temporal_attention.cuh"

namespace stiv {

template <class Number>
TemporalParameters<Number> temporal_parameters(const StivTemporalAttention& call, const StivPlan& plan) {
    return {static_cast<const Number*>(call.qkv),
            static_cast<const Number*>(call.bias),
            static_cast<const Number*>(call.q_gamma),
            static_cast<const Number*>(call.k_gamma),
            static_cast<const Number*>(call.cos),
            static_cast<const Number*>(call.sin),
            call.output_dtype == STIV_FLOAT8_E4M3 ? call.output_scale : nullptr,
            call.output,
            static_cast<int>(call.frames),
            static_cast<int>(call.positions),
            static_cast<int>(call.heads),
            plan.heads_per_block,
            plan.positions_per_block,
            plan.splits,
            call.epsilon};
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// function(Constant<head_dim>) for a head size that was checked before.
template <class Function>
int32_t with_head_dim(int64_t head_dim, const Function& function) {
    switch (head_dim) {
        case 32: return function(Constant<32>{});
        case 48: return function(Constant<48>{});
        case 64: return function(Constant<64>{});
        case 72: return function(Constant<72>{});
        case 96: return function(Constant<96>{});
        case 128: return function(Constant<128>{});
        default: return STIV_ERROR_HEAD_SIZE;
    }
}

}  // namespace stiv
