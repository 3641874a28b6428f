// Eigenvectors of a matrix so small that it lies in registers.
#pragma once

#define SMA_UNROLL _Pragma("GCC unroll 8")

namespace sma {

// Eigenvalues, descending, and eigenvectors (columns of `turn`) of a symmetric matrix, which is
// lost; by Jacobi's rotations. Static: each source has its own, compiled for its instruction set.
template <int kMost>
static inline void small_eigen(double (&m)[kMost][kMost], double (&values)[kMost],
                               double (&turn)[kMost][kMost]) {
  double most = 0;
  SMA_UNROLL for (int i = 0; i < kMost; ++i) {
    most += m[i][i] < 0 ? -m[i][i] : m[i][i];
    SMA_UNROLL for (int j = 0; j < kMost; ++j) turn[i][j] = i == j;
  }
  bool turned = true;
  for (int sweep = 0; sweep < 8 && turned; ++sweep) {  // they converge quadratically
    turned = false;
    SMA_UNROLL for (int p = 0; p < kMost; ++p) {
      SMA_UNROLL for (int q = p + 1; q < kMost; ++q) {
        if ((m[p][q] < 0 ? -m[p][q] : m[p][q]) <= 1e-17 * most) continue;
        turned = true;
        const double theta = (m[q][q] - m[p][p]) / (2 * m[p][q]);
        const double t = (theta < 0 ? -1 : 1) /
                         ((theta < 0 ? -theta : theta) + __builtin_sqrt(theta * theta + 1));
        const double c = 1 / __builtin_sqrt(t * t + 1), s = t * c;
        SMA_UNROLL for (int k = 0; k < kMost; ++k) {
          const double x = m[k][p], y = m[k][q];
          m[k][p] = c * x - s * y;
          m[k][q] = s * x + c * y;
        }
        SMA_UNROLL for (int k = 0; k < kMost; ++k) {
          const double x = m[p][k], y = m[q][k];
          m[p][k] = c * x - s * y;
          m[q][k] = s * x + c * y;
          const double u = turn[k][p], v = turn[k][q];
          turn[k][p] = c * u - s * v;
          turn[k][q] = s * u + c * v;
        }
      }
    }
  }
  SMA_UNROLL for (int i = 0; i < kMost; ++i) values[i] = m[i][i];
  SMA_UNROLL for (int i = 0; i < kMost; ++i) {
    SMA_UNROLL for (int j = i + 1; j < kMost; ++j) {
      if (!(values[j] > values[i])) continue;
      const double value = values[i];
      values[i] = values[j];
      values[j] = value;
      SMA_UNROLL for (int k = 0; k < kMost; ++k) {
        const double u = turn[k][i];
        turn[k][i] = turn[k][j];
        turn[k][j] = u;
      }
    }
  }
}

}  // namespace sma
