// bipartition: the patches of a sample cut in two, by the second eigenvector of their similarity.
//
// One sample at a time, and its rows stay in the cache: a block of four vectors is multiplied with
// the similarities again and again, made orthogonal to the trivial vector and to each other, and
// turned to the eigenvectors of the 4 x 4 problem between them (subspace iteration with
// Rayleigh-Ritz).
#pragma once
#include "cut_matrix.h"
#include "small_eigen.h"

namespace sma {
namespace SMA_ISA {

constexpr int kDirectTokens = 8;     // the matrix pays after an iteration for each so many tokens
constexpr double kFarBelow = 0.8;    // of the second eigenvalue, that a polynomial tells from it
constexpr int kFewProducts = 20;     // from here on polynomials are of higher degrees,
constexpr int kMostDegree = 8;       // up to this,
constexpr double kMostGrowth = 1e3;  // while the vectors stay apart in floats

template <class T>
class Cut : CutMatrix<T> {
 public:
  using CutMatrix<T>::CutMatrix;

  // False: an embedding is not finite.
  bool run() {
    if (!this->find_scales()) return false;
    const int size = static_cast<int>(smaller<int64_t>(kVectors, n - 1));
    double values[kVectors] = {};
    bool converged = false;
    if (size > 0) {
      this->find_degrees();
      for (int j = 0; j < kVectors; ++j) start(j, 0);
      for (int j = 0; j < size; ++j) gram_schmidt(vectors, j, 0);
      for (int64_t i = 0; i < a.iterations && !converged; ++i) {
        if (plan.stored && !filled && i >= n / kDirectTokens) this->fill_matrix();
        if (const int degree = degree_for(i, values); degree > 1) {
          filter(static_cast<float>(values[kVectors - 1]), degree);
          i += degree - 1;
        }
        if (i > 0) next_vectors(size, i);
        this->multiply(size);
        converged = rayleigh_ritz(size, values);
      }
    }
    write(converged, values[0]);
    return true;
  }

 private:
  using Base = CutMatrix<T>;
  using Base::a, Base::plan, Base::b, Base::n, Base::tokens, Base::root, Base::trivial;
  using Base::filled, Base::vectors, Base::products, Base::before;

  void start(int j, int64_t round) {
    float* v = vectors + j * plan.padded;
    for (int64_t i = 0; i < plan.padded; ++i)
      v[i] = i < n ? cut_noise(static_cast<uint32_t>(i), static_cast<uint32_t>(j),
                               static_cast<uint32_t>(round))
                   : 0.0f;
  }

  // Makes vector j orthogonal to the trivial one and to those before it, and of length 1; noise
  // takes its place where nothing is left.
  void gram_schmidt(float* all, int j, int64_t round) {
    float* v = all + j * plan.padded;
    const double before = dot(v, v, n);
    for (int again = 0; again < 2; ++again) {
      add_times(v, trivial, static_cast<float>(-dot(v, trivial, n)), n);
      for (int k = 0; k < j; ++k) {
        const float* other = all + k * plan.padded;
        add_times(v, other, static_cast<float>(-dot(v, other, n)), n);
      }
    }
    double length = dot(v, v, n);
    if (!(length > 1e-10 * before) || !(length > 1e-24)) {
      if (round < 0) return;
      start(j, round + 1);
      return gram_schmidt(all, j, -1);
    }
    const float factor = static_cast<float>(1 / __builtin_sqrt(length));
    for (int64_t i = 0; i < n; ++i) v[i] *= factor;
  }

  // The degree of the polynomial that product i becomes; 1: a product. The bound on what is not
  // wanted is the last value, which is right only after some products unless it lies far below.
  int degree_for(int64_t i, const double (&values)[kVectors]) const {
    const double x = 2 * values[0] / values[kVectors - 1] - 1;
    const bool far_below = values[kVectors - 1] < kFarBelow * values[0];
    if (i < 2 || !(values[kVectors - 1] > kNothing) || !(far_below || i >= kFewProducts)) return 1;
    const int64_t most = i < kFewProducts ? 2 : smaller<int64_t>(kMostDegree, a.iterations - i);
    if (i + 2 > a.iterations) return 1;
    int degree = 2;
    for (double last = x, now = 2 * x * x - 1; degree < most && now < kMostGrowth; ++degree) {
      const double next = 2 * x * now - last;
      last = now;
      now = next;
    }
    return degree;
  }

  // Instead of the product with the matrix, a polynomial of it: Chebyshev's, which is small on
  // [0, bound], where what is not wanted lies, and grows fastest above. Each degree takes a
  // product; the last one is left to the caller.
  void filter(float bound, int degree) {
    const int64_t size = kVectors * plan.padded;
    const float inverse = 2 / bound;
    memcpy(before, vectors, static_cast<size_t>(size) * sizeof(float));
    for (int64_t i = 0; i < size; ++i) vectors[i] = products[i] * inverse - vectors[i];
    for (int d = 2;; ++d) {
      this->multiply(kVectors);
      for (int64_t i = 0; i < size; ++i) {
        products[i] = 2 * (products[i] * inverse - vectors[i]) - before[i];
        before[i] = vectors[i];
        vectors[i] = products[i];
      }
      if (d == degree) return;
    }
  }

  void next_vectors(int size, int64_t round) {
    memcpy(vectors, products, static_cast<size_t>(kVectors * plan.padded) * sizeof(float));
    for (int j = 0; j < size; ++j) gram_schmidt(vectors, j, round);
  }

