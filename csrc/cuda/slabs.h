// The rows of a sample brought to shared memory in slabs: some features of all valid tokens.
//
// A slab's rows have kWords words of 16 bytes. Slabs come round and round: behind the last one the
// first comes again, and the next ones are on their way while one is used.
#pragma once
#include "../args.h"
#include "device.h"

namespace sma {
namespace cuda {

constexpr unsigned kSlabThreads = 256;     // of a block
constexpr int kWords = 8;                  // of 16 bytes: a row of a slab
constexpr int kPitch = (kWords + 1) * 16;  // from one row to the next: in other banks
constexpr int kMostBuffers = 3;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ inline float to_float(Float16 x) { return half_to_float(x.bits); }

template <class T>
class Slabs {
 public:
  static constexpr int kEach = 16 / sizeof(T);  // features of a word
  static constexpr int kFeatures = kWords * kEach;

  // buffers: of slabs, in `shared`; without any all is read from memory. index: of valid tokens.
  __device__ Slabs(const BipartitionArgs& args, int buffers, const int* index, char* shared)
      : count(static_cast<int>((args.width + kFeatures - 1) / kFeatures)),
        width(args.width),
        row_bytes(args.strides[1] * kSize),
        element_bytes(args.strides[2] * kSize),
        sample(static_cast<const char*>(args.embeddings) + blockIdx.x * args.strides[0] * kSize),
        in_words(element_bytes == kSize &&
                 ((reinterpret_cast<uintptr_t>(sample) | static_cast<uint64_t>(row_bytes)) & 15) ==
                     0),
        buffers(buffers),
        index(index),
        shared(shared) {}

  const int count;  // of slabs

  // Sends for the first slabs, once `index` is written, of n tokens.
  __device__ void begin(unsigned n) {
    tokens = n;
    for (int i = 0; i < buffers - 1; ++i) stage(i % count, i);
  }
  // To be called before the block ends.
  __device__ void end() { copy_async_wait<0>(); }

  // Waits for a slab, and sends for one of the next. A barrier of the block: all are done with the
  // slab before this one. Null where there are no buffers.
  __device__ const char* next(int slab) {
    if (buffers == 0) return nullptr;
    if (buffers == 1) {
      __syncthreads();
      stage(slab, 0);
      copy_async_wait<0>();
      __syncthreads();
      return shared;
    }
    if (buffers == kMostBuffers) copy_async_wait<kMostBuffers - 2>();
    else copy_async_wait<0>();
    __syncthreads();
    const int now = buffer, ahead = buffers - 1;
    stage((slab + ahead) % count, now == 0 ? ahead : now - 1);
    buffer = now == ahead ? 0 : now + 1;
    return shared + static_cast<int64_t>(now) * tokens * kPitch;
  }

  // One word of a row of a slab that `next` returned.
  __device__ void word_of(const char* rows, int slab, unsigned i, int word,
                          float (&x)[kEach]) const {
    if (rows == nullptr) features(i, static_cast<int64_t>(slab) * kFeatures + word * kEach, x);
    else unpack(*reinterpret_cast<const uint4*>(rows + i * kPitch + word * 16), x);
  }

  // Features from `d` on, from memory; 0 behind the last.
  __device__ void features(unsigned i, int64_t d, float (&x)[kEach]) const {
    unpack(fetch(i, d), x);
  }

 private:
  static constexpr int64_t kSize = sizeof(T);

  const int64_t width, row_bytes, element_bytes;
  const char* const sample;
  const bool in_words;  // rows can be read 16 bytes at a time
  const int buffers;
  const int* const index;
  char* const shared;
  unsigned tokens = 0;
  int buffer = 0;  // of the slab that is next

  __device__ const char* row(unsigned i) const { return sample + index[i] * row_bytes; }

  __device__ uint4 fetch(unsigned i, int64_t d) const {
    const char* from = row(i);
    if (in_words && d + kEach <= width) return *reinterpret_cast<const uint4*>(from + d * kSize);
    T x[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      x[k] = d + k < width ? *reinterpret_cast<const T*>(from + (d + k) * element_bytes) : T{};
    uint4 word;
    memcpy(&word, x, sizeof word);
    return word;
  }
  static __device__ void unpack(uint4 word, float (&x)[kEach]) {
    T each[kEach];
    memcpy(each, &word, sizeof word);
#pragma unroll
    for (int k = 0; k < kEach; ++k) x[k] = to_float(each[k]);
  }

  __device__ void stage(int slab, int to) {
    char* const rows = shared + static_cast<int64_t>(to) * tokens * kPitch;
    const bool by_token = row_bytes < element_bytes;  // neighbours read what lies side by side
    for (unsigned at = threadIdx.x; at < tokens * kWords; at += kSlabThreads) {
      const unsigned i = by_token ? at % tokens : at / kWords;
      const unsigned word = by_token ? at / tokens : at % kWords;
      const int64_t d = static_cast<int64_t>(slab) * kFeatures + word * kEach;
      char* const there = rows + i * kPitch + word * 16;
      if (in_words && d + kEach <= width) copy_async_16(there, row(i) + d * kSize);
      else *reinterpret_cast<uint4*>(there) = fetch(i, d);
    }
    copy_async_commit();
  }
};

}  // namespace cuda
}  // namespace sma
