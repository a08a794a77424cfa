// What the C ABI calls once a call is checked and planned; each returns a code of the ABI.
#pragma once

#include "kernels.h"

namespace stiv {

int32_t launch_temporal_tiles(const StivTemporalAttention& call, const StivPlan& plan, void* stream);
int32_t launch_temporal_scalar(const StivTemporalAttention& call, const StivPlan& plan, void* stream);
int32_t launch_spatial_qkv(const StivSpatialQkv& call, const StivPlan& plan, void* stream);
const char* device_error_string(int32_t code);

}  // namespace stiv
