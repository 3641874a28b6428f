// CUDA, or on a machine without it what tests/emulated_cuda has of it.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulated_cuda.h"
#endif
