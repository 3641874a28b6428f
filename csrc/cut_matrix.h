// The similarities of a sample's rows, which bipartition multiplies with pairs of vectors.
//
// They are never stored: their product with v is x (x^T v), and the rows x stay in the cache.
#pragma once
#include "cut_rules.h"
#include "unit_rows.h"

namespace sma {
namespace SMA_ISA {

constexpr int kPair = 2;
constexpr int kRowsAtOnce = 4;

// x^T y, over n floats, whole vectors: in double, but for the few that a lane adds up at a time.
inline double dot(const float* x, const float* y, int64_t n) {
  constexpr int64_t kRun = 16 * kLanes;
  double sum = 0;
  for (int64_t from = 0; from < n; from += kRun) {
    Vf run = {};
    for (int64_t i = from; i < smaller(from + kRun, n); i += kLanes)
      run += load<Vf>(x + i) * load<Vf>(y + i);
    sum += reduce_add(run);
  }
  return sum;
}

inline void add_times(float* x, const float* y, double factor, int64_t n) {
  const Vf f = splat(static_cast<float>(factor));
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, load<Vf>(x + i) + load<Vf>(y + i) * f);
}

inline void scale_by(float* x, double factor, int64_t n) {
  const Vf f = splat(static_cast<float>(factor));
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, load<Vf>(x + i) * f);
}

// A vector of a sample is so many floats long.
inline int64_t padded_tokens(int64_t tokens) {
  return round_up(larger<int64_t>(tokens, 1), kLanes);
}
// Floats of scratch that CutMatrix takes.
inline int64_t cut_matrix_size(const BipartitionArgs& a) {
  return (kPair + 4) * padded_tokens(a.tokens) + round_up(kPair * a.width, kLanes);
}

template <class T>
class CutMatrix {
 public:
  CutMatrix(const BipartitionArgs& args, int64_t sample, float* scratch)
      : a(args),
        b(sample),
        rows(static_cast<const T*>(args.embeddings) + sample * args.strides[0]),
        padded(padded_tokens(args.tokens)),
        scale(scratch),
        root(scale + padded),
        trivial(root + padded),
        tokens(args.padding == nullptr ? nullptr : args.padding + sample * args.tokens, args.tokens,
               reinterpret_cast<int32_t*>(trivial + padded)),
        n(tokens.count),
        rooted(trivial + 2 * padded),
        along(rooted + kPair * padded) {}

 protected:
  const BipartitionArgs& a;
  const int64_t b;
  const T* const rows;
  const int64_t padded;
  float* const scale;    // one over the length of each row, 0 for a zero row
  float* const root;     // one over the square root of its degree
  float* const trivial;  // the first eigenvector
  const ValidTokens tokens;
  const int64_t n;
  float* const rooted;   // vectors times root
  float* const along;    // x^T v, [vector][feature]
  bool extreme = false;  // a row is so long or short that floats may not hold its products

  bool cut() const { return a.method == kNcut; }

  // For a cut the matrix is (1 + cosine) / 2 between roots of the degrees, else cosine / n. False:
  // an embedding is not finite. All that lies behind the last token is 0 from here on.
  bool find_degrees() {
    for (int64_t i = 0; i < padded; ++i) {
      rooted[i] = i < n ? 1.0f : 0.0f;
      root[i] = trivial[i] = 0;
    }
    for (int64_t d = 0; d < a.width; ++d) along[d] = 0;
    for (int64_t i = 0; i < n; i += kRowsAtOnce) {
      bool any_extreme = false;
      for (int64_t k = i; k < smaller(i + kRowsAtOnce, n); ++k) {
        const RowScale found = row_scale(row(k), a.width);
        if (found.factor != found.factor) return false;
        any_extreme = any_extreme || found.extreme;
        scale[k] = static_cast<float>(found.factor);
      }
      if (any_extreme) add_rows_along<1, true>(i);
      else add_rows_along<1, false>(i);
      extreme = extreme || any_extreme;
    }
    float* const cosines = trivial;
    if (extreme) multiply_along<1, true>(cosines);
    else multiply_along<1, false>(cosines);
    for (int64_t i = 0; i < n; ++i) {
      const double degree = (n + static_cast<double>(cosines[i])) / 2;
      // the degree of a zero row is n / 2, and that of none is 0
      root[i] = cut()
                    ? static_cast<float>(1 / __builtin_sqrt(degree > 1e-6 * n ? degree : 1e-6 * n))
                    : 1.0f;
      trivial[i] = 1 / root[i];
    }
    scale_by(trivial, 1 / __builtin_sqrt(dot(trivial, trivial, padded)), padded);
    return true;
  }

