// The C ABI: every argument is checked here, before anything is launched.
#include "kernels.h"

#include <cmath>
#include <initializer_list>

#include "heuristics.h"
#include "launchers.h"

namespace stiv {
namespace {

constexpr int64_t kMaximumInt32 = 0x7fffffff;
constexpr int kTensorAlignment = 16, kScaleAlignment = 4;

bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int32_t check_tensors(std::initializer_list<const void*> needed, const void* optional) {
    for (const void* pointer : needed)
        if (!pointer) return STIV_ERROR_NULL_POINTER;
    for (const void* pointer : needed)
        if (!aligned(pointer, kTensorAlignment)) return STIV_ERROR_MISALIGNED;
    return aligned(optional, kTensorAlignment) ? STIV_SUCCESS : STIV_ERROR_MISALIGNED;
}

int32_t check_scales(int32_t output_dtype, std::initializer_list<const void*> scales) {
    for (const void* scale : scales) {
        if (output_dtype == STIV_FLOAT8_E4M3 && !scale) return STIV_ERROR_SCALE;
        if (!aligned(scale, kScaleAlignment)) return STIV_ERROR_MISALIGNED;
    }
    return STIV_SUCCESS;
}

int32_t check_dtypes(int32_t dtype, int32_t output_dtype, int64_t head_dim, float epsilon) {
    if (dtype != STIV_FLOAT32 && dtype != STIV_FLOAT16 && dtype != STIV_BFLOAT16) return STIV_ERROR_DTYPE;
    if (output_dtype != dtype && output_dtype != STIV_FLOAT8_E4M3) return STIV_ERROR_OUTPUT_DTYPE;
    if (!supported_head_dim(head_dim)) return STIV_ERROR_HEAD_SIZE;
    return epsilon >= 0 && std::isfinite(epsilon) ? STIV_SUCCESS : STIV_ERROR_EPSILON;
}

// Sizes are int32 in the kernels; offsets are 64 bits wide, so only bytes beyond that are too many.
int32_t check_sizes(std::initializer_list<int64_t> sizes) {
    int64_t elements = 3 * 4;
    for (const int64_t size : sizes) {
        if (size < 1) return STIV_ERROR_SIZE;
        if (size > kMaximumInt32 || __builtin_mul_overflow(elements, size, &elements)) return STIV_ERROR_TOO_LARGE;
    }
    return STIV_SUCCESS;
}

int32_t check_plan(const StivPlan& plan) {
    return plan.blocks <= kMaximumInt32 ? STIV_SUCCESS : STIV_ERROR_TOO_LARGE;
}

int32_t element_bytes(int32_t dtype) { return dtype == STIV_FLOAT32 ? 4 : 2; }

}  // namespace
}  // namespace stiv

extern "C" {

int32_t stiv_temporal_attention_plan(const StivTemporalAttention* call, StivPlan* plan) {
    if (!call || !plan) return STIV_ERROR_NULL_POINTER;
    if (const int32_t code = stiv::check_dtypes(call->dtype, call->output_dtype, call->head_dim, call->epsilon))
        return code;
    if (call->frames < 1 || call->frames > stiv::kMaximumFrames) return STIV_ERROR_FRAMES;
    if (const int32_t code =
            stiv::check_sizes({call->batch, call->frames, call->positions, call->heads, call->head_dim}))
        return code;
    const auto make = call->dtype == STIV_FLOAT32 ? stiv::plan_scalar : stiv::plan_tiles;
    *plan = make(call->batch, static_cast<int>(call->frames), call->positions, call->heads,
                 static_cast<int>(call->head_dim));
    return stiv::check_plan(*plan);
}

int32_t stiv_temporal_attention(const StivTemporalAttention* call, void* stream) {
    StivPlan plan;
    if (const int32_t code = stiv_temporal_attention_plan(call, &plan)) return code;
    if (const int32_t code = stiv::check_tensors(
            {call->qkv, call->q_gamma, call->k_gamma, call->cos, call->sin, call->output}, call->bias))
        return code;
    if (const int32_t code = stiv::check_scales(call->output_dtype, {call->output_scale})) return code;
    const auto launch = call->dtype == STIV_FLOAT32 ? stiv::launch_temporal_scalar : stiv::launch_temporal_tiles;
    return launch(*call, plan, stream);
}

int32_t stiv_spatial_qkv_plan(const StivSpatialQkv* call, StivPlan* plan) {
    if (!call || !plan) return STIV_ERROR_NULL_POINTER;
    if (const int32_t code = stiv::check_dtypes(call->dtype, call->output_dtype, call->head_dim, call->epsilon))
        return code;
    if (!std::isfinite(call->query_scale)) return STIV_ERROR_SCALE;
    if (const int32_t code = stiv::check_sizes({call->rows, call->positions, call->heads, call->head_dim}))
        return code;
    const bool with_v = call->bias || call->output_dtype == STIV_FLOAT8_E4M3;
    *plan = stiv::plan_spatial(call->rows, call->positions, call->heads, static_cast<int>(call->head_dim),
                               stiv::element_bytes(call->dtype), with_v);
    return stiv::check_plan(*plan);
}

int32_t stiv_spatial_qkv(const StivSpatialQkv* call, void* stream) {
    StivPlan plan;
    if (const int32_t code = stiv_spatial_qkv_plan(call, &plan)) return code;
    if (const int32_t code = stiv::check_tensors(
            {call->qkv, call->q_gamma, call->k_gamma, call->cos, call->sin, call->q, call->k, call->v}, call->bias))
        return code;
    if (const int32_t code =
            stiv::check_scales(call->output_dtype, {call->q_scale, call->k_scale, call->v_scale}))
        return code;
    return stiv::launch_spatial_qkv(*call, plan, stream);
}

const char* stiv_error_string(int32_t code) {
    switch (code) {
        case STIV_SUCCESS: return "no error";
        case STIV_ERROR_NULL_POINTER: return "a tensor's pointer is null; only bias may be";
        case STIV_ERROR_MISALIGNED: return "a pointer is misaligned; tensors need 16 bytes, scales 4";
        case STIV_ERROR_DTYPE: return "unsupported dtype; give float32, float16 or bfloat16";
        case STIV_ERROR_OUTPUT_DTYPE: return "unsupported output dtype; give the input's or float8_e4m3";
        case STIV_ERROR_HEAD_SIZE: return "unsupported head size; give 32, 48, 64, 72, 96 or 128";
        case STIV_ERROR_FRAMES: return "unsupported number of frames; give 1 to 64";
        case STIV_ERROR_SIZE: return "a size is below 1; give sizes of at least 1";
        case STIV_ERROR_TOO_LARGE: return "a size or the number of thread blocks is above 2^31 - 1; split the batch";
        case STIV_ERROR_SCALE: return "a scale is missing or not finite; float8_e4m3 needs one fp32 scale an output";
        case STIV_ERROR_EPSILON: return "epsilon must be finite and at least 0";
        case STIV_ERROR_EMULATION: return "emulated block: a barrier not all threads reach, or a write out of bounds";
        default: return stiv::device_error_string(code);
    }
}

int32_t stiv_abi_version(void) { return STIV_ABI_VERSION; }

#if defined(STIV_EMULATE)
const char* stiv_backend(void) { return "emulated"; }
#else
const char* stiv_backend(void) { return "cuda"; }
#endif

}  // extern "C"
