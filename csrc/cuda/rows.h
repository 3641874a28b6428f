// Rows of tokens copied by many threads: 16 bytes each where addresses and sizes allow it, and
// several on their way at once.
#pragma once
#include <type_traits>

#include "../args.h"
#include "device.h"

namespace sma {
namespace cuda {

constexpr int kCopies = 4;  // words that a thread has on their way
constexpr unsigned kCopyThreads = 256;
constexpr unsigned kBlockWords = kCopyThreads * kCopies;  // of a block at a time

// 32-bit numbers are enough for this many words; one more step of a block must stay below 2^31.
constexpr int64_t kSmallCopy = (int64_t{1} << 31) - 1024 * kCopies;

__device__ inline uint4 load_word(const uint4* from) { return load_stream(from); }
__device__ inline void store_word(uint4* to, uint4 word) { store_16(to, word); }
template <class Word>
__device__ inline Word load_word(const Word* from) {
  return *from;
}
template <class Word>
__device__ inline void store_word(Word* to, Word word) {
  *to = word;
}

// Divides numbers below 2^31 by one that is known beforehand: a multiplication and a shift. With
// 2^shift >= by, factor = 2^(31 + shift) / by, rounded up, is too large by less than 1, which is
// less than 1 / by in the quotient.
template <class Index>
class Divisor {
 public:
  __host__ __device__ explicit Divisor(int64_t by) : shift(31) {
    while ((int64_t{1} << (shift - 31)) < by) ++shift;
    const uint64_t last = static_cast<uint64_t>(by) - 1;
    factor = by == 0 ? 0 : static_cast<uint32_t>(((uint64_t{1} << shift) + last) / (last + 1));
  }
  __device__ uint32_t quotient(uint32_t x) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(x) * factor >> shift);
  }

 private:
  uint32_t factor;
  int shift;
};
template <>
class Divisor<uint64_t> {
 public:
  __host__ __device__ explicit Divisor(int64_t by) : by(static_cast<uint64_t>(by)) {}
  __device__ uint64_t quotient(uint64_t x) const { return x / by; }

 private:
  uint64_t by;
};

// The words [begin, end) of rows of `row_words` each that lie in one piece.
template <class Index>
struct Words {
  Index row_words, begin, end;
  Divisor<Index> row;  // by row_words
};

// Fills these words of `out` from the rows that source.row(row, source.id(row)) points to; null
// gives zeros, as it must at an id of -1. Every one of `threads` threads calls it. All ids are sent
// for before the first is waited for, and all rows before the first is stored.
template <class Word, class Index, class Source>
__device__ void copy_rows(Word* out, const Words<Index>& words, unsigned thread, unsigned threads,
                          const Source& source) {
  using Id = decltype(source.id(Index{}));
  for (Index first = words.begin + thread; first < words.end; first += threads * kCopies) {
    Index row[kCopies];
    Id id[kCopies];
    Word word[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      row[i] = words.row.quotient(first + i * threads);
      id[i] = first + i * threads < words.end ? source.id(row[i]) : Id{-1};
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const char* from = source.row(row[i], id[i]);
      word[i] = Word{};
      if (from == nullptr) continue;
      const Word* const at =
          reinterpret_cast<const Word*>(from) + (first + i * threads - row[i] * words.row_words);
      if constexpr (Source::kReadsOnce) word[i] = load_word(at);
      else word[i] = *at;
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      if (first + i * threads < words.end) store_word(out + first + i * threads, word[i]);
  }
}

// Where the rows of a sample's gather come from.
struct GatherRows {
  static constexpr bool kReadsOnce = true;
  const char* rows;
  const int64_t* ids;
  int64_t token_bytes;
  unsigned tokens;

  __host__ __device__ GatherRows(const GatherTokensArgs& a, int64_t sample)
      : rows(static_cast<const char*>(a.rows) + sample * a.batch_bytes),
        ids(a.ids + sample * a.visible),
        token_bytes(a.token_bytes),
        tokens(static_cast<unsigned>(a.tokens)) {}

  template <class Index>
  __device__ int64_t id(Index row) const {
    return ids[row];
  }
  template <class Index>
  __device__ const char* row(Index, int64_t id) const {
    if (static_cast<uint64_t>(id) >= tokens) return nullptr;  // -1 too
    return rows + static_cast<uint32_t>(id) * token_bytes;
  }
};

// Calls body with the widest word that divides all of `bits`: addresses and sizes, or-ed.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Body>
__host__ __device__ void with_word(uint64_t bits, const Body& body) {
  if (bits % sizeof(uint4) == 0) body(uint4{});
  else if (bits % sizeof(uint32_t) == 0) body(uint32_t{});
  else if (bits % sizeof(uint16_t) == 0) body(uint16_t{});
  else body(uint8_t{});
}

__host__ __device__ inline uint64_t bits_of(const void* address) {
  return reinterpret_cast<uintptr_t>(address);
}

__host__ __device__ inline uint64_t word_bits(const GatherTokensArgs& a) {
  return bits_of(a.rows) | bits_of(a.out) | static_cast<uint64_t>(a.batch_bytes) |
         static_cast<uint64_t>(a.token_bytes) | static_cast<uint64_t>(a.row_bytes);
}

// The words of `rows` rows that one of `blocks` copies.
template <class Index>
__device__ Words<Index> share_of_words(int64_t rows, int64_t row_words, unsigned rank,
                                       unsigned blocks) {
  const auto all = static_cast<uint64_t>(rows * row_words);
  return {static_cast<Index>(row_words), static_cast<Index>(all * rank / blocks),
          static_cast<Index>(all * (rank + 1) / blocks), Divisor<Index>(row_words)};
}

// Block `rank` of `blocks` gathers its part of a sample's rows, of fewer than kSmallCopy words.
__device__ inline void gather_sample(const GatherTokensArgs& a, int64_t sample, unsigned rank,
                                     unsigned blocks) {
  with_word(word_bits(a), [&](auto word) {
    using Word = decltype(word);
    const int64_t row_words = a.row_bytes / static_cast<int64_t>(sizeof(Word));
    const auto words = share_of_words<uint32_t>(a.visible, row_words, rank, blocks);
    copy_rows(static_cast<Word*>(a.out) + sample * a.visible * row_words, words, threadIdx.x,
              blockDim.x, GatherRows(a, sample));
  });
}

// Copies `rows` rows of row_bytes, in which samples follow each other after `per_sample`, by
// copy(Word, Index, row_words, words, grid): launches blocks that take a part of the words each.
template <class Copy>
cudaError_t launch_copy(uint64_t bits, int64_t rows, int64_t row_bytes, const Copy& copy) {
  cudaError_t error = cudaSuccess;
  with_word(bits | static_cast<uint64_t>(row_bytes), [&](auto word) {
    const int64_t row_words = row_bytes / static_cast<int64_t>(sizeof(word));
    const int64_t words = rows * row_words;
    const Grid grid = {dim3(static_cast<unsigned>(ceil_div<int64_t>(words, kBlockWords))),
                       kCopyThreads};
    error = words < kSmallCopy ? copy(word, uint32_t{}, row_words, words, grid)
                               : copy(word, uint64_t{}, row_words, words, grid);
  });
  return error;
}

// A block's words of `all`.
template <class Index>
__device__ Words<Index> words_of_block(Index all, Index row_words, const Divisor<Index>& row) {
  const Index begin = static_cast<Index>(blockIdx.x) * kBlockWords;
  return {row_words, begin, all - begin < kBlockWords ? all : begin + kBlockWords, row};
}

}  // namespace cuda
}  // namespace sma
