// bipartition: the patches of a sample cut in two, by the second eigenvector of their similarity.
//
// One sample at a time, and its rows stay in the cache. A pair of vectors nears the two first
// eigenvectors behind the trivial one: each product adds the directions in which the pair is wrong,
// and the next pair is the best of what both, and the step before, span (LOBPCG, Knyazev 2001;
// orthonormal throughout, as Hetmaniuk and Lehoucq 2006 have it). A pair rather than one, as the
// second tells how far away the first is from being another vector as well.
#pragma once
#include "cut_matrix.h"
#include "small_eigen.h"

namespace sma {
namespace SMA_ISA {

// The pair, the step that led to it, and where it is wrong: in this order in memory.
enum Part : int { kBest = 0, kStep = kPair, kWrong = 2 * kPair };
constexpr int kSpan = 3 * kPair;

template <class T>
class Cut : CutMatrix<T> {
 public:
  Cut(const BipartitionArgs& args, int64_t sample, float* scratch)
      : CutMatrix<T>(args, sample, scratch),
        vectors(scratch + cut_matrix_size(args)),
        products(vectors + kSpan * padded) {}

  // Floats of scratch.
  static int64_t size(const BipartitionArgs& a) {
    return round_up(cut_matrix_size(a) + 2 * kSpan * padded_tokens(a.tokens), 16);
  }

  // False: an embedding is not finite.
  bool run() {
    if (!this->find_degrees()) return false;
    memset(vectors, 0, static_cast<size_t>(2 * kSpan * padded) * sizeof(float));
    double values[kPair] = {};
    bool converged = false;
    for (int64_t i = 0; i < a.iterations && n > 1 && !converged; ++i) {
      for (int j = kWrong; j < kSpan; ++j) there[j] = orthonormal(j, i);
      this->multiply(vector(kWrong), product(kWrong));
      const bool more = n - 1 > kPair * (i + 1);  // vectors than were spanned
      converged = rayleigh_ritz(values, more) && !(more && i + 1 < kFewest);
    }
    write(converged, values[0]);
    return true;
  }

 private:
  using Base = CutMatrix<T>;
  using Base::a, Base::b, Base::n, Base::padded, Base::tokens, Base::root, Base::trivial;

  float* const vectors;    // [kSpan][padded], orthonormal
  float* const products;   // of the matrix with them
  bool there[kSpan] = {};  // else the vector is 0
  double remembered = 0;   // error of the first of the pair

  float* vector(int j) const { return vectors + j * padded; }
  float* product(int j) const { return products + j * padded; }

  // Makes vector j orthogonal to the trivial one and to those before it, and of length 1; noise
  // takes its place where nothing is left. False where nothing is left of that either.
  bool orthonormal(int j, int64_t round) {
    float* const v = vector(j);
    for (int noise = 0; noise < 2; ++noise) {
      if (noise > 0)
        for (int64_t i = 0; i < n; ++i)
          v[i] = cut_noise(static_cast<uint32_t>(i), static_cast<uint32_t>(j - kWrong),
                           static_cast<uint32_t>(round));
      const double before = dot(v, v, padded);
      for (int again = 0; again < 2; ++again) {
        add_times(v, trivial, -dot(v, trivial, padded), padded);
        for (int k = 0; k < j; ++k)
          if (there[k]) add_times(v, vector(k), -dot(v, vector(k), padded), padded);
      }
      const double left = dot(v, v, padded);
      if (left > 1e-10 * before && left > 1e-24) {
        scale_by(v, 1 / __builtin_sqrt(left), padded);
        return true;
      }
    }
    memset(v, 0, static_cast<size_t>(padded) * sizeof(float));
    return false;
  }

