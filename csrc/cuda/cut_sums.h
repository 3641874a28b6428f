// Sums over the lanes of a warp and the threads of a block of bipartition, several at once.
#pragma once
#include "slabs.h"

namespace sma {
namespace cuda {

constexpr unsigned kThreads = kSlabThreads, kWarps = kThreads / kWarp;
constexpr int kMostSums = 16;

// The lanes that `bit` is set in keep the upper half, and their neighbours the lower one.
template <int kCount, class Sum>
__device__ inline void fold(const Sum (&from)[2 * kCount], Sum (&to)[kCount], int bit) {
  const bool upper = lane() & bit;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Sum sent = upper ? from[i] : from[kCount + i];
    to[i] = (upper ? from[kCount + i] : from[i]) + __shfl_xor_sync(kAllLanes, sent, bit);
  }
}

// Sums over all lanes, whose number is a power of 2: of the lane's own, which is sum
// lane / (32 / kCount). Folding takes fewer shuffles than to add up each for all lanes.
template <int kCount, class Sum>
__device__ inline Sum sum_of_lanes(const Sum (&x)[kCount], int bit = kWarp / 2) {
  if constexpr (kCount > 1) {
    Sum half[kCount / 2];
    fold(x, half, bit);
    return sum_of_lanes(half, bit / 2);
  } else {
    Sum sum = x[0];
#pragma unroll
    for (; bit > 0; bit /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
    return sum;
  }
}

struct SumsShared {
  double sums[2][kWarps * kMostSums];
  unsigned counts[kWarps];
};

class BlockSums {
 protected:
  __device__ explicit BlockSums(SumsShared* shared) : of(*shared) {}

  SumsShared& of;

  // How many of the block's threads before this one say yes; and of all of them.
  __device__ unsigned before_me(bool yes, unsigned* all) {
    const unsigned votes = __ballot_sync(kAllLanes, yes);
    __syncthreads();
    if (lane() == 0) of.counts[warp()] = __popc(votes);
    __syncthreads();
    unsigned before = __popc(votes & ((1u << lane()) - 1));
    *all = 0;
    for (unsigned w = 0; w < kWarps; ++w) {
      before += w < warp() ? of.counts[w] : 0;
      *all += of.counts[w];
    }
    return before;
  }

  // The least of the block's numbers, and the largest, of those that are at least 0.
  __device__ unsigned least(unsigned x) {
    x = __reduce_min_sync(kAllLanes, x);
    __syncthreads();
    if (lane() == 0) of.counts[warp()] = x;
    __syncthreads();
    x = __reduce_min_sync(kAllLanes, of.counts[lane() % kWarps]);
    return x;
  }
  __device__ float largest(float x) {  // they are in the order of their bits
    return __uint_as_float(~least(~__float_as_uint(x)));
  }

  // Sums of the block, the same bits in all threads.
  template <int kCount, class Sum>
  __device__ void add_up(Sum (&x)[kCount]) {
    constexpr int kPadded = kCount > 8 ? 16 : kCount > 4 ? 8 : kCount > 2 ? 4 : kCount;
    static_assert(kCount <= kMostSums);
    Sum* const of_warps = reinterpret_cast<Sum*>(of.sums[sums_at]);
    sums_at ^= 1;  // what is read now is written again behind the next barrier
    Sum padded[kPadded] = {};
#pragma unroll
    for (int k = 0; k < kCount; ++k) padded[k] = x[k];
    const Sum own = sum_of_lanes(padded);
    constexpr unsigned kEqual = kWarp / kPadded;  // lanes, which hold the same sum
    if (lane() % kEqual == 0) of_warps[warp() * kPadded + lane() / kEqual] = own;
    __syncthreads();
    // a lane takes one of the sums, from every kEqual-th warp
    Sum sum = 0;
#pragma unroll
    for (unsigned w = 0; w < kWarps; w += kEqual)
      if (w + lane() / kPadded < kWarps) sum += of_warps[w * kPadded + lane()];
#pragma unroll
    for (int step = kWarp / 2; step >= kPadded; step /= 2)
      sum += __shfl_xor_sync(kAllLanes, sum, step);
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = __shfl_sync(kAllLanes, sum, k);
  }

 private:
  int sums_at = 0;  // which of the sums is next
};

}  // namespace cuda
}  // namespace sma
