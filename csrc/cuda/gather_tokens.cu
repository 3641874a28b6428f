// gather_tokens on a GPU. An id outside [0, N) reads nothing and gives zeros.
#include "kernels.h"
#include "rows.h"

namespace sma {
namespace cuda {
namespace {

template <class Word, class Index>
__global__ void __launch_bounds__(kCopyThreads)
    gather_kernel(GatherSource from, const int64_t* ids, Index visible, Index row_words,
                  Index words, Word* out) {
  const Index begin = static_cast<Index>(blockIdx.x) * (kCopyThreads * kCopies);
  const Index end = words - begin < kCopyThreads * kCopies ? words : begin + kCopyThreads * kCopies;
  copy_rows<Word, Index>(out, row_words, begin, end, threadIdx.x, kCopyThreads, [&](Index row) {
    return from.row(static_cast<int64_t>(row / visible), ids[row]);
  });
}

}  // namespace

int gather_tokens(const GatherTokensArgs& a, const Place& place) {
  if (a.batch * a.visible == 0 || a.row_bytes == 0) return cudaSuccess;
  const OnDevice on(place);
  cudaError_t error = on.error();
  if (error != cudaSuccess) return error;
  with_word(word_bits(a), [&](auto word) {
    using Word = decltype(word);
    const int64_t row_words = a.row_bytes / static_cast<int64_t>(sizeof(Word));
    const int64_t words = a.batch * a.visible * row_words;
    Word* const out = static_cast<Word*>(a.out);
    error = words < kSmallCopy ? launch(gather_kernel<Word, uint32_t>, copy_grid(words), place,
                                        GatherSource(a), a.ids, a.visible, row_words, words, out)
                               : launch(gather_kernel<Word, uint64_t>, copy_grid(words), place,
                                        GatherSource(a), a.ids, a.visible, row_words, words, out);
  });
  return error;
}

}  // namespace cuda
}  // namespace sma
