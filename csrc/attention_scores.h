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
constexpr int kTileRows = 14;  // 14 x 2 accumulators in 32 registers
#else
constexpr int kTileRows = 6;  // 6 x 2 accumulators in 16 registers
#endif
constexpr int64_t kAheadQueries = 1024;  // rows of queries asked of memory ahead, at most
// Rows of exponentials kept at once: 64, or more while they fit here. More rows than that, of one
// head or of several that share its keys, take several passes over the keys.
constexpr int64_t kRowsAtLeast = 64;
constexpr int64_t kRowsBytes = 16 << 20;
constexpr int64_t kAheadSample = 32 << 10;  // bytes of keys: samples up to here are small
constexpr int64_t kPassBytes = 32 << 10;    // small heads are taken together up to here

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
    for (int j = 0; j < kPanels; ++j) key[j] = load<Vf>(keys + (j * width + d) * kLanes);
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
void logits_rows(const float* queries, const float* keys, int64_t width, int64_t panels, float* out,
                 int64_t out_stride, float* best, Ahead* ahead, int64_t lines) {
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

// The scores of one sample. Every thread of the team makes one, with the same `shared` and its own
// `own`, and calls run().
template <class T>
class SampleScores {
 public:
  SampleScores(const AttentionScoresArgs& args, const ScoresPlan& plan, int64_t sample,
               float* shared, float* own, const Team& team)
      : a(args),
        plan(plan),
        b(sample),
        team(team),
        score_rows(args.reduce == kNone ? args.heads : 1),
        factor((args.scale < 0 ? -args.scale : args.scale) * kLog2e),
        padded(round_up(larger<int64_t>(args.tokens, 1), kLanes)),
        past_caches(plan.rows * padded * 4 >= 2 * kStreamBytes),
        exponents(shared),
        packed_keys(own),
        logits(packed_keys + kChunk * args.width),
        packed_queries(logits + kTileRows * kChunk),
        row_index(reinterpret_cast<int32_t*>(packed_queries + plan.rows * args.width)),
        rows{0, row_index, row_index + plan.rows, row_index + 2 * plan.rows},
        tokens(args.padding == nullptr ? nullptr : args.padding + sample * args.tokens, args.tokens,
               row_index + 3 * plan.rows),  // each thread finds the same
        chunks((tokens.count + kChunk - 1) / kChunk),
        mine(share(chunks, team)),
        my_keys{mine.begin * kChunk, smaller(mine.end * kChunk, tokens.count)} {
    float* rest = exponents + plan.rows * padded;
    float** const arrays[] = {&maxima[0], &maxima[1], &totals[0], &totals[1], &weights};
    for (float** array : arrays) {
      *array = rest;
      rest += plan.chunks * plan.stride;
    }
    sums = reinterpret_cast<double*>(rest);
  }

  void run() {
    for (int64_t h = 0; h < score_rows; ++h)
      for (int64_t n = my_keys.begin; n < round_up(my_keys.end, kLanes); ++n)
        sums[h * padded + n] = 0.0;
    touch_queries(b + 1);
    team.wait();
    for (int64_t g = 0; g < a.kv_heads && tokens.count > 0; g += plan.heads)
      for (int64_t next = 0; collect_rows(g, &next);) {
        stride = round_up(rows.count, kLanes);
        for_each_head([&](int64_t, Range range) {
          for (int64_t i = 0; i < row_groups(range); ++i) {
            const Range group = row_group(range, i);
            pack_queries<T>(a, b, rows, group, packed_queries + group.begin * a.width);
          }
        });
        for (int64_t c = mine.begin; c < mine.end; ++c) multiply_chunk(c);
        if (past_caches) fence();
        team.wait();
        weigh_rows();
        for (int64_t c = mine.begin; c < mine.end; ++c) add_chunk(c);
        parity ^= 1;  // other threads may still read this pass's maxima and totals
      }
    for (int64_t h = 0; h < score_rows; ++h) write_scores(h);
    team.wait();
  }

 private:
  const AttentionScoresArgs& a;
  const ScoresPlan& plan;
  const int64_t b;
  const Team& team;
  const int64_t score_rows;
  const float factor;  // makes exp2 of a logit its exponential, scaled
  const int64_t padded;
  const bool past_caches;
  float* const exponents;        // [chunk][row][key]
  float *maxima[2], *totals[2];  // [chunk][row], one for each parity
  float* weights;                // [chunk][row]
  double* sums;                  // [score row][valid key]
  float *packed_keys, *logits, *packed_queries;
  int32_t* row_index;
  ScoreRows rows;
  const ValidTokens tokens;
  const int64_t chunks;
  const Range mine, my_keys;  // chunks and valid keys of this thread
  int64_t stride = 0;         // of maxima, totals and weights in this pass
  int parity = 0;

  int64_t query_of(int64_t sample, int64_t r) const {
    return a.query_index == nullptr ? r : a.query_index[sample * a.selected + r];
  }

  // Rows of queries lie far apart: those of a later sample are asked of memory ahead.
  void touch_queries(int64_t sample) const {
    if (a.query_strides[0] == 0 || sample >= a.batch) return;
    if (a.heads * a.selected > kAheadQueries) return;
    const T* query = static_cast<const T*>(a.query) + sample * a.query_strides[0];
    for (int64_t r = 0; r < a.selected; ++r) {
      const int64_t m = query_of(sample, r);
      const int64_t from = a.head_index == nullptr ? 0 : a.head_index[sample * a.selected + r];
      const int64_t to = a.head_index == nullptr ? a.heads : from + 1;
      for (int64_t h = from; h < to && m >= 0; ++h)
        for (int64_t d = 0; d < a.width; d += 64 / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(query + h * a.query_strides[1] + m * a.query_strides[2] + d);
    }
  }

  // The next rows of plan.heads key heads from g on, from candidate `next` of their heads times R
  // on. False: none left.
  bool collect_rows(int64_t g, int64_t* next) {
    const int64_t group = a.heads / a.kv_heads;
    const int64_t candidates = (smaller(g + plan.heads, a.kv_heads) - g) * group * a.selected;
    rows.count = 0;
    if (*next >= candidates) return false;
    int64_t head = g * group + *next / a.selected, r = *next % a.selected, key_head = head / group;
    for (; *next < candidates && rows.count < plan.rows; ++*next, ++r) {
      if (r == a.selected) {
        r = 0;
        key_head = ++head / group;
      }
      const int64_t query = query_of(b, r);
      if (query < 0) continue;
      if (a.head_index != nullptr && a.head_index[b * a.selected + r] != head) continue;
      rows.head[rows.count] = static_cast<int32_t>(head);
      rows.key_head[rows.count] = static_cast<int32_t>(key_head);
      rows.query[rows.count++] = static_cast<int32_t>(query);
    }
    return rows.count > 0;
  }

  // Calls body(g, range) for the rows of each key head g in work.
  template <class Body>
  void for_each_head(const Body& body) const {
    for (int64_t r = 0, end; r < rows.count; r = end) {
      for (end = r + 1; end < rows.count && rows.key_head[end] == rows.key_head[r];) ++end;
      body(rows.key_head[r], Range{r, end});
    }
  }

  // What to ask of memory while chunk c of head g is multiplied: the next chunk, or the next head's
  // first one, or the next sample's. Small samples are over before memory answers: they ask for
  // the same chunk and head of the next sample.
  Ahead after(int64_t g, int64_t c) const {
    const int64_t size = static_cast<int64_t>(sizeof(T));
    const bool small = a.kv_heads * tokens.count * a.width * size <= kAheadSample;
    const bool same_head = !small && c + 1 < mine.end;
    const bool same_sample = !small && (same_head || g + 1 < a.kv_heads);
    const int64_t head = same_head || small ? g : same_sample ? g + 1 : 0;
    const T* key = static_cast<const T*>(a.key) + (same_sample ? b : b + 1) * a.key_strides[0] +
                   head * a.key_strides[1];
    const int64_t first = (same_head ? c + 1 : small ? c : mine.begin) * kChunk;
    const bool any = same_sample || b + 1 < a.batch;
    return {reinterpret_cast<const char*>(key),
            same_sample ? tokens.index : nullptr,
            a.key_strides[2] * size,
            a.width * size,
            first,
            any ? smaller(first + kChunk, tokens.count) : 0,
            0};
  }

  // A: exponentials of chunk c against its own maxima, with their sums.
  void multiply_chunk(int64_t c) {
    const int64_t first = c * kChunk, count = smaller(kChunk, tokens.count - first);
    const int64_t keys = round_up(count, kLanes);
    float* best = maxima[parity] + c * stride;
    float* total = totals[parity] + c * stride;
    for_each_head([&](int64_t g, Range range) {
      const T* key = static_cast<const T*>(a.key) + b * a.key_strides[0] + g * a.key_strides[1];
      pack_keys(key, a.key_strides[2], a.key_strides[3], a.width, tokens.index, first, count,
                packed_keys);
      Ahead ahead = after(g, c);
      const int64_t groups = row_groups(range);
      const int64_t lines = (kLanes * ((ahead.row_bytes + 63) / 64) + groups - 1) / groups;
      for (int64_t i = 0; i < groups; ++i) {
        const Range group = row_group(range, i);
        logits_any(group.end - group.begin, packed_queries + group.begin * a.width, packed_keys,
                   a.width, keys / kLanes, logits, keys, best + group.begin, &ahead, lines);
        for (int64_t r = group.begin; r < group.end; ++r)
          total[r] = exponentials(logits + (r - group.begin) * keys, best[r], factor, count,
                                  exponents + first * plan.rows + r * keys, past_caches);
      }
    });
    for (int64_t r = rows.count; r < stride; ++r) best[r] = total[r] = 0.0f;
  }

  // Joins maxima and sums of all chunks into each row's softmax denominator; then the weight of a
  // row's exponentials in each chunk of this thread.
  void weigh_rows() {
    const bool mean = a.reduce == kMean && a.head_index == nullptr;
    const Vf head_weight = splat(mean ? 1.0f / static_cast<float>(a.heads) : 1.0f);
    for (int64_t r = 0; r < stride; r += kLanes) {
      const float *best = maxima[parity] + r, *total = totals[parity] + r;
      Vf top = splat(-kInfinity), sum = {};
      for (int64_t c = 0; c < chunks; ++c) top = maximum(load<Vf>(best + c * stride), top);
      for (int64_t c = 0; c < chunks; ++c)
        sum += load<Vf>(total + c * stride) *
               exp2_nonpositive((load<Vf>(best + c * stride) - top) * factor);
      const Vf share_of_one = head_weight / sum;
      for (int64_t c = mine.begin; c < mine.end; ++c)
        store(weights + c * stride + r,
              exp2_nonpositive((load<Vf>(best + c * stride) - top) * factor) * share_of_one);
    }
  }

  // B: adds the weighted rows of chunk c up, all of them or head by head.
  void add_chunk(int64_t c) {
    const int64_t first = c * kChunk;
    const int64_t keys = round_up(smaller(kChunk, tokens.count - first), kLanes);
    for (int64_t r = 0, end; r < rows.count; r = end) {
      end = rows.count;
      if (a.reduce == kNone)
        for (end = r + 1; end < rows.count && rows.head[end] == rows.head[r];) ++end;
      add_rows(exponents + first * plan.rows + r * keys, keys, end - r, weights + c * stride + r,
               sums + (a.reduce == kNone ? rows.head[r] * padded : 0) + first);
    }
  }

  // Puts the sums of this thread's keys where their tokens stand, zeros where padding stands.
  void write_scores(int64_t h) const {
    float* out = a.scores + (b * score_rows + h) * a.tokens;
    const double* sum = sums + h * padded;
    if (tokens.index == nullptr) {
      for (int64_t n = my_keys.begin; n < my_keys.end; ++n) out[n] = static_cast<float>(sum[n]);
      for (int64_t n = tokens.count; team.id == 0 && n < a.tokens; ++n) out[n] = 0.0f;
      return;
    }
    // padding behind the thread's own keys, up to those of the next thread, is its own too
    if (mine.begin == mine.end) return;
    const int64_t begin = my_keys.begin == 0 ? 0 : tokens.index[my_keys.begin];
    const int64_t end = my_keys.end == tokens.count ? a.tokens : tokens.index[my_keys.end];
    for (int64_t n = begin; n < end; ++n) out[n] = 0.0f;
    for (int64_t n = my_keys.begin; n < my_keys.end; ++n)
      out[tokens.index[n]] = static_cast<float>(sum[n]);
  }
};

inline void score_sample(const AttentionScoresArgs& a, const ScoresPlan& plan, int64_t b,
                         float* shared, float* own, const Team& team) {
  if (a.dtype == kFloat32) SampleScores<float>(a, plan, b, shared, own, team).run();
  else if (a.dtype == kBFloat16) SampleScores<BFloat16>(a, plan, b, shared, own, team).run();
  else SampleScores<Float16>(a, plan, b, shared, own, team).run();
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
    score_sample(a, plan, b, shared, own, team);
  });
}

}  // namespace SMA_ISA
}  // namespace sma
