// Vectors of one instruction set, and the little else that depends on it.
//
// This file and every <op>.h are compiled once per instruction set, inside `namespace
// sma::SMA_ISA`. Nothing in them may come from an std:: template: the linker would keep one copy of
// it, compiled for whichever instruction set came first.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../args.h"
#include "cache.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sma {
namespace SMA_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vf __attribute__((vector_size(kLanes * 4)));
typedef float Vhf __attribute__((vector_size(kLanes * 2)));  // half as many floats
typedef double Vd __attribute__((vector_size(kLanes * 4)));
typedef int32_t Vi __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Vh __attribute__((vector_size(kLanes * 2)));

#if !defined(_OPENMP)
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2e = 1.44269504088896340736f;

template <class V, class T>
inline V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
inline void store(T* p, V v) {
  memcpy(p, &v, sizeof(V));
}
// sums[i] += v[i], where many float sums are joined
inline void add_to(double* sums, Vf v) {
  Vhf half[2];
  memcpy(half, &v, sizeof v);
  for (int i = 0; i < 2; ++i)
    store(sums + i * (kLanes / 2),
          load<Vd>(sums + i * (kLanes / 2)) + __builtin_convertvector(half[i], Vd));
}
constexpr int64_t kFloatRows = 16;  // rows added up in float before their sum goes to a double
inline Vf splat(float x) {          // 0 + x would be an addition: it changes -0
#if defined(__AVX512F__)
  return reinterpret_cast<Vf>(_mm512_set1_ps(x));
#elif defined(__AVX2__)
  return reinterpret_cast<Vf>(_mm256_set1_ps(x));
#else
  return Vf{x, x, x, x};
#endif
}
inline Vi splat(int32_t x) { return Vi{} + x; }
inline Vi iota() {
  Vi v{};
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}
inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
template <class T>
inline T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T larger(T a, T b) {
  return a < b ? b : a;
}
inline Vi as_int(Vf v) {
  Vi r;
  memcpy(&r, &v, sizeof v);
  return r;
}
inline Vf as_float(Vi v) {
  Vf r;
  memcpy(&r, &v, sizeof v);
  return r;
}

inline Vf maximum(Vf a, Vf b) { return a > b ? a : b; }
inline float reduce_max(Vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
  float r = v[0];
  for (int i = 1; i < kLanes; ++i) r = v[i] > r ? v[i] : r;
  return r;
#endif
}
inline float reduce_add(Vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float r = 0.0f;
  for (int i = 0; i < kLanes / 2; ++i) r += v[i] + v[i + kLanes / 2];
  return r;
#endif
}

// 2^x for x <= 0, relative error below 2e-7: below 2^-126.5 it gives 0, NaN stays NaN.
// The polynomial is the minimax one of 2^f on [-0.5, 0.5] with 2^0 = 1.
inline Vf exp2_nonpositive(Vf x) {
  const Vf lowest = splat(-127.0f);
  x = x < lowest ? lowest : x;
  const Vf shifted = x + 12582912.0f;  // 1.5 * 2^23: its low bits now hold round(x)
  const Vf f = x - (shifted - 12582912.0f);
  Vf p = splat(0.00132647273f);
  p = p * f + 0.00967151299f;
  p = p * f + 0.0555073358f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.0f;
  const Vi power = (as_int(shifted) << 23) + (127 << 23);
  return p * as_float(power);
}

