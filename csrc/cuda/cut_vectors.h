// The four vectors of a sample that bipartition cuts, in shared memory: made orthogonal, and turned
// to the eigenvectors between them, by all threads of a block together.
#pragma once
#include "../small_eigen.h"
#include "slabs.h"

namespace sma {
namespace cuda {

constexpr int kVectors = 4;
constexpr unsigned kThreads = kSlabThreads, kWarps = kThreads / kWarp;
constexpr int kMostSums = 10;
constexpr float kNothing = 1e-6f;  // eigenvalues up to here count as 0

struct CutShared {
  double sums[2][kWarps * kMostSums];
  double turn[kVectors][kVectors], values[kVectors];
  unsigned counts[kWarps];
};

// Where all stands in the shared memory of a block, which takes `slabs` of a sample at once.
struct CutMemory {
  int64_t shares, floats, along, slabs, bytes;

  // blocks: of the cluster. features: of a slab. places: for slabs in shared memory.
  __host__ __device__ CutMemory(int64_t tokens, unsigned blocks, int features, int64_t at_once,
                                int64_t places) {
    shares = sizeof(CutShared) + 2 * tokens * sizeof(float4);
    floats = shares + (blocks > 1 ? 2 : 0) * tokens * sizeof(float4);
    along = floats + (tokens * (3 * sizeof(float) + sizeof(int)) + 15) / 16 * 16;
    slabs = along + at_once * features * sizeof(float4);
    bytes = slabs + places * tokens * kPitch;
  }
};

class CutVectors {
 protected:
  __device__ CutVectors(char* shared, int64_t tokens, const CutMemory& memory)
      : s(*reinterpret_cast<CutShared*>(shared)),
        vectors(reinterpret_cast<float4*>(shared + sizeof(CutShared))),
        products(vectors + tokens),
        root(reinterpret_cast<float*>(shared + memory.floats)),
        factor(root + tokens),
        trivial(factor + tokens),
        index(reinterpret_cast<int*>(trivial + tokens)) {}

  CutShared& s;
  float4* const vectors;   // of each valid token, one float of each vector
  float4* const products;  // of the matrix with them
  float* const root;       // one over the square root of the degree
  float* const factor;     // that, over the row's length; 0 for a zero row
  float* const trivial;    // the first eigenvector
  int* const index;        // of the valid tokens
  unsigned n = 0;          // valid tokens

  static __device__ float* part(float4* x, int j) { return reinterpret_cast<float*>(x) + j; }

  // How many of the block's threads before this one say yes; and of all of them.
  __device__ unsigned before_me(bool yes, unsigned* all) {
    const unsigned votes = __ballot_sync(kAllLanes, yes);
    __syncthreads();
    if (lane() == 0) s.counts[warp()] = __popc(votes);
    __syncthreads();
    unsigned before = __popc(votes & ((1u << lane()) - 1));
    *all = 0;
    for (unsigned w = 0; w < kWarps; ++w) {
      before += w < warp() ? s.counts[w] : 0;
      *all += s.counts[w];
    }
    return before;
  }

  // Sums of the block, the same bits in all threads.
  template <int kCount, class Sum>
  __device__ void add_up(Sum (&x)[kCount]) {
    static_assert(kCount <= kMostSums);
    Sum* const of_warps = reinterpret_cast<Sum*>(s.sums[sums_at]);
    sums_at ^= 1;  // what is read now is written again behind the next barrier
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2)
        x[k] += __shfl_xor_sync(kAllLanes, x[k], step);
      if (lane() == 0) of_warps[warp() * kCount + k] = x[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      x[k] = 0;
#pragma unroll
      for (unsigned w = 0; w < kWarps; ++w) x[k] += of_warps[w * kCount + k];
    }
  }

  // Each thread reads and writes its own tokens only in what follows.