  // Finds the best pair that the vectors span, the step to it and where it is wrong; says whether
  // its first is near enough. More: the span is not yet all there is.
  bool rayleigh_ritz(double (&values)[kPair], bool more) {
    double m[kSpan][kSpan], found[kSpan], turn[kSpan][kSpan];
    for (int p = 0; p < kSpan; ++p) {
      for (int q = p; q < kSpan; ++q) m[p][q] = m[q][p] = dot(vector(p), product(q), padded);
      if (!there[p]) m[p][p] = -1;  // below all others, which are not negative
    }
    small_eigen(m, found, turn);
    for (int j = 0; j < kPair; ++j) there[kBest + j] = there[kBest + j] || there[kWrong + j];
    for (int j = 0; j < kPair; ++j) there[kStep + j] = step(j, turn);
    combine(vectors, turn);
    combine(products, turn);
    double errors[kPair];
    for (int j = 0; j < kPair; ++j) {
      values[j] = found[j];
      float* const wrong = vector(kWrong + j);
      memcpy(wrong, product(j), static_cast<size_t>(padded) * sizeof(float));
      add_times(wrong, vector(j), -values[j], padded);
      errors[j] = __builtin_sqrt(dot(wrong, wrong, padded));
    }
    // the second may be as much larger as it is wrong
    const double second = there[1] ? values[1] + errors[1] : 0, gap = values[0] - second;
    const bool settled = !there[1] || errors[1] <= kSettled * gap;
    remembered = larger(kFades * remembered, errors[0]);
    const bool sudden = remembered > larger(a.tol * gap, kSudden * errors[0]);
    return !(more && sudden) && values[0] > kNothing && gap > kLeastGap * values[0] && settled &&
           errors[0] <= a.tol * gap && labels_follow(errors[0] / gap);
  }

  // Column kStep + j of `turn` becomes the step to best vector j: what that has of all but the best
  // before it, made orthogonal to what is best now and to other steps. False: there is none.
  static bool step(int j, double (&turn)[kSpan][kSpan]) {
    double square = 0;
    for (int p = 0; p < kSpan; ++p) {
      turn[p][kStep + j] = p < kStep ? 0 : turn[p][j];
      square += turn[p][kStep + j] * turn[p][kStep + j];
    }
    double left = 0;
    for (int again = 0; again < 2; ++again) {
      for (int k = 0; k < kStep + j; ++k) {
        double along = 0;
        for (int p = 0; p < kSpan; ++p) along += turn[p][k] * turn[p][kStep + j];
        for (int p = 0; p < kSpan; ++p) turn[p][kStep + j] -= along * turn[p][k];
      }
      left = 0;
      for (int p = 0; p < kSpan; ++p) left += turn[p][kStep + j] * turn[p][kStep + j];
    }
    const bool some = left > 1e-10 * square && left > 1e-24;
    const double factor = some ? 1 / __builtin_sqrt(left) : 0;
    for (int p = 0; p < kSpan; ++p) turn[p][kStep + j] *= factor;
    return some;
  }

  // The best vectors and the steps, or products with them, of those of the span.
  void combine(float* all, const double (&turn)[kSpan][kSpan]) {
    float factors[kWrong][kSpan];
    for (int j = 0; j < kWrong; ++j)
      for (int p = 0; p < kSpan; ++p) factors[j][p] = static_cast<float>(turn[p][j]);
    for (int64_t i = 0; i < padded; i += kLanes) {
      Vf sum[kWrong] = {};
      for (int p = 0; p < kSpan; ++p) {
        const Vf v = load<Vf>(all + p * padded + i);
#pragma GCC unroll 4
        for (int j = 0; j < kWrong; ++j) sum[j] += v * splat(factors[j][p]);
      }
      for (int j = 0; j < kWrong; ++j) store(all + j * padded + i, sum[j]);
    }
  }

  // Whether labels are those of the exact vector, at this angle to it: but for one, and one more in
  // each thousand, no entry is so near to where labels begin, nor is a large one that the sign may
  // hang on another.
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
  const int64_t size = Cut<T>::size(a);
  const int64_t work = a.batch * a.tokens * a.width;
  const int threads =
      static_cast<int>(smaller<int64_t>(threads_for(work, a.threads), larger<int64_t>(a.batch, 1)));
  const Scratch<float> scratch(size * threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < a.batch; ++b) {
    float* own = scratch.get() + omp_get_thread_num() * size;
    if (!Cut<T>(a, b, own).run()) *a.not_finite = 1;  // any thread writes the same
  }
}

inline void bipartition(const BipartitionArgs& a) {
  if (a.dtype == kFloat32) bipartition_of<float>(a);
  else if (a.dtype == kBFloat16) bipartition_of<BFloat16>(a);
  else bipartition_of<Float16>(a);
}

}  // namespace SMA_ISA
}  // namespace sma
