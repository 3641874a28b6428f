// Entry points of the CUDA kernels. Each launches on the given device and stream and returns null,
// or the text of the error; none allocates or synchronises.
#pragma once
#include "../args.h"

namespace sma {
namespace cuda {

const char* gather_tokens(const GatherTokensArgs& a, int device, void* stream);

}  // namespace cuda
}  // namespace sma
