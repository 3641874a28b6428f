// Kernels that test_emulated_cuda.py launches to see that the emulator does what a GPU does, and
// that it notices what a GPU would not survive. Each launcher returns null or what went wrong.
#include <initializer_list>

#include "emulated_cuda.h"

using namespace sma::cuda;

namespace {

constexpr unsigned kWarp = 32, kAll = ~0u;

// sum of each block's `blockDim.x` values, by halving distances
template <bool kSynchronized>
__global__ void block_sums(const int* values, int* sums) {
  int* partial = reinterpret_cast<int*>(shared_memory());
  const unsigned t = threadIdx.x;
  partial[t] = values[blockIdx.x * blockDim.x + t];
  for (unsigned distance = blockDim.x / 2; distance > 0; distance /= 2) {
    if (kSynchronized) __syncthreads();
    if (t < distance) partial[t] += partial[t + distance];
  }
  if (t == 0) sums[blockIdx.x] = partial[0];
}

// out: (10, 32), a row for each operation
__global__ void warp_operations(const int* values, int* out) {
  const unsigned lane = threadIdx.x;
  const int v = values[lane];
  const auto put = [&](int row, int64_t x) { out[row * kWarp + lane] = static_cast<int>(x); };
  put(0, __shfl_sync(kAll, v, 5));
  put(1, __shfl_up_sync(kAll, static_cast<double>(v), 3, 8));
  put(2, __shfl_down_sync(kAll, static_cast<int64_t>(v), 3));
  put(3, __shfl_xor_sync(kAll, static_cast<float>(v), 9));
  // the odd lanes run ahead of the even ones, each with their own kind of operation
  const unsigned mask = lane % 2 == 0 ? 0x55555555 : 0xAAAAAAAA;
  if (lane % 2 == 0) {
    put(4, __ballot_sync(mask, v > 0));
    put(5, __reduce_max_sync(mask, v));
    put(6, __shfl_sync(mask, v, 3));  // of a lane outside of the mask
  } else {
    put(4, __reduce_add_sync(mask, v));
    put(5, __any_sync(mask, v > 1 << 20));
    put(6, __all_sync(mask, v < 1 << 20));
  }
  __syncwarp();
  put(7, __match_any_sync(kAll, v / 16));
  if (lane >= 20) return;
  put(8, __ballot_sync(kAll, 1));  // those that have returned are not waited for
  put(9, __reduce_min_sync(0xFFFFF, v));
}

__global__ void votes(const int* values, int* out) {
  const int v = values[threadIdx.x];
  if (threadIdx.x >= 40) return;
  out[3 * threadIdx.x] = __syncthreads_count(v > 0);
  out[3 * threadIdx.x + 1] = __syncthreads_or(v == values[3]);
  out[3 * threadIdx.x + 2] = __syncthreads_and(v == values[3]);
}

__global__ void count_values(const int* values, unsigned* histogram, float* sum, int* most,
                             unsigned long long* seen) {
  const int v = values[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(&histogram[v], 1u);
  atomicAdd(sum, static_cast<float>(v));
  atomicMax(most, v);
  atomicOr(seen, 1ull << v);
}

// one product of 16 x k and k x 8, k being 16, or 8 for tf32; a and b are bits, row after row
template <int kKind>
__global__ void product(const uint32_t* a, const uint32_t* b, float* d) {
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sums[4];
  for (unsigned i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  if constexpr (kKind == 2) {
    const uint32_t fragment[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4],
                                  a[(g + 8) * 8 + t + 4]};
    mma_tf32(sums, fragment, b[t * 8 + g], b[(t + 4) * 8 + g]);
  } else {
    const auto pair = [](const uint32_t* first, unsigned step) {
      return first[0] | first[step] << 16;
    };
    const uint32_t fragment[4] = {pair(a + g * 16 + 2 * t, 1), pair(a + (g + 8) * 16 + 2 * t, 1),
                                  pair(a + g * 16 + 2 * t + 8, 1),
                                  pair(a + (g + 8) * 16 + 2 * t + 8, 1)};
    const uint32_t b0 = pair(b + 2 * t * 8 + g, 8), b1 = pair(b + (2 * t + 8) * 8 + g, 8);
    if (kKind == 0) mma_bf16(sums, fragment, b0, b1);
    else mma_fp16(sums, fragment, b0, b1);
  }
  for (unsigned i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// words of 32 rows, of which lane l names row 5 l % 32; out: (kMatrices, 32)
template <int kMatrices>
__global__ void matrices(const uint4* from, uint32_t* out) {
  uint4* rows = reinterpret_cast<uint4*>(shared_memory());
  rows[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  uint32_t words[kMatrices];
  load_matrices(address_of(&rows[5 * threadIdx.x % kWarp]), words);
  for (int i = 0; i < kMatrices; ++i) out[i * kWarp + threadIdx.x] = words[i];
}

// the first `some` threads, and nobody else, tell their neighbours a number, `rounds` times
template <bool kSynchronized>
__global__ void some_numbers(unsigned some, int rounds, int* out) {
  int* numbers = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x < some) {
    int sum = 0;
    for (int round = 0; round < rounds; ++round) {
      numbers[threadIdx.x] = round * static_cast<int>(threadIdx.x);
      if (kSynchronized) sync_some(some);
      sum += numbers[(threadIdx.x + 40) % some];
      if (kSynchronized) sync_some(some);
    }
    out[threadIdx.x] = sum;
  }
  __syncthreads();
}

__global__ void wait_for_different_numbers() { sync_some(threadIdx.x < 32 ? 64 : 32); }

__global__ void copy_or_zero(const uint4* from, uint4* to) {
  uint4* buffer = reinterpret_cast<uint4*>(shared_memory()) + threadIdx.x;
  const bool read = threadIdx.x % 3 != 0;
  copy_async_16_or_zeros(buffer, read ? from + threadIdx.x : nullptr, read);
  copy_async_commit();
  copy_async_wait<0>();
  to[threadIdx.x] = *buffer;
}

// every block sums what all blocks of its cluster hold
template <bool kStays>
__global__ void cluster_sums(const int* values, int* sums) {
  int* own = reinterpret_cast<int*>(shared_memory());
  own[threadIdx.x] = values[blockIdx.x * blockDim.x + threadIdx.x];
  cluster_sync();
  int sum = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank) {
    const auto* place = reinterpret_cast<const float*>(&own[threadIdx.x]);
    if (rank % 2 == 0) sum += cluster_map(own, rank)[threadIdx.x];
    else sum += static_cast<int>(__float_as_uint(cluster_load(place, rank)));
  }
  sums[blockIdx.x * blockDim.x + threadIdx.x] = sum * 10 + static_cast<int>(cluster_rank());
  if (kStays) cluster_sync();  // before its memory goes
}

// every block writes its number, then adds up those of all
template <bool kSynchronized>
__global__ void grid_sums(int* numbers, int* sums, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) numbers[blockIdx.x] = static_cast<int>(blockIdx.x + 1) * (round + 1);
    if (kSynchronized) grid_sync();
    int sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += numbers[i];
    sums[(round * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x] = sum;
    if (kSynchronized) grid_sync();
  }
}

// one block leaves, the others wait for it
__global__ void leave_grid() {
  if (blockIdx.x != 1) grid_sync();
}

// each thread keeps two copies under way
template <int kLeft>
__global__ void copy_rows(const uint4* from, uint4* to, int rows) {
  uint4* buffer = reinterpret_cast<uint4*>(shared_memory()) + 2 * threadIdx.x;
  const auto start = [&](int row) {
    if (row < rows) copy_async_16(buffer + row % 2, from + row * blockDim.x + threadIdx.x);
    copy_async_commit();
  };
  start(0);
  for (int row = 0; row < rows; ++row) {
    start(row + 1);
    copy_async_wait<kLeft>();
    store_16(to + row * blockDim.x + threadIdx.x, buffer[row % 2]);
  }
}

__global__ void diverging_barriers() {
  if (threadIdx.x == 7) __shfl_sync(kAll, 1, 0);
  __syncthreads();
}

__global__ void diverging_shuffles() {
  if (threadIdx.x % 2 == 0) __shfl_sync(kAll, 1, 0);
  else __shfl_xor_sync(kAll, 1, 1);
}

__global__ void write_behind(int bytes) {
  if (blockIdx.x == 1 && threadIdx.x == 0) shared_memory()[bytes] = 1;
}

__global__ void touch(int* at) { *at = static_cast<int>(gridDim.x); }

__global__ void read_null(const int* at, int* to) { *to = at[threadIdx.x]; }

__global__ void recurse(int* at, int depth) {
  volatile char frame[512];
  frame[0] = static_cast<char>(depth);
  if (depth > 0) recurse(at, depth - 1);
  *at += frame[0];
}

__global__ void only_barriers(int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
}

__global__ void only_shuffles(int* out, int count) {
  int v = 0;
  for (int i = 0; i < count; ++i) v = __shfl_xor_sync(kAll, v + 1, 1);
  out[threadIdx.x] = v;
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                   cudaLaunchAttribute attribute, Arguments... arguments) {
  cudaLaunchConfig_t config = {grid, block, shared, nullptr, &attribute, 1};
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaPeekAtLastError() || error != cudaGetLastError()) return "no last error";
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                   unsigned cluster, Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  return launch(kernel, grid, block, shared, attribute, arguments...);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* run_block_sums(bool synchronized, int blocks, int threads, const int* values,
                                  int* sums) {
  return launch(synchronized ? block_sums<true> : block_sums<false>, blocks, threads,
                sizeof(int) * threads, 1, values, sums);
}
EXPORT const char* run_warp_operations(const int* values, int* out) {
  return launch(warp_operations, 1, kWarp, 0, 1, values, out);
}
EXPORT const char* run_votes(const int* values, int* out) {
  return launch(votes, 1, 50, 0, 1, values, out);
}
EXPORT const char* run_count_values(int blocks, int threads, const int* values, unsigned* histogram,
                                    float* sum, int* most, unsigned long long* seen) {
  return launch(count_values, blocks, threads, 0, 1, values, histogram, sum, most, seen);
}
EXPORT const char* run_product(int kind, int threads, const uint32_t* a, const uint32_t* b,
                               float* d) {
  const auto kernel = kind == 0 ? product<0> : kind == 1 ? product<1> : product<2>;
  return launch(kernel, 1, threads, 0, 1, a, b, d);
}
EXPORT const char* run_matrices(int count, int threads, const uint4* from, uint32_t* out) {
  return launch(count == 4 ? matrices<4> : matrices<2>, 1, threads, kWarp * sizeof(uint4), 1, from,
                out);
}
EXPORT const char* run_some_numbers(bool synchronized, int threads, unsigned some, int rounds,
                                    int* out) {
  return launch(synchronized ? some_numbers<true> : some_numbers<false>, 1, threads,
                sizeof(int) * threads, 1, some, rounds, out);
}
EXPORT const char* run_wait_for_different_numbers() {
  return launch(wait_for_different_numbers, 1, 64, 0, 1);
}
EXPORT const char* run_copy_or_zero(int threads, const uint4* from, uint4* to) {
  return launch(copy_or_zero, 1, threads, sizeof(uint4) * threads, 1, from, to);
}
EXPORT const char* run_cluster_sums(bool stays, int blocks, int cluster, int threads,
                                    const int* values, int* sums) {
  return launch(stays ? cluster_sums<true> : cluster_sums<false>, blocks, threads,
                sizeof(int) * threads, cluster, values, sums);
}
EXPORT const char* run_grid_sums(bool synchronized, bool cooperative, int blocks, int threads,
                                 int rounds, int* numbers, int* sums) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  return launch(synchronized ? grid_sums<true> : grid_sums<false>, blocks, threads, 0, attribute,
                numbers, sums, rounds);
}
EXPORT const char* run_leave_grid(int blocks) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return launch(leave_grid, blocks, 64, 0, attribute);
}
EXPORT const char* run_copy_rows(bool waits, int threads, int rows, const uint4* from, uint4* to) {
  return launch(waits ? copy_rows<1> : copy_rows<2>, 1, threads, 32 * threads, 1, from, to, rows);
}
EXPORT const char* run_diverging(bool barriers) {
  return launch(barriers ? diverging_barriers : diverging_shuffles, dim3(2, 3), 64, 0, 1);
}
EXPORT const char* run_write_behind(int bytes, int at) {
  return launch(write_behind, 2, 32, bytes, 1, at);
}
EXPORT const char* run_read_null(int* to) {
  return launch(read_null, 1, 1, 0, 1, static_cast<const int*>(nullptr), to);
}
EXPORT const char* run_recurse(int depth, int* to) {
  return launch(recurse, 1, 1, 0, 1, to, depth);
}
EXPORT const char* run_touch(int x, int y, int z, int threads, int shared, int most_shared,
                             int cluster, bool large_clusters, int* at) {
  for (const auto [attribute, value] :
       {std::pair{cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared},
        std::pair{cudaFuncAttributeNonPortableClusterSizeAllowed, int{large_clusters}}}) {
    const cudaError_t error = cudaFuncSetAttribute(touch, attribute, value);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return launch(touch, dim3(x, y, z), threads, shared, cluster, at);
}
EXPORT const char* run_only_barriers(int threads, int count) {
  return launch(only_barriers, 1, threads, 0, 1, count);
}
EXPORT const char* run_only_shuffles(int threads, int count, int* out) {
  return launch(only_shuffles, 1, threads, 0, 1, out, count);
}

// what needs no kernel
EXPORT float run_half_to_float(uint16_t bits) { return half_to_float(bits); }
EXPORT uint16_t run_float_to_half(float x) { return float_to_half(x); }
EXPORT uint32_t run_to_tf32(float x) { return to_tf32(x); }
EXPORT float run_exp2(float x) { return exp2_fast(x); }