  // Turns the vectors to the eigenvectors between them; says whether the first is near enough.
  bool rayleigh_ritz(int size, double (&values)[kVectors]) {
    double m[kVectors][kVectors] = {}, turn[kVectors][kVectors];
    for (int p = 0; p < size; ++p)
      for (int q = 0; q < size; ++q)
        m[p][q] = dot(vectors + p * plan.padded, products + q * plan.padded, n);
    for (int p = 0; p < size; ++p)
      for (int q = 0; q < p; ++q) m[p][q] = m[q][p] = (m[p][q] + m[q][p]) / 2;
    small_eigen(m, size, values, turn);
    double errors[kVectors] = {};
    for (int64_t i = 0; i < n; ++i) {
      double v[kVectors] = {}, y[kVectors] = {};
      for (int j = 0; j < size; ++j)
        for (int k = 0; k < size; ++k) {
          v[j] += vectors[k * plan.padded + i] * turn[k][j];
          y[j] += products[k * plan.padded + i] * turn[k][j];
        }
      for (int j = 0; j < size; ++j) {
        const double error = y[j] - values[j] * v[j];
        errors[j] += error * error;
        vectors[j * plan.padded + i] = static_cast<float>(v[j]);
        products[j * plan.padded + i] = static_cast<float>(y[j]);
      }
    }
    // the second may be as much larger as it is wrong
    const double second = size > 1 ? values[1] + __builtin_sqrt(errors[1]) : 0;
    const double gap = values[0] - second, error = __builtin_sqrt(errors[0]);
    return values[0] > kNothing && error <= a.tol * gap && labels_follow(error / gap);
  }

  // Whether labels are those of the exact vector, at this angle to it: but for one in a thousand no
  // entry is so near to where labels begin, nor is a large one that the sign may hang on another.
  bool labels_follow(double angle) const {
    double most = 0, squares = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double x = static_cast<double>(vectors[i]) * root[i];
      most = larger(most, x < 0 ? -x : x);
      squares += x * x;
    }
    const double error = kWorstEntry * angle * __builtin_sqrt(squares / static_cast<double>(n));
    int64_t near = 0;
    int sign[2] = {};  // of the first large entry, if those within the error are large or are not
    for (int64_t i = 0; i < n; ++i) {
      const double x = static_cast<double>(vectors[i]) * root[i], size = x < 0 ? -x : x;
      const double from_zero = size - kZero * most, from_large = size - (1 - kSignTie) * most;
      near += (from_zero < 0 ? -from_zero : from_zero) < error;
      if (sign[0] == 0 && from_large >= -error) sign[0] = x < 0 ? -1 : 1;
      if (sign[1] == 0 && from_large >= error) sign[1] = x < 0 ? -1 : 1;
    }
    return near <= 1 + n / 1000 && sign[0] == sign[1];
  }

  void write(bool converged, double value) {
    float* v = vectors;
    const bool found = n > 1 && value > kNothing;
    float most = 0;
    double squares = 0;
    for (int64_t i = 0; i < n; ++i) {
      v[i] = found ? v[i] * root[i] : 0.0f;
      most = larger(most, v[i] < 0 ? -v[i] : v[i]);
      squares += static_cast<double>(v[i]) * v[i];
    }
    float factor = squares > 0 ? static_cast<float>(1 / __builtin_sqrt(squares)) : 0.0f;
    for (int64_t i = 0; i < n; ++i)
      if ((v[i] < 0 ? -v[i] : v[i]) >= (1 - kSignTie) * most) {
        if (v[i] < 0) factor = -factor;
        break;
      }
    const int64_t from = b * a.tokens;
    for (int64_t i = 0; i < a.tokens; ++i) {
      a.vector[from + i] = 0.0f;
      a.labels[from + i] = 0;
    }
    int64_t* ids = a.ids + from;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = tokens.index == nullptr ? i : tokens.index[i];
      a.vector[from + token] = v[i] * factor + 0.0f;
      if (!(v[i] * factor > kZero * most * (factor < 0 ? -factor : factor))) continue;
      a.labels[from + token] = 1;
      *ids++ = token;
    }
    while (ids < a.ids + from + a.tokens) *ids++ = -1;
    const double eigenvalue = found ? value : 0;
    a.eigenvalue[b] = static_cast<float>(this->cut() ? 1 - eigenvalue : eigenvalue);
    a.converged[b] = converged;
  }
};

template <class T>
void bipartition_of(const BipartitionArgs& a) {
  const BipartitionPlan plan(a);
  const int64_t size = round_up(plan.size(a), 16);
  const int64_t work = a.batch * a.tokens * a.width;
  const int threads =
      static_cast<int>(smaller<int64_t>(threads_for(work, a.threads), larger<int64_t>(a.batch, 1)));
  const Scratch<float> scratch(size * threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < a.batch; ++b) {
    float* own = scratch.get() + omp_get_thread_num() * size;
    if (!Cut<T>(a, plan, b, own).run()) *a.not_finite = 1;  // any thread writes the same
  }
}

inline void bipartition(const BipartitionArgs& a) {
  if (a.dtype == kFloat32) bipartition_of<float>(a);
  else if (a.dtype == kBFloat16) bipartition_of<BFloat16>(a);
  else bipartition_of<Float16>(a);
}

}  // namespace SMA_ISA
}  // namespace sma