// Floats as integers that compare the other way round: the larger float has the larger integer.
// NaN counts as -inf, -0 as +0.
inline Vi ordered(Vf v) {
  v = v == v ? v + 0.0f : splat(-kInfinity);
  const Vi bits = as_int(v);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline int32_t ordered(float v) {
  v = v == v ? v + 0.0f : -kInfinity;
  int32_t bits;
  memcpy(&bits, &v, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// bfloat16 and float16 to float32.
inline float to_float(float v) { return v; }
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
inline float to_float(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float r;
  memcpy(&r, &bits, 4);
  return r;
}
inline float to_float(Float16 v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float r;
  if (magnitude >= 0x7c00u) {
    bits += 0x70000000u;  // infinity and NaN
    memcpy(&r, &bits, 4);
  } else {
    bits += 0x38000000u;  // the exponent's bias: 127 - 15
    memcpy(&r, &bits, 4);
    if (magnitude < 0x0400u) r = magnitude * 5.9604644775390625e-08f;  // subnormal: times 2^-24
  }
  memcpy(&bits, &r, 4);
  bits |= sign;
  memcpy(&r, &bits, 4);
  return r;
}
inline uint16_t round_to_bfloat16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if (v != v) return static_cast<uint16_t>((bits >> 16) | 0x0040u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline uint16_t round_to_float16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more
  if (bits < 0x38800000u) {                        // below 2^-14: a multiple of 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;  // the sum's last bit is 2^-24, so the addition rounds half to even
    memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}
inline void from_float(float v, float* out) { *out = v; }
inline void from_float(float v, BFloat16* out) { out->bits = round_to_bfloat16(v); }
inline void from_float(float v, Float16* out) { out->bits = round_to_float16(v); }
inline double to_float(double v) { return v; }
inline void from_float(double v, double* out) { *out = v; }

inline Vf load_floats(const float* p) { return load<Vf>(p); }
inline Vf load_floats(const BFloat16* p) {
  return as_float(__builtin_convertvector(load<Vh>(p), Vi) << 16);
}
inline Vf load_floats(const Float16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vf>(_mm512_cvtph_ps(load<__m256i>(p)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vf>(_mm256_cvtph_ps(load<__m128i>(p)));
#else
  Vf v{};
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// Transposes kLanes rows of kLanes floats: rows[i] -> out[0..kLanes) columns, stored kLanes apart.
#if defined(__AVX512F__)
inline void transpose_store(const Vf* rows, float* out) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    const __m512 x = reinterpret_cast<__m512>(rows[i]), y = reinterpret_cast<__m512>(rows[i + 1]);
    a[i] = _mm512_unpacklo_ps(x, y);
    a[i + 1] = _mm512_unpackhi_ps(x, y);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(a[i + j]), y = _mm512_castps_pd(a[i + 2 + j]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // column c of each 4 x 4 block; blocks are 128-bit quarters
    const __m512 p = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
    const __m512 q = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 r = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 s = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    _mm512_storeu_ps(out + (c + 0) * 16, _mm512_shuffle_f32x4(p, q, 0x88));
    _mm512_storeu_ps(out + (c + 8) * 16, _mm512_shuffle_f32x4(p, q, 0xdd));
    _mm512_storeu_ps(out + (c + 4) * 16, _mm512_shuffle_f32x4(r, s, 0x88));
    _mm512_storeu_ps(out + (c + 12) * 16, _mm512_shuffle_f32x4(r, s, 0xdd));
  }
}
#elif defined(__AVX2__)
inline void transpose_store(const Vf* rows, float* out) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    const __m256 x = reinterpret_cast<__m256>(rows[i]), y = reinterpret_cast<__m256>(rows[i + 1]);
    a[i] = _mm256_unpacklo_ps(x, y);
    a[i + 1] = _mm256_unpackhi_ps(x, y);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256d x = _mm256_castps_pd(a[i + j]), y = _mm256_castps_pd(a[i + 2 + j]);
      b[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
      b[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(out + c * 8, _mm256_permute2f128_ps(b[c], b[4 + c], 0x20));
    _mm256_storeu_ps(out + (c + 4) * 8, _mm256_permute2f128_ps(b[c], b[4 + c], 0x31));
  }
}
#else
inline void transpose_store(const Vf* rows, float* out) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) out[j * kLanes + i] = rows[i][j];
}
#endif

// Writes past the caches, for outputs too large to be read back from them; fence() when done.
inline void stream(float* p, Vf v) {  // p aligned to the vector
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#elif defined(__x86_64__)
  _mm_stream_ps(p, reinterpret_cast<__m128>(v));
#else
  store(p, v);
#endif
}
inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
constexpr int64_t kStreamBytes = 8 << 20;  // outputs from here on do not stay in the caches

inline bool aligned_to_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// Copies one row, or writes zeros where `from` is null.
inline void copy_row(void* to, const void* from, int64_t bytes, bool past_caches) {
  if (bytes == 0) return;
  if (!(past_caches && bytes % 64 == 0 && aligned_to_line(to))) {
    if (from == nullptr) memset(to, 0, bytes);
    else memcpy(to, from, bytes);
    return;
  }
  float* out = static_cast<float*>(to);
  const float* in = static_cast<const float*>(from);
  const int64_t count = bytes / 4;
  if (in == nullptr)
    for (int64_t i = 0; i < count; i += kLanes) stream(out + i, Vf{});
  else
    for (int64_t i = 0; i < count; i += kLanes) stream(out + i, load<Vf>(in + i));
}

// Scratch memory, aligned to cache lines and given back with its owner.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(take_block(static_cast<size_t>(count) * sizeof(T), &size_))) {}
  ~Scratch() { give_block(data_, size_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t size_;
  T* data_;
};

// The tokens of a row that are not padding: their number, and their indices in `room` unless they
// are simply the first ones (index null), as in a row without padding or padded on the right.
struct ValidTokens {
  int64_t count;
  const int32_t* index = nullptr;

  ValidTokens(const uint8_t* padding, int64_t tokens, int32_t* room) : count(tokens) {
    if (padding == nullptr) return;
    int64_t padded = 0, early = 0;
    for (int64_t n = 0; n < tokens; ++n) padded += padding[n] != 0;
    count = tokens - padded;
    for (int64_t n = 0; n < count; ++n) early += padding[n] != 0;
    if (early == 0) return;
    int64_t kept = 0;
    for (int64_t n = 0; n < tokens; ++n) {
      room[kept] = static_cast<int32_t>(n);
      kept += padding[n] == 0;
    }
    index = room;
  }
};

// The threads that work on one thing together: a sample each (size 1), or all on one sample.
struct Team {
  int id, size;
  void wait() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};
// A call too small to share among threads runs on one.
inline int threads_for(int64_t work, int threads) {
  return work < (int64_t{1} << 15) ? 1 : threads;
}
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t count, const Team& team) {
  return {count * team.id / team.size, count * (team.id + 1) / team.size};
}

}  // namespace SMA_ISA
}  // namespace sma
