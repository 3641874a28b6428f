// The rows of a sample brought to shared memory in slabs: some features of all valid tokens.
//
// A slab's rows have kWords words of 16 bytes, in another order in each of eight rows that follow
// each other: eight lanes find a word of eight rows, or all words of one, in different banks.
// Slabs stay where the blocks of a cluster can hold them all. Elsewhere they come round and round:
// behind the last one the first comes again, and the next ones are on their way while one is used.
#pragma once
#include "../args.h"
#include "numbers.h"

namespace sma {
namespace cuda {

constexpr unsigned kSlabThreads = 256;  // of a block
constexpr int kWords = 8;               // of 16 bytes: a row of a slab
constexpr int kPitch = kWords * 16;     // from one row to the next
constexpr int kMostPlaces = 3;

template <class T, bool kStay>
class Slabs {
 public:
  static constexpr int kWordFeatures = 16 / sizeof(T);  // features of a word
  static constexpr int kFeatures = kWords * kWordFeatures;
  __host__ __device__ static int64_t count_of(int64_t width) {  // of all features
    return ceil_div<int64_t>(width, kFeatures);
  }

  // places: in `shared`, each of a slab. Where slabs stay, these are a block's share of them; where
  // they do not and there are none, all is read from memory. index: of valid tokens.
  __device__ Slabs(const BipartitionArgs& args, int64_t sample, int places, const int* index,
                   char* shared)
      : first(kStay ? static_cast<int>(cluster_rank()) * places : 0),
        count(kStay ? max(0, min(places, static_cast<int>(count_of(args.width)) - first))
                    : static_cast<int>(count_of(args.width))),
        width(args.width),
        row_bytes(args.strides[1] * kSize),
        element_bytes(args.strides[2] * kSize),
        sample(static_cast<const char*>(args.embeddings) + sample * args.strides[0] * kSize),
        in_words(element_bytes == kSize &&
                 ((reinterpret_cast<uintptr_t>(this->sample) | static_cast<uint64_t>(row_bytes)) &
                  15) == 0),
        places(places),
        index(index),
        shared(shared) {}

  const int first, count;  // of the slabs that this block takes

  // How many times `next` is called for all of them, and how many slabs each brings.
  __device__ int turns() const { return kStay ? 1 : count; }
  __device__ int at_once() const { return kStay ? count : 1; }

  // Sends for the first slabs, once `index` is written, of n tokens; waits for those that stay.
  __device__ void begin(unsigned n) {
    tokens = n;
    for (int i = 0; i < (kStay ? count : places - 1); ++i) stage(i % count, i);
    if constexpr (kStay) {
      end();
      __syncthreads();
    }
  }
  // To be called before the block ends.
  __device__ void end() { copy_async_wait<0>(); }

  // Waits for a slab, and sends for one of the next. A barrier of the block: all are done with the
  // slab before this one. Nothing where slabs stay.
  __device__ void next(int turn) {
    if constexpr (kStay) return;
    now = turn;
    if (places <= 1) {
      __syncthreads();
      if (places == 0) return;
      stage(turn, 0);
      copy_async_wait<0>();
      __syncthreads();
      return;
    }
    if (places == kMostPlaces) copy_async_wait<kMostPlaces - 2>();
    else copy_async_wait<0>();
    __syncthreads();
    place = waiting;
    const int ahead = places - 1;
    stage((turn + ahead) % count, place == 0 ? ahead : place - 1);
    waiting = place == ahead ? 0 : place + 1;
  }

  // One word of a row, of one of the slabs that `next` brought.
  __device__ void word_of(int slab, unsigned i, int word, float (&x)[kWordFeatures]) const {
    if (kStay || places > 0) {
      const char* rows = shared + static_cast<int64_t>(kStay ? slab : place) * tokens * kPitch;
      unpack(*reinterpret_cast<const uint4*>(rows + inside(i, word)), x);
    } else {
      unpack(fetch(i, static_cast<int64_t>(now) * kFeatures + word * kWordFeatures), x);
    }
  }

  // One word of a row, of all words that this block takes; needs no `next`.
  __device__ int words() const { return count * kWords; }
  __device__ void any_word_of(unsigned i, int word, float (&x)[kWordFeatures]) const {
    if constexpr (kStay) word_of(word / kWords, i, word % kWords, x);
    else unpack(fetch(i, static_cast<int64_t>(word) * kWordFeatures), x);
  }

 private:
  static constexpr int64_t kSize = sizeof(T);

  const int64_t width, row_bytes, element_bytes;
  const char* const sample;
  const bool in_words;  // rows can be read 16 bytes at a time
  const int places;
  const int* const index;
  char* const shared;
  unsigned tokens = 0;
  int now = 0, place = 0, waiting = 0;  // the slab that came last, where, and where the next one is

  static __device__ unsigned inside(unsigned i, int word) {
    return (i * kPitch + i % kWords * 16) ^ (static_cast<unsigned>(word) * 16);
  }
  __device__ const char* row(unsigned i) const { return sample + index[i] * row_bytes; }

  // From feature `d` on, from memory; 0 behind the last.
  __device__ uint4 fetch(unsigned i, int64_t d) const {
    const char* from = row(i);
    if (in_words && d + kWordFeatures <= width)
      return *reinterpret_cast<const uint4*>(from + d * kSize);
    T x[kWordFeatures];
#pragma unroll
    for (int k = 0; k < kWordFeatures; ++k)
      x[k] = d + k < width ? *reinterpret_cast<const T*>(from + (d + k) * element_bytes) : T{};
    uint4 word;
    memcpy(&word, x, sizeof word);
    return word;
  }
  static __device__ void unpack(uint4 word, float (&x)[kWordFeatures]) {
    T each[kWordFeatures];
    memcpy(each, &word, sizeof word);
#pragma unroll
    for (int k = 0; k < kWordFeatures; ++k) x[k] = to_float(each[k]);
  }

  __device__ void stage(int slab, int to) {
    char* const rows = shared + static_cast<int64_t>(to) * tokens * kPitch;
    const bool by_token = row_bytes < element_bytes;  // neighbours read what lies side by side
    for (unsigned at = threadIdx.x; at < tokens * kWords; at += kSlabThreads) {
      const unsigned i = by_token ? at % tokens : at / kWords;
      const unsigned word = by_token ? at / tokens : at % kWords;
      const int64_t d = static_cast<int64_t>(first + slab) * kFeatures + word * kWordFeatures;
      char* const there = rows + inside(i, static_cast<int>(word));
      if (in_words && d + kWordFeatures <= width) copy_async_16(there, row(i) + d * kSize);
      else *reinterpret_cast<uint4*>(there) = fetch(i, d);
    }
    copy_async_commit();
  }
};

}  // namespace cuda
}  // namespace sma