  // Deterministic noise in [-1, 1).
  __device__ void start(int j, unsigned round) {
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      uint32_t x = (i * kVectors + j + 1) * 2654435761u + round * 40503u;
      x ^= x >> 15;
      x *= 2246822519u;
      x ^= x >> 13;
      part(vectors + i, 0)[j] = static_cast<float>(static_cast<int32_t>(x)) * 4.656612873e-10f;
    }
  }

  // Makes vector j orthogonal to the trivial one and to those before it, and of length 1; noise
  // takes its place where nothing is left.
  __device__ void gram_schmidt(int j, unsigned round) {
#pragma unroll 1
    for (bool again = false;; again = true) {
      float before = 0, squares = 0;
#pragma unroll 1
      for (int turn = 0; turn < 2; ++turn) {
        float dots[kVectors + 1] = {};  // with itself, the trivial one, and three before it
        for (unsigned i = threadIdx.x; i < n; i += kThreads) {
          const float4 v = vectors[i];
          const float x = part(vectors + i, 0)[j];
          dots[0] += x * x;
          dots[1] += x * trivial[i];
          dots[2] += x * v.x;
          dots[3] += x * v.y;
          dots[4] += x * v.z;
        }
        add_up(dots);
        if (turn == 0) before = dots[0];
        squares = dots[0];
#pragma unroll
        for (int k = 1; k < kVectors + 1; ++k) {
          if (k > j + 1) dots[k] = 0;
          squares -= dots[k] * dots[k];
        }
        for (unsigned i = threadIdx.x; i < n; i += kThreads) {
          const float4 v = vectors[i];
          part(vectors + i, 0)[j] -=
              dots[1] * trivial[i] + dots[2] * v.x + dots[3] * v.y + dots[4] * v.z;
        }
      }
      if (squares > 1e-10f * before && squares > 1e-24f) {
        const float scale = 1 / sqrtf(squares);
        for (unsigned i = threadIdx.x; i < n; i += kThreads) part(vectors + i, 0)[j] *= scale;
        return;
      }
      if (again) return;
      start(j, round + 1);
    }
  }

  // Turns the vectors to the eigenvectors between them; says whether the first is near enough.
  __device__ bool rayleigh_ritz(int size, double tol) {
    double sums[kVectors * (kVectors + 1) / 2] = {};
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const float *v = part(vectors + i, 0), *y = part(products + i, 0);
      int at = 0;
#pragma unroll
      for (int p = 0; p < kVectors; ++p) {
#pragma unroll
        for (int q = p; q < kVectors; ++q)
          sums[at++] += 0.5 * (static_cast<double>(v[p]) * y[q] + static_cast<double>(v[q]) * y[p]);
      }
    }
    add_up(sums);
    if (threadIdx.x == 0) {
      double m[kVectors][kVectors];
      int at = 0;
#pragma unroll
      for (int p = 0; p < kVectors; ++p) {
#pragma unroll
        for (int q = p; q < kVectors; ++q) m[p][q] = m[q][p] = sums[at++];
      }
      small_eigen(m, size, s.values, s.turn);
    }
    __syncthreads();
    double errors[2] = {};  // of the first and the second
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const float4 v = vectors[i], y = products[i];
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const double turned =
            v.x * s.turn[0][j] + v.y * s.turn[1][j] + v.z * s.turn[2][j] + v.w * s.turn[3][j];
        const double product =
            y.x * s.turn[0][j] + y.y * s.turn[1][j] + y.z * s.turn[2][j] + y.w * s.turn[3][j];
        if (j < 2) {
          const double error = product - s.values[j] * turned;
          errors[j] += error * error;
        }
        part(vectors + i, 0)[j] = static_cast<float>(turned);
        part(products + i, 0)[j] = static_cast<float>(product);
      }
    }
    add_up(errors);
    // the second may be as much larger as it is wrong
    const double second = size > 1 ? s.values[1] + sqrt(errors[1]) : 0;
    return s.values[0] > kNothing && sqrt(errors[0]) <= tol * (s.values[0] - second);
  }

 private:
  int sums_at = 0;  // which of s.sums is next
};

}  // namespace cuda
}  // namespace sma
