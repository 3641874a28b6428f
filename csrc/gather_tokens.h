// gather_tokens: the rows of each sample at its ids, zeros where the id is -1; and its backward.
#pragma once
#include "cpu/vec.h"

namespace sma {
namespace SMA_ISA {

constexpr int64_t kRowBlock = 1024;    // rows of one sample that a thread takes at a time
constexpr int64_t kAheadBytes = 3072;  // rows are asked of memory this far before they are copied

// Calls body(b, rows) for blocks of rows of every sample. Blocks do not depend on the
// number of threads.
template <class Body>
void for_row_blocks(int64_t batch, int64_t rows, int64_t row_bytes, int threads, const Body& body) {
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  threads = threads_for(batch * rows * row_bytes / 4, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < batch * blocks; ++i) {
      const int64_t begin = i % blocks * kRowBlock;
      body(i / blocks, Range{begin, smaller(begin + kRowBlock, rows)});
    }
    fence();
  }
}

// Calls body(b) for every sample; `work` is that of all samples, in elements.
template <class Body>
void for_samples(int64_t batch, int64_t work, int threads, const Body& body) {
  threads = threads_for(work, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t b = 0; b < batch; ++b) body(b);
}

// Rows whose elements lie apart, as after a transpose: 64 bytes of each row at a time, so that the
// lines of memory that hold neighbouring tokens are read once.
template <class Element>
void gather_apart(const GatherTokensArgs& a, int64_t b, Range rows) {
  constexpr int64_t kColumns = 64 / sizeof(Element);
  const char* from = static_cast<const char*>(a.rows) + b * a.batch_bytes;
  const int64_t width = a.row_bytes / static_cast<int64_t>(sizeof(Element));
  Element* to = static_cast<Element*>(a.out) + b * a.visible * width;
  const int64_t* ids = a.ids + b * a.visible;
  for (int64_t begin = 0; begin < width; begin += kColumns) {
    const int64_t end = smaller(begin + kColumns, width);
    for (int64_t v = rows.begin; v < rows.end; ++v) {
      const char* row = from + (ids[v] < 0 ? 0 : ids[v]) * a.token_bytes;
      for (int64_t c = begin; c < end; ++c) {
        Element x{};
        if (ids[v] >= 0) memcpy(&x, row + c * a.stride_bytes, sizeof x);
        to[v * width + c] = x;
      }
    }
  }
}

inline void gather_rows(const GatherTokensArgs& a, int64_t b, Range rows) {
  if (a.stride_bytes != a.element_bytes) {
    if (a.element_bytes == 8) gather_apart<uint64_t>(a, b, rows);
    else if (a.element_bytes == 4) gather_apart<uint32_t>(a, b, rows);
    else if (a.element_bytes == 2) gather_apart<uint16_t>(a, b, rows);
    else gather_apart<uint8_t>(a, b, rows);
    return;
  }
  const bool past_caches = a.batch * a.visible * a.row_bytes >= kStreamBytes;
  const char* from = static_cast<const char*>(a.rows) + b * a.batch_bytes;
  char* to = static_cast<char*>(a.out) + b * a.visible * a.row_bytes;
  const int64_t* ids = a.ids + b * a.visible;
  const auto touch = [&](int64_t v) {  // ask memory for a row
    if (v < rows.end && ids[v] >= 0)
      for (int64_t i = 0; i < a.row_bytes; i += 64)
        __builtin_prefetch(from + ids[v] * a.token_bytes + i, 0, 2);
  };
  const int64_t ahead = larger<int64_t>(1, kAheadBytes / larger<int64_t>(a.row_bytes, 1));
  for (int64_t v = rows.begin; v < rows.begin + ahead; ++v) touch(v);
  for (int64_t v = rows.begin; v < rows.end; ++v) {
    touch(v + ahead);
    copy_row(to + v * a.row_bytes, ids[v] < 0 ? nullptr : from + ids[v] * a.token_bytes,
             a.row_bytes, past_caches);
  }
}

inline void gather_tokens(const GatherTokensArgs& a) {
  for_row_blocks(a.batch, a.visible, a.row_bytes, a.threads,
                 [&](int64_t b, Range rows) { gather_rows(a, b, rows); });
}

// Which rows of a sample have a given id, in ascending order: first[id], then next[row], then -1.
struct RowsOfId {
  int32_t *first, *next;

  static int64_t size(int64_t ids, int64_t rows) { return ids + rows; }
  RowsOfId(int32_t* base, int64_t ids) : first(base), next(base + ids) {}

  // Returns whether no id has two rows.
  bool build(const int64_t* id_of_row, int64_t rows, int64_t ids) const {
    bool unique = true;
    for (int64_t i = 0; i < ids; ++i) first[i] = -1;
    for (int64_t r = rows - 1; r >= 0; --r) {
      const int64_t id = id_of_row[r];
      if (id < 0 || id >= ids) continue;
      unique = unique && first[id] < 0;
      next[r] = first[id];
      first[id] = static_cast<int32_t>(r);
    }
    return unique;
  }
};

// One output row: the sum of the rows in the list, in float32 (double for double), rounded once.
template <class T>
void sum_rows(T* out, const T* rows, int64_t width, int32_t r, const int32_t* next,
              bool past_caches) {
  if (r < 0 || next[r] < 0) {
    copy_row(out, r < 0 ? nullptr : rows + r * width, width * static_cast<int64_t>(sizeof(T)),
             past_caches);
    return;
  }
  for (int64_t c = 0; c < width; ++c) {
    auto sum = to_float(rows[r * width + c]);
    for (int32_t s = next[r]; s >= 0; s = next[s]) sum += to_float(rows[s * width + c]);
    from_float(sum, out + c);
  }
}

template <class T>
void gather_tokens_backward_of(const GatherTokensBackwardArgs& a) {
  const int64_t row_bytes = a.width * static_cast<int64_t>(sizeof(T));
  const int64_t size = RowsOfId::size(a.tokens, a.visible);
  const Scratch<int32_t> scratch(size * a.batch);
  const bool past_caches = a.batch * a.tokens * row_bytes >= kStreamBytes;
  for_samples(a.batch, a.batch * (a.tokens + a.visible), a.threads, [&](int64_t b) {
    RowsOfId(scratch.get() + b * size, a.tokens).build(a.ids + b * a.visible, a.visible, a.tokens);
  });
  for_row_blocks(a.batch, a.tokens, row_bytes, a.threads, [&](int64_t b, Range rows) {
    const RowsOfId list(scratch.get() + b * size, a.tokens);
    const T* grad = static_cast<const T*>(a.grad) + b * a.visible * a.width;
    T* out = static_cast<T*>(a.out) + b * a.tokens * a.width;
    for (int64_t n = rows.begin; n < rows.end; ++n)
      sum_rows(out + n * a.width, grad, a.width, list.first[n], list.next, past_caches);
  });
}

inline void gather_tokens_backward(const GatherTokensBackwardArgs& a) {
  if (a.dtype == kFloat32) gather_tokens_backward_of<float>(a);
  else if (a.dtype == kBFloat16) gather_tokens_backward_of<BFloat16>(a);
  else if (a.dtype == kFloat16) gather_tokens_backward_of<Float16>(a);
  else gather_tokens_backward_of<double>(a);
}

}  // namespace SMA_ISA
}  // namespace sma
