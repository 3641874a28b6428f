// The attention scores of one sample, by a thread or by several.
#pragma once
#include "score_rows.h"

namespace sma {
namespace SMA_ISA {

constexpr int64_t kAheadQueries = 1024;     // rows of queries asked of memory ahead, at most
constexpr int64_t kAheadSample = 32 << 10;  // bytes of keys: samples up to here are small

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
    return a.query_index == nullptr ? r : a.query_index[sample * a.index_stride + r];
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

}  // namespace SMA_ISA
}  // namespace sma
