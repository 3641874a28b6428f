// What is asked of each device once, and what CUDA's errors mean to a user.
#include "device.h"

#include <map>
#include <mutex>

namespace sma {
namespace cuda {
namespace {

__global__ void asked_kernel() {}

// What clusters_at_once says, of blocks that take as much shared memory as leaves room for the
// others, and nothing else that is scarce.
int ask_clusters(const DeviceLimits& limits, unsigned blocks, unsigned together) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kWarp);
  config.dynamicSmemBytes = static_cast<size_t>(shared_room(limits, together));
  config.attrs = &cluster;
  config.numAttrs = 1;
  const auto allow = [](cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(asked_kernel, attribute, value) == cudaSuccess;
  };
  int clusters = 0;
  if (!allow(cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ||
      !allow(cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes) ||
      !allow(cudaFuncAttributePreferredSharedMemoryCarveout, 100) ||
      cudaOccupancyMaxActiveClusters(&clusters, asked_kernel, &config) != cudaSuccess)
    cudaGetLastError();  // an answer too, and nobody else's error
  return clusters;
}

DeviceLimits ask(int device) {
  DeviceLimits limits = {};
  cudaFuncAttributes code = {};
  cudaError_t& error = limits.error;
  error = cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, asked_kernel);
  if (error != cudaSuccess) return limits;
  limits.major = code.ptxVersion / 10;
  for (unsigned together = 1; together <= kMostTogether; ++together) {
    int* const clusters = limits.clusters[together - 1];
    clusters[0] = limits.multiprocessors * static_cast<int>(together);
    for (unsigned size = 1; size < kClusterSizes && limits.major >= 9; ++size)
      clusters[size] = ask_clusters(limits, 1u << size, together);
  }
  return limits;
}

}  // namespace

DeviceLimits limits_of(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const DeviceLimits limits = ask(device);
  if (limits.error == cudaSuccess) known.emplace(device, limits);
  return limits;
}

std::string error_text(int error) {
  if (error == kRowsTooLong)
    return "the heads are too wide for this GPU's shared memory. Use the backend triton or "
           "reference";
  if (error == kTooManyTokens)
    return "the tokens of a sample are too many for this GPU's shared memory. Use the backend "
           "reference, or triton where a sample has at most 2048 tokens";
  if (error == kTooManySamples)
    return "the samples are more than one launch has blocks for. Take a smaller batch";
  const auto code = static_cast<cudaError_t>(error);
  std::string text = cudaGetErrorString(code);
  if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorInvalidDeviceFunction)
    text +=
        ". sma_fast was built for other GPUs: if this one's compute capability is 8.0 or more, set "
        "SMA_FAST_CUDA_ARCHS to it (such as 86) and install again; else use the backend triton";
  else if (code == cudaErrorInsufficientDriver || code == cudaErrorUnsupportedPtxVersion)
    text +=
        ". The driver is older than the nvcc that built sma_fast: update the driver, install "
        "again with an older nvcc, or use the backend triton";
  else if (code == cudaErrorCooperativeLaunchTooLarge)
    text +=
        ". Part of this GPU is kept from this process (by MPS or a green context), and the rest is "
        "too little for blocks that must run at once: use the backend triton";
  else if (code == cudaErrorMemoryAllocation)
    text += ". Free memory on this GPU, or take a smaller batch";
  return text;
}

}  // namespace cuda
}  // namespace sma
