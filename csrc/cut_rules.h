// What bipartition has in common on the CPU and in CUDA. kernels/bipartition.py follows the same
// rules with two vectors.
#pragma once
#include <cstdint>

#include "small_eigen.h"

namespace sma {

constexpr double kShortest = 1.17549435e-38;  // a row shorter than a normal float counts as 0
constexpr float kNothing = 1e-6f;             // eigenvalues up to here count as 0
constexpr float kSignTie = 1e-3f;  // entries within this share of the largest count as large,
constexpr float kZero = 1e-4f;     // and up to this share of it as 0, but for rounding
constexpr double kWorstEntry = 8;  // times the mean error of an entry, that one may be wrong

// Deterministic noise in [-1, 1), that entry `i` of vector `j` begins with.
SMA_HOST_DEVICE static inline float cut_noise(uint32_t i, uint32_t j, uint32_t round) {
  uint32_t x = (i * 4 + j + 1) * 2654435761u + round * 40503u;
  x ^= x >> 15;
  x *= 2246822519u;
  x ^= x >> 13;
  return static_cast<float>(static_cast<int32_t>(x)) * 4.656612873e-10f;
}

}  // namespace sma
