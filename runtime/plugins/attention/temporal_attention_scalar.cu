#include "../common/launch.h"
#include "heuristics.h"
#include "launchers.h"
#include "parameters.h"
#include "temporal_attention_scalar.cuh"

namespace stiv {
namespace {

template <int kHeadDim>
STIV_KERNEL(kScalarThreads, 2)
temporal_attention_scalar(const TemporalParameters<float> parameters) {
    ScalarTemporalAttention<kHeadDim, kScalarThreads / kWarp>(parameters).run();
}

}  // namespace

int32_t launch_temporal_scalar(const StivTemporalAttention& call, const StivPlan& plan, void* stream) {
    return with_head_dim(call.head_dim, [&](auto head_dim) {
        return launch(temporal_attention_scalar<decltype(head_dim)::value>, plan.blocks, plan.threads,
                      plan.shared_bytes, stream, temporal_parameters<float>(call, plan));
    });
}

}  // namespace stiv
