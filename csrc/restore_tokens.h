// restore_tokens: all tokens in their order again, `fill` where they were masked; and its backward.
#pragma once
#include "gather_tokens.h"

namespace sma {
namespace SMA_ISA {

inline void restore_tokens(const RestoreTokensArgs& a) {
  const bool past_caches = a.batch * a.tokens * a.row_bytes >= kStreamBytes;
  for_row_blocks(a.batch, a.tokens, a.row_bytes, a.threads, [&](int64_t b, Range rows) {
    const char* visible = static_cast<const char*>(a.visible_rows) + b * a.visible_batch_bytes;
    const char* fill = static_cast<const char*>(a.fill_rows) + b * a.fill_batch_bytes;
    char* out = static_cast<char*>(a.out) + b * a.tokens * a.row_bytes;
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      const int64_t id = a.ids_restore[b * a.tokens + n];
      const char* from = nullptr;
      if (id >= a.visible) from = fill + (id - a.visible) * a.fill_token_bytes;
      else if (id >= 0) from = visible + id * a.visible_token_bytes;
      copy_row(out + n * a.row_bytes, from, a.row_bytes, past_caches);
    }
  });
}

// sum[c] += row[c]; `next` is the row to come, asked of memory while this one is added.
template <class T>
void add_row(const T* row, const T* next, int64_t width, float* sum) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    __builtin_prefetch(next + c);
    store(sum + c, load<Vf>(sum + c) + load_floats(row + c));
  }
  for (; c < width; ++c) sum[c] += to_float(row[c]);
}
inline void add_row(const double* row, const double*, int64_t width, double* sum) {
  for (int64_t c = 0; c < width; ++c) sum[c] += row[c];
}

// The gradient of one fill for all tokens: sums over a few rows, then over these sums in order,
// which keeps what is lost to rounding small. Where no visible token stands twice, the same sweep
// over the gradient copies the visible rows.
constexpr int64_t kSumRows = 128;
static_assert(kRowBlock % kSumRows == 0, "a sum is one thread's");

template <class T>
void sum_shared_fill(const RestoreTokensBackwardArgs& a, const uint8_t* copies, bool past_caches) {
  using Sum = decltype(to_float(T{}));
  const int64_t row_bytes = a.width * static_cast<int64_t>(sizeof(T));
  const int64_t sums = (a.tokens + kSumRows - 1) / kSumRows;  // of each sample
  const Scratch<Sum> partial((a.batch * sums + 1) * a.width);
  for_row_blocks(a.batch, a.tokens, row_bytes, a.threads, [&](int64_t b, Range rows) {
    Sum* sum = nullptr;
    const T* grad = static_cast<const T*>(a.grad) + b * a.tokens * a.width;
    T* visible = static_cast<T*>(a.grad_visible) + b * a.visible * a.width;
    const int64_t* ids = a.ids_restore + b * a.tokens;
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      if (n % kSumRows == 0) {
        sum = partial.get() + (b * sums + n / kSumRows) * a.width;
        for (int64_t c = 0; c < a.width; ++c) sum[c] = 0;
      }
      const T* row = grad + n * a.width;
      const int64_t filled = ids[n] - a.visible;
      if (filled >= 0 && filled < a.fill)
        add_row(row, n + 1 < rows.end ? row + a.width : row, a.width, sum);
      else if (copies[b] && ids[n] >= 0)
        copy_row(visible + ids[n] * a.width, row, row_bytes, past_caches);
    }
  });
  Sum* total = partial.get() + a.batch * sums * a.width;
  for (int64_t c = 0; c < a.width; ++c) total[c] = 0;
  for (int64_t i = 0; i < a.batch * sums; ++i) {
    const Sum* sum = partial.get() + i * a.width;
    add_row(sum, sum, a.width, total);
  }
  for (int64_t c = 0; c < a.width; ++c) from_float(total[c], static_cast<T*>(a.grad_fill) + c);
}

template <class T>
void restore_tokens_backward_of(const RestoreTokensBackwardArgs& a) {
  const int64_t targets = a.visible + (a.shared_fill ? 0 : a.fill);
  const int64_t size = RowsOfId::size(targets, a.tokens);
  const int64_t row_bytes = a.width * static_cast<int64_t>(sizeof(T));
  const Scratch<int32_t> scratch(size * a.batch);
  const Scratch<uint8_t> copies(a.batch);  // samples whose rows the sweep for the fill copies
  const bool past_caches = a.batch * targets * row_bytes >= kStreamBytes;
  for_samples(a.batch, a.batch * (targets + a.tokens), a.threads, [&](int64_t b) {
    const bool unique = RowsOfId(scratch.get() + b * size, targets)
                            .build(a.ids_restore + b * a.tokens, a.tokens, targets);
    copies[b] = unique && a.shared_fill;
  });
  for_row_blocks(a.batch, targets, row_bytes, a.threads, [&](int64_t b, Range rows) {
    const RowsOfId list(scratch.get() + b * size, targets);
    const T* grad = static_cast<const T*>(a.grad) + b * a.tokens * a.width;
    T* visible = static_cast<T*>(a.grad_visible) + b * a.visible * a.width;
    T* fill = static_cast<T*>(a.grad_fill) + b * a.fill * a.width;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      if (copies[b] && list.first[i] >= 0) continue;
      T* out = i < a.visible ? visible + i * a.width : fill + (i - a.visible) * a.width;
      sum_rows(out, grad, a.width, list.first[i], list.next, past_caches);
    }
  });
  if (a.shared_fill) sum_shared_fill<T>(a, copies.get(), past_caches);
}

inline void restore_tokens_backward(const RestoreTokensBackwardArgs& a) {
  if (a.dtype == kFloat32) restore_tokens_backward_of<float>(a);
  else if (a.dtype == kBFloat16) restore_tokens_backward_of<BFloat16>(a);
  else if (a.dtype == kFloat16) restore_tokens_backward_of<Float16>(a);
  else restore_tokens_backward_of<double>(a);
}

}  // namespace SMA_ISA
}  // namespace sma
