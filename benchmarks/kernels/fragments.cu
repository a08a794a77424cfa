// What the kernels take for granted about a warp's registers, one instruction at a time: a block of 32 threads each.
// Compiled by nvcc for the GPU, and by a C++ compiler with STIV_EMULATE; fragments.py knows the right answers.
#include <cstdint>

#include "../../runtime/plugins/common/launch.h"

namespace {

using stiv::BFloat16;
using stiv::Float16;

struct Probe {
    const uint32_t* in;
    uint32_t* out;
};

// in: kMatrices of 8 x 8 16-bit numbers; out: [32][kMatrices] registers.
template <int kMatrices, bool kTransposed>
STIV_KERNEL(32, 1)
load_matrices(const Probe probe) {
    auto* words = reinterpret_cast<uint32_t*>(stiv::shared_memory());
    const int lane = stiv::thread_index();
    for (int i = lane; i < kMatrices * 32; i += 32) words[i] = probe.in[i];
    stiv::sync_block();
    uint32_t r[kMatrices];
    const void* row = words + lane % (kMatrices * 8) * 4;
    if constexpr (kTransposed)
        stiv::load_matrix_transposed(r, row);
    else
        stiv::load_matrix(r, row);
    for (int i = 0; i < kMatrices; ++i) probe.out[lane * kMatrices + i] = r[i];
}

// in: registers of a [32][kA], of b [32][kA / 2], of c [32][4]; out: c [32][4].
template <class Number, int kA>
STIV_KERNEL(32, 1)
multiply(const Probe probe) {
    const int lane = stiv::thread_index();
    const uint32_t* b = probe.in + 32 * kA;
    const auto* c = reinterpret_cast<const float*>(b + 32 * (kA / 2));
    uint32_t a[kA];
    float sums[4];
    for (int i = 0; i < kA; ++i) a[i] = probe.in[lane * kA + i];
    for (int i = 0; i < 4; ++i) sums[i] = c[lane * 4 + i];
    if constexpr (kA == 4)
        stiv::multiply_add(Number{}, sums, a, b[lane * 2], b[lane * 2 + 1]);
    else
        stiv::multiply_add(Number{}, sums, a, b[lane]);
    for (int i = 0; i < 4; ++i) reinterpret_cast<float*>(probe.out)[lane * 4 + i] = sums[i];
}

// in: [32] words of two numbers; out: [32][3], the word unpacked and packed again, and its two numbers as FP8.
template <class Number>
STIV_KERNEL(32, 1)
convert(const Probe probe) {
    const int lane = stiv::thread_index();
    float low, high;
    stiv::unpack(Number{}, probe.in[lane], low, high);
    probe.out[lane * 3] = stiv::pack(Number{}, low, high);
    probe.out[lane * 3 + 1] = stiv::pack(Number{}, high, low);
    probe.out[lane * 3 + 2] = stiv::pack_e4m3(low, high);
}

int32_t start(void (*kernel)(Probe), const Probe& probe) { return stiv::launch(kernel, 1, 32, 512, nullptr, probe); }

int32_t start(int32_t number, const Probe& probe) {
    switch (number) {
        case 0: return start(load_matrices<4, false>, probe);
        case 1: return start(load_matrices<4, true>, probe);
        case 2: return start(load_matrices<2, false>, probe);
        case 3: return start(load_matrices<2, true>, probe);
        case 4: return start(multiply<BFloat16, 4>, probe);
        case 5: return start(multiply<Float16, 4>, probe);
        case 6: return start(multiply<BFloat16, 2>, probe);
        case 7: return start(multiply<Float16, 2>, probe);
        case 8: return start(convert<BFloat16>, probe);
        default: return start(convert<Float16>, probe);
    }
}

}  // namespace

// Runs probe `number` on host memory; returns 0 or the CUDA error.
extern "C" __attribute__((visibility("default"))) int32_t stiv_probe(int32_t number, const uint32_t* in,
                                                                     int64_t in_words, uint32_t* out,
                                                                     int64_t out_words) {
#if defined(STIV_EMULATE)
    static_cast<void>(in_words);
    static_cast<void>(out_words);
    return start(number, Probe{in, out});
#else
    uint32_t *device_in = nullptr, *device_out = nullptr;
    const size_t in_bytes = in_words * sizeof *in, out_bytes = out_words * sizeof *out;
    cudaError_t code = cudaMalloc(&device_in, in_bytes);
    if (code == cudaSuccess) code = cudaMalloc(&device_out, out_bytes);
    if (code == cudaSuccess) code = cudaMemcpy(device_in, in, in_bytes, cudaMemcpyHostToDevice);
    if (code == cudaSuccess) code = static_cast<cudaError_t>(start(number, Probe{device_in, device_out}));
    if (code == cudaSuccess) code = cudaMemcpy(out, device_out, out_bytes, cudaMemcpyDeviceToHost);
    static_cast<void>(cudaFree(device_in));
    static_cast<void>(cudaFree(device_out));
    return static_cast<int32_t>(code);
#endif
}
