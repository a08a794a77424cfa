#if defined(STIV_EMULATE)

namespace stiv {

const char* device_error_string(int) { return "emulated library: no device, no device errors"; }

}  // namespace stiv

#else

#include <cuda_runtime_api.h>

namespace stiv {

const char* device_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace stiv

#endif
