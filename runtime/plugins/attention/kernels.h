/* C ABI of the attention kernels: plain C, no CUDA header needed. Pointers are device pointers (host pointers in the
 * emulated library), `stream` is a cudaStream_t; all tensors are contiguous. Every function returns a code: 0 success,
 * 1..999 the CUDA error of that number, 1000.. a refused argument (StivError); stiv_error_string() explains it in one
 * line. A refused call launches nothing. Calls are asynchronous, need no workspace, allocate nothing, can be captured
 * in a CUDA graph (after a first call outside one with the same dtype, head size and side of 32 frames: CUDA loads a
 * kernel when it is first launched) and give the same bits every time.
 *
 * Symbols: B batch, T frames, S positions of a frame, H heads, Dh head size, N = B * T.
 */
#ifndef STIV_KERNELS_H
#define STIV_KERNELS_H

#include <stdint.h>

#if defined(STIV_BUILD)
#define STIV_API __attribute__((visibility("default")))
#else
#define STIV_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define STIV_ABI_VERSION 1

enum StivDtype { STIV_FLOAT32 = 0, STIV_FLOAT16 = 1, STIV_BFLOAT16 = 2, STIV_FLOAT8_E4M3 = 3 };

enum StivError {
    STIV_SUCCESS = 0,
    STIV_ERROR_NULL_POINTER = 1001,
    STIV_ERROR_MISALIGNED = 1002,
    STIV_ERROR_DTYPE = 1003,
    STIV_ERROR_OUTPUT_DTYPE = 1004,
    STIV_ERROR_HEAD_SIZE = 1005,
    STIV_ERROR_FRAMES = 1006,
    STIV_ERROR_SIZE = 1007,
    STIV_ERROR_TOO_LARGE = 1008,
    STIV_ERROR_SCALE = 1009,
    STIV_ERROR_EPSILON = 1010,
    STIV_ERROR_EMULATION = 1099
};

/* Temporal attention: softmax(rope(norm(q)) rope(norm(k))^T * Dh^-0.5) v over the T frames of each (b, s, head).
 *
 * qkv [B, T, S, 3, H, Dh], bias [3, H, Dh] or NULL, q_gamma and k_gamma [Dh] (RMS norm), cos and sin
 * [T, Dh / 2] (pairs are (i, i + Dh / 2)): all of `dtype`. output [B, T, S, H * Dh] of `output_dtype`: the same, or
 * FP8 E4M3 as saturate(x / output_scale), output_scale one fp32 number in device memory. T 1..64; Dh 32, 48, 64, 72,
 * 96 or 128; any B, S, H >= 1. Every tensor is aligned to 16 bytes, a scale to 4.
 */
typedef struct StivTemporalAttention {
    const void* qkv;
    const void* bias;
    const void* q_gamma;
    const void* k_gamma;
    const void* cos;
    const void* sin;
    const float* output_scale; /* NULL unless output_dtype is FP8 */
    void* output;
    int64_t batch;
    int64_t frames;
    int64_t positions;
    int64_t heads;
    int64_t head_dim;
    int32_t dtype;
    int32_t output_dtype;
    float epsilon; /* of the RMS norms, >= 0 */
} StivTemporalAttention;

/* Spatial pre-processing: bias, QK-norm, RoPE, and the layout of attention kernels.
 *
 * qkv [N, S, 3, H, Dh], bias [3, H, Dh] or NULL, gammas [Dh], cos and sin [S, Dh / 2]: all of `dtype`. q, k, v
 * [N, H, S, Dh] of `output_dtype`: the same, or FP8 E4M3, each with its scale. q = rope(norm(q)) * query_scale, before
 * it is rounded or quantized: TensorRT's FP8 attention wants Dh^-0.5 there, everyone else 1.
 */
typedef struct StivSpatialQkv {
    const void* qkv;
    const void* bias;
    const void* q_gamma;
    const void* k_gamma;
    const void* cos;
    const void* sin;
    const float* q_scale; /* the three scales: NULL unless output_dtype is FP8 */
    const float* k_scale;
    const float* v_scale;
    void* q;
    void* k;
    void* v;
    int64_t rows;
    int64_t positions;
    int64_t heads;
    int64_t head_dim;
    int32_t dtype;
    int32_t output_dtype;
    float epsilon; /* of the RMS norms, >= 0 */
    float query_scale;
} StivSpatialQkv;

/* How a call is cut into thread blocks; see heuristics.h. */
typedef struct StivPlan {
    int64_t blocks;
    int32_t threads;
    int32_t shared_bytes;
    int32_t heads_per_block;
    int32_t positions_per_block; /* of temporal attention; tokens of a tile in spatial pre-processing */
    int32_t splits;              /* parts that the norm's pass cuts a block's heads and positions into */
    int32_t tiles;               /* of 16 frames; 0 where no tensor cores are used */
} StivPlan;

/* Sizes and dtypes only, no pointer is looked at: what a plugin asks before it promises anything. */
STIV_API int32_t stiv_temporal_attention_plan(const StivTemporalAttention* call, StivPlan* plan);
STIV_API int32_t stiv_spatial_qkv_plan(const StivSpatialQkv* call, StivPlan* plan);

STIV_API int32_t stiv_temporal_attention(const StivTemporalAttention* call, void* stream);
STIV_API int32_t stiv_spatial_qkv(const StivSpatialQkv* call, void* stream);

/* One line, static storage. */
STIV_API const char* stiv_error_string(int32_t code);
STIV_API int32_t stiv_abi_version(void);
/* "cuda", or "emulated" for the build that runs on the host. */
STIV_API const char* stiv_backend(void);

#if defined(STIV_EMULATE)
/* Emulated build only: order in which the threads of a block take turns; 0 is ascending. */
STIV_API void stiv_emulation_seed(uint64_t seed);
/* Emulated build only, for tests: its number conversions, bits of `dtype` in 16-bit words. */
STIV_API void stiv_emulation_round(int32_t dtype, const float* values, uint16_t* bits, int64_t count);
STIV_API void stiv_emulation_widen(int32_t dtype, const uint16_t* bits, float* values, int64_t count);
/* Emulated build only, for tests: one mma of m16n8k`depth` (16 or 8) on the registers of 32 lanes, a [32][depth / 4],
 * b [32][depth / 8], c [32][4], sums in place; one ldmatrix of 8x8 `matrices` (2 or 4), rows [8 * matrices][8], out
 * [32][matrices]. */
STIV_API int32_t stiv_emulation_multiply(int32_t dtype, int32_t depth, const uint32_t* a, const uint32_t* b, float* c);
STIV_API int32_t stiv_emulation_load_matrix(int32_t matrices, int32_t transposed, const uint16_t* rows, uint32_t* out);
/* Emulated build only: the kernel that is shipped as PTX, of bfloat16 and Dh = 72; bias is needed. */
STIV_API int32_t stiv_emulation_ptx_kernel(const StivTemporalAttention* call);
#endif

#ifdef __cplusplus
}
#endif
#endif
