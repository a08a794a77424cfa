// What a kernel may use of the machine, in one place: CUDA under nvcc, fibers on the host with STIV_EMULATE.
//
// Kernels are written against these names only, so that the arithmetic, the indices and the barriers that the host
// tests run are the ones that ship. A grid and a block have one dimension. All threads of a warp call a warp function
// together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace stiv {

constexpr int kWarp = 32;

struct alignas(8) Words2 {
    uint32_t x, y;
};

struct alignas(16) Words4 {
    uint32_t x, y, z, w;
};

struct alignas(16) Floats4 {
    float x, y, z, w;
};

// 16-bit numbers by their bits; conversions are in numbers.h.
struct Float16 {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

}  // namespace stiv

#if defined(STIV_EMULATE)
#include "emulation.h"  // IWYU pragma: export
#else
#include "cuda_device.h"  // IWYU pragma: export
#endif
