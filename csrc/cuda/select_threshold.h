// The threshold that chooses the highest keys of a row.
//
// The k-th largest key is found by histograms of the keys' range, each of a bin of the one before,
// until few keys are in doubt; these are ranked by comparing each with each.
#pragma once
#include "select_keys.h"

namespace sma {
namespace cuda {

template <class Keys>
class ThresholdSearch {
 public:
  __device__ explicit ThresholdSearch(Keys& keys) : keys(keys), s(keys.s) {}

  // Returns what chooses the `wanted` highest of the row's `competing` tokens.
  __device__ Threshold find(unsigned wanted, unsigned competing) {
    constexpr bool kGridSearches = Keys::kSearch == kGrid;
    if (!kGridSearches && wanted == 0) return {kNoKey, 0};
    const unsigned all_wanted = wanted;
    const bool is_block = lane() < keys.blocks();
    uint32_t low = __reduce_min_sync(kAllLanes, is_block ? *keys.there(&s.low, lane()) : kNoKey);
    uint32_t high = __reduce_max_sync(kAllLanes, is_block ? *keys.there(&s.high, lane()) : 0);
    unsigned inside = competing;  // how many keys lie in [low, high]
    if (kGridSearches && threadIdx.x == 0) s.found_low = s.found_above = s.found_inside = 0;
    for (int round = 0; kGridSearches ? round < kRounds : low < high && inside > kFewKeys;
         ++round) {
      const uint32_t range = high - low;
      const int shift = max(0, 32 - __clz(range) - kBinBits);
      for (unsigned i = threadIdx.x; i < kBins; i += blockDim.x) s.bins[i] = 0;
      __syncthreads();
      keys.for_each_key([&](uint32_t key) {
        if (key - low <= range) atomicAdd(&s.bins[(key - low) >> shift], 1u);
      });
      keys.publish();
      find_bin(wanted);
      wanted -= s.found_above;
      inside = s.found_inside;
      low += s.found_low << shift;
      high = min(high, low + ((1u << shift) - 1));
      keys.done_reading();
    }
    if constexpr (kGridSearches)  // these rounds leave one key, or found nothing that is wanted
      return all_wanted == 0 ? Threshold{kNoKey, 0} : Threshold{low, wanted};
    return low == high ? Threshold{low, wanted} : rank(low, high, inside, wanted);
  }

 private:
  static constexpr bool kTogether = Keys::kSearch != kAlone;
  static constexpr int kRounds = ceil_div(32, kBinBits);  // for every bit of a key
  Keys& keys;
  SelectShared& s;

  // Finds the bin that holds the wanted-th largest key of the row.
  __device__ void find_bin(unsigned wanted) {
    const uint32_t* bins = s.bins;
    if constexpr (kTogether) {
      for (unsigned i = threadIdx.x; i < kBins / 4; i += blockDim.x) {
        uint4 sum = {0, 0, 0, 0};
#pragma unroll 4
        for (unsigned r = 0; r < keys.blocks(); ++r) {
          const uint4 four = *keys.there(reinterpret_cast<uint4*>(s.bins) + i, r);
          sum = {sum.x + four.x, sum.y + four.y, sum.z + four.z, sum.w + four.w};
        }
        reinterpret_cast<uint4*>(s.total)[i] = sum;
      }
      __syncthreads();
      bins = s.total;
    }
    const unsigned each = ceil_div(kBins, blockDim.x);
    const unsigned first = min(kBins, threadIdx.x * each), last = min(kBins, first + each);
    unsigned own = 0;
    for (unsigned bin = first; bin < last; ++bin) own += bins[bin];
    unsigned from_here = own;  // and in the lanes above
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const unsigned other = __shfl_down_sync(kAllLanes, from_here, step);
      if (lane() + step < kWarp) from_here += other;
    }
    if (lane() == 0) s.count_of[warp()] = from_here;
    __syncthreads();
    const bool above_me = lane() > warp() && lane() < warps();
    unsigned above = __reduce_add_sync(kAllLanes, above_me ? s.count_of[lane()] : 0);
    above += from_here - own;
    if (above < wanted && wanted <= above + own) {
      unsigned bin = last;
      unsigned inside = 0;
      while (above + (inside = bins[--bin]) < wanted) above += inside;
      s.found_low = bin;
      s.found_above = above;
      s.found_inside = inside;
    }
    __syncthreads();
  }

  // The same as find for the few keys in [low, high], each compared with each.
  __device__ Threshold rank(uint32_t low, uint32_t high, unsigned inside, unsigned wanted) {
    constexpr int kOwnKeys = kFewKeys / kWarp;
    uint32_t* const few = kTogether ? s.few : s.all;
    if (threadIdx.x == 0) s.few_count = 0;
    __syncthreads();
    keys.for_each_key([&](uint32_t key) {
      if (key - low <= high - low) few[atomicAdd(&s.few_count, 1u)] = key;
    });
    keys.publish();
    if constexpr (kTogether) {
      unsigned before = 0;
      for (unsigned r = 0; r < keys.blocks(); ++r) {
        const unsigned count = *keys.there(&s.few_count, r);
        for (unsigned i = threadIdx.x; i < count; i += blockDim.x)
          s.all[before + i] = keys.there(s.few, r)[i];
        before += count;
      }
      __syncthreads();
    }
    uint32_t own[kOwnKeys];  // this lane's, of each 32; 0 is no key
#pragma unroll
    for (int j = 0; j < kOwnKeys; ++j)
      own[j] = j * kWarp + lane() < inside ? s.all[j * kWarp + lane()] : 0;
    for (unsigned i = warp(); i < inside; i += warps()) {
      const uint32_t key = s.all[i];
      unsigned above = 0, equal = 0, equal_before = 0;
#pragma unroll
      for (int j = 0; j < kOwnKeys; ++j) {
        above += own[j] > key;
        equal += own[j] == key;
        equal_before += own[j] == key && j * kWarp + lane() < i;
      }
      // all three at once: none is above 128
      const unsigned sums = __reduce_add_sync(kAllLanes, above | equal << 10 | equal_before << 20);
      above = sums & 1023;
      equal = sums >> 10 & 1023;
      if (lane() == 0 && sums >> 20 == 0 && above < wanted && wanted <= above + equal)
        s.threshold = {key, wanted - above};
    }
    keys.done_reading();  // and `threshold` is there
    return s.threshold;
  }
};

}  // namespace cuda
}  // namespace sma
