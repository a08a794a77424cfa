#include "../common/launch.h"
#include "heuristics.h"
#include "launchers.h"
#include "parameters.h"
#include "temporal_attention.cuh"

namespace stiv {
namespace {

// Up to kMost tiles: a kernel for one and two, one for three and four. They differ in the registers that they need.
template <class Number, int kHeadDim, int kMost>
STIV_KERNEL(kBlockThreads, blocks_per_sm(kHeadDim, kMost))
temporal_attention(const TemporalParameters<Number> parameters) {
    TemporalAttention<Number, kHeadDim>(parameters).template run<kMost - 1, kMost>(kBlockThreads);
}

template <class Number, int kHeadDim>
int32_t launch_tiles(const StivTemporalAttention& call, const StivPlan& plan, void* stream) {
    const auto parameters = temporal_parameters<Number>(call, plan);
    const auto kernel = plan.tiles > 2 ? temporal_attention<Number, kHeadDim, 4> : temporal_attention<Number, kHeadDim, 2>;
    return launch(kernel, plan.blocks, plan.threads, plan.shared_bytes, stream, parameters);
}

}  // namespace

int32_t launch_temporal_tiles(const StivTemporalAttention& call, const StivPlan& plan, void* stream) {
    return with_head_dim(call.head_dim, [&](auto head_dim) {
        constexpr int kHeadDim = decltype(head_dim)::value;
        return call.dtype == STIV_BFLOAT16 ? launch_tiles<BFloat16, kHeadDim>(call, plan, stream)
                                           : launch_tiles<Float16, kHeadDim>(call, plan, stream);
    });
}

}  // namespace stiv
