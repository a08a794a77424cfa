// The kernels' sources as one host program; see common/emulation.h.
#include "kernels.cpp"
#include "spatial_qkv.cu"
#include "temporal_attention.cu"
#include "temporal_attention_scalar.cu"

#define STIV_NUMBER BFloat16
#define STIV_HEAD_DIM 72
#define STIV_FP8 0
#define STIV_PTX_NAME ptx_kernel
#include "temporal_attention_ptx.cu"

extern "C" {

void stiv_emulation_seed(uint64_t seed) { stiv::emulation::set_seed(seed); }

void stiv_emulation_round(int32_t dtype, const float* values, uint16_t* bits, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        switch (dtype) {
            case STIV_FLOAT16: bits[i] = stiv::from_float(stiv::Float16{}, values[i]); break;
            case STIV_BFLOAT16: bits[i] = stiv::from_float(stiv::BFloat16{}, values[i]); break;
            default: bits[i] = stiv::to_e4m3(values[i]);
        }
    }
}

void stiv_emulation_widen(int32_t dtype, const uint16_t* bits, float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        values[i] = dtype == STIV_FLOAT16 ? stiv::to_float(stiv::Float16{bits[i]})
                                          : stiv::to_float(stiv::BFloat16{bits[i]});
}

int32_t stiv_emulation_ptx_kernel(const StivTemporalAttention* call) {
    StivPlan plan;
    if (const int32_t code = stiv_temporal_attention_plan(call, &plan)) return code;
    const auto p = stiv::temporal_parameters<stiv::BFloat16>(*call, plan);
    const auto body = [&] {
        ptx_kernel(p.qkv, p.bias, p.q_gamma, p.k_gamma, p.cos, p.sin, p.frames, p.positions, p.heads,
                   p.heads_per_block, p.positions_per_block, p.splits, p.output);
    };
    const bool done = stiv::emulation::launch(plan.blocks, plan.threads, plan.shared_bytes, body);
    return done ? STIV_SUCCESS : STIV_ERROR_EMULATION;
}

}  // extern "C"
