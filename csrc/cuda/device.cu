// What is asked of each device once, and what CUDA's errors mean to a user.
#include "device.h"

#include <mutex>
#include <vector>

namespace sma {
namespace cuda {
namespace {

__global__ void asked_kernel() {}

}  // namespace

const DeviceLimits& limits_of(int device) {
  static std::mutex mutex;
  static std::vector<DeviceLimits*> known;  // never freed: threads may hold them to the end
  const std::lock_guard<std::mutex> lock(mutex);
  const size_t index = static_cast<size_t>(device);
  if (known.size() <= index) known.resize(index + 1);
  if (known[index] == nullptr) {
    auto* limits = new DeviceLimits{1, 48 << 10, 0};
    cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaFuncAttributes code = {};
    if (cudaFuncGetAttributes(&code, asked_kernel) == cudaSuccess)
      limits->major = code.ptxVersion / 10;
    known[index] = limits;
  }
  return *known[index];
}

std::string error_text(int error) {
  if (error == kRowsTooLong)
    return "the heads are too wide for this GPU's shared memory. Use the backend triton or "
           "reference";
  if (error == kTooManyTokens)
    return "the tokens of a sample are too many for this GPU's shared memory. Use the backend "
           "reference, or triton where a sample has at most 4096 tokens";
  const auto code = static_cast<cudaError_t>(error);
  std::string text = cudaGetErrorString(code);
  if (code == cudaErrorNoKernelImageForDevice)
    text +=
        ". sma_fast was built for other GPUs: set SMA_FAST_CUDA_ARCHS to this one's compute "
        "capability (such as 75) and install again, or use the backend triton";
  else if (code == cudaErrorInsufficientDriver || code == cudaErrorUnsupportedPtxVersion)
    text +=
        ". The driver is older than the nvcc that built sma_fast: update the driver, install "
        "again with an older nvcc, or use the backend triton";
  else if (code == cudaErrorMemoryAllocation)
    text += ". Free memory on this GPU, or take a smaller batch";
  return text;
}

}  // namespace cuda
}  // namespace sma
