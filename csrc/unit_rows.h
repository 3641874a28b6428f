// Rows as vectors of length 1: the factor that makes them so.
#pragma once
#include "cpu/vec.h"
#include "cut_rules.h"

namespace sma {
namespace SMA_ISA {

template <class T>
float squares(const T* x, int64_t width) {
  Vf sum[4] = {};
  int64_t d = 0;
  for (; d + 4 * kLanes <= width; d += 4 * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vf v = load_floats(x + d + j * kLanes);
      sum[j] += v * v;
    }
  float rest = 0;
  for (; d < width; ++d) rest += to_float(x[d]) * to_float(x[d]);
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

struct RowScale {
  double
      factor;    // one over the row's length; 0 for a row that is 0, NaN for one that is not finite
  bool extreme;  // the row is so long or short that floats may not hold its products
};

template <class T>
RowScale row_scale(const T* x, int64_t width) {
  double sum = squares(x, width);
  if (sum > 1e-30 && sum < 1e30) return {1 / __builtin_sqrt(sum), false};
  sum = 0;  // a float cannot tell
  for (int64_t d = 0; d < width; ++d) sum += static_cast<double>(to_float(x[d])) * to_float(x[d]);
  if (!(sum < __builtin_huge_val())) return {__builtin_nan(""), true};
  const double length = __builtin_sqrt(sum);
  return length < kShortest ? RowScale{0, false} : RowScale{1 / length, true};
}

}  // namespace SMA_ISA
}  // namespace sma
