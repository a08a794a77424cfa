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

namespace {

// One warp with a lane's fragments each: a [32][kParts * 2], b [32][kParts], c [32][4], kParts = depth / 8.
template <class Number, int kParts>
bool multiply_in_warp(const uint32_t* a, const uint32_t* b, float* c) {
    return stiv::emulation::launch(1, 32, 0, [&] {
        const int lane = stiv::thread_index();
        uint32_t left[2 * kParts];
        float sums[4];
        std::memcpy(left, a + lane * 2 * kParts, sizeof left);
        std::memcpy(sums, c + lane * 4, sizeof sums);
        const uint32_t* right = b + lane * kParts;
        if constexpr (kParts == 2)
            stiv::multiply_add(Number{}, sums, left, right[0], right[1]);
        else
            stiv::multiply_add(Number{}, sums, left, right[0]);
        std::memcpy(c + lane * 4, sums, sizeof sums);
    });
}

template <int kMatrices>
bool load_matrix_in_warp(bool transposed, const uint16_t* rows, uint32_t* out) {
    return stiv::emulation::launch(1, 32, 0, [&] {
        const int lane = stiv::thread_index();
        const uint16_t* row = rows + lane % (8 * kMatrices) * 8;
        uint32_t words[kMatrices];
        transposed ? stiv::load_matrix_transposed(words, row) : stiv::load_matrix(words, row);
        std::memcpy(out + lane * kMatrices, words, sizeof words);
    });
}

}  // namespace

extern "C" {

int32_t stiv_emulation_multiply(int32_t dtype, int32_t depth, const uint32_t* a, const uint32_t* b, float* c) {
    const bool half = dtype == STIV_FLOAT16;
    const auto multiply = depth == 16 ? (half ? multiply_in_warp<stiv::Float16, 2> : multiply_in_warp<stiv::BFloat16, 2>)
                                      : (half ? multiply_in_warp<stiv::Float16, 1> : multiply_in_warp<stiv::BFloat16, 1>);
    return multiply(a, b, c) ? STIV_SUCCESS : STIV_ERROR_EMULATION;
}

int32_t stiv_emulation_load_matrix(int32_t matrices, int32_t transposed, const uint16_t* rows, uint32_t* out) {
    const auto load = matrices == 4 ? load_matrix_in_warp<4> : load_matrix_in_warp<2>;
    return load(transposed, rows, out) ? STIV_SUCCESS : STIV_ERROR_EMULATION;
}

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
