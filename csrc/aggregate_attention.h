// aggregate_attention: the attention each key receives, from a map that already exists.
//
// Logits need two passes over a row: its maximum and sum, then the weighted exponentials. Plain
// attention needs the second pass only. Columns are shared among threads.
#pragma once
#include "attention_scores.h"

namespace sma {
namespace SMA_ISA {

template <class T>
inline Vf load_strided(const T* p, int64_t stride, int64_t count) {
  if (stride == 1 && count >= kLanes) return load_floats(p);
  Vf v{};
  for (int64_t i = 0; i < smaller<int64_t>(count, kLanes); ++i) v[i] = to_float(p[i * stride]);
  return v;
}

// Maximum and sum of e^(logit - maximum) over a row of logits.
struct RowSum {
  float top, total;
};

template <class T>
RowSum row_sum(const T* row, int64_t stride, Range keys) {
  Vf best = splat(-kInfinity);
  for (int64_t n = keys.begin; n < keys.end; n += kLanes) {
    Vf v = load_strided(row + n * stride, stride, keys.end - n);
    if (keys.end - n < kLanes)
      v = iota() < splat(static_cast<int32_t>(keys.end - n)) ? v : splat(-kInfinity);
    best = maximum(v, best);
  }
  const float top = reduce_max(best);
  const Vf shift = splat(top > -kInfinity ? top : 0.0f);
  Vf sum = {};
  for (int64_t n = keys.begin; n < keys.end; n += kLanes) {
    Vf e =
        exp2_nonpositive((load_strided(row + n * stride, stride, keys.end - n) - shift) * kLog2e);
    if (keys.end - n < kLanes) e = iota() < splat(static_cast<int32_t>(keys.end - n)) ? e : Vf{};
    sum += e;
  }
  return {top, reduce_add(sum)};
}

template <class T>
void aggregate_attention_of(const AggregateAttentionArgs& a) {
  const int64_t out_rows = a.reduce == kNone ? a.heads : 1;
  const int64_t candidates = a.heads * a.selected;
  const float head_weight = a.reduce == kMean && a.head_index == nullptr ? 1.0f / a.heads : 1.0f;
  const int64_t blocks = (a.tokens + kChunk - 1) / kChunk;
  const Scratch<RowSum> sums(a.logits ? a.batch * candidates : 1);
  const int threads = threads_for(a.batch * candidates * a.tokens, a.threads);

  const auto row_of = [&](int64_t b, int64_t i) -> const T* {  // null where nothing is selected
    const int64_t head = i / a.selected, r = i % a.selected;
    const int64_t query = a.query_index == nullptr ? r : a.query_index[b * a.index_stride + r];
    if (query < 0) return nullptr;
    if (a.head_index != nullptr && a.head_index[b * a.selected + r] != head) return nullptr;
    return static_cast<const T*>(a.attention) + b * a.strides[0] + head * a.strides[1] +
           query * a.strides[2];
  };
  // Adds the candidates from `first` on up, for a chunk of keys.
  const auto add_columns = [&](int64_t b, int64_t first, int64_t end, Range keys, float* out) {
    double total[kChunk] = {};
    float part[kChunk] = {};
    int64_t added = 0;
    const int64_t width = round_up(keys.end - keys.begin, kLanes);
    const auto join = [&] {
      for (int64_t n = 0; n < width; n += kLanes) {
        add_to(total + n, load<Vf>(part + n));
        store(part + n, Vf{});
      }
    };
    for (int64_t i = first; i < end; ++i) {
      const T* row = row_of(b, i);
      if (row == nullptr) continue;
      if (added > 0 && added % kFloatRows == 0) join();
      ++added;
      const RowSum sum = a.logits ? sums[b * candidates + i] : RowSum{0.0f, 1.0f};
      const Vf shift = splat(sum.top > -kInfinity ? sum.top : 0.0f);
      const Vf weight = splat(head_weight / sum.total);
      for (int64_t n = 0; n < width; n += kLanes) {
        const int64_t key = keys.begin + n;
        Vf v = load_strided(row + key * a.strides[3], a.strides[3], keys.end - key);
        if (a.logits) v = exp2_nonpositive((v - shift) * kLog2e);
        store(part + n, load<Vf>(part + n) + v * weight);
      }
    }
    join();
    for (int64_t n = keys.begin; n < keys.end; ++n)
      out[n] = static_cast<float>(total[n - keys.begin]);
  };
  const auto add_chunk = [&](int64_t b, Range keys) {
    const int64_t each = a.reduce == kNone ? a.selected : candidates;
    for (int64_t h = 0; h < out_rows; ++h)
      add_columns(b, h * each, (h + 1) * each, keys, a.scores + (b * out_rows + h) * a.tokens);
  };

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (a.logits) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < a.batch * candidates; ++i) {
        const T* row = row_of(i / candidates, i % candidates);
        if (row == nullptr) continue;
        sums[i] = row_sum(row, a.strides[3], Range{0, a.tokens});
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.batch * blocks; ++i) {
      const int64_t begin = i % blocks * kChunk;
      add_chunk(i / blocks, Range{begin, smaller(begin + kChunk, a.tokens)});
    }
  }
}

inline void aggregate_attention(const AggregateAttentionArgs& a) {
  if (a.batch == 0 || a.tokens == 0) return;
  if (a.dtype == kFloat32) aggregate_attention_of<float>(a);
  else if (a.dtype == kBFloat16) aggregate_attention_of<BFloat16>(a);
  else aggregate_attention_of<Float16>(a);
}

}  // namespace SMA_ISA
}  // namespace sma
