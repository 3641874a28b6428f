// restore_tokens on a GPU: all tokens in their order again, `fill` where they were masked. An id
// outside [0, V + K) reads nothing and gives zeros.
#include "kernels.h"
#include "rows.h"

namespace sma {
namespace cuda {
namespace {

// Where the row of a token comes from.
template <class Index>
struct RestoreSource {
  static constexpr bool kReadsOnce = false;  // a fill is read for many tokens: it stays in L1
  const char *visible_rows, *fill_rows;
  const int64_t* ids_restore;
  int64_t visible_batch_bytes, visible_token_bytes, fill_batch_bytes, fill_token_bytes;
  unsigned visible;
  uint64_t both;
  Divisor<Index> sample;  // of a token

  explicit RestoreSource(const RestoreTokensArgs& a)
      : visible_rows(static_cast<const char*>(a.visible_rows)),
        fill_rows(static_cast<const char*>(a.fill_rows)),
        ids_restore(a.ids_restore),
        visible_batch_bytes(a.visible_batch_bytes),
        visible_token_bytes(a.visible_token_bytes),
        fill_batch_bytes(a.fill_batch_bytes),
        fill_token_bytes(a.fill_token_bytes),
        visible(static_cast<unsigned>(a.visible)),
        both(static_cast<uint64_t>(a.visible + a.fill)),
        sample(a.tokens) {}

  __device__ int64_t id(Index token) const { return ids_restore[token]; }
  __device__ const char* row(Index token, int64_t id) const {
    const Index b = sample.quotient(token);
    const auto at = static_cast<uint32_t>(id);
    const char* seen = visible_rows + b * visible_batch_bytes + at * visible_token_bytes;
    const char* fill = fill_rows + b * fill_batch_bytes + (at - visible) * fill_token_bytes;
    const char* from = at < visible ? seen : fill;
    return static_cast<uint64_t>(id) < both ? from : nullptr;  // not at -1 either
  }
};

template <class Word, class Index>
__global__ void __launch_bounds__(kCopyThreads)
    restore_kernel(const __grid_constant__ RestoreSource<Index> from,
                   const __grid_constant__ Divisor<Index> row, Index row_words, Index words,
                   Word* out) {
  copy_rows(out, words_of_block(words, row_words, row), threadIdx.x, kCopyThreads, from);
}

}  // namespace

int restore_tokens(const RestoreTokensArgs& a, const Place& place) {
  if (a.batch * a.tokens == 0 || a.row_bytes == 0) return cudaSuccess;
  const OnDevice on(place);
  if (on.error() != cudaSuccess) return on.error();
  uint64_t bits = bits_of(a.visible_rows) | bits_of(a.fill_rows) | bits_of(a.out);
  for (const int64_t size :
       {a.visible_batch_bytes, a.visible_token_bytes, a.fill_batch_bytes, a.fill_token_bytes})
    bits |= static_cast<uint64_t>(size);
  return launch_copy(
      bits, a.batch * a.tokens, a.row_bytes,
      [&](auto word, auto index, int64_t row_words, int64_t words, const Grid& grid) {
        using Word = decltype(word);
        using Index = decltype(index);
        return launch(restore_kernel<Word, Index>, grid, place, RestoreSource<Index>(a),
                      Divisor<Index>(row_words), row_words, words, static_cast<Word*>(a.out));
      });
}

}  // namespace cuda
}  // namespace sma
