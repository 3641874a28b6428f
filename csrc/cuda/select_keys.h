// The keys of one row of scores, and what stands in their place for tokens without one.
//
// What a block keeps of the row, a key for each token, lies in shared memory where it fits; else
// keys are made from the scores each time, and what is known of a token lies in the mask; where
// there is none, only padding is known.
#pragma once
#include <cstddef>

#include "../args.h"
#include "grid_sync.h"
#include "numbers.h"

namespace sma {
namespace cuda {

constexpr int kBinBits = 10;
constexpr unsigned kBins = 1u << kBinBits;
constexpr unsigned kFewKeys = 128;  // so many are compared each with each
constexpr unsigned kMostWarps = 32;
constexpr unsigned kReads = 8;   // scores that a thread has on their way,
constexpr unsigned kCounts = 4;  // and keys

// Unsigned integers in the order of the scores times `sign`; NaN counts as -inf, and -0 is 0.
__device__ inline uint32_t ordered_key(float x, float sign) {
  const float value = fmaxf(fmaf(x, sign, 0.0f), -__builtin_huge_valf());
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
constexpr uint32_t kLastKey = 0x007FFFFFu;   // of -inf
constexpr uint32_t kFirstKey = 0xFF800000u;  // of +inf
constexpr uint32_t kNoKey = 0xFFFFFFFEu;     // above all that compete

// Calls body with a row's numbers as what they are: float32, bfloat16 or float16.
template <class Body>
__device__ inline void with_type(const void* values, int dtype, const Body& body) {
  if (dtype == kFloat32) body(static_cast<const float*>(values));
  else if (dtype == kBFloat16) body(static_cast<const BFloat16*>(values));
  else body(static_cast<const Float16*>(values));
}

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

// In shared memory. What other blocks that search the same row read stands first, up to `total`.
struct alignas(16) SelectShared {
  uint32_t bins[kBins];
  uint32_t few[kFewKeys];  // keys in doubt, of this block
  unsigned few_count;
  uint32_t low, high;                 // of this block's competing keys
  unsigned competing;                 // how many
  RowCounts part;                     // this block's
  alignas(16) uint32_t total[kBins];  // of the bins of all these blocks
  uint32_t all[kFewKeys];             // keys in doubt, of all
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

// Who searches a row: each block the whole of it by itself, or each of the blocks of a cluster a
// part; or so of a grid that is launched together, for GPUs without clusters. There the blocks of
// all rows wait together, so each row's as often as any other's.
enum Search : int { kAlone, kCluster, kGrid };

// What this block does for a row: it is one of several that write a part each. Those that search
// the row together search what they write.
struct RowShare {
  unsigned rank, blocks;
  Span searched, written;
};

// What a block has found so far, for the other blocks of its row to read: the first of SelectShared
// in global memory, in two places by turns. So a block may write the one while others read the
// other.
constexpr size_t kFoundBytes = offsetof(SelectShared, total);
static_assert(kFoundBytes % sizeof(uint4) == 0, "copied in words of 16 bytes");
// Of a row, at most; they lie where its ids_restore is written in the end, from 16 bytes on.
constexpr int64_t found_bytes(int64_t blocks) {
  return static_cast<int64_t>(2 * kFoundBytes) * blocks + 16;
}

// Bytes of shared memory for the keys of so many tokens that a block searches.
__host__ __device__ inline size_t held_bytes(int64_t tokens) {
  return static_cast<size_t>((tokens + 3) / 4 * 4) * sizeof(uint32_t);
}

// kHeld: keys lie in shared memory. kPlain: every token competes, in one choice: no padding,
// nothing drawn, no random share, no pool.
template <bool kHeld_, bool kPlain_, Search kSearch_>
class RowKeys {
 public:
  static constexpr bool kHeld = kHeld_, kPlain = kPlain_;
  static constexpr Search kSearch = kSearch_;

  // keys: place for those that are searched, see held_bytes; null unless held.
  __device__ RowKeys(const SelectTokensArgs& args, int64_t sample, const RowShare& share,
                     SelectShared* shared, uint32_t* keys)
      : a(args),
        b(sample),
        row(sample * args.tokens),
        begin(share.searched.begin),
        size(share.searched.end - share.searched.begin),
        s(*shared),
        share(share),
        keys(keys) {}

  const SelectTokensArgs& a;
  const int64_t b, row;        // the sample, and the place of its first token
  const unsigned begin, size;  // what is searched; from here on tokens count from `begin`
  SelectShared& s;
  const RowShare share;

  // The blocks that search together.
  __device__ unsigned blocks() const { return kSearch == kAlone ? 1 : share.blocks; }
  // From here on what each of them has found can be read `there`, until it is done_reading.
  __device__ void publish() {
    if constexpr (kSearch == kAlone) __syncthreads();
    if constexpr (kSearch == kCluster) cluster_sync();
    if constexpr (kSearch == kGrid) {
      __syncthreads();
      second = !second;
      auto* const to = reinterpret_cast<uint4*>(found_by(share.rank));
      for (unsigned i = threadIdx.x; i < kFoundBytes / sizeof(uint4); i += blockDim.x)
        to[i] = reinterpret_cast<const uint4*>(&s)[i];
      grid_sync();
    }
  }
  __device__ void done_reading() const {
    if constexpr (kSearch == kCluster) cluster_sync();
    else __syncthreads();
  }
  template <class T>
  __device__ T* there(T* shared, unsigned rank) const {
    if constexpr (kSearch == kAlone) return shared;
    if constexpr (kSearch == kCluster) return cluster_map(shared, rank);
    if constexpr (kSearch == kGrid)
      return reinterpret_cast<T*>(found_by(rank) +
                                  (reinterpret_cast<char*>(shared) - reinterpret_cast<char*>(&s)));
  }

  __device__ void set_mark(unsigned i, uint32_t mark) const {
    if constexpr (kHeld) keys[i] = mark;
    else marks()[i] = static_cast<uint8_t>(mark);
  }
  // A token's key, or the mark that stands in its place.
  __device__ uint32_t key_of(unsigned i) const {
    if constexpr (kHeld) return keys[i];
    else return made_key(mark(i), value(i));
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
    if (kPlain || (!kHeld && a.mask == nullptr)) return;
    const uint8_t* const padding = padding_bytes();
    for (unsigned i = threadIdx.x; i < size; i += blockDim.x)
      set_mark(i, padding != nullptr && padding[i] ? kPadding : kCompetes);
    __syncthreads();
    if (a.drawn == nullptr) return;
    for (int64_t i = threadIdx.x; i < a.drawn_width; i += blockDim.x) {
      const int64_t token = a.drawn[b * a.drawn_stride + i] - begin;
      if (token >= 0 && token < size && (padding == nullptr || !padding[token]))
        set_mark(static_cast<unsigned>(token), kDrawn);
    }
    __syncthreads();
  }

  // Makes keys of the competing tokens; returns how many the row has.
  __device__ unsigned read_keys(const void* all_values, int all_dtype, float all_sign) {
    const int64_t size_of_one = all_dtype == kFloat32 ? 4 : 2;
    values = hoisted(static_cast<const char*>(all_values) + (row + begin) * size_of_one);
    dtype = all_dtype;
    sign = all_sign;
    uint32_t low = kNoKey, high = 0;
    unsigned competing = 0;
    const auto take = [&](unsigned i, float value) {
      const uint32_t key = made_key(mark(i), value);
      const bool competes = kPlain || (key >= kLastKey && key != kTaken);
      low = min(low, competes ? key : kNoKey);
      high = max(high, competes ? key : 0);
      if constexpr (!kPlain) competing += competes;
      return key;
    };
    if (is_in_fours()) read_in_fours(take);
    else read_one_by_one(take);
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
    publish();
    if constexpr (kPlain) return static_cast<unsigned>(a.tokens);
    const bool is_block = lane() < blocks();
    return __reduce_add_sync(kAllLanes, is_block ? *there(&s.competing, lane()) : 0);
  }

 private:
  uint32_t* const keys;
  bool second = false;           // which of the two places was published last
  const char* values = nullptr;  // what the keys are made of,
  int dtype = kFloat32;          // of this type,
  float sign = 1.0f;             // times this

  __device__ char* found_by(unsigned rank) const {
    const auto row_begin = reinterpret_cast<uintptr_t>(a.ids_restore + row);
    char* const first = reinterpret_cast<char*>((row_begin + 15) / 16 * 16);
    return first + (rank * 2 + second) * kFoundBytes;
  }
  __device__ const uint8_t* padding_bytes() const {
    return a.padding == nullptr ? nullptr : a.padding + row + begin;
  }
  __device__ uint8_t* marks() const { return a.mask + row + begin; }  // unless held
  __device__ uint32_t mark(unsigned i) const {
    if constexpr (kPlain) return kCompetes;
    else if constexpr (kHeld) return keys[i];
    else if (a.mask == nullptr)
      return a.padding != nullptr && padding_bytes()[i] ? kPadding : kCompetes;
    else return static_cast<uint32_t>(static_cast<int8_t>(marks()[i]));
  }
  __device__ float value(unsigned i) const {
    float x;
    with_type(values, dtype, [&](const auto* from) { x = to_float(from[i]); });
    return x;
  }
  // Whether four values can be read at once, and their keys written.
  __device__ bool is_in_fours() const {
    return kHeld && kPlain && dtype == kFloat32 && size % 4 == 0 &&
           reinterpret_cast<uintptr_t>(values) % sizeof(float4) == 0;
  }
  // Keeps take(i, value) of all that is searched.
  template <class Take>
  __device__ void read_in_fours(const Take& take) const {
    constexpr unsigned kFours = 4;  // that a thread has on their way
    const auto* const from = reinterpret_cast<const float4*>(values);
    for (unsigned first = threadIdx.x; first < size / 4; first += blockDim.x * kFours) {
      float4 four[kFours];
#pragma unroll
      for (unsigned j = 0; j < kFours; ++j)
        if (first + j * blockDim.x < size / 4) four[j] = from[first + j * blockDim.x];
#pragma unroll
      for (unsigned j = 0; j < kFours; ++j) {
        const unsigned i = first + j * blockDim.x;
        if (i >= size / 4) break;
        reinterpret_cast<uint4*>(keys)[i] = {take(4 * i, four[j].x), take(4 * i + 1, four[j].y),
                                             take(4 * i + 2, four[j].z),
                                             take(4 * i + 3, four[j].w)};
      }
    }
  }
  template <class Take>
  __device__ void read_one_by_one(const Take& take) const {
    constexpr unsigned kOfWarp = kReads * kWarp;
    for (unsigned start = warp() * kOfWarp; start < size; start += blockDim.x * kReads) {
      const unsigned first = start + lane();
      float number[kReads];
      with_type(values, dtype, [&](const auto* from) {
#pragma unroll
        for (unsigned j = 0; j < kReads; ++j)
          number[j] = first + j * kWarp < size ? to_float(from[first + j * kWarp]) : 0.0f;
      });
#pragma unroll
      for (unsigned j = 0; j < kReads; ++j) {
        const unsigned i = first + j * kWarp;
        if (i >= size) break;
        const uint32_t key = take(i, number[j]);
        if constexpr (kHeld) keys[i] = key;
      }
    }
  }
  __device__ uint32_t made_key(uint32_t mark, float value) const {
    const uint32_t key = ordered_key(value, sign);
    if constexpr (kPlain) return key;
    else return mark == kCompetes ? key : mark == kDrawn ? kFirstKey : mark;
  }
};

}  // namespace cuda
}  // namespace sma
