// Rows of attention scores: how many are kept at once, their queries, exponentials and sums.
#pragma once
#include "logit_tiles.h"

namespace sma {
namespace SMA_ISA {

constexpr int64_t kChunk = 256;  // keys in a chunk: packed, they stay in L2
// Rows of exponentials kept at once: 64, or more while they fit here. More rows than that, of one
// head or of several that share its keys, take several passes over the keys.
constexpr int64_t kRowsAtLeast = 64;
constexpr int64_t kRowsBytes = 16 << 20;
constexpr int64_t kPassBytes = 32 << 10;  // small heads are taken together up to here

// How much scratch a sample takes: `shared` by the team that works on it, `own` by each thread.
struct ScoresPlan {
  int64_t heads;         // key heads taken together
  int64_t rows, stride;  // of exponentials kept at once, and rounded up to whole vectors
  int64_t chunks, shared, own;

  explicit ScoresPlan(const AttentionScoresArgs& a) {
    const int64_t tokens = round_up(larger<int64_t>(a.tokens, 1), kLanes);
    const int64_t fit = larger(kRowsAtLeast, kRowsBytes / (tokens * 4));
    const int64_t group = a.heads / a.kv_heads;
    // rows of a key head: with head_index, as many as it gets of R on average, and R at most
    const int64_t usual =
        a.head_index == nullptr ? group * a.selected : (a.selected + a.kv_heads - 1) / a.kv_heads;
    heads = kPassBytes / larger<int64_t>(usual * tokens * 4, 1);
    heads = larger<int64_t>(1, smaller(heads, a.kv_heads));
    const int64_t wanted = a.head_index == nullptr ? heads * usual : a.selected;
    rows = larger<int64_t>(1, smaller(wanted, fit));
    stride = round_up(rows, kLanes);
    chunks = (tokens + kChunk - 1) / kChunk;
    const int64_t sums = (a.reduce == kNone ? a.heads : 1) * tokens;
    shared = rows * tokens + 5 * chunks * stride + 2 * sums;  // sums are doubles
    own = kChunk * a.width + kTileRows * kChunk + rows * a.width + 3 * rows + tokens;
  }
};

// Selected rows of the key heads in work, head by head: which query of which head, and whose keys.
struct ScoreRows {
  int64_t count;
  int32_t* head;
  int32_t* query;
  int32_t* key_head;
};

// Queries of the rows in `range`, feature by feature, with the sign of the scale: what is left of
// it is positive, and the largest logit stays the largest.
template <class T>
void pack_queries(const AttentionScoresArgs& a, int64_t b, const ScoreRows& rows, Range range,
                  float* out) {
  const float sign = a.scale < 0 ? -1.0f : 1.0f;
  const T* query = static_cast<const T*>(a.query) + b * a.query_strides[0];
  const int64_t size = range.end - range.begin;
  for (int64_t r = range.begin; r < range.end; ++r) {
    const T* from = query + rows.head[r] * a.query_strides[1] + rows.query[r] * a.query_strides[2];
    for (int64_t d = 0; d < a.width; ++d)
      out[d * size + (r - range.begin)] = to_float(from[d * a.query_strides[3]]) * sign;
  }
}

// logits -> exponentials of `factor` times their distance to the row's maximum; returns their sum
// over the first `count`.
inline float exponentials(const float* logits, float best, float factor, int64_t count, float* out,
                          bool past_caches) {
  const Vf top = splat(best > -kInfinity ? best : 0.0f);  // -inf less -inf would be NaN
  Vf sum = {};
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) {
    const Vf e = exp2_nonpositive((load<Vf>(logits + n) - top) * factor);
    sum += e;
    if (past_caches) stream(out + n, e);
    else store(out + n, e);
  }
  if (n < count) {
    Vf e = exp2_nonpositive((load<Vf>(logits + n) - top) * factor);
    e = iota() < splat(static_cast<int32_t>(count - n)) ? e : Vf{};
    sum += e;
    store(out + n, e);
  }
  return reduce_add(sum);
}

// sums[n] += sum over rows of weight[r] * e[r][n]
template <int kWide>
void add_columns(const float* e, int64_t stride, int64_t rows, const float* weight, double* sums) {
  for (int64_t begin = 0; begin < rows; begin += kFloatRows) {
    const int64_t end = smaller(begin + kFloatRows, rows);
    Vf sum[kWide] = {};
    for (int64_t r = begin; r < end; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j)
        sum[j] += splat(weight[r]) * load<Vf>(e + r * stride + j * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < kWide; ++j) add_to(sums + j * kLanes, sum[j]);
  }
}
inline void add_rows(const float* e, int64_t stride, int64_t rows, const float* weight,
                     double* sums) {
  constexpr int kWide = 8;
  int64_t n = 0;
  for (; n + kWide * kLanes <= stride; n += kWide * kLanes)
    add_columns<kWide>(e + n, stride, rows, weight, sums + n);
  for (; n < stride; n += kLanes) add_columns<1>(e + n, stride, rows, weight, sums + n);
}

}  // namespace SMA_ISA
}  // namespace sma
