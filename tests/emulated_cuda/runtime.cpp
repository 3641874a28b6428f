// What the runtime refuses, as a GPU of compute capability 9.0 does, or another that is asked for.
#include "emulated_cuda.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>

namespace {

constexpr size_t kPortableShared = 48 << 10;
constexpr unsigned kMostThreads = 1024, kMostGrid = 65535;
constexpr unsigned kPortableCluster = 8;

// SMA_EMULATED_ARCH=80 makes it an older GPU, 86 one with less shared memory, as 120 is.
int arch() {
  const char* given = std::getenv("SMA_EMULATED_ARCH");
  return given == nullptr ? 90 : std::atoi(given);
}
int most_shared() {
  if (arch() == 80) return 166912;
  return arch() < 90 || arch() >= 120 ? 101376 : 232448;
}

// SMA_EMULATED_MULTIPROCESSORS=40 makes it one with so many.
int multiprocessors() {
  const char* given = std::getenv("SMA_EMULATED_MULTIPROCESSORS");
  return given == nullptr ? 4 : std::atoi(given);
}

// SMA_EMULATED_CLUSTER=8 makes it one of parts with 8 multiprocessors, in which clusters lie; else
// these have 16, and 8 from 12.0 on.
unsigned most_cluster() {
  const char* given = std::getenv("SMA_EMULATED_CLUSTER");
  if (given != nullptr) return static_cast<unsigned>(std::atoi(given));
  return arch() >= 120 ? kPortableCluster : 16;
}

// SMA_EMULATED_DEVICES=2 makes it two.
int devices() {
  const char* given = std::getenv("SMA_EMULATED_DEVICES");
  return given == nullptr ? 1 : std::atoi(given);
}

// SMA_EMULATED_LAUNCHES=FILE adds a line to it for each launch: its blocks; and for each change of
// the current device: "device" and its number.
void note(const std::string& line) {
  const char* file = std::getenv("SMA_EMULATED_LAUNCHES");
  if (file != nullptr) std::ofstream(file, std::ios::app) << line << '\n';
}

// SMA_EMULATED_ERROR=209 makes every launch fail with that error, in CUDA's own words; 720 only
// those whose blocks must all run at once. 209,2 makes it the process's third from now on.
struct ChosenError {
  std::string given;
  cudaError_t error = cudaSuccess;
  int good = 0;  // launches that do not fail
};
cudaError_t chosen_error(bool cooperative) {
  static ChosenError chosen;
  const char* given = std::getenv("SMA_EMULATED_ERROR");
  if (given == nullptr) {
    chosen = {};
    return cudaSuccess;
  }
  if (chosen.given != given) {
    const char* comma = std::strchr(given, ',');
    chosen = {given, static_cast<cudaError_t>(std::atoi(given)),
              comma == nullptr ? 0 : std::atoi(comma + 1)};
  }
  if (chosen.good-- > 0) return cudaSuccess;
  const bool spared = chosen.error == cudaErrorCooperativeLaunchTooLarge && !cooperative;
  return spared ? cudaSuccess : chosen.error;
}
const char* words_of(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorUnsupportedPtxVersion:
      return "the provided PTX was compiled with an unsupported toolchain.";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    default:
      return "an error that was chosen";
  }
}

struct Attributes {
  size_t shared = kPortableShared;
  bool large_clusters = false;
};

std::mutex attributes_guard;
std::map<const void*, Attributes> attributes;
thread_local int current = 0;                      // device
thread_local cudaError_t last = cudaSuccess;       // until somebody asks for it
thread_local cudaError_t described = cudaSuccess;  // what `description` is of
thread_local std::string description;

cudaError_t report(cudaError_t error, const std::string& text) {
  last = described = error;
  description = text;
  return error;
}

Attributes attributes_of(const void* kernel) {
  const std::lock_guard<std::mutex> guard(attributes_guard);
  const auto found = attributes.find(kernel);
  return found == attributes.end() ? Attributes{} : found->second;
}

