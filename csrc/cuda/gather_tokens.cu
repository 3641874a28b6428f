// gather_tokens on a GPU. An id outside [0, N) reads nothing and gives zeros.
#include "kernels.h"
#include "rows.h"

namespace sma {
namespace cuda {
namespace {

// Where the rows of a whole batch come from.
template <class Index>
struct GatherSource : GatherRows {
  int64_t batch_bytes;
  Divisor<Index> sample;  // of a row

  explicit GatherSource(const GatherTokensArgs& a)
      : GatherRows(a, 0), batch_bytes(a.batch_bytes), sample(a.visible) {}

  __device__ const char* row(Index row, int64_t id) const {
    const char* from = GatherRows::row(row, id);
    return from == nullptr ? nullptr : from + sample.quotient(row) * batch_bytes;
  }
};

template <class Word, class Index>
__global__ void __launch_bounds__(kCopyThreads)
    gather_kernel(const __grid_constant__ GatherSource<Index> from,
                  const __grid_constant__ Divisor<Index> row, Index row_words, Index words,
                  Word* out) {
  copy_rows(out, words_of_block(words, row_words, row), threadIdx.x, kCopyThreads, from);
}

}  // namespace

int gather_tokens(const GatherTokensArgs& a, const Place& place) {
  if (a.batch * a.visible == 0 || a.row_bytes == 0) return cudaSuccess;
  const OnDevice on(place);
  if (on.error() != cudaSuccess) return on.error();
  return launch_copy(
      word_bits(a), a.batch * a.visible, a.row_bytes,
      [&](auto word, auto index, int64_t row_words, int64_t words, const Grid& grid) {
        using Word = decltype(word);
        using Index = decltype(index);
        return launch(gather_kernel<Word, Index>, grid, place, GatherSource<Index>(a),
                      Divisor<Index>(row_words), row_words, words, static_cast<Word*>(a.out));
      });
}

}  // namespace cuda
}  // namespace sma
