// device.h on the host: a thread block is a set of fibers that take turns at barriers and warp functions.
//
// Fragment layouts are those of the PTX ISA (mma.m16n8k16, mma.m16n8k8, ldmatrix). An asynchronous copy poisons its
// destination with NaN when it is issued and lands when it is waited for; shared memory starts as NaN; the order of
// turns can be shuffled by a seed: a missing wait or barrier changes results.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>

#include "host_numbers.h"

#define STIV_DEVICE inline
#define STIV_HOST_DEVICE inline
#define STIV_KERNEL(threads, blocks_per_sm) void

namespace stiv::emulation {

// Runs `body` for every thread of every block. False if a block came to a standstill or wrote beyond its shared memory.
bool launch(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& body);

void set_seed(uint64_t seed);

struct Exchange {
    uint64_t in[kWarp][4];
    uint32_t out[kWarp][4];
};

using Combine = void (*)(Exchange&);

// Deposits `in`, waits for the warp, lets one thread combine, returns this thread's row of `out`.
const uint32_t* exchange(const uint64_t (&in)[4], Combine combine);

void copy_async(void* shared, const void* global);
void copy_async_commit();
void copy_async_wait(int pending);

void combine_nothing(Exchange& warp);
void combine_shuffle(Exchange& warp);
template <int kMatrices, bool kTransposed>
void combine_load_matrix(Exchange& warp);

}  // namespace stiv::emulation

namespace stiv {

int thread_index();
int block_index();
inline int lane_index() { return thread_index() % kWarp; }
inline int warp_index() { return thread_index() / kWarp; }
inline int settled(int x) { return x; }
unsigned char* shared_memory();
void sync_block();

inline void sync_warp() { emulation::exchange({0, 0, 0, 0}, emulation::combine_nothing); }

inline float shuffle(float value, int lane) {
    const uint32_t bits = *emulation::exchange({float_bits(value), static_cast<uint64_t>(lane), 0, 0},
                                               emulation::combine_shuffle);
    return bits_float(bits);
}

inline float shuffle_xor(float value, int mask) { return shuffle(value, (thread_index() % kWarp) ^ mask); }

template <class Value>
Value load_constant(const void* address) {
    Value value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

inline float power_of_two(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float exponential(float x) { return std::exp(x); }
inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

inline void copy_async(void* shared, const void* global) { emulation::copy_async(shared, global); }
inline void copy_async_commit() { emulation::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
    emulation::copy_async_wait(kPending);
}

template <int kMatrices>
void load_matrix(uint32_t (&r)[kMatrices], const void* row) {
    const uint32_t* out = emulation::exchange({reinterpret_cast<uint64_t>(row), 0, 0, 0},
                                              emulation::combine_load_matrix<kMatrices, false>);
    std::memcpy(r, out, sizeof r);
}

template <int kMatrices>
void load_matrix_transposed(uint32_t (&r)[kMatrices], const void* row) {
    const uint32_t* out = emulation::exchange({reinterpret_cast<uint64_t>(row), 0, 0, 0},
                                              emulation::combine_load_matrix<kMatrices, true>);
    std::memcpy(r, out, sizeof r);
}

void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void multiply_add(Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[2], uint32_t b);
void multiply_add(Float16, float (&c)[4], const uint32_t (&a)[2], uint32_t b);

}  // namespace stiv
