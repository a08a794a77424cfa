// Memory that the kernels can read: the GPU's with STIV_HARNESS_CUDA, the host's for the emulated kernels.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(STIV_HARNESS_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace harness {

using Bytes = std::vector<unsigned char>;

class Memory {
public:
    explicit Memory(const Bytes& bytes) : size_(bytes.size()) {
#if defined(STIV_HARNESS_CUDA)
        check(cudaMalloc(&data_, size_ + kSlack));
        check(cudaMemcpy(data_, bytes.data(), size_, cudaMemcpyHostToDevice));
#else
        data_ = std::aligned_alloc(256, (size_ + kSlack + 255) / 256 * 256);
        std::memcpy(data_, bytes.data(), size_);
#endif
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() {
#if defined(STIV_HARNESS_CUDA)
        cudaFree(data_);
#else
        std::free(data_);
#endif
    }

    void* get() const { return data_; }

    // Waits for the kernels.
    Bytes read() const {
        Bytes bytes(size_);
#if defined(STIV_HARNESS_CUDA)
        check(cudaDeviceSynchronize());
        check(cudaMemcpy(bytes.data(), data_, size_, cudaMemcpyDeviceToHost));
#else
        std::memcpy(bytes.data(), data_, size_);
#endif
        return bytes;
    }

private:
    static constexpr size_t kSlack = 16;  // so that a pointer may be moved off its alignment

#if defined(STIV_HARNESS_CUDA)
    static void check(cudaError_t code) {
        if (code == cudaSuccess) return;
        std::fprintf(stderr, "error: %s\n", cudaGetErrorString(code));
        std::exit(2);
    }
#endif

    void* data_ = nullptr;
    size_t size_;
};

}  // namespace harness
