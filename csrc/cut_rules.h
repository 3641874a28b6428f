// What bipartition has in common on the CPU and in CUDA: when a cut is known, and what it begins
// with. kernels/bipartition.py follows the same rules.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define SMA_HOST_DEVICE __host__ __device__
#else
#define SMA_HOST_DEVICE
#endif

namespace sma {

constexpr double kShortest = 1.17549435e-38;  // a row shorter than a normal float counts as 0
constexpr float kNothing = 1e-6f;             // eigenvalues up to here count as 0
constexpr float kLeastGap = 2e-5f;  // of the eigenvalue: floats cannot tell less from a tie
constexpr float kSettled = 0.5f;    // of the gap, that the second eigenvector may be wrong
constexpr int kFewest = 3;          // products: before, one of equal eigenvalues may show alone
constexpr float kSudden = 1000.0f;  // times less error than is remembered: exact all at once, as
constexpr float kFades = 0.25f;     // repeated rows make it; what is equal shows until that faded
constexpr float kSignTie = 1e-3f;   // entries within this share of the largest count as large,
constexpr float kZero = 1e-4f;      // and up to this share of it as 0, but for rounding
constexpr double kWorstEntry = 8;   // times the mean error of an entry, that one may be wrong

// Deterministic noise in [-1, 1), that entry `i` of vector `j`, of four at most, begins with.
SMA_HOST_DEVICE static inline float cut_noise(uint32_t i, uint32_t j, uint32_t round) {
  uint32_t x = (i * 4 + j + 1) * 2654435761u + round * 40503u;
  x ^= x >> 15;
  x *= 2246822519u;
  x ^= x >> 13;
  return static_cast<float>(static_cast<int32_t>(x)) * 4.656612873e-10f;
}

}  // namespace sma
