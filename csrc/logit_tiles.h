// Products of rows of queries with keys, in tiles of registers: keys are packed so that a vector
// holds one feature of kLanes of them.
#pragma once
#include "cpu/vec.h"

namespace sma {
namespace SMA_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;  // 14 x 2 accumulators in 32 registers
#else
constexpr int kTileRows = 6;  // 6 x 2 accumulators in 16 registers
#endif

// Rows of keys that are packed next: touched line by line between register tiles, so that they come
// in from memory while this chunk is multiplied.
struct Ahead {
  const char* keys;      // of the head they belong to
  const int32_t* index;  // which rows, or null: all in order
  int64_t row_stride, row_bytes, row, end, offset;

  void touch(int64_t lines) {
    for (; lines > 0 && row < end; --lines) {
      __builtin_prefetch(keys + (index == nullptr ? row : index[row]) * row_stride + offset, 0, 2);
      offset += 64;
      if (offset >= row_bytes) {
        offset = 0;
        ++row;
      }
    }
  }
};

// Lines that a tile asks for, some of them every kAskEvery features: a core that is asked for more
// than it can have on their way stops.
constexpr int64_t kAskEvery = 4;
struct Asked {
  int64_t lines, some;
};

// out[r][n] = q[r] . k[n] for kRows queries and kPanels panels of kLanes keys; best[r] = maximum.
template <int kRows, int kPanels>
inline void logits_tile(const float* queries, const float* keys, int64_t width, float* out,
                        int64_t out_stride, Vf* best, Ahead* ahead, Asked asked) {
  Vf sum[kRows][kPanels] = {};
  for (int64_t begin = 0; begin < width; begin += kAskEvery) {
    ahead->touch(smaller(asked.some, asked.lines));
    asked.lines -= asked.some;
    const int64_t end = smaller(begin + kAskEvery, width);
    for (int64_t d = begin; d < end; ++d) {
      Vf key[kPanels];
#pragma GCC unroll 8
      for (int j = 0; j < kPanels; ++j) key[j] = load<Vf>(keys + (j * width + d) * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vf query = splat(queries[d * kRows + i]);
#pragma GCC unroll 8
        for (int j = 0; j < kPanels; ++j) sum[i][j] += query * key[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kPanels; ++j) {
      store(out + i * out_stride + j * kLanes, sum[i][j]);
      best[i] = maximum(sum[i][j], best[i]);
    }
}

template <int kRows>
void logits_rows(const float* queries, const float* keys, int64_t width, int64_t panels, float* out,
                 int64_t out_stride, float* best, Ahead* ahead, int64_t lines) {
  constexpr int kPanels = kRows * 8 <= 2 * kTileRows ? 8 : kRows * 4 <= 2 * kTileRows ? 4 : 2;
  Vf maxima[kRows];
  for (int i = 0; i < kRows; ++i) maxima[i] = splat(-kInfinity);
  const auto asked = [&](int panels) {
    const int64_t all = lines * panels;
    return Asked{all, all * kAskEvery / larger<int64_t>(width, 1) + 1};
  };
  const Asked many = asked(kPanels), two = asked(2), one = asked(1);
  int64_t p = 0;
  for (; p + kPanels <= panels; p += kPanels)
    logits_tile<kRows, kPanels>(queries, keys + p * width * kLanes, width, out + p * kLanes,
                                out_stride, maxima, ahead, many);
  for (; kPanels > 2 && p + 2 <= panels; p += 2)
    logits_tile<kRows, 2>(queries, keys + p * width * kLanes, width, out + p * kLanes, out_stride,
                          maxima, ahead, two);
  for (; p < panels; ++p)
    logits_tile<kRows, 1>(queries, keys + p * width * kLanes, width, out + p * kLanes, out_stride,
                          maxima, ahead, one);
  for (int i = 0; i < kRows; ++i) best[i] = reduce_max(maxima[i]);
}

template <int kRows = 1>
void logits_any(int64_t rows, const float* queries, const float* keys, int64_t width,
                int64_t panels, float* out, int64_t out_stride, float* best, Ahead* ahead,
                int64_t lines) {
  if constexpr (kRows < kTileRows)
    if (rows != kRows)
      return logits_any<kRows + 1>(rows, queries, keys, width, panels, out, out_stride, best, ahead,
                                   lines);
  logits_rows<kRows>(queries, keys, width, panels, out, out_stride, best, ahead, lines);
}

// Row groups of nearly equal size, each at most kTileRows.
inline int64_t row_groups(Range rows) {
  return (rows.end - rows.begin + kTileRows - 1) / kTileRows;
}
inline Range row_group(Range rows, int64_t group) {
  const Range part = share(rows.end - rows.begin,
                           Team{static_cast<int>(group), static_cast<int>(row_groups(rows))});
  return {rows.begin + part.begin, rows.begin + part.end};
}

// keys of one chunk -> panels of kLanes keys, feature by feature: out[panel][d][lane].
// Lanes behind the last key repeat it, so that they cannot change a maximum.
template <class T>
void pack_keys(const T* key, int64_t token_stride, int64_t width_stride, int64_t width,
               const int32_t* index, int64_t first, int64_t count, float* out) {
  for (int64_t p = 0; p < count; p += kLanes, out += width * kLanes) {
    const T* lane[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t n = first + smaller<int64_t>(p + i, count - 1);
      lane[i] = key + (index == nullptr ? n : index[n]) * token_stride;
    }
    int64_t d = 0;
    if (width_stride == 1)
      for (; d + kLanes <= width; d += kLanes) {
        Vf rows[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = load_floats(lane[i] + d);
        transpose_store(rows, out + d * kLanes);
      }
    for (; d < width; ++d)
      for (int i = 0; i < kLanes; ++i) out[d * kLanes + i] = to_float(lane[i][d * width_stride]);
  }
}

}  // namespace SMA_ISA
}  // namespace sma
