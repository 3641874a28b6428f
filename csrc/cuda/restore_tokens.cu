// restore_tokens on a GPU: all tokens in their order again, `fill` where they were masked. An id
// outside [0, V + K) reads nothing and gives zeros.
#include "kernels.h"
#include "rows.h"

namespace sma {
namespace cuda {
namespace {

// Where the row of a token comes from.
struct RestoreSource {
  const char *visible_rows, *fill_rows;
  int64_t visible_batch_bytes, visible_token_bytes, fill_batch_bytes, fill_token_bytes;
  int64_t visible, both;

  explicit RestoreSource(const RestoreTokensArgs& a)
      : visible_rows(static_cast<const char*>(a.visible_rows)),
        fill_rows(static_cast<const char*>(a.fill_rows)),
        visible_batch_bytes(a.visible_batch_bytes),
        visible_token_bytes(a.visible_token_bytes),
        fill_batch_bytes(a.fill_batch_bytes),
        fill_token_bytes(a.fill_token_bytes),
        visible(a.visible),
        both(a.visible + a.fill) {}

  __device__ const char* row(int64_t sample, int64_t id) const {
    if (id < 0 || id >= both) return nullptr;
    if (id < visible) return visible_rows + sample * visible_batch_bytes + id * visible_token_bytes;
    return fill_rows + sample * fill_batch_bytes + (id - visible) * fill_token_bytes;
  }
};

template <class Word, class Index>
__global__ void __launch_bounds__(kCopyThreads)
    restore_kernel(RestoreSource from, const int64_t* ids_restore, Index tokens, Index row_words,
                   Index words, Word* out) {
  const Index begin = static_cast<Index>(blockIdx.x) * (kCopyThreads * kCopies);
  const Index end = words - begin < kCopyThreads * kCopies ? words : begin + kCopyThreads * kCopies;
  copy_rows<Word, Index>(out, row_words, begin, end, threadIdx.x, kCopyThreads, [&](Index row) {
    return from.row(static_cast<int64_t>(row / tokens), ids_restore[row]);
  });
}

}  // namespace

int restore_tokens(const RestoreTokensArgs& a, const Place& place) {
  if (a.batch * a.tokens == 0 || a.row_bytes == 0) return cudaSuccess;
  const OnDevice on(place);
  cudaError_t error = on.error();
  if (error != cudaSuccess) return error;
  const int64_t sizes[] = {a.visible_batch_bytes, a.visible_token_bytes, a.fill_batch_bytes,
                           a.fill_token_bytes, a.row_bytes};
  uint64_t bits = bits_of(a.visible_rows) | bits_of(a.fill_rows) | bits_of(a.out);
  for (const int64_t size : sizes) bits |= static_cast<uint64_t>(size);
  with_word(bits, [&](auto word) {
    using Word = decltype(word);
    const int64_t row_words = a.row_bytes / static_cast<int64_t>(sizeof(Word));
    const int64_t words = a.batch * a.tokens * row_words;
    Word* const out = static_cast<Word*>(a.out);
    error = words < kSmallCopy
                ? launch(restore_kernel<Word, uint32_t>, copy_grid(words), place, RestoreSource(a),
                         a.ids_restore, a.tokens, row_words, words, out)
                : launch(restore_kernel<Word, uint64_t>, copy_grid(words), place, RestoreSource(a),
                         a.ids_restore, a.tokens, row_words, words, out);
  });
  return error;
}

}  // namespace cuda
}  // namespace sma
