// Selects the tokens of one row: all threads of a block, or of a cluster that shares the row, call
// SelectRow::run together.
//
// The k-th largest key is found by histograms of the keys' range, each of a bin of the one before,
// until few keys are in doubt; these are ranked by comparing each with each. One ordered sweep then
// writes mask and ids. What a block keeps of the row, a key for each token, lies in shared memory
// where it fits; else keys are made from the scores each time, and what is known of a token lies in
// the mask.
#pragma once
#include "../args.h"
#include "device.h"

namespace sma {
namespace cuda {

constexpr int kBinBits = 10;
constexpr unsigned kBins = 1u << kBinBits;
constexpr unsigned kFewKeys = 128;  // so many are compared each with each
constexpr unsigned kMostWarps = 32;
constexpr unsigned kReads = 8;   // scores that a thread has on their way,
constexpr unsigned kCounts = 4;  // and keys

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

// Unsigned integers in the order of the scores times `sign`; NaN counts as -inf, and -0 is 0.
__device__ inline uint32_t ordered_key(float x, float sign) {
  const float value = fmaxf(fmaf(x, sign, 0.0f), -__builtin_huge_valf());
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
constexpr uint32_t kLastKey = 0x007FFFFFu;   // of -inf
constexpr uint32_t kFirstKey = 0xFF800000u;  // of +inf
constexpr uint32_t kNoKey = 0xFFFFFFFEu;     // above all that compete

// What stands in place of a key for a token without one, so that all that are masked already are
// above a threshold, and all that cannot be are below. In the mask of a row, only the last byte.
enum Mark : uint32_t {
  kPadding = 0,
  kPassed = 1,          // visible by an earlier choice
  kCompetes = 2,        // its key is not made yet
  kDrawn = 3,           // so is this one's, and it goes before all others
  kTaken = 0xFFFFFFFFu  // masked by an earlier choice
};

struct Threshold {
  uint32_t key;   // all above are chosen,
  unsigned ties;  // and the first so many that equal it
};

struct RowCounts {
  unsigned taken, ties, valid;
};

// In shared memory. What other blocks of the cluster read stands first.
struct alignas(16) SelectShared {
  uint32_t bins[kBins];
  uint32_t few[kFewKeys];  // keys in doubt, of this block
  unsigned few_count;
  uint32_t low, high;                 // of this block's competing keys
  unsigned competing;                 // how many
  RowCounts part;                     // this block's
  alignas(16) uint32_t total[kBins];  // of the bins of the cluster
  uint32_t all[kFewKeys];             // keys in doubt, of the cluster
  uint32_t low_of[kMostWarps], high_of[kMostWarps];
  unsigned count_of[kMostWarps];
  RowCounts counts_of[kMostWarps], front_of[kMostWarps];
  Threshold threshold;
  uint32_t found_low, found_high;
  unsigned found_above, found_inside;
};

// Tokens of a row.
struct Span {
  unsigned begin, end;
};
__host__ __device__ inline Span part_of_row(unsigned tokens, unsigned part, unsigned rank) {
  const uint64_t begin = static_cast<uint64_t>(part) * rank, end = begin + part;
  return {static_cast<unsigned>(begin < tokens ? begin : tokens),
          static_cast<unsigned>(end < tokens ? end : tokens)};
}

// What this block does for a row. The blocks of a cluster write a part each. They search the row
// together, where each searches what it writes, or each searches the whole row by itself.
struct RowShare {
  Span searched, written;
};

// kHeld: keys lie in shared memory. kPlain: every token competes, in one choice: no padding,
// nothing drawn, no random share, no pool. kTogether: the cluster searches together.
template <bool kHeld, bool kPlain, bool kTogether>
class SelectRow {
 public:
  // keys: place for those that are searched, see held_bytes; null unless held.
  __device__ SelectRow(const SelectTokensArgs& args, int64_t sample, const RowShare& share,
                       SelectShared* shared, uint32_t* keys)
      : a(args),
        b(sample),
        row(sample * args.tokens),
        begin(share.searched.begin),
        size(share.searched.end - share.searched.begin),
        written({share.written.begin - begin, share.written.end - begin}),
        s(*shared),
        keys(keys) {}

  // Other blocks of the cluster are done too at the end where they search together.
  __device__ void run() {
    mark_tokens();
    unsigned competing = read_keys(a.scores, 1.0f);
    const unsigned valid = competing, count = masked_of(valid);
    if constexpr (kPlain) {
      finish(find(count, competing), count, valid);
    } else {
      // what the scores choose; noise may choose among these, or the rest
      const bool has_pool = a.pool_ratio >= 0, is_last = !has_pool && a.random_fraction == 0;
      unsigned wanted = count;
      if (has_pool) wanted = max(count, rounded(a.pool_ratio * valid));
      else if (!is_last) wanted = rounded((1.0 - a.random_fraction) * count);
#pragma unroll 1
      for (bool last = is_last;; last = true) {
        const Threshold t = find(wanted, competing);
        if (last) return finish(t, count, valid);
        settle(t, has_pool ? kCompetes : kTaken, has_pool ? kPassed : kCompetes);
        competing = read_keys(a.noise, -1.0f);
        if (has_pool) wanted = count;
        else wanted = count - wanted;
      }
    }
  }

 private:
  const SelectTokensArgs& a;
  const int64_t b, row;        // the sample, and the place of its first token
  const unsigned begin, size;  // what is searched; from here on tokens count from `begin`
  const Span written;
  SelectShared& s;
  uint32_t* const keys;
  const float* values = nullptr;  // what the keys are made of,
  float sign = 1.0f;              // times this

  static __device__ unsigned warp() { return threadIdx.x / kWarp; }
  static __device__ unsigned lane() { return threadIdx.x % kWarp; }
  static __device__ unsigned warps() { return blockDim.x / kWarp; }

  // The blocks that search together.
  static __device__ unsigned blocks() { return kTogether ? cluster_size() : 1; }
  static __device__ void sync() {
    if constexpr (kTogether) cluster_sync();
    else __syncthreads();
  }
  template <class T>
  static __device__ T* there(T* shared, unsigned rank) {
    if constexpr (kTogether) return cluster_map(shared, rank);
    else return shared;
  }

  static __device__ unsigned rounded(double x) { return static_cast<unsigned>(rint(x)); }

  __device__ unsigned masked_of(unsigned valid) const {
    int64_t count = a.num_masked;
    if (a.mask_ratio >= 0) count = rounded(a.mask_ratio * valid);
    else if (a.num_masked_rows != nullptr) count = a.num_masked_rows[b];
    count = max(int64_t{0}, min(count, a.width_masked));
    return static_cast<unsigned>(min(count, static_cast<int64_t>(valid)));
  }

  __device__ uint8_t* marks() const { return a.mask + row + begin; }  // unless held
  __device__ uint32_t mark(unsigned i) const {
    if constexpr (kPlain) return kCompetes;
    else if constexpr (kHeld) return keys[i];
    else return static_cast<uint32_t>(static_cast<int8_t>(marks()[i]));
  }
  __device__ void set_mark(unsigned i, uint32_t mark) const {
    if constexpr (kHeld) keys[i] = mark;
    else marks()[i] = static_cast<uint8_t>(mark);
  }
  // A token's key, or the mark that stands in its place.
  __device__ uint32_t made_key(uint32_t mark, float value) const {
    const uint32_t key = ordered_key(value, sign);
    if constexpr (kPlain) return key;
    else return mark == kCompetes ? key : mark == kDrawn ? kFirstKey : mark;
  }
  __device__ uint32_t key_of(unsigned i) const {
    if constexpr (kHeld) return keys[i];
    else return made_key(mark(i), values[i]);
  }

  // Calls body(key) for the keys of what is searched, each in one thread; and for marks.
  template <class Body>
  __device__ void for_each_key(const Body& body) const {
    if constexpr (kHeld) {
      const auto* fours = reinterpret_cast<const uint4*>(keys);
      for (unsigned i = threadIdx.x; i < (size + 3) / 4; i += blockDim.x) {
        const uint4 four = fours[i];
        body(four.x);
        body(four.y);
        body(four.z);
        body(four.w);
      }
    } else {
      for (unsigned i = threadIdx.x; i < size; i += blockDim.x) body(key_of(i));
    }
  }

  __device__ void mark_tokens() {
    if constexpr (kHeld)  // the last four
      if (threadIdx.x < (4 - size % 4) % 4) keys[size + threadIdx.x] = kPadding;
    if constexpr (kPlain) return;
    const uint8_t* padding = a.padding == nullptr ? nullptr : a.padding + row + begin;
    for (unsigned i = threadIdx.x; i < size; i += blockDim.x)
      set_mark(i, padding != nullptr && padding[i] ? kPadding : kCompetes);
    __syncthreads();
    if (a.drawn == nullptr) return;
    for (int64_t i = threadIdx.x; i < a.drawn_width; i += blockDim.x) {
      const int64_t token = a.drawn[b * a.drawn_width + i] - begin;
      if (token >= 0 && token < size && (padding == nullptr || !padding[token]))
        set_mark(static_cast<unsigned>(token), kDrawn);
    }
    __syncthreads();
  }

  // Makes keys of the competing tokens; returns how many the row has.
  __device__ unsigned read_keys(const float* row_values, float row_sign) {
    values = row_values + row + begin;
    sign = row_sign;
    uint32_t low = kNoKey, high = 0;
    unsigned competing = 0;
    const auto take = [&](unsigned i, float value) {
      const uint32_t key = made_key(mark(i), value);
      if constexpr (kHeld) keys[i] = key;
      const bool competes = kPlain || (key >= kLastKey && key != kTaken);
      low = min(low, competes ? key : kNoKey);
      high = max(high, competes ? key : 0);
      if constexpr (!kPlain) competing += competes;
    };
    constexpr unsigned kOfWarp = kReads * kWarp;
    const float* const from = hoisted(values);
    for (unsigned start = warp() * kOfWarp; start < size; start += blockDim.x * kReads) {
      const unsigned first = start + lane();
      float value[kReads];
      if (start + kOfWarp <= size) {
#pragma unroll
        for (unsigned j = 0; j < kReads; ++j) value[j] = (from + first)[j * kWarp];
#pragma unroll
        for (unsigned j = 0; j < kReads; ++j) take(first + j * kWarp, value[j]);
      } else {
#pragma unroll
        for (unsigned j = 0; j < kReads; ++j)
          value[j] = first + j * kWarp < size ? (from + first)[j * kWarp] : 0.0f;
#pragma unroll
        for (unsigned j = 0; j < kReads; ++j)
          if (first + j * kWarp < size) take(first + j * kWarp, value[j]);
      }
    }
    low = __reduce_min_sync(kAllLanes, low);
    high = __reduce_max_sync(kAllLanes, high);
    if constexpr (!kPlain) competing = __reduce_add_sync(kAllLanes, competing);
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
    sync();
    if constexpr (kPlain) return static_cast<unsigned>(a.tokens);
    const bool is_block = lane() < blocks();
    return __reduce_add_sync(kAllLanes, is_block ? *there(&s.competing, lane()) : 0);
  }

  // Returns what chooses the `wanted` highest of the row's `competing` tokens.
  __device__ Threshold find(unsigned wanted, unsigned competing) {
    if (wanted == 0) return {kNoKey, 0};
    const bool is_block = lane() < blocks();
    uint32_t low = __reduce_min_sync(kAllLanes, is_block ? *there(&s.low, lane()) : kNoKey);
    uint32_t high = __reduce_max_sync(kAllLanes, is_block ? *there(&s.high, lane()) : 0);
    unsigned inside = competing;  // how many keys lie in [low, high]
    while (low < high && inside > kFewKeys) {
      const uint32_t range = high - low;
      const int shift = max(0, 32 - __clz(range) - kBinBits);
      for (unsigned i = threadIdx.x; i < kBins; i += blockDim.x) s.bins[i] = 0;
      __syncthreads();
      for_each_key([&](uint32_t key) {
        if (key - low <= range) atomicAdd(&s.bins[(key - low) >> shift], 1u);
      });
      sync();
      find_bin(wanted);
      wanted -= s.found_above;
      inside = s.found_inside;
      low += s.found_low << shift;
      high = min(high, low + ((1u << shift) - 1));
      sync();  // before the bins are used again
    }
    return low == high ? Threshold{low, wanted} : rank(low, high, inside, wanted);
  }

  // Finds the bin that holds the wanted-th largest key of the row.
  __device__ void find_bin(unsigned wanted) {
    const uint32_t* bins = s.bins;
    if constexpr (kTogether) {
      for (unsigned i = threadIdx.x; i < kBins / 4; i += blockDim.x) {
        uint4 sum = {0, 0, 0, 0};
#pragma unroll 4
        for (unsigned r = 0; r < blocks(); ++r) {
          const uint4 four = *there(reinterpret_cast<uint4*>(s.bins) + i, r);
          sum = {sum.x + four.x, sum.y + four.y, sum.z + four.z, sum.w + four.w};
        }
        reinterpret_cast<uint4*>(s.total)[i] = sum;
      }
      __syncthreads();
      bins = s.total;
    }
    const unsigned each = (kBins + blockDim.x - 1) / blockDim.x;
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
    constexpr int kEach = kFewKeys / kWarp;
    uint32_t* const few = kTogether ? s.few : s.all;
    if (threadIdx.x == 0) s.few_count = 0;
    __syncthreads();
    for_each_key([&](uint32_t key) {
      if (key - low <= high - low) few[atomicAdd(&s.few_count, 1u)] = key;
    });
    sync();
    if constexpr (kTogether) {
      unsigned before = 0;
      for (unsigned r = 0; r < blocks(); ++r) {
        const unsigned count = *there(&s.few_count, r);
        for (unsigned i = threadIdx.x; i < count; i += blockDim.x)
          s.all[before + i] = there(s.few, r)[i];
        before += count;
      }
      __syncthreads();
    }
    uint32_t own[kEach];  // this lane's, of each 32; 0 is no key
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      own[j] = j * kWarp + lane() < inside ? s.all[j * kWarp + lane()] : 0;
    for (unsigned i = warp(); i < inside; i += warps()) {
      const uint32_t key = s.all[i];
      unsigned above = 0, equal = 0, equal_before = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
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
    sync();  // and the lists may be used again
    return s.threshold;
  }

  // Adds what tokens are against the threshold.
  __device__ void count(Threshold t, unsigned first, unsigned last, unsigned step,
                        RowCounts& counts) const {
    const auto add = [&](uint32_t key) {
      counts.taken += key > t.key;
      counts.ties += key == t.key;
      if constexpr (!kPlain) counts.valid += key != kPadding;
    };
    unsigned i = first;
    for (; i + (kCounts - 1) * step < last; i += kCounts * step) {
      uint32_t key[kCounts];
#pragma unroll
      for (unsigned j = 0; j < kCounts; ++j) key[j] = key_of(i + j * step);
#pragma unroll
      for (unsigned j = 0; j < kCounts; ++j) add(key[j]);
    }
#pragma unroll 1
    for (; i < last; i += step) add(key_of(i));
  }

  // Calls body(i, key, chosen, chosen before, valid before) for the tokens of a span, a warp for 32
  // that follow each other, in order.
  template <class Body>
  __device__ void sweep(Threshold t, Span span, const Body& body) {
    const unsigned length = span.end - span.begin;
    const unsigned each = (length + warps() * kWarp - 1) / (warps() * kWarp) * kWarp;
    const unsigned warp_begin = span.begin + min(length, warp() * each);
    const unsigned warp_end = min(span.end, warp_begin + each);
    RowCounts counts = {0, 0, 0}, front = {0, 0, 0};
    count(t, warp_begin + lane(), warp_end, kWarp, counts);
    if (!kTogether && span.begin > 0) count(t, threadIdx.x, span.begin, blockDim.x, front);
    counts = before_me(counts, front);
    unsigned ties = counts.ties, chosen = counts.taken + min(ties, t.ties);
    unsigned valid = kPlain ? begin + warp_begin : counts.valid;
    const unsigned lower_lanes = (1u << lane()) - 1;
    const auto take = [&](unsigned i, bool inside) {
      const uint32_t key = inside ? key_of(i) : kPadding;
      bool choose = key > t.key;
      const bool equal = key == t.key;
      const unsigned tied = __ballot_sync(kAllLanes, equal);
      if (tied != 0) {
        if (equal && ties + __popc(tied & lower_lanes) < t.ties) choose = true;
        ties += __popc(tied);
      }
      const unsigned all_chosen = __ballot_sync(kAllLanes, choose);
      unsigned valid_before = valid + lane(), all_valid = kWarp;
      if constexpr (!kPlain) {
        const unsigned valid_lanes = __ballot_sync(kAllLanes, key != kPadding);
        valid_before = valid + __popc(valid_lanes & lower_lanes);
        all_valid = __popc(valid_lanes);
      }
      if (inside) body(i, key, choose, chosen + __popc(all_chosen & lower_lanes), valid_before);
      chosen += __popc(all_chosen);
      valid += all_valid;
    };
    unsigned first = warp_begin;
#pragma unroll 2
    for (; first + kWarp <= warp_end; first += kWarp) take(first + lane(), true);
    if (first < warp_end) take(first + lane(), first + lane() < warp_end);
  }

  static __device__ RowCounts sum_of(RowCounts x) {
    return {__reduce_add_sync(kAllLanes, x.taken), __reduce_add_sync(kAllLanes, x.ties),
            kPlain ? 0 : __reduce_add_sync(kAllLanes, x.valid)};
  }
  static __device__ RowCounts sum_of(RowCounts x, RowCounts y) {
    return {x.taken + y.taken, x.ties + y.ties, x.valid + y.valid};
  }

  // Sums of what each lane counted over all that stands in front of this warp in the row: what the
  // warps before it counted, and what all found in front of the span.
  __device__ RowCounts before_me(RowCounts own, RowCounts front) {
    constexpr RowCounts kNone = {0, 0, 0};
    own = sum_of(own);
    if constexpr (!kTogether) front = sum_of(front);
    if (lane() == 0) {
      s.counts_of[warp()] = own;
      if constexpr (!kTogether) s.front_of[warp()] = front;
    }
    __syncthreads();
    RowCounts other = lane() < warp() ? s.counts_of[lane()] : kNone;
    if constexpr (!kTogether)
      if (lane() < warps()) other = sum_of(other, s.front_of[lane()]);
    RowCounts sum = sum_of(other);
    if constexpr (kTogether) {
      if (threadIdx.x == blockDim.x - kWarp) s.part = sum_of(sum, own);  // of the last warp
      cluster_sync();
      other = lane() < cluster_rank() ? *there(&s.part, lane()) : kNone;
      sum = sum_of(sum, sum_of(other));
    }
    return sum;
  }

  // A choice that another one follows: what becomes of the chosen, and of the others.
  __device__ void settle(Threshold t, uint32_t chosen, uint32_t other) {
    sweep(t, {0, size}, [&](unsigned i, uint32_t key, bool choose, unsigned, unsigned) {
      if (key != kPadding) set_mark(i, choose ? chosen : other);
    });
    sync();
  }

  __device__ void finish(Threshold t, unsigned count, unsigned valid) {
    uint8_t* const mask = hoisted(a.mask + row + begin);
    int64_t* const restore = hoisted(a.ids_restore + row + begin);
    int64_t* const masked = hoisted(a.ids_masked + b * a.width_masked);
    int64_t* const visible = hoisted(a.ids_visible + b * a.width_visible);
    const auto width_visible = static_cast<unsigned>(a.width_visible);
    sweep(t, written,
          [&](unsigned i, uint32_t key, bool choose, unsigned chosen, unsigned valid_before) {
            const unsigned at = choose ? chosen : valid_before - chosen;
            const bool is_valid = kPlain || key != kPadding;
            if (is_valid) (choose ? masked : visible)[at] = begin + i;
            restore[i] = is_valid ? int64_t{at + (choose ? width_visible : 0)} : -1;
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
    if constexpr (kTogether) cluster_sync();  // others may still read this block's shared memory
  }
};

// Whether every token competes, in one choice.
__host__ __device__ inline bool is_plain(const SelectTokensArgs& a) {
  return a.padding == nullptr && a.drawn == nullptr && a.random_fraction == 0 && a.pool_ratio < 0;
}

// Bytes of shared memory for the keys of so many tokens that a block searches.
__host__ __device__ inline size_t held_bytes(int64_t tokens) {
  return static_cast<size_t>((tokens + 3) / 4 * 4) * sizeof(uint32_t);
}

// What select_sample wants of shared memory.
inline size_t select_sample_bytes(int64_t tokens) {
  return sizeof(SelectShared) + held_bytes(tokens);
}

// The blocks of a cluster select the tokens of a sample: each searches all of them, and writes its
// part. So they wait for each other only once, at the end.
__device__ inline void select_sample(const SelectTokensArgs& a, int64_t sample, char* memory) {
  const auto tokens = static_cast<unsigned>(a.tokens);
  const unsigned part = (tokens + cluster_size() - 1) / cluster_size();
  auto* const shared = reinterpret_cast<SelectShared*>(memory);
  auto* const keys = reinterpret_cast<uint32_t*>(shared + 1);
  const RowShare share = {{0, tokens}, part_of_row(tokens, part, cluster_rank())};
  SelectRow<true, false, false>(a, sample, share, shared, keys).run();
  cluster_sync();  // ids can now be read
}

}  // namespace cuda
}  // namespace sma
