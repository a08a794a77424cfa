// device.h under nvcc. Instructions are those of sm_80; newer machines run them as they are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#define STIV_DEVICE __device__ __forceinline__
#define STIV_HOST_DEVICE __host__ __device__ __forceinline__
#define STIV_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)

namespace stiv {

STIV_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
STIV_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & (kWarp - 1)); }
STIV_DEVICE int warp_index() { return static_cast<int>(threadIdx.x / kWarp); }
STIV_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }

STIV_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char stiv_shared[];
    return stiv_shared;
}

STIV_DEVICE void sync_block() { __syncthreads(); }
STIV_DEVICE void sync_warp() { __syncwarp(); }
STIV_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
STIV_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

template <class Value>
STIV_DEVICE Value load_constant(const void* address) {
    static_assert(sizeof(Value) == 4 || sizeof(Value) == 8 || sizeof(Value) == 16, "one load");
    if constexpr (sizeof(Value) == 4) {
        const uint32_t word = __ldg(static_cast<const unsigned*>(address));
        return *reinterpret_cast<const Value*>(&word);
    } else if constexpr (sizeof(Value) == 8) {
        const uint2 words = __ldg(static_cast<const uint2*>(address));
        return *reinterpret_cast<const Value*>(&words);
    } else {
        const uint4 words = __ldg(static_cast<const uint4*>(address));
        return *reinterpret_cast<const Value*>(&words);
    }
}

STIV_DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// `x` as it is from here on: sums with it are not taken apart and put together anew for every use.
STIV_DEVICE int settled(int x) {
    asm("" : "+r"(x));
    return x;
}

STIV_DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

STIV_DEVICE float exponential(float x) { return expf(x); }
STIV_DEVICE float reciprocal_root(float x) { return rsqrtf(x); }
STIV_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
STIV_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

STIV_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

STIV_DEVICE void copy_async(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

STIV_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
STIV_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

STIV_DEVICE void load_matrix(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

STIV_DEVICE void load_matrix(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

STIV_DEVICE void load_matrix_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

STIV_DEVICE void load_matrix_transposed(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], products and sums in fp32.
STIV_DEVICE void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

STIV_DEVICE void multiply_add(Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c [16, 8] += a [16, 8] b [8, 8], products and sums in fp32.
STIV_DEVICE void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

STIV_DEVICE void multiply_add(Float16, float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

// The two halves of a word as numbers; the first one is the low half.
STIV_DEVICE void unpack(BFloat16, uint32_t word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
}

STIV_DEVICE void unpack(Float16, uint32_t word, float& low, float& high) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    low = pair.x;
    high = pair.y;
}

STIV_DEVICE uint32_t pack(BFloat16, float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

STIV_DEVICE uint32_t pack(Float16, float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Rounded to nearest even; beyond 448 saturated; NaN stays NaN.
STIV_DEVICE uint16_t pack_e4m3(float low, float high) {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

}  // namespace stiv
