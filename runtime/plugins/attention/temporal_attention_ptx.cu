// Temporal attention as one kernel of plain pointers and int32 numbers: what a TensorRT quickly deployable plugin can
// launch from PTX. Arguments are the plugin's inputs, the extra numbers, the output. Compiled once for each type and
// head size, with the macros STIV_NUMBER (BFloat16 or Float16), STIV_HEAD_DIM, STIV_FP8 (0 or 1) and STIV_PTX_NAME.
#include "heuristics.h"
#include "temporal_attention.cuh"

#if STIV_FP8
#define STIV_SCALE_ARGUMENT const float *output_scale,
#else
#define STIV_SCALE_ARGUMENT
#endif

extern "C" STIV_KERNEL(stiv::kBlockThreads, 4)
STIV_PTX_NAME(const stiv::STIV_NUMBER* qkv, const stiv::STIV_NUMBER* bias, const stiv::STIV_NUMBER* q_gamma,
              const stiv::STIV_NUMBER* k_gamma, const stiv::STIV_NUMBER* cos, const stiv::STIV_NUMBER* sin,
              STIV_SCALE_ARGUMENT int frames, int positions, int heads, int heads_per_block, int positions_per_block,
              int splits, void* output) {
#if !STIV_FP8
    const float* const output_scale = nullptr;
#endif
    constexpr float kEpsilon = 1e-6f;  // baked in: only int32 numbers can be passed
    const stiv::TemporalParameters<stiv::STIV_NUMBER> parameters{
        qkv,    bias,      q_gamma, k_gamma,         cos,                 sin,    output_scale, output,
        frames, positions, heads,   heads_per_block, positions_per_block, splits, kEpsilon};
    stiv::TemporalAttention<stiv::STIV_NUMBER, STIV_HEAD_DIM>(parameters).run<1, 4>(stiv::kBlockThreads);
}
