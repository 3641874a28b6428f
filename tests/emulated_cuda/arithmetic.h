// Arithmetic that CUDA has and C++ has not, or has under other names. Included by emulated_cuda.h.
#pragma once

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

inline unsigned __float_as_uint(float x) { return emulated::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return emulated::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return emulated::bit_cast<float>(x); }
inline float __int_as_float(int x) { return emulated::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return emulated::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated::bit_cast<double>(x); }

// rounded on their own: never contracted to a multiply-add
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0), 1); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline long long __double2ll_rn(double x) { return llrint(x); }

// as in device code: two integers of one width give the unsigned one where either is unsigned
template <class T>
inline constexpr bool has_min_max =
    emulated::is_one_of<T, int, unsigned, long, unsigned long, long long, unsigned long long>;

template <class A, class B>
using MinMax = std::enable_if_t<has_min_max<A> && has_min_max<B>, std::common_type_t<A, B>>;

template <class A, class B>
constexpr MinMax<A, B> min(A a, B b) {
  const MinMax<A, B> x = a, y = b;
  return x < y ? x : y;
}
template <class A, class B>
constexpr MinMax<A, B> max(A a, B b) {
  const MinMax<A, B> x = a, y = b;
  return x > y ? x : y;
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
