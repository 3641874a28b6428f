// The k largest of integer keys, found without sorting: a bisection counts how many lie above the
// middle (kLanes at a time) and keeps only the candidates that are still in doubt.
#pragma once
#include "cpu/vec.h"

namespace sma {
namespace SMA_ISA {

struct Bounds {
  int32_t low, high;
};

inline Bounds bounds(const int32_t* keys, int64_t count) {  // count > 0
  const int64_t whole = count / kLanes * kLanes;
  Bounds b = {keys[0], keys[0]};
  if (whole > 0) {
    Vi low = load<Vi>(keys), high = low;
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vi k = load<Vi>(keys + i);
      low = k < low ? k : low;
      high = k > high ? k : high;
    }
    for (int j = 0; j < kLanes; ++j) {
      b.low = smaller<int32_t>(b.low, low[j]);
      b.high = larger<int32_t>(b.high, high[j]);
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    b.low = smaller(b.low, keys[i]);
    b.high = larger(b.high, keys[i]);
  }
  return b;
}

inline int64_t count_above(const int32_t* keys, int64_t count, int32_t pivot) {
  const Vi p = splat(pivot);
  int64_t total = 0, i = 0;
  while (i + kLanes <= count) {
    const int64_t stop = smaller(count, i + (int64_t{1} << 24));  // a lane counts to 2^24 at most
    Vi sum{};
    for (; i + kLanes <= stop; i += kLanes) sum -= load<Vi>(keys + i) > p;
    for (int j = 0; j < kLanes; ++j) total += sum[j];
    if (stop == count) break;
  }
  for (; i < count; ++i) total += keys[i] > pivot;
  return total;
}

// Keeps the keys in the range, in any order; `out` may be `keys`. Returns how many, and adds to
// `above` how many lie higher.
inline int64_t keep_between(const int32_t* keys, int64_t count, Bounds range, int32_t* out,
                            int64_t* above) {
  int64_t kept = 0, i = 0, higher = 0;
#if defined(__AVX512F__)
  const __m512i lo = _mm512_set1_epi32(range.low), hi = _mm512_set1_epi32(range.high);
  for (; i + 16 <= count; i += 16) {
    const __m512i k = _mm512_loadu_si512(keys + i);
    const __mmask16 over = _mm512_cmpgt_epi32_mask(k, hi);
    const __mmask16 in = _mm512_cmpge_epi32_mask(k, lo) & static_cast<__mmask16>(~over);
    higher += __builtin_popcount(over);
    _mm512_storeu_si512(out + kept, _mm512_maskz_compress_epi32(in, k));
    kept += __builtin_popcount(in);
  }
#endif
  for (; i < count; ++i) {
    const int32_t k = keys[i];
    out[kept] = k;
    kept += (k >= range.low) & (k <= range.high);
    higher += k > range.high;
  }
  *above += higher;
  return kept;
}

// The k-th largest key, how many keys equal it, and how many of those belong to the k largest.
struct Threshold {
  int32_t key;
  int64_t equal, wanted;
};

// What bisection still has to look at: the k-th largest lies within `range`, `above` keys lie
// higher and `from_low` keys lie in it or higher. `keys` holds all of the range and perhaps others,
// but `left_out` of those above are not in it.
struct InDoubt {
  Bounds range;
  int64_t above, from_low;
  const int32_t* keys;
  int64_t count, left_out;
};

inline Threshold bisect(InDoubt d, int64_t k, int32_t* work) {
  while (d.range.low < d.range.high) {
    const int32_t middle =
        static_cast<int32_t>((static_cast<int64_t>(d.range.low) + d.range.high) >> 1);
    const int64_t higher = d.left_out + count_above(d.keys, d.count, middle);
    if (higher >= k) {
      d.range.low = middle + 1;
      d.from_low = higher;
    } else {
      d.range.high = middle;
      d.above = higher;
    }
    if (2 * (d.from_low - d.above) <= d.count) {
      int64_t dropped = 0;
      d.count = keep_between(d.keys, d.count, d.range, work, &dropped);
      d.keys = work;
      d.left_out = d.above;
    }
  }
  return {d.range.low, d.from_low - d.above, k - d.above};
}

// 0 < k <= count. `work` holds count + kLanes keys.
inline Threshold kth_largest(const int32_t* keys, int64_t count, int64_t k, int32_t* work) {
  return bisect({bounds(keys, count), 0, count, keys, count, 0}, k, work);
}

constexpr int64_t kRankedRow = 48;  // up to here comparing all pairs is faster than bisection

// The same as flag_largest, by counting for each key how many stand before it. `keys` and `flags`
// have room for kLanes more.
inline void flag_by_rank(int32_t* keys, int64_t count, int64_t k, uint8_t* flags) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vi mine = load<Vi>(keys + i), place = iota() + static_cast<int32_t>(i);
    Vi rank{};
    for (int64_t j = 0; j < i; ++j) rank -= splat(keys[j]) >= mine;
    for (int64_t j = i; j < smaller(i + kLanes, count); ++j)
      rank -= (splat(keys[j]) > mine) |
              ((splat(keys[j]) == mine) & (splat(static_cast<int32_t>(j)) < place));
    for (int64_t j = i + kLanes; j < count; ++j) rank -= splat(keys[j]) > mine;
    const Vi chosen = rank < splat(static_cast<int32_t>(k));
    for (int j = 0; j < kLanes; ++j) flags[i + j] = static_cast<uint8_t>(chosen[j] & 1);
  }
}

// flags[i] = 1 for the keys above the threshold and for the first `wanted` that equal it, less
// which `wanted` is left.
inline void flag_above(const int32_t* keys, int64_t count, const Threshold& t, int64_t* wanted,
                       uint8_t* flags) {
  if (t.equal == t.wanted) {  // no key that equals it is left out
    for (int64_t i = 0; i < count; ++i) flags[i] = keys[i] >= t.key;
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool tie = keys[i] == t.key && *wanted > 0;
    *wanted -= tie;
    flags[i] = (keys[i] > t.key) | tie;
  }
}

// flags[i] = 1 for the k largest keys, ties to the lowest index, else 0. Arrays have room for
// kLanes more.
inline void flag_largest(int32_t* keys, int64_t count, int64_t k, int32_t* work, uint8_t* flags) {
  if (k <= 0 || k >= count) {
    memset(flags, k <= 0 ? 0 : 1, count);
    return;
  }
  if (count <= kRankedRow) return flag_by_rank(keys, count, k, flags);
  const Threshold t = kth_largest(keys, count, k, work);
  int64_t wanted = t.wanted;
  flag_above(keys, count, t, &wanted, flags);
}

}  // namespace SMA_ISA
}  // namespace sma
