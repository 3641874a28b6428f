// A barrier for all blocks of a grid; apart, because what it includes takes nvcc seconds a file.
#pragma once
#include "device.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>

namespace sma {
namespace cuda {

// All blocks of a grid that is launched together wait for each other, and see what was written.
__device__ inline void grid_sync() { cooperative_groups::this_grid().sync(); }

}  // namespace cuda
}  // namespace sma
#endif
