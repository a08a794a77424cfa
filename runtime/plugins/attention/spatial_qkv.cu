#include "spatial_qkv.cuh"

#include "../common/launch.h"
#include "heuristics.h"
#include "launchers.h"
#include "parameters.h"

namespace stiv {
namespace {

template <class Number, int kHeadDim>
STIV_KERNEL(kBlockThreads, sizeof(Number) == 4 || kHeadDim == 72 ? 3 : 4)
spatial_qkv(const SpatialParameters<Number> parameters) {
    SpatialQkv<Number, kHeadDim>(parameters).run(kBlockThreads);
}

template <class Number>
SpatialParameters<Number> spatial_parameters(const StivSpatialQkv& call, const StivPlan& plan) {
    const bool fp8 = call.output_dtype == STIV_FLOAT8_E4M3;
    return {static_cast<const Number*>(call.qkv),
            static_cast<const Number*>(call.bias),
            static_cast<const Number*>(call.q_gamma),
            static_cast<const Number*>(call.k_gamma),
            static_cast<const Number*>(call.cos),
            static_cast<const Number*>(call.sin),
            {fp8 ? call.q_scale : nullptr, fp8 ? call.k_scale : nullptr, fp8 ? call.v_scale : nullptr},
            {call.q, call.k, call.v},
            static_cast<int>(call.positions),
            static_cast<int>(call.heads),
            plan.heads_per_block,
            plan.positions_per_block,
            plan.splits,
            call.epsilon,
            call.query_scale};
}

template <class Number>
int32_t launch_typed(const StivSpatialQkv& call, const StivPlan& plan, void* stream) {
    return with_head_dim(call.head_dim, [&](auto head_dim) {
        return launch(spatial_qkv<Number, decltype(head_dim)::value>, plan.blocks, plan.threads, plan.shared_bytes,
                      stream, spatial_parameters<Number>(call, plan));
    });
}

}  // namespace

int32_t launch_spatial_qkv(const StivSpatialQkv& call, const StivPlan& plan, void* stream) {
    switch (call.dtype) {
        case STIV_FLOAT32: return launch_typed<float>(call, plan, stream);
        case STIV_BFLOAT16: return launch_typed<BFloat16>(call, plan, stream);
        default: return launch_typed<Float16>(call, plan, stream);
    }
}

}  // namespace stiv
