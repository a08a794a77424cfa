// One kernel launch on either machine; returns the code that the C ABI hands out.
#pragma once

#include "device.h"

namespace stiv {

template <class Parameters>
int32_t launch(void (*kernel)(Parameters), int64_t blocks, int threads, int shared_bytes, void* stream,
               const Parameters& parameters) {
#if defined(STIV_EMULATE)
    (void)stream;
    constexpr int32_t kStandstill = 1099;
    return emulation::launch(blocks, threads, shared_bytes, [&] { kernel(parameters); }) ? 0 : kStandstill;
#else
    void* arguments[] = {const_cast<Parameters*>(&parameters)};
    const cudaError_t code =
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), arguments, static_cast<size_t>(shared_bytes),
                         static_cast<cudaStream_t>(stream));
    if (code != cudaSuccess) static_cast<void>(cudaGetLastError());  // told once: the next call starts clean
    return static_cast<int32_t>(code);
#endif
}

}  // namespace stiv
