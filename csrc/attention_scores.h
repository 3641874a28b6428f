// attention_scores: the attention each key receives from the selected queries.
//
// One sample at a time, one key head at a time, in chunks of keys:
//   A  pack the chunk's valid keys so that a vector holds one feature of kLanes keys, multiply with
//      the selected queries in register tiles, exponentiate against the chunk's own maximum;
//   -  join the chunks' maxima and sums into each row's softmax denominator, in chunk order;
//   B  add up the rows of the chunk, each with its weight.
// Keys are read once (kRowsAtLeast says when not). What is kept is R x N exponentials of one head,
// never the (M, N) map.
// Chunks do not depend on the number of threads, so neither do the bits of the result.
#pragma once
#include "cpu/vec.h"

namespace sma {
namespace SMA_ISA {

constexpr int64_t kChunk = 256;  // keys in a chunk: packed, they stay in L2
#if defined(__AVX512F__)
constexpr int kTileRows = 14;    // 14 x 2 accumulators in 32 registers
#else
constexpr int kTileRows = 6;     // 6 x 2 accumulators in 16 registers
#endif
constexpr int64_t kAheadQueries = 1024;  // rows of queries asked of memory ahead, at most
// Rows of exponentials kept at once: 64, or more while they fit here. More rows than that, of one
// head or of several that share its keys, take several passes over the keys.
constexpr int64_t kRowsAtLeast = 64;
constexpr int64_t kRowsBytes = 16 << 20;

// How much scratch a sample takes: `shared` by the team that works on it, `own` by each thread.
struct ScoresPlan {
  int64_t rows, stride, chunks, shared, own;  // stride: rows rounded up to whole vectors

