// What csrc/cuda/device.h writes in PTX. Included by emulated_cuda.h.
#pragma once

namespace emulated {

struct Matrices {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

void mma_bf16(void* const* operands);
void mma_fp16(void* const* operands);
void mma_tf32(void* const* operands);

inline constexpr WarpOperation kMmaBf16 = {"mma_bf16", mma_bf16};
inline constexpr WarpOperation kMmaFp16 = {"mma_fp16", mma_fp16};
inline constexpr WarpOperation kMmaTf32 = {"mma_tf32", mma_tf32};

inline void mma(const WarpOperation& operation, float* d, const uint32_t* a, uint32_t b0,
                uint32_t b1) {
  Matrices operands = {d, a, {b0, b1}};
  warp_wait(operation, ~0u, &operands);
}

struct MatrixRow {
  const void* row;
  unsigned matrices;
  uint32_t words[4];
};
void load_matrices(void* const* operands);
inline constexpr WarpOperation kLoadMatrices = {"load_matrices", load_matrices};

void copy_async(void* shared, const void* global);  // null: zeros
void copy_async_wait(size_t left);
char* cluster_map(char* shared, unsigned rank);
float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);

template <class T>
T* aligned(T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0)
    fail("16 bytes at once at a misaligned address");
  return at;
}

}  // namespace emulated

namespace sma {
namespace cuda {

inline char* shared_memory() { return emulated::current->block->shared; }

// a subnormal result is zero, as on the GPU
inline float exp2_fast(float x) { return x < -126 ? 0 : exp2f(x); }
inline float reciprocal_fast(float x) { return 1 / x; }

inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  const bool finite = (bits & 0x7F800000) != 0x7F800000;
  return ((finite ? bits + 0x1000 : bits) & ~0x1FFFu) | (x != x ? 0x7FFFE000 : 0);
}

inline float half_to_float(uint16_t bits) { return emulated::half_to_float(bits); }
inline uint16_t float_to_half(float x) { return emulated::float_to_half(x); }

// d += a * b, in the fragments of mma.sync.m16n8k16 and, for tf32, of m16n8k8
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma(emulated::kMmaBf16, d, a, b0, b1);
}
inline void mma_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma(emulated::kMmaFp16, d, a, b0, b1);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma(emulated::kMmaTf32, d, a, b0, b1);
}

using SharedAddress = const char*;
inline SharedAddress flipped(SharedAddress at, unsigned bits) {
  return reinterpret_cast<SharedAddress>(reinterpret_cast<uintptr_t>(at) ^ bits);
}
inline SharedAddress address_of(const void* shared) { return static_cast<const char*>(shared); }

template <int kMatrices>
void load_matrices(SharedAddress row, uint32_t (&words)[kMatrices]) {
  static_assert(kMatrices == 2 || kMatrices == 4);
  emulated::MatrixRow operands = {
      emulated::aligned(reinterpret_cast<const uint4*>(row)), kMatrices, {}};
  emulated::warp_wait(emulated::kLoadMatrices, ~0u, &operands);
  memcpy(words, operands.words, sizeof words);
}

inline unsigned cluster_rank() {
  return emulated::cluster.cooperative ? 0 : emulated::current->block->rank;
}
inline unsigned cluster_size() {
  return emulated::cluster.cooperative ? 1 : emulated::cluster.size;
}
inline void cluster_sync() {
  const bool alone = emulated::cluster.cooperative;
  emulated::barrier_wait(alone ? emulated::current->block->barrier : emulated::cluster.barrier,
                         "cluster_sync", 0);
}
inline void sync_some(unsigned threads) {
  emulated::barrier_wait_some(emulated::current->block->part_barrier, "sync_some", threads);
}
inline void grid_sync() {
  if (!emulated::cluster.cooperative) emulated::fail("grid_sync in a launch that is not together");
  if (emulated::cluster.left) emulated::fail("grid_sync after a block has returned");
  emulated::barrier_wait(emulated::cluster.barrier, "grid_sync", 0);
}
template <class T>
T* cluster_map(T* shared, unsigned rank) {
  return reinterpret_cast<T*>(emulated::cluster_map(reinterpret_cast<char*>(shared), rank));
}

inline float cluster_load(const float* shared, unsigned rank) {
  return *cluster_map(const_cast<float*>(shared), rank);
}

// the bytes arrive with the wait; from here to there they are undefined
inline void copy_async_16(void* shared, const void* global) {
  emulated::copy_async(shared, global);
}
inline void copy_async_16_or_zeros(void* shared, const void* global, bool read) {
  emulated::copy_async(shared, read ? global : nullptr);
}
inline void copy_async_commit() {
  emulated::current->groups.push_back(emulated::current->uncommitted);
  emulated::current->uncommitted = 0;
}
template <int kLeft>
void copy_async_wait() {
  emulated::copy_async_wait(kLeft);
}

inline uint4 load_stream(const uint4* from) { return *emulated::aligned(from); }
inline void store_16(uint4* to, uint4 value) { *emulated::aligned(to) = value; }

}  // namespace cuda
}  // namespace sma