std::string text(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error == described ? description.c_str() : "an error of the emulated CUDA runtime";
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last; }

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  const std::string name = "device " + std::to_string(device);
  if (device < 0 || device >= devices())
    return report(cudaErrorInvalidDevice, name + " of " + std::to_string(devices()));
  current = device;
  note(name);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= devices()) return cudaSetDevice(device);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors();
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = most_shared();
      return cudaSuccess;
  }
  return report(cudaErrorInvalidValue, "device attribute " + std::to_string(attribute));
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes) {
  attributes->ptxVersion = arch();
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> guard(attributes_guard);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > most_shared())
      return report(cudaErrorInvalidValue, std::to_string(value) + " bytes of shared memory");
    attributes[kernel].shared = static_cast<size_t>(value);
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    attributes[kernel].large_clusters = value != 0;
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t shared_bytes) {
  *blocks =
      threads <= static_cast<int>(kMostThreads) && shared_bytes <= attributes_of(kernel).shared;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  const Attributes allowed = attributes_of(kernel);
  const unsigned most = allowed.large_clusters ? most_cluster() : kPortableCluster;
  const unsigned blocks = config->attrs[0].val.clusterDim.x;
  *clusters = 0;
  if (arch() < 90 || blocks > most || config->dynamicSmemBytes > allowed.shared) return cudaSuccess;
  const size_t reserved = 1 << 10;
  const size_t of_each =
      (static_cast<size_t>(most_shared()) + reserved) / (config->dynamicSmemBytes + reserved);
  const size_t all = static_cast<size_t>(multiprocessors()), part = most_cluster();
  const size_t found = all / part * (part * of_each / blocks) + all % part * of_each / blocks;
  // one runs in any case, on the few multiprocessors that there are
  *clusters = static_cast<int>(std::max<size_t>(found, of_each == 1));
  return cudaSuccess;
}

namespace emulated {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* key,
                   std::function<void()> kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  note(std::to_string(uint64_t{grid.x} * grid.y * grid.z));
  dim3 cluster;
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& a = config.attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension)
      cluster = {a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z};
    else if (a.id == cudaLaunchAttributeCooperative) cooperative = a.val.cooperative != 0;
  }
  const cudaError_t chosen = chosen_error(cooperative);
  if (chosen != cudaSuccess) return report(chosen, words_of(chosen));
  const Attributes allowed = attributes_of(key);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMostThreads || block.z > 64)
    return report(cudaErrorInvalidConfiguration, "a block of " + text(block) + " threads");
  if (uint64_t{grid.x} * grid.y * grid.z == 0 || grid.x > INT32_MAX || grid.y > kMostGrid ||
      grid.z > kMostGrid)
    return report(cudaErrorInvalidConfiguration, "a grid of " + text(grid) + " blocks");
  if (config.dynamicSmemBytes > allowed.shared)
    return report(cudaErrorInvalidValue, std::to_string(config.dynamicSmemBytes) +
                                             " bytes of shared memory, the kernel may have " +
                                             std::to_string(allowed.shared));
  const uint64_t blocks = uint64_t{cluster.x} * cluster.y * cluster.z;
  const unsigned most = arch() < 90              ? 1
                        : allowed.large_clusters ? most_cluster()
                                                 : kPortableCluster;
  if (blocks == 0 || blocks > most)
    return report(cudaErrorInvalidClusterSize, "a cluster of " + text(cluster) + " blocks");
  if (grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0)
    return report(cudaErrorInvalidConfiguration,
                  "a grid of " + text(grid) + " blocks in clusters of " + text(cluster));
  if (cooperative && uint64_t{grid.x} * grid.y * grid.z > static_cast<uint64_t>(multiprocessors()))
    return report(cudaErrorCooperativeLaunchTooLarge,
                  "a grid of " + text(grid) + " blocks, all at once");
  const std::string failure =
      run({grid, block, cluster, cooperative, config.dynamicSmemBytes, std::move(kernel)});
  return failure.empty() ? cudaSuccess : report(cudaErrorLaunchFailure, failure);
}

}  // namespace emulated