  explicit ScoresPlan(const AttentionScoresArgs& a) {
    const int64_t tokens = round_up(larger<int64_t>(a.tokens, 1), kLanes);
    const int64_t group = a.head_index == nullptr ? a.heads / a.kv_heads : 1;
    const int64_t fit = larger(kRowsAtLeast, kRowsBytes / (tokens * 4));
    rows = larger<int64_t>(1, smaller(group * a.selected, fit));
    stride = round_up(rows, kLanes);
    chunks = (tokens + kChunk - 1) / kChunk;
    const int64_t sums = (a.reduce == kNone ? a.heads : 1) * tokens;
    shared = rows * tokens + 5 * chunks * stride + sums;
    own = kChunk * a.width + kTileRows * kChunk + rows * a.width + 2 * rows + tokens;
  }
};

// Selected rows of one key head: which query, and which head's sum they go to.
struct ScoreRows {
  int64_t count;
  int32_t* head;
  int32_t* query;
};

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

// out[r][n] = q[r] . k[n] for kRows queries and kPanels panels of kLanes keys; best[r] = maximum.
template <int kRows, int kPanels>
inline void logits_tile(const float* queries, const float* keys, int64_t width, float* out,
                        int64_t out_stride, Vf* best) {
  Vf sum[kRows][kPanels] = {};
  for (int64_t d = 0; d < width; ++d) {
    Vf key[kPanels];
#pragma GCC unroll 8
    for (int j = 0; j < kPanels; ++j)
      key[j] = load<Vf>(keys + (j * width + d) * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vf query = splat(queries[d * kRows + i]);
#pragma GCC unroll 8
      for (int j = 0; j < kPanels; ++j) sum[i][j] += query * key[j];
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
void logits_rows(const float* queries, const float* keys, int64_t width, int64_t panels,
                 float* out, int64_t out_stride, float* best, Ahead* ahead, int64_t lines) {
  constexpr int kPanels = kRows * 8 <= 2 * kTileRows ? 8 : kRows * 4 <= 2 * kTileRows ? 4 : 2;
  Vf maxima[kRows];
  for (int i = 0; i < kRows; ++i) maxima[i] = splat(-kInfinity);
  int64_t p = 0;
  for (; p + kPanels <= panels; p += kPanels) {
    ahead->touch(lines * kPanels);
    logits_tile<kRows, kPanels>(queries, keys + p * width * kLanes, width, out + p * kLanes,
                                out_stride, maxima);
  }
  for (; kPanels > 2 && p + 2 <= panels; p += 2) {
    ahead->touch(lines * 2);
    logits_tile<kRows, 2>(queries, keys + p * width * kLanes, width, out + p * kLanes, out_stride,
                          maxima);
  }
  for (; p < panels; ++p) {
    ahead->touch(lines);
    logits_tile<kRows, 1>(queries, keys + p * width * kLanes, width, out + p * kLanes, out_stride,
                          maxima);
  }
  for (int i = 0; i < kRows; ++i) best[i] = reduce_max(maxima[i]);
}

template <int kRows = 1>
void logits_any(int64_t rows, const float* queries, const float* keys, int64_t width,
                int64_t panels, float* out, int64_t out_stride, float* best, Ahead* ahead,
                int64_t lines) {
  if constexpr (kRows < kTileRows)
    if (rows != kRows)
      return logits_any<kRows + 1>(rows, queries, keys, width, panels, out, out_stride, best,
                                   ahead, lines);
  logits_rows<kRows>(queries, keys, width, panels, out, out_stride, best, ahead, lines);
}

// Row groups of nearly equal size, each at most kTileRows.
inline Range row_group(int64_t rows, int64_t group) {
  const int64_t groups = (rows + kTileRows - 1) / kTileRows;
  return {rows * group / groups, rows * (group + 1) / groups};
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

// Queries of each row group, feature by feature, times the factor that makes exp2 a softmax.
template <class T>
void pack_queries(const AttentionScoresArgs& a, int64_t b, const ScoreRows& rows, float* out) {
  const float factor = a.scale * kLog2e;
  const T* query = static_cast<const T*>(a.query) + b * a.query_strides[0];
  for (int64_t g = 0, begin = 0; begin < rows.count; ++g) {
    const Range range = row_group(rows.count, g);
    const int64_t size = range.end - range.begin;
    for (int64_t r = range.begin; r < range.end; ++r) {
      const T* from = query + rows.head[r] * a.query_strides[1] + rows.query[r] * a.query_strides[2];
      for (int64_t d = 0; d < a.width; ++d)
        out[range.begin * a.width + d * size + (r - range.begin)] =
            to_float(from[d * a.query_strides[3]]) * factor;
    }
    begin = range.end;
  }
}

// logits -> exponentials against the row's maximum; returns their sum over the first `count`.
inline float exponentials(const float* logits, float best, int64_t count, float* out,
                          bool past_caches) {
  const Vf top = splat(best > -kInfinity ? best : 0.0f);  // -inf less -inf would be NaN
  Vf sum = {};
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) {
    const Vf e = exp2_nonpositive(load<Vf>(logits + n) - top);
    sum += e;
    if (past_caches) stream(out + n, e);
    else store(out + n, e);
  }
  if (n < count) {
    Vf e = exp2_nonpositive(load<Vf>(logits + n) - top);
    e = iota() < splat(static_cast<int32_t>(count - n)) ? e : Vf{};
    sum += e;
    store(out + n, e);
  }
  return reduce_add(sum);
}

// sums[n] += sum over rows of weight[r] * e[r][n]
inline void add_rows(const float* e, int64_t stride, int64_t rows, const float* weight,
                     float* sums) {
  constexpr int kWide = 8;
  int64_t n = 0;
  for (; n + kWide * kLanes <= stride; n += kWide * kLanes) {
    Vf sum[kWide];
#pragma GCC unroll 8
    for (int j = 0; j < kWide; ++j) sum[j] = load<Vf>(sums + n + j * kLanes);
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j)
        sum[j] += splat(weight[r]) * load<Vf>(e + r * stride + n + j * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < kWide; ++j) store(sums + n + j * kLanes, sum[j]);
  }
  for (; n < stride; n += kLanes) {
    Vf sum = load<Vf>(sums + n);
    for (int64_t r = 0; r < rows; ++r) sum += splat(weight[r]) * load<Vf>(e + r * stride + n);
    store(sums + n, sum);
  }
}

// The scores of sample b. Every thread of the team calls it, with the same `shared` and its `own`.
template <class T>
void score_sample(const AttentionScoresArgs& a, const ScoresPlan& plan, int64_t b, float* shared,
                  float* own, const Team& team) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t score_rows = a.reduce == kNone ? a.heads : 1;
  const int64_t padded = round_up(larger<int64_t>(a.tokens, 1), kLanes);
  float* e = shared;                                           // [chunk][row][key]
  float* maxima[2] = {e + plan.rows * padded, nullptr};        // [chunk][row], one for each parity
  maxima[1] = maxima[0] + plan.chunks * plan.stride;
  float* totals[2] = {maxima[1] + plan.chunks * plan.stride, nullptr};
  totals[1] = totals[0] + plan.chunks * plan.stride;
  float* weights = totals[1] + plan.chunks * plan.stride;      // [chunk][row]
  float* sums = weights + plan.chunks * plan.stride;           // [score row][valid key]
  float* packed_keys = own;
  float* logits = packed_keys + kChunk * a.width;
  float* packed_queries = logits + kTileRows * kChunk;
  int32_t* row_index = reinterpret_cast<int32_t*>(packed_queries + plan.rows * a.width);
  ScoreRows rows = {0, row_index, row_index + plan.rows};
  int32_t* token_index = row_index + 2 * plan.rows;

  const uint8_t* padding = a.padding == nullptr ? nullptr : a.padding + b * a.tokens;
  const ValidTokens tokens(padding, a.tokens, token_index);  // each thread finds the same
  const int64_t valid = tokens.count;
  const int32_t* index = tokens.index;
  const int64_t chunks = (valid + kChunk - 1) / kChunk;
  const Range mine = share(chunks, team);
  const Range own_keys = {mine.begin * kChunk, smaller(mine.end * kChunk, valid)};
  for (int64_t h = 0; h < score_rows; ++h)
    for (int64_t n = own_keys.begin; n < round_up(own_keys.end, kLanes); ++n)
      sums[h * padded + n] = 0.0f;
  const bool past_caches = plan.rows * padded * 4 >= 2 * kStreamBytes;
  const float head_weight = a.reduce == kMean && a.head_index == nullptr ? 1.0f / a.heads : 1.0f;
  team.wait();

  // rows of queries lie far apart: those of the next sample are asked of memory now
  if (a.query_strides[0] != 0 && b + 1 < a.batch && a.heads * a.selected <= kAheadQueries)
    for (int64_t r = 0; r < a.selected; ++r) {
      const int64_t row = (b + 1) * a.selected + r;
      const int64_t query = a.query_index == nullptr ? r : a.query_index[row];
      const int64_t from = a.head_index == nullptr ? 0 : a.head_index[row];
      const int64_t to = a.head_index == nullptr ? a.heads : from + 1;
      for (int64_t h = from; h < to && query >= 0; ++h)
        for (int64_t d = 0; d < a.width; d += 64 / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(static_cast<const T*>(a.query) + (b + 1) * a.query_strides[0] +
                             h * a.query_strides[1] + query * a.query_strides[2] + d);
    }

  int parity = 0;
  for (int64_t g = 0; g < a.kv_heads && valid > 0; ++g) {
    const T* key = static_cast<const T*>(a.key) + b * a.key_strides[0] + g * a.key_strides[1];
    int64_t next = 0;  // of the group * R candidates of this key head
    while (next < group * a.selected) {
      rows.count = 0;
      for (; next < group * a.selected && rows.count < plan.rows; ++next) {
        const int64_t head = g * group + next / a.selected, r = next % a.selected;
        const int64_t query = a.query_index == nullptr ? r : a.query_index[b * a.selected + r];
        if (query < 0) continue;
        if (a.head_index != nullptr && a.head_index[b * a.selected + r] != head) continue;
        rows.head[rows.count] = static_cast<int32_t>(head);
        rows.query[rows.count++] = static_cast<int32_t>(query);
      }
      if (rows.count == 0) continue;
      const int64_t stride = round_up(rows.count, kLanes);  // of maxima, totals and weights
      pack_queries<T>(a, b, rows, packed_queries);

      for (int64_t c = mine.begin; c < mine.end; ++c) {
        const int64_t first = c * kChunk, count = smaller(kChunk, valid - first);
        const int64_t panels = (count + kLanes - 1) / kLanes;
        pack_keys(key, a.key_strides[2], a.key_strides[3], a.width, index, first, count,
                  packed_keys);
        const int64_t size = static_cast<int64_t>(sizeof(T));
        Ahead ahead = {reinterpret_cast<const char*>(key), index, a.key_strides[2] * size,
                       a.width * size, (c + 1) * kChunk, smaller((c + 2) * kChunk, valid), 0};
        if (c + 1 == mine.end) {  // the first chunk of the next head, or of the next sample
          const bool same = g + 1 < a.kv_heads;
          ahead.keys = reinterpret_cast<const char*>(
              same ? key + a.key_strides[1]
                   : static_cast<const T*>(a.key) + (b + 1) * a.key_strides[0]);
          if (!same) ahead.index = nullptr;
          ahead.row = mine.begin * kChunk;
          ahead.end = same || b + 1 < a.batch ? smaller(ahead.row + kChunk, valid) : 0;
        }
        const int64_t groups = (rows.count + kTileRows - 1) / kTileRows;
        const int64_t lines = (kLanes * ((a.width * size + 63) / 64) + groups - 1) / groups;
        for (int64_t begin = 0, i = 0; begin < rows.count; ++i) {
          const Range range = row_group(rows.count, i);
          const int64_t group_rows = range.end - range.begin;
          float* best = maxima[parity] + c * stride + range.begin;
          logits_any(group_rows, packed_queries + range.begin * a.width, packed_keys, a.width, panels,
                     logits, panels * kLanes, best, &ahead, lines);
          for (int64_t r = 0; r < group_rows; ++r)
            totals[parity][c * stride + range.begin + r] = exponentials(
                logits + r * panels * kLanes, best[r], count,
                e + first * plan.rows + (range.begin + r) * panels * kLanes, past_caches);
          begin = range.end;
        }
        for (int64_t r = rows.count; r < stride; ++r)
          maxima[parity][c * stride + r] = totals[parity][c * stride + r] = 0.0f;
      }
      if (past_caches) fence();
      team.wait();

      for (int64_t r = 0; r < stride; r += kLanes) {
        Vf top = splat(-kInfinity), total = {};
        for (int64_t c = 0; c < chunks; ++c)
          top = maximum(load<Vf>(maxima[parity] + c * stride + r), top);
        for (int64_t c = 0; c < chunks; ++c)
          total += load<Vf>(totals[parity] + c * stride + r) *
                   exp2_nonpositive(load<Vf>(maxima[parity] + c * stride + r) - top);
        const Vf factor = splat(head_weight) / total;
        for (int64_t c = mine.begin; c < mine.end; ++c)
          store(weights + c * stride + r,
                exp2_nonpositive(load<Vf>(maxima[parity] + c * stride + r) - top) * factor);
      }
      for (int64_t c = mine.begin; c < mine.end; ++c) {
        const int64_t first = c * kChunk;
        const int64_t keys = round_up(smaller(kChunk, valid - first), kLanes);
        for (int64_t r = 0, end; r < rows.count; r = end) {
          end = rows.count;
          if (a.reduce == kNone)
            for (end = r + 1; end < rows.count && rows.head[end] == rows.head[r];) ++end;
          add_rows(e + first * plan.rows + r * keys, keys, end - r, weights + c * stride + r,
                   sums + (a.reduce == kNone ? rows.head[r] * padded : 0) + first);
        }
      }
      parity ^= 1;
    }
  }

  for (int64_t h = 0; h < score_rows; ++h) {
    float* out = a.scores + (b * score_rows + h) * a.tokens;
    const float* sum = sums + h * padded;
    if (index == nullptr) {
      for (int64_t n = own_keys.begin; n < own_keys.end; ++n) out[n] = sum[n];
      for (int64_t n = valid; team.id == 0 && n < a.tokens; ++n) out[n] = 0.0f;  // padding
      continue;
    }
    // padding behind the thread's own keys, up to those of the next thread, is its own too
    if (mine.begin == mine.end) continue;
    const int64_t begin = own_keys.begin == 0 ? 0 : index[own_keys.begin];
    const int64_t end = own_keys.end == valid ? a.tokens : index[own_keys.end];
    for (int64_t n = begin; n < end; ++n) out[n] = 0.0f;
    for (int64_t n = own_keys.begin; n < own_keys.end; ++n) out[index[n]] = sum[n];
  }
  team.wait();
}

inline void score_sample_of(const AttentionScoresArgs& a, const ScoresPlan& plan, int64_t b,
                            float* shared, float* own, const Team& team) {
  if (a.dtype == kFloat32) score_sample<float>(a, plan, b, shared, own, team);
  else if (a.dtype == kBFloat16) score_sample<BFloat16>(a, plan, b, shared, own, team);
  else score_sample<Float16>(a, plan, b, shared, own, team);
}

// Threads take a sample each where there are enough, else all work on one sample together.
inline bool share_samples(int64_t batch, int64_t chunks, int threads) {
  return threads > 1 && (batch < threads || (batch < 4 * threads && chunks >= 8 * threads));
}

// Calls body(b, shared, own, team) for every sample.
template <class Body>
void for_each_sample(const AttentionScoresArgs& a, const ScoresPlan& plan, const Body& body) {
  const int64_t work = a.batch * a.kv_heads * a.tokens * a.width;
  const int threads = threads_for(work, a.threads);
  const bool together = share_samples(a.batch, plan.chunks, threads);
  const int64_t shared_size = round_up(plan.shared, 64), own_size = round_up(plan.own, 64);
  const Scratch<float> shared(shared_size * (together ? 1 : threads));
  const Scratch<float> own(own_size * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int id = omp_get_thread_num(), count = omp_get_num_threads();
    if (together) {
      for (int64_t b = 0; b < a.batch; ++b)
        body(b, shared.get(), own.get() + id * own_size, Team{id, count});
    } else {
      const int64_t run = larger<int64_t>(1, a.batch / (count * 16));  // of neighbours in memory
#pragma omp for schedule(dynamic, run)
      for (int64_t b = 0; b < a.batch; ++b)
        body(b, shared.get() + id * shared_size, own.get() + id * own_size, Team{0, 1});
    }
  }
}

inline void attention_scores(const AttentionScoresArgs& a) {
  if (a.batch == 0 || a.tokens == 0) return;
  const ScoresPlan plan(a);
  for_each_sample(a, plan, [&](int64_t b, float* shared, float* own, const Team& team) {
    score_sample_of(a, plan, b, shared, own, team);
  });
}

}  // namespace SMA_ISA
}  // namespace sma