  // products = matrix vectors, of a pair; both are orthogonal to the trivial vector.
  void multiply(const float* vectors, float* products) {
    float sums[kPair];
    for (int j = 0; j < kPair; ++j) {
      Vf sum = {};
      for (int64_t i = 0; i < padded; i += kLanes) {
        const Vf v = load<Vf>(vectors + j * padded + i) * load<Vf>(root + i);
        store(rooted + j * padded + i, v);
        sum += v;
      }
      sums[j] = cut() ? reduce_add(sum) : 0.0f;
    }
    for (int64_t d = 0; d < kPair * a.width; ++d) along[d] = 0;
    if (extreme) {
      for (int64_t i = 0; i < n; i += kRowsAtOnce) add_rows_along<kPair, true>(i);
      multiply_along<kPair, true>(products);
    } else {
      for (int64_t i = 0; i < n; i += kRowsAtOnce) add_rows_along<kPair, false>(i);
      multiply_along<kPair, false>(products);
    }
    const float factor = cut() ? 0.5f : 1 / static_cast<float>(n);
    for (int j = 0; j < kPair; ++j) {
      float* const y = products + j * padded;
      for (int64_t i = 0; i < padded; i += kLanes)
        store(y + i, (load<Vf>(y + i) + sums[j]) * factor * load<Vf>(root + i));
      add_times(y, trivial, -dot(y, trivial, padded), padded);
    }
  }

 private:
  // Rows from i on; those behind the last repeat it.
  template <bool kExtreme>
  struct Rows {
    const T* of[kRowsAtOnce];
    float scale[kRowsAtOnce];

    Vf features(int k, int64_t d) const {
      const Vf x = load_floats(of[k] + d);
      return kExtreme ? x * scale[k] : x;
    }
    float feature(int k, int64_t d) const { return to_float(of[k][d]) * (kExtreme ? scale[k] : 1); }
    float factor(int k) const { return kExtreme ? 1 : scale[k]; }
  };
  template <bool kExtreme>
  Rows<kExtreme> rows_from(int64_t i) const {
    Rows<kExtreme> some;
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t at = smaller(i + k, n - 1);
      some.of[k] = row(at);
      some.scale[k] = scale[at];
    }
    return some;
  }

  template <int kCount, bool kExtreme>
  void add_rows_along(int64_t i) {
    const auto x = rows_from<kExtreme>(i);
    float factor[kRowsAtOnce][kCount];
    for (int k = 0; k < kRowsAtOnce; ++k)
      for (int j = 0; j < kCount; ++j)
        factor[k][j] = i + k < n ? rooted[j * padded + i + k] * x.factor(k) : 0.0f;
    int64_t d = 0;
    for (; d + kLanes <= a.width; d += kLanes) {
      Vf v[kRowsAtOnce];
#pragma GCC unroll 4
      for (int k = 0; k < kRowsAtOnce; ++k) v[k] = x.features(k, d);
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        float* const at = along + j * a.width + d;
        Vf sum = load<Vf>(at);
#pragma GCC unroll 4
        for (int k = 0; k < kRowsAtOnce; ++k) sum += splat(factor[k][j]) * v[k];
        store(at, sum);
      }
    }
    for (; d < a.width; ++d)
      for (int j = 0; j < kCount; ++j)
        for (int k = 0; k < kRowsAtOnce; ++k)
          along[j * a.width + d] += factor[k][j] * x.feature(k, d);
  }

  template <int kCount, bool kExtreme>
  void multiply_along(float* products) {
    for (int64_t i = 0; i < n; i += kRowsAtOnce) multiply_along<kCount, kExtreme>(i, products);
    for (int j = 0; j < kCount; ++j)
      for (int64_t i = n; i < padded; ++i) products[j * padded + i] = 0;
  }
  template <int kCount, bool kExtreme>
  void multiply_along(int64_t i, float* products) {
    const auto x = rows_from<kExtreme>(i);
    Vf sum[kRowsAtOnce][kCount] = {};
    float rest[kRowsAtOnce][kCount] = {};
    int64_t d = 0;
    for (; d + kLanes <= a.width; d += kLanes) {
      Vf v[kRowsAtOnce];
#pragma GCC unroll 4
      for (int k = 0; k < kRowsAtOnce; ++k) v[k] = x.features(k, d);
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        const Vf w = load<Vf>(along + j * a.width + d);
#pragma GCC unroll 4
        for (int k = 0; k < kRowsAtOnce; ++k) sum[k][j] += w * v[k];
      }
    }
    for (; d < a.width; ++d)
      for (int k = 0; k < kRowsAtOnce; ++k)
        for (int j = 0; j < kCount; ++j) rest[k][j] += along[j * a.width + d] * x.feature(k, d);
    for (int k = 0; k < kRowsAtOnce && i + k < n; ++k)
      for (int j = 0; j < kCount; ++j)
        products[j * padded + i + k] = (reduce_add(sum[k][j]) + rest[k][j]) * x.factor(k);
  }

  const T* row(int64_t i) const {
    return rows + (tokens.index == nullptr ? i : tokens.index[i]) * a.strides[1];
  }
};

}  // namespace SMA_ISA
}  // namespace sma
