// Selects the tokens of one row: all threads of a block, or of a cluster that shares the row, call
// SelectRow::run together.
//
// The k-th largest key is found by histograms of the keys' range, each of a bin of the one before,
// until few keys are in doubt; these are ranked by comparing each with each. One ordered sweep then
// writes mask and ids. What a block keeps of its part of the row, keys and state, lies in shared
// memory where it fits; else keys are made from the scores each time, and state lies in the mask.
#pragma once
#include "../args.h"
#include "device.h"

namespace sma {
namespace cuda {

constexpr int kBinBits = 10;
constexpr unsigned kBins = 1u << kBinBits;
constexpr unsigned kFewKeys = 128;  // so many are compared each with each
constexpr unsigned kMostWarps = 32;

// Unsigned integers in the order of the scores; NaN counts as -inf, and -0 is 0.
__device__ inline uint32_t ordered_key(float x) {
  if (x != x) return 0x007FFFFFu;  // of -inf
  const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
constexpr uint32_t kFirstKey = 0xFF800000u;  // of +inf
constexpr uint32_t kNoKey = 0xFFFFFFFFu;     // above all

// What is known of a token of the row.
enum TokenState : uint8_t {
  kPadding = 0,
  kCompeting = 1,
  kTaken = 2,   // masked by an earlier choice
  kPassed = 3,  // visible by an earlier choice
  kDrawn = 4    // competing, and goes before all others
};

struct Threshold {
  uint32_t key;   // all above are chosen,
  unsigned ties;  // and the first so many that equal it
};

struct RowCounts {
  unsigned taken, ties, valid;
};

// In shared memory. What other blocks of the cluster read stands first.
struct SelectShared {
  uint32_t bins[kBins];
  uint32_t few[kFewKeys];  // keys in doubt, of this block
  unsigned few_count;
  uint32_t low, high;      // of this block's competing keys
  unsigned competing;      // how many
  RowCounts part;          // this block's
  uint32_t all[kFewKeys];  // keys in doubt, of the cluster
  uint32_t low_of[kMostWarps], high_of[kMostWarps];
  unsigned count_of[kMostWarps];
  RowCounts counts_of[kMostWarps];
  Threshold threshold;
  uint32_t found_low, found_high;
  unsigned found_above, found_inside;
};

class SelectRow {
 public:
  // keys, state: of this block's part, in shared memory; null where they do not fit there.
  __device__ SelectRow(const SelectTokensArgs& args, int64_t sample, unsigned part_tokens,
                       SelectShared* shared, uint32_t* keys, uint8_t* state)
      : a(args),
        b(sample),
        tokens(static_cast<unsigned>(args.tokens)),
        begin(min(tokens, cluster_rank() * part_tokens)),
        size(min(tokens - begin, part_tokens)),
        s(*shared),
        keys(keys),
        state(state == nullptr ? args.mask + sample * args.tokens + begin : state) {
    const unsigned warps = blockDim.x / kWarp;
    const unsigned each = (size + warps * kWarp - 1) / (warps * kWarp) * kWarp;
    warp_begin = min(size, warp() * each);
    warp_end = min(size, warp_begin + each);
  }

  __device__ void run() {
    mark_tokens();
    unsigned competing = read_keys(a.scores, 1.0f);
    const unsigned valid = competing, count = masked_of(valid);
    // what the scores choose; noise may choose among these, or the rest
    const bool has_pool = a.pool_ratio >= 0, is_last = !has_pool && a.random_fraction == 0;
    unsigned wanted = count;
    if (has_pool) wanted = max(count, rounded(a.pool_ratio * valid));
    else if (!is_last) wanted = rounded((1.0 - a.random_fraction) * count);
#pragma unroll 1
    for (bool last = is_last;; last = true) {
      const Threshold t = find(wanted, competing);
      if (last) return finish(t, count, valid);
      settle(t, has_pool ? kCompeting : kTaken, has_pool ? kPassed : kCompeting);
      competing = read_keys(a.noise, -1.0f);
      if (has_pool) wanted = count;
      else wanted = count - wanted;
    }
  }

 private:
  const SelectTokensArgs& a;
  const int64_t b;
  const unsigned tokens, begin, size;  // of the row; this block's part of it
  SelectShared& s;
  uint32_t* const keys;
  uint8_t* const state;
  unsigned warp_begin, warp_end;  // this warp's tokens of the part
  const float* values = nullptr;  // what the keys are made of,
  float sign = 1.0f;              // times this

  static __device__ unsigned warp() { return threadIdx.x / kWarp; }
  static __device__ unsigned lane() { return threadIdx.x % kWarp; }
  static __device__ unsigned warps() { return blockDim.x / kWarp; }

  static __device__ unsigned rounded(double x) { return static_cast<unsigned>(rint(x)); }

  __device__ unsigned masked_of(unsigned valid) const {
    int64_t count = a.num_masked;
    if (a.mask_ratio >= 0) count = rounded(a.mask_ratio * valid);
    else if (a.num_masked_rows != nullptr) count = a.num_masked_rows[b];
    count = max(int64_t{0}, min(count, a.width_masked));
    return static_cast<unsigned>(min(count, static_cast<int64_t>(valid)));
  }

  __device__ uint32_t key_of(unsigned i) const {
    if (keys != nullptr) return keys[i];
    return state[i] == kDrawn ? kFirstKey : ordered_key(values[i] * sign);
  }
  static __device__ bool competes(uint8_t state) { return state == kCompeting || state == kDrawn; }

  // Calls body(i, key) for the competing tokens of this block, each in one thread.
  template <class Body>
  __device__ void for_each_key(const Body& body) const {
#pragma unroll 4
    for (unsigned i = threadIdx.x; i < size; i += blockDim.x)
      if (competes(state[i])) body(key_of(i));
  }

  __device__ void mark_tokens() {
    const uint8_t* padding = a.padding == nullptr ? nullptr : a.padding + b * a.tokens + begin;
    for (unsigned i = threadIdx.x; i < size; i += blockDim.x)
      state[i] = padding != nullptr && padding[i] ? kPadding : kCompeting;
    __syncthreads();
    if (a.drawn == nullptr) return;
    for (int64_t i = threadIdx.x; i < a.drawn_width; i += blockDim.x) {
      const int64_t token = a.drawn[b * a.drawn_width + i] - begin;
      if (token >= 0 && token < size && state[token] != kPadding) state[token] = kDrawn;
    }
    __syncthreads();
  }

  // Makes keys of the competing tokens; returns how many the row has.
  __device__ unsigned read_keys(const float* row_values, float row_sign) {
    values = row_values + b * a.tokens + begin;
    sign = row_sign;
    uint32_t low = kNoKey, high = 0;
    unsigned competing = 0;
#pragma unroll 4
    for (unsigned i = threadIdx.x; i < size; i += blockDim.x) {
      const uint8_t is = state[i];
      const uint32_t key = is == kDrawn ? kFirstKey : ordered_key(values[i] * sign);
      if (keys != nullptr) keys[i] = key;
      if (!competes(is)) continue;
      low = min(low, key);
      high = max(high, key);
      ++competing;
    }
    low = __reduce_min_sync(kAllLanes, low);
    high = __reduce_max_sync(kAllLanes, high);
    competing = __reduce_add_sync(kAllLanes, competing);
    if (lane() == 0) {
      s.low_of[warp()] = low;
      s.high_of[warp()] = high;
      s.count_of[warp()] = competing;
    }
    __syncthreads();
    if (warp() == 0) {
      const bool is_warp = lane() < warps();
      low = __reduce_min_sync(kAllLanes, is_warp ? s.low_of[lane()] : kNoKey);
      high = __reduce_max_sync(kAllLanes, is_warp ? s.high_of[lane()] : 0);
      competing = __reduce_add_sync(kAllLanes, is_warp ? s.count_of[lane()] : 0);
      if (lane() == 0) {
        s.low = low;
        s.high = high;
        s.competing = competing;
      }
    }
    cluster_sync();
    unsigned total = 0;
    for (unsigned r = 0; r < cluster_size(); ++r) total += *cluster_map(&s.competing, r);
    return total;
  }

  // Returns what chooses the `wanted` highest of the row's `competing` tokens.
  __device__ Threshold find(unsigned wanted, unsigned competing) {
    if (wanted == 0) return {kNoKey, 0};
    uint32_t low = kNoKey, high = 0;
    for (unsigned r = 0; r < cluster_size(); ++r) {
      low = min(low, *cluster_map(&s.low, r));
      high = max(high, *cluster_map(&s.high, r));
    }
    unsigned inside = competing;  // how many keys lie in [low, high]
    while (low < high && inside > kFewKeys) {
      const int shift = max(0, 32 - __clz(high - low) - kBinBits);
      for (unsigned i = threadIdx.x; i < kBins; i += blockDim.x) s.bins[i] = 0;
      __syncthreads();
      for_each_key([&](uint32_t key) {
        if (key >= low && key <= high) atomicAdd(&s.bins[(key - low) >> shift], 1u);
      });
      cluster_sync();
      find_bin(wanted);
      wanted -= s.found_above;
      inside = s.found_inside;
      low += s.found_low << shift;
      high = min(high, low + ((1u << shift) - 1));
      cluster_sync();  // before the bins are used again
    }
    return low == high ? Threshold{low, wanted} : rank(low, high, inside, wanted);
  }

  // Finds the bin that holds the wanted-th largest key of the cluster.
  __device__ void find_bin(unsigned wanted) {
    const unsigned each = (kBins + blockDim.x - 1) / blockDim.x;
    const unsigned first = min(kBins, threadIdx.x * each), last = min(kBins, first + each);
    unsigned own = 0;
    for (unsigned bin = first; bin < last; ++bin) own += keys_in(bin);
    unsigned from_here = own;  // and in the lanes above
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
      while (above + (inside = keys_in(--bin)) < wanted) above += inside;
      s.found_low = bin;
      s.found_above = above;
      s.found_inside = inside;
    }
    __syncthreads();
  }
  __device__ unsigned keys_in(unsigned bin) const {
    unsigned total = 0;
    for (unsigned r = 0; r < cluster_size(); ++r) total += *cluster_map(&s.bins[bin], r);
    return total;
  }

  // The same for the few keys in [low, high], each compared with each.
  __device__ Threshold rank(uint32_t low, uint32_t high, unsigned inside, unsigned wanted) {
    if (threadIdx.x == 0) s.few_count = 0;
    __syncthreads();
    for_each_key([&](uint32_t key) {
      if (key >= low && key <= high) s.few[atomicAdd(&s.few_count, 1u)] = key;
    });
    cluster_sync();
    unsigned before = 0;
    for (unsigned r = 0; r < cluster_size(); ++r) {
      const unsigned count = *cluster_map(&s.few_count, r);
      for (unsigned i = threadIdx.x; i < count; i += blockDim.x)
        s.all[before + i] = cluster_map(s.few, r)[i];
      before += count;
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < inside; i += blockDim.x) {
      const uint32_t key = s.all[i];
      unsigned above = 0, equal = 0, equal_before = 0;
      for (unsigned j = 0; j < inside; ++j) {
        above += s.all[j] > key;
        equal += s.all[j] == key;
        equal_before += s.all[j] == key && j < i;
      }
      if (equal_before == 0 && above < wanted && wanted <= above + equal)
        s.threshold = {key, wanted - above};
    }
    cluster_sync();  // and the lists may be used again
    return s.threshold;
  }

  // Calls body(i, state, chosen, chosen before, valid before) for the part's tokens, in order.
  template <class Body>
  __device__ void sweep(Threshold t, const Body& body) {
    RowCounts counts = {0, 0, 0};
    for (unsigned i = warp_begin + lane(); i < warp_end; i += kWarp) {
      const uint8_t is = state[i];
      const uint32_t key = competes(is) ? key_of(i) : 0;
      counts.taken += is == kTaken || (competes(is) && key > t.key);
      counts.ties += competes(is) && key == t.key;
      counts.valid += is != kPadding;
    }
    counts = before_me(counts);
    unsigned ties = counts.ties, valid = counts.valid;
    unsigned chosen = counts.taken + min(ties, t.ties);
    const unsigned lower_lanes = (1u << lane()) - 1;
    for (unsigned first = warp_begin; first < warp_end; first += kWarp) {
      const unsigned i = first + lane();
      const uint8_t is = i < warp_end ? state[i] : kPadding;
      const uint32_t key = competes(is) ? key_of(i) : 0;
      const unsigned tied = __ballot_sync(kAllLanes, competes(is) && key == t.key);
      const bool tie = (tied >> lane() & 1) && ties + __popc(tied & lower_lanes) < t.ties;
      const bool choose = tie || is == kTaken || (competes(is) && key > t.key);
      const unsigned all_chosen = __ballot_sync(kAllLanes, choose);
      const unsigned all_valid = __ballot_sync(kAllLanes, is != kPadding);
      if (i < warp_end)
        body(i, is, choose, chosen + __popc(all_chosen & lower_lanes),
             valid + __popc(all_valid & lower_lanes));
      ties += __popc(tied);
      chosen += __popc(all_chosen);
      valid += __popc(all_valid);
    }
  }

  // Sums of what each lane counted over all that stands in front of this warp in the row.
  __device__ RowCounts before_me(RowCounts own) {
    own.taken = __reduce_add_sync(kAllLanes, own.taken);
    own.ties = __reduce_add_sync(kAllLanes, own.ties);
    own.valid = __reduce_add_sync(kAllLanes, own.valid);
    if (lane() == 0) s.counts_of[warp()] = own;
    __syncthreads();
    const RowCounts other = lane() < warps() ? s.counts_of[lane()] : RowCounts{0, 0, 0};
    const bool before = lane() < warp();
    RowCounts sum = {__reduce_add_sync(kAllLanes, before ? other.taken : 0),
                     __reduce_add_sync(kAllLanes, before ? other.ties : 0),
                     __reduce_add_sync(kAllLanes, before ? other.valid : 0)};
    if (threadIdx.x == blockDim.x - kWarp)  // of the last warp
      s.part = {sum.taken + own.taken, sum.ties + own.ties, sum.valid + own.valid};
    cluster_sync();
    for (unsigned r = 0; r < cluster_rank(); ++r) {
      const RowCounts* part = cluster_map(&s.part, r);
      sum.taken += part->taken;
      sum.ties += part->ties;
      sum.valid += part->valid;
    }
    return sum;
  }

  // A choice that another one follows: what becomes of the chosen, and of the others.
  __device__ void settle(Threshold t, uint8_t chosen, uint8_t other) {
    sweep(t, [&](unsigned i, uint8_t is, bool choose, unsigned, unsigned) {
      if (is != kPadding) state[i] = choose ? chosen : other;
    });
    cluster_sync();
  }

  __device__ void finish(Threshold t, unsigned count, unsigned valid) {
    uint8_t* mask = a.mask + b * a.tokens + begin;
    int64_t* restore = a.ids_restore + b * a.tokens + begin;
    int64_t* masked = a.ids_masked + b * a.width_masked;
    int64_t* visible = a.ids_visible + b * a.width_visible;
    sweep(t, [&](unsigned i, uint8_t is, bool choose, unsigned chosen, unsigned valid_before) {
      const unsigned seen = valid_before - chosen;
      int64_t place = -1;
      if (choose) {
        masked[chosen] = begin + i;
        place = a.width_visible + chosen;
      } else if (is != kPadding) {
        visible[seen] = begin + i;
        place = seen;
      }
      restore[i] = place;
      mask[i] = choose;
    });
    const unsigned thread = cluster_rank() * blockDim.x + threadIdx.x;
    const unsigned threads = cluster_size() * blockDim.x;
    for (int64_t i = count + thread; i < a.width_masked; i += threads) masked[i] = -1;
    for (int64_t i = valid - count + thread; i < a.width_visible; i += threads) visible[i] = -1;
    if (thread == 0) {
      a.out_num_visible[b] = static_cast<int32_t>(valid - count);
      a.out_num_masked[b] = static_cast<int32_t>(count);
    }
    cluster_sync();  // other blocks may still read this one's shared memory; ids can now be read
  }
};

// Bytes of shared memory for a part of so many tokens: keys and state.
inline size_t held_bytes(int64_t part_tokens) {
  return static_cast<size_t>((part_tokens * 5 + 15) / 16 * 16);
}

}  // namespace cuda
}  // namespace sma
