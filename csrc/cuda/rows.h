// Rows of tokens copied by many threads: 16 bytes each where addresses and sizes allow it, and
// several on their way at once.
#pragma once
#include "../args.h"
#include "device.h"

namespace sma {
namespace cuda {

constexpr int kCopies = 4;  // words that a thread has on their way
constexpr unsigned kCopyThreads = 256;

__device__ inline uint4 load_word(const uint4* from) { return load_stream(from); }
__device__ inline void store_word(uint4* to, uint4 word) { store_stream(to, word); }
template <class Word>
__device__ inline Word load_word(const Word* from) {
  return *from;
}
template <class Word>
__device__ inline void store_word(Word* to, Word word) {
  *to = word;
}

// Fills the words [begin, end) of `out`, whose rows of `row_words` lie in one piece, from the rows
// that source(row) points to; null gives zeros. Every one of `threads` threads calls it.
template <class Word, class Index, class Source>
__device__ void copy_rows(Word* out, Index row_words, Index begin, Index end, Index thread,
                          Index threads, const Source& source) {
  for (Index first = begin + thread; first < end; first += threads * kCopies) {
    Word word[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const Index at = first + i * threads;
      word[i] = Word{};
      if (at < end) {
        const Index row = at / row_words;
        const char* from = source(row);
        if (from != nullptr)
          word[i] = load_word(reinterpret_cast<const Word*>(from) + (at - row * row_words));
      }
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const Index at = first + i * threads;
      if (at < end) store_word(out + at, word[i]);
    }
  }
}

// Where the row of a gather comes from.
struct GatherSource {
  const char* rows;
  int64_t batch_bytes, token_bytes;
  unsigned tokens;

  __host__ __device__ explicit GatherSource(const GatherTokensArgs& a)
      : rows(static_cast<const char*>(a.rows)),
        batch_bytes(a.batch_bytes),
        token_bytes(a.token_bytes),
        tokens(static_cast<unsigned>(a.tokens)) {}

  __device__ const char* row(int64_t sample, int64_t id) const {
    if (static_cast<uint64_t>(id) >= tokens) return nullptr;  // -1 too
    return rows + sample * batch_bytes + id * token_bytes;
  }
};

// Calls body with the widest word that divides all of `bits`: addresses and sizes, or-ed.
template <class Body>
void with_word(uint64_t bits, const Body& body) {
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

// Blocks that copy `words` words, each a part of them.
inline Grid copy_grid(int64_t words) {
  constexpr int64_t each = kCopyThreads * kCopies;
  return {dim3(static_cast<unsigned>((words + each - 1) / each)), kCopyThreads};
}

// 32-bit numbers are enough for this many words; one more step of a block must not overflow.
constexpr int64_t kSmallCopy = (int64_t{1} << 31) - kCopyThreads * kCopies;

}  // namespace cuda
}  // namespace sma
