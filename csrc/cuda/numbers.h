// The numbers of tensors: sums of them are float, or double for double, and rounded once.
#pragma once
#include "device.h"

namespace sma {
namespace cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ inline double to_float(double x) { return x; }
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ inline float to_float(Float16 x) { return half_to_float(x.bits); }

__device__ inline void from_float(double x, double* out) { *out = x; }
__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, BFloat16* out) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);  // ties to even
  out->bits = static_cast<uint16_t>((x == x ? rounded : bits | 0x400000) >> 16);
}
__device__ inline void from_float(float x, Float16* out) { out->bits = float_to_half(x); }

template <class T>
using SumOf = decltype(to_float(T{}));

// Calls body with a number of the type.
template <class Body>
auto with_number(int dtype, const Body& body) {
  if (dtype == kFloat32) return body(float{});
  if (dtype == kBFloat16) return body(BFloat16{});
  if (dtype == kFloat16) return body(Float16{});
  return body(double{});
}

}  // namespace cuda
}  // namespace sma
