// The four vectors of a sample that bipartition cuts, in shared memory: made orthogonal, and turned
// to the eigenvectors between them, by all threads of a block together.
#pragma once
#include "cut_sums.h"
#include "ritz.h"

namespace sma {
namespace cuda {

constexpr float kEnough = 0.1f;  // of a vector's square, left beside those before it

struct alignas(sizeof(float4)) CutShared {
  double turn[kVectors][kVectors], values[kVectors];
  float remembered;  // error of the first vector
  SumsShared sums;
};
static_assert(sizeof(CutShared) % sizeof(float4) == 0);

// Where all stands in the shared memory of a block, behind CutShared.
struct CutMemory {
  int64_t shares, floats, along, slabs, bytes;

  // blocks: of the cluster. features: of a slab. at_once: slabs that a product takes together.
  // places: for slabs.
  __host__ __device__ CutMemory(int64_t tokens, unsigned blocks, int features, int64_t at_once,
                                int64_t places) {
    shares = sizeof(CutShared) + 2 * tokens * sizeof(float4);
    floats = shares + (blocks > 1 ? 2 : 0) * tokens * sizeof(float4);
    along = floats + (tokens * (3 * sizeof(float) + sizeof(int)) + 15) / 16 * 16;
    slabs = along + at_once * features * sizeof(float4);
    bytes = slabs + places * tokens * kPitch;
  }
};

class CutVectors : protected BlockSums {
 protected:
  __device__ CutVectors(char* shared, int64_t tokens, const CutMemory& memory)
      : BlockSums(&reinterpret_cast<CutShared*>(shared)->sums),
        s(*reinterpret_cast<CutShared*>(shared)),
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

  // Each thread reads and writes its own tokens only in what follows.

  __device__ void start(int j, unsigned round) {
    for (unsigned i = threadIdx.x; i < n; i += kThreads)
      part(vectors + i, 0)[j] = cut_noise(i, static_cast<unsigned>(j), round);
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

  // vectors = products, made orthogonal to the trivial one and to each other all at once: by the
  // triangle that their products with each other are the square of. False where so little is left
  // of one that this is not exact, and products are as they were; vectors are lost.
  __device__ bool orthogonal_products(int size) {
    float dots[kVectors * (kVectors + 1) / 2 + kVectors] = {};
    constexpr int kTrivial = kVectors * (kVectors + 1) / 2;  // where those with the trivial one are
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const float4 y = products[i];
      const float each[kVectors] = {y.x, y.y, y.z, y.w};
      int at = 0;
#pragma unroll
      for (int p = 0; p < kVectors; ++p) {
#pragma unroll
        for (int q = 0; q <= p; ++q) dots[at++] += each[p] * each[q];
        dots[kTrivial + p] += each[p] * trivial[i];
      }
    }
    add_up(dots);
    float triangle[kVectors][kVectors], scale[kVectors];
    bool exact = true;
    int at = 0;
#pragma unroll
    for (int p = 0; p < kVectors; ++p) {
#pragma unroll
      for (int q = 0; q <= p; ++q) {
        float left = dots[at] - dots[kTrivial + p] * dots[kTrivial + q];
#pragma unroll
        for (int k = 0; k < q; ++k) left -= triangle[p][k] * triangle[q][k];
        if (q < p) {
          triangle[p][q] = left * scale[q];
        } else {
          const bool enough = left > kEnough * dots[at] && left > 1e-24f;
          exact &= enough || p >= size;
          scale[p] = enough ? rsqrtf(left) : 0.0f;
        }
        ++at;
      }
    }
    if (!exact) return false;
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const float4 y = products[i];
      float v[kVectors] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int p = 0; p < kVectors; ++p) {
        v[p] -= dots[kTrivial + p] * trivial[i];
#pragma unroll
        for (int k = 0; k < p; ++k) v[p] -= triangle[p][k] * v[k];
        v[p] *= scale[p];
      }
      vectors[i] = float4{v[0], v[1], v[2], v[3]};
    }
    return true;
  }

  // Turns the vectors to the eigenvectors between them; says whether the first is near enough.
  __device__ bool rayleigh_ritz(int size, float tol) {
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
    if (threadIdx.x == 0) Ritz(sums).solve(size, s.values, s.turn);
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
    const float value = static_cast<float>(s.values[0]);
    const float error = sqrtf(static_cast<float>(errors[0]));
    const float wrong = size > 1 ? sqrtf(static_cast<float>(errors[1])) : 0.0f;
    const float gap = static_cast<float>(s.values[0] - (size > 1 ? s.values[1] : 0.0)) - wrong;
    const float remembered = fmaxf(kFades * s.remembered, error);
    __syncthreads();  // all have read it
    if (threadIdx.x == 0) s.remembered = remembered;
    if (n - 1 > kVectors && remembered > fmaxf(tol * gap, kSudden * error)) return false;
    if (!(value > kNothing && gap > kLeastGap * value)) return false;
    if (!(error <= tol * gap && wrong <= kSettled * gap)) return false;
    return labels_follow(error / gap);
  }

  // Whether labels are those of the exact vector, at this angle to it: see csrc/bipartition.h.
  __device__ bool labels_follow(float angle) {
    float most = 0, squares[1] = {};
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const float x = vectors[i].x * root[i];
      most = fmaxf(most, fabsf(x));
      squares[0] += x * x;
    }
    add_up(squares);
    most = largest(most);
    const float error =
        static_cast<float>(kWorstEntry) * angle * sqrtf(squares[0] / static_cast<float>(n));
    float near[1] = {};
    unsigned first[2] = {n, n};  // large entry, if those within the error are large or are not
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const float size = fabsf(vectors[i].x * root[i]), from_large = size - (1 - kSignTie) * most;
      near[0] += fabsf(size - kZero * most) < error ? 1.0f : 0.0f;
      if (from_large >= -error) first[0] = min(first[0], i);
      if (from_large >= error) first[1] = min(first[1], i);
    }
    add_up(near);
    for (unsigned& place : first) place = least(place);
    const bool same = first[1] < n && (vectors[first[0]].x < 0) == (vectors[first[1]].x < 0);
    return __syncthreads_and(same && near[0] <= static_cast<float>(1 + n / 1000));
  }
};

}  // namespace cuda
}  // namespace sma
