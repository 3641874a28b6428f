// What the CUDA kernels share: instructions that CUDA C++ has no word for, and how one is launched.
// Compiled by another compiler than nvcc, it is the emulator of the tests (tests/emulated_cuda).
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulated_cuda.h"
#endif

namespace sma {
namespace cuda {

// How many parts of this size the whole has, the last one perhaps smaller.
template <class T>
__host__ __device__ constexpr T ceil_div(T whole, T part) {
  return (whole + part - 1) / part;
}

constexpr int kWarp = 32;
constexpr unsigned kPortableCluster = 8;  // blocks, on every GPU that has clusters
constexpr unsigned kLargeCluster = 16;    // blocks, on those with `large_clusters`
constexpr unsigned kClusterSizes = 5;     // 1, 2, ... kLargeCluster
constexpr unsigned kMostTogether = 2;     // blocks of a multiprocessor, as kernels are sized
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kSharedAlignment = 128;  // bytes: addresses whose lower bits are flipped begin there

#ifdef __CUDACC__

__device__ inline char* shared_memory() {
  extern __shared__ __align__(kSharedAlignment) uint4 dynamic_shared_memory[];
  return reinterpret_cast<char*>(dynamic_shared_memory);
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

__device__ inline float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ inline uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

// d += a b: a (16, k), b (k, 8), d (16, 8), spread over the lanes as PTX says. Those of tf32 keep
// their order: each needs so many registers that mixed they would not fit.
#define SMA_MMA(name, order, shape, types)                                                       \
  __device__ inline void name(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm order("mma.sync.aligned." shape ".row.col.f32." types                                    \
              ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                       \
              : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                   \
              : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                   \
  }
SMA_MMA(mma_bf16, , "m16n8k16", "bf16.bf16")
SMA_MMA(mma_fp16, , "m16n8k16", "f16.f16")
SMA_MMA(mma_tf32, volatile, "m16n8k8", "tf32.tf32")
#undef SMA_MMA

// A place in the block's shared memory, to which bytes can be added, or of which bits be flipped.
using SharedAddress = unsigned;
__device__ inline SharedAddress flipped(SharedAddress at, unsigned bits) { return at ^ bits; }
__device__ inline SharedAddress address_of(const void* shared) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(shared));
}

// kMatrices of 8 rows of 16 bytes in shared memory, spread over the lanes as mma wants them: lane l
// names row l % 8 of matrix l / 8.
template <int kMatrices>
__device__ inline void load_matrices(SharedAddress row, uint32_t (&words)[kMatrices]) {
  if constexpr (kMatrices == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(row)
                 : "memory");
}

// 16 bytes from global to shared memory on their way.
__device__ inline void copy_async_16(void* shared, const void* global) {
  const SharedAddress to = address_of(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
// The same, or zeros, which read nothing.
__device__ inline void copy_async_16_or_zeros(void* shared, const void* global, bool read) {
  const SharedAddress to = address_of(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
               "r"(read ? 16 : 0)
               : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>  // groups that may still be on their way
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Rows that are read once are the first to leave the caches; those that are written are read next,
// by the layer that they are for, and stay there.
__device__ inline uint4 load_stream(const uint4* from) { return __ldcs(from); }
__device__ inline void store_16(uint4* to, uint4 word) { *to = word; }

// The cluster of blocks this one belongs to; before sm_90 a cluster is one block.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline unsigned cluster_size() {
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place in the shared memory of another block of the cluster, and what is there.
template <class T>
__device__ inline T* cluster_map(T* shared, unsigned rank) {
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(there);
}
__device__ inline float cluster_load(const float* shared, unsigned rank) {
  float value;
  asm volatile(
      "{ .reg .u32 there; mapa.shared::cluster.u32 there, %1, %2; "
      "ld.shared::cluster.f32 %0, [there]; }"
      : "=f"(value)
      : "r"(address_of(shared)), "r"(rank)
      : "memory");
  return value;
}
#else
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline unsigned cluster_size() { return 1; }
__device__ inline void cluster_sync() { __syncthreads(); }
template <class T>
__device__ inline T* cluster_map(T* shared, unsigned) {
  return shared;
}
__device__ inline float cluster_load(const float* shared, unsigned) { return *shared; }
#endif

// So many threads of a block, of whole warps, wait for each other; always the same ones.
__device__ inline void sync_some(unsigned threads) {
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

#endif  // __CUDACC__

// Where a thread is in its block.
__device__ inline unsigned lane() { return threadIdx.x % kWarp; }
__device__ inline unsigned warp() { return threadIdx.x / kWarp; }
__device__ inline unsigned warps() { return blockDim.x / kWarp; }

// A number that all lanes have, told to the compiler as such. All lanes call it.
__device__ inline unsigned same_in_warp(unsigned x) { return __shfl_sync(kAllLanes, x, 0); }

// The same number, of which the compiler no longer knows what it was: what is made of it is made
// where it is used, each time, and takes no register until then.
__device__ inline unsigned again(unsigned x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}
__device__ inline unsigned block_again() {
#ifdef __CUDACC__
  unsigned block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
#else
  return blockIdx.x;
#endif
}
__device__ inline unsigned lane_again() { return again(threadIdx.x) % kWarp; }
__device__ inline unsigned warp_again() { return again(threadIdx.x) / kWarp; }

// The same pointer to global memory, as one that is not to be computed again at each use.
template <class T>
__device__ inline T* hoisted(T* pointer) {
#ifdef __CUDACC__
  size_t address = __cvta_generic_to_global(pointer);
  asm("" : "+l"(address));
  pointer = static_cast<T*>(__cvta_global_to_generic(address));
#endif
  return pointer;
}

constexpr int64_t kReservedShared = 1 << 10;  // bytes of each block's shared memory that CUDA takes

// How a kernel is launched, with how many blocks in a cluster.
struct Grid {
  dim3 blocks;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool prefers_shared = false;  // memory to L1: more blocks fit
  bool together = false;        // grid_sync: no more blocks than the GPU runs at once,
  bool all_or_none = false;     // or an error, where fewer will not do
};

// What a device has, asked once unless that fails. The major version is that of the code that runs
// there: an older one than the device's where the driver compiled it from PTX.
struct DeviceLimits {
  int multiprocessors, shared_bytes, major;
  int clusters[kMostTogether][kClusterSizes];  // as clusters_at_once says
  cudaError_t error;

  // How many clusters of so many blocks, a power of 2, run at once where as many blocks as
  // `together` share a multiprocessor. Clusters lie in parts of the GPU that are not all as large,
  // so these may have fewer blocks than there are multiprocessors. 0: none does.
  int64_t clusters_at_once(int64_t blocks, unsigned together = 1) const {
    unsigned size = 0;
    while (int64_t{1} << size < blocks) ++size;
    return size < kClusterSizes ? clusters[together - 1][size] : 0;
  }
  bool large_clusters() const { return clusters_at_once(kLargeCluster) > 0; }
};
DeviceLimits limits_of(int device);

// Shared memory of a block where so many share a multiprocessor.
inline int64_t shared_room(const DeviceLimits& limits, unsigned blocks) {
  return (limits.shared_bytes - (int64_t{blocks} - 1) * kReservedShared) / blocks;
}

// Makes the place's device the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(const Place& place) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != place.device) {
      error_ = cudaSetDevice(place.device);
      changed_ = error_ == cudaSuccess;
    }
    if (error_ == cudaSuccess) error_ = limits_of(place.device).error;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
  int before_ = 0;
  bool changed_ = false;
};

template <class... Params, class... Arguments>
cudaError_t launch(void (*kernel)(Params...), const Grid& grid, const Place& place,
                   const Arguments&... arguments) {
  cudaError_t error = cudaSuccess;
  const auto allow = [&](cudaFuncAttribute attribute, int value) {
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, attribute, value);
  };
  if (grid.shared_bytes > (48 << 10))
    // the most there is: another thread may launch the same kernel with more
    allow(cudaFuncAttributeMaxDynamicSharedMemorySize, limits_of(place.device).shared_bytes);
  if (grid.prefers_shared) allow(cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  if (grid.cluster > kPortableCluster) allow(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  unsigned blocks = grid.blocks.x;
  if (grid.together) {
    int of_each = 0;
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &of_each, kernel, static_cast<int>(grid.threads), grid.shared_bytes);
    const auto at_once = static_cast<unsigned>(of_each * limits_of(place.device).multiprocessors);
    if (error == cudaSuccess && (at_once == 0 || (grid.all_or_none && at_once < blocks)))
      error = cudaErrorCooperativeLaunchTooLarge;
    blocks = std::min(blocks, at_once);
  }
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  if (grid.together) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = grid.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks, grid.blocks.y, grid.blocks.z);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(place.stream);
  config.attrs = &attribute;
  config.numAttrs = grid.together || grid.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(arguments)...);
}

}  // namespace cuda
}  // namespace sma
