// Eigenvectors of a 4 x 4 matrix by one thread, which all others of the block wait for.
#pragma once
#include "../cut_rules.h"
#include "device.h"

namespace sma {
namespace cuda {

constexpr int kVectors = 4;

// As small_eigen does, but for what takes long in double: the angle of a rotation, which is only to
// be near, is found in float, and the rotation is one in double all the same. Rotations of
// different rows go together, as none waits for the other; what is left beside the diagonal is far
// below what the floats that the matrix is of can tell.
class Ritz {
 public:
  __device__ Ritz(const double (&sums)[kVectors * (kVectors + 1) / 2]) {
    int at = 0;
#pragma unroll
    for (int p = 0; p < kVectors; ++p) {
#pragma unroll
      for (int q = p; q < kVectors; ++q) m[p][q] = sums[at++];
    }
#pragma unroll
    for (int p = 0; p < kVectors; ++p) {
#pragma unroll
      for (int q = 0; q < kVectors; ++q) turn[p][q] = p == q;
    }
  }

  // Of the first `size` rows and columns, descending; the rest of the matrix is 0.
  __device__ void solve(int size, double (&values)[kVectors],
                        double (&vectors)[kVectors][kVectors]) {
#pragma unroll 1
    for (int sweep = 0; sweep < 8 && beside() > 1e-11 * trace(); ++sweep) {
      rotate<0, 1, 2, 3>();
      rotate<0, 2, 1, 3>();
      rotate<0, 3, 1, 2>();
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = i + 1; j < kVectors; ++j)
        if (j < size && m[j][j] > m[i][i]) swap(i, j);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      values[i] = m[i][i];
#pragma unroll
      for (int j = 0; j < kVectors; ++j) vectors[i][j] = turn[i][j];
    }
  }

 private:
  double m[kVectors][kVectors];  // its upper triangle
  double turn[kVectors][kVectors];

  struct Angle {
    double cosine, sine;
  };

  __device__ double trace() const {
    return fabs(m[0][0]) + fabs(m[1][1]) + fabs(m[2][2]) + fabs(m[3][3]);
  }
  __device__ double beside() const {
    return fmax(fmax(fmax(fabs(m[0][1]), fabs(m[0][2])), fmax(fabs(m[0][3]), fabs(m[1][2]))),
                fmax(fabs(m[1][3]), fabs(m[2][3])));
  }
  __device__ Angle angle(int p, int q) const {
    const float d = static_cast<float>(m[q][q] - m[p][p]), o = 2 * static_cast<float>(m[p][q]);
    const float sum = fabsf(d) + sqrtf(d * d + o * o);
    float t = sum > 0 ? fminf(fabsf(o) / sum, 1.0f) : 0.0f;  // the tangent
    if ((d < 0) != (o < 0)) t = -t;
    const double square = 1 + static_cast<double>(t) * t;
    double cosine = rsqrtf(static_cast<float>(square));
#pragma unroll
    for (int i = 0; i < 2; ++i) cosine *= 1.5 - 0.5 * square * cosine * cosine;  // Newton's
    return {cosine, cosine * t};
  }
  template <int p, int q, int r, int s>
  __device__ void rotate() {
    const Angle first = angle(p, q), second = angle(r, s);
    apply(p, q, first);
    apply(r, s, second);
  }
  // p < q
  __device__ void apply(int p, int q, Angle by) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (k != p && k != q) mix(m[min(k, p)][max(k, p)], m[min(k, q)][max(k, q)], by);
      mix(turn[k][p], turn[k][q], by);
    }
    double below = m[p][q];  // the diagonal
    mix(m[p][p], m[p][q], by);
    mix(below, m[q][q], by);
    m[p][p] = by.cosine * m[p][p] - by.sine * below;
    mix(m[p][q], m[q][q], by);
  }
  static __device__ void mix(double& x, double& y, Angle by) {
    const double before = x;
    x = by.cosine * x - by.sine * y;
    y = by.sine * before + by.cosine * y;
  }
  // The diagonal, which is all that is left of the matrix, and the vectors.
  __device__ void swap(int i, int j) {
    exchange(m[i][i], m[j][j]);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) exchange(turn[k][i], turn[k][j]);
  }
  static __device__ void exchange(double& x, double& y) {
    const double before = x;
    x = y;
    y = before;
  }
};

}  // namespace cuda
}  // namespace sma
