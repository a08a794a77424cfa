// A few small calls of every kernel with nothing else around, for compute-sanitizer: each tensor is an allocation of
// its exact size, so that a step beyond it is one beyond all memory. With STIV_EMULATE it runs on the host.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "../../runtime/plugins/attention/kernels.h"

#if !defined(STIV_EMULATE)
#include <cuda_runtime_api.h>
#endif

namespace {

[[noreturn]] void fail(const char* what, const char* why) {
    std::printf("%s: %s\n", what, why);
    std::exit(1);
}

#if defined(STIV_EMULATE)
void* allocate(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
void release(void* pointer) { std::free(pointer); }
void copy_in(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void synchronize() {}
#else
void check(cudaError_t code) {
    if (code != cudaSuccess) fail("CUDA", cudaGetErrorString(code));
}
void* allocate(size_t bytes) {
    void* pointer = nullptr;
    check(cudaMalloc(&pointer, bytes));
    return pointer;
}
void release(void* pointer) { check(cudaFree(pointer)); }
void copy_in(void* to, const void* from, size_t bytes) { check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice)); }
void synchronize() { check(cudaDeviceSynchronize()); }
#endif

// Buffers of one call.
class Buffers {
public:
    Buffers() = default;
    Buffers(const Buffers&) = delete;
    Buffers& operator=(const Buffers&) = delete;
    ~Buffers() {
        for (void* pointer : all_) release(pointer);
    }

    void* output(int64_t elements, int32_t dtype) { return add(static_cast<size_t>(elements) * size_of(dtype)); }

    // Random numbers with the exponent of 1 and either sign.
    void* input(int64_t elements, int32_t dtype) {
        const size_t bytes = static_cast<size_t>(elements) * size_of(dtype);
        std::vector<unsigned char> host(bytes);
        for (int64_t i = 0; i < elements; ++i) {
            state_ = state_ * 6364136223846793005u + 1442695040888963407u;
            const auto random = static_cast<uint32_t>(state_ >> 32);
            if (dtype == STIV_FLOAT32) {
                const uint32_t bits = 0x3f800000u | (random & 0x807fffffu);
                std::memcpy(host.data() + i * 4, &bits, 4);
            } else {
                const auto bits = static_cast<uint16_t>(dtype == STIV_BFLOAT16 ? 0x3f80u | (random & 0x807fu)
                                                                               : 0x3c00u | (random & 0x83ffu));
                std::memcpy(host.data() + i * 2, &bits, 2);
            }
        }
        void* pointer = add(bytes);
        copy_in(pointer, host.data(), bytes);
        return pointer;
    }

    const float* scale() {
        const float value = 0.01f;
        void* pointer = add(sizeof value);
        copy_in(pointer, &value, sizeof value);
        return static_cast<const float*>(pointer);
    }

private:
    static size_t size_of(int32_t dtype) { return dtype == STIV_FLOAT32 ? 4 : dtype == STIV_FLOAT8_E4M3 ? 1 : 2; }

    void* add(size_t bytes) {
        all_.push_back(allocate(bytes));
        return all_.back();
    }

    std::vector<void*> all_;
    uint64_t state_ = 1;
};

struct Options {
    int32_t dtype;
    bool fp8, bias;
};

void temporal(int64_t batch, int64_t frames, int64_t positions, int64_t heads, int64_t head_dim, Options with) {
    Buffers buffers;
    StivTemporalAttention call{};
    const int64_t width = heads * head_dim, tokens = batch * frames * positions;
    call.qkv = buffers.input(3 * tokens * width, with.dtype);
    call.bias = with.bias ? buffers.input(3 * width, with.dtype) : nullptr;
    call.q_gamma = buffers.input(head_dim, with.dtype);
    call.k_gamma = buffers.input(head_dim, with.dtype);
    call.cos = buffers.input(frames * head_dim / 2, with.dtype);
    call.sin = buffers.input(frames * head_dim / 2, with.dtype);
    call.output_scale = with.fp8 ? buffers.scale() : nullptr;
    call.batch = batch;
    call.frames = frames;
    call.positions = positions;
    call.heads = heads;
    call.head_dim = head_dim;
    call.dtype = with.dtype;
    call.output_dtype = with.fp8 ? static_cast<int32_t>(STIV_FLOAT8_E4M3) : with.dtype;
    call.epsilon = 1e-6f;
    call.output = buffers.output(tokens * width, call.output_dtype);
    const int32_t code = stiv_temporal_attention(&call, nullptr);
    if (code) fail("temporal attention", stiv_error_string(code));
    synchronize();
}

void spatial(int64_t rows, int64_t positions, int64_t heads, int64_t head_dim, Options with) {
    Buffers buffers;
    StivSpatialQkv call{};
    const int64_t width = heads * head_dim, tokens = rows * positions;
    call.qkv = buffers.input(3 * tokens * width, with.dtype);
    call.bias = with.bias ? buffers.input(3 * width, with.dtype) : nullptr;
    call.q_gamma = buffers.input(head_dim, with.dtype);
    call.k_gamma = buffers.input(head_dim, with.dtype);
    call.cos = buffers.input(positions * head_dim / 2, with.dtype);
    call.sin = buffers.input(positions * head_dim / 2, with.dtype);
    call.q_scale = with.fp8 ? buffers.scale() : nullptr;
    call.k_scale = with.fp8 ? buffers.scale() : nullptr;
    call.v_scale = with.fp8 ? buffers.scale() : nullptr;
    call.rows = rows;
    call.positions = positions;
    call.heads = heads;
    call.head_dim = head_dim;
    call.dtype = with.dtype;
    call.output_dtype = with.fp8 ? static_cast<int32_t>(STIV_FLOAT8_E4M3) : with.dtype;
    call.epsilon = 1e-6f;
    call.query_scale = 0.125f;
    call.q = buffers.output(tokens * width, call.output_dtype);
    call.k = buffers.output(tokens * width, call.output_dtype);
    call.v = buffers.output(tokens * width, call.output_dtype);
    const int32_t code = stiv_spatial_qkv(&call, nullptr);
    if (code) fail("spatial pre-processing", stiv_error_string(code));
    synchronize();
}

}  // namespace

int main() {
    int count = 0;
    for (const int64_t head_dim : {32, 48, 64, 72, 96, 128}) {
        const bool odd = count % 2;
        for (const int64_t frames : {1, 7, 16, 20, 33, 64}) {
            temporal(1, frames, 3, 3, head_dim, {STIV_BFLOAT16, frames == 20, frames != 7});
            ++count;
        }
        temporal(2, 21, 1, 5, head_dim, {STIV_FLOAT16, odd, !odd});
        temporal(1, 17, 2, 2, head_dim, {STIV_FLOAT32, !odd, odd});
        spatial(2, 19, 3, head_dim, {STIV_BFLOAT16, odd, true});
        spatial(1, 17, 5, head_dim, {STIV_FLOAT16, !odd, false});
        spatial(1, 3, 2, head_dim, {STIV_FLOAT32, odd, odd});
        count += 5;
    }
    std::printf("launched %d calls\n", count);
    return 0;
}
