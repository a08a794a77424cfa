#include "../common/launch.h"
#include "heuristics.h"
#include "launchers.h"
#include "parameters.h"
#include "temporal_attention.cuh"

namespace stiv {
namespace {

template <class Number, int kHeadDim, int kTiles>
STIV_KERNEL(kBlockThreads, blocks_per_sm(kHeadDim, kTiles))
temporal_attention(const TemporalParameters<Number> parameters) {
    TemporalAttention<Number, kHeadDim>(parameters).template run<kTiles>(kBlockThreads);
}

template <class Number, int kHeadDim>
int32_t launch_tiles(const StivTemporalAttention& call, const StivPlan& plan, void* stream) {
    const auto parameters = temporal_parameters<Number>(call, plan);
    const auto start = [&](void (*kernel)(TemporalParameters<Number>)) {
        return launch(kernel, plan.blocks, plan.threads, plan.shared_bytes, stream, parameters);
    };
    switch (plan.tiles) {
        case 1: return start(temporal_attention<Number, kHeadDim, 1>);
        case 2: return start(temporal_attention<Number, kHeadDim, 2>);
        case 3: return start(temporal_attention<Number, kHeadDim, 3>);
        default: return start(temporal_attention<Number, kHeadDim, 4>);
    }
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
