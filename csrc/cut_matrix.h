// The similarities of a sample's rows, which bipartition multiplies with its vectors.
//
// They are applied as x (x^T v), which costs less than their matrix where few products are enough,
// as they mostly are. Where they are not, their matrix is made of the rows after all, up to
// kStoredTokens tokens: one half in register tiles, as attention_scores multiplies, the other half
// copied.
#pragma once
#include "cut_rules.h"
#include "logit_tiles.h"
#include "unit_rows.h"

namespace sma {
namespace SMA_ISA {

constexpr int64_t kStoredTokens = 256;
constexpr int kRowsAtOnce = 4;

inline void add_times(float* x, const float* y, float factor, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, load<Vf>(x + i) + load<Vf>(y + i) * factor);
  for (; i < n; ++i) x[i] += y[i] * factor;
}

// Scratch of a thread.
struct BipartitionPlan {
  int64_t padded;  // tokens, rounded up to whole vectors
  bool stored;     // the matrix is

  explicit BipartitionPlan(const BipartitionArgs& a)
      : padded(round_up(larger<int64_t>(a.tokens, 1), kLanes)), stored(a.tokens <= kStoredTokens) {}

  int64_t size(const BipartitionArgs& a) const {
    const int64_t packed = stored ? padded * padded + (padded + kTileRows) * a.width : 0;
    return packed + kVectors * a.width + (3 * kVectors + 4) * padded;
  }
};

template <class T>
class CutMatrix {
 public:
  CutMatrix(const BipartitionArgs& args, const BipartitionPlan& plan, int64_t sample,
            float* scratch)
      : a(args),
        plan(plan),
        b(sample),
        rows(static_cast<const T*>(args.embeddings) + sample * args.strides[0]),
        scale(take(&scratch, plan.padded)),
        root(take(&scratch, plan.padded)),
        trivial(take(&scratch, plan.padded)),
        tokens(args.padding == nullptr ? nullptr : args.padding + sample * args.tokens, args.tokens,
               reinterpret_cast<int32_t*>(take(&scratch, plan.padded))),
        n(tokens.count),
        vectors(take(&scratch, kVectors * plan.padded)),
        products(take(&scratch, kVectors * plan.padded)),
        before(take(&scratch, kVectors * plan.padded)),
        along(take(&scratch, kVectors * args.width)),
        matrix(scratch) {}

 protected:
  const BipartitionArgs& a;
  const BipartitionPlan& plan;
  const int64_t b;
  const T* const rows;
  float* const scale;    // one over the length of each row, 0 for a zero row
  float* const root;     // one over the square root of its degree
  float* const trivial;  // the first eigenvector
  const ValidTokens tokens;
  const int64_t n;
  float* const vectors;   // [vector][valid token]
  float* const products;  // of the matrix with them
  float* const before;    // the vectors that a polynomial begins with
  float* const along;     // x^T v, [vector][feature]
  float* const matrix;    // of cosines, and packed rows behind it
  bool filled = false;    // the matrix is
  bool extreme = false;   // a row is so long or short that floats may not hold its products

  bool cut() const { return a.method == kNcut; }

  // False: an embedding is not finite.
  bool find_scales() {
    for (int64_t i = 0; i < n; ++i) {
      const RowScale found = row_scale(row(i), a.width);
      if (found.factor != found.factor) return false;
      extreme = extreme || found.extreme;
      scale[i] = static_cast<float>(found.factor);
    }
    return true;
  }

  // matrix[i][j] = cosine of rows i and j.
  void fill_matrix() {
    float* const panels = matrix + plan.padded * plan.padded;
    float* const group_rows = panels + plan.padded * a.width;
    for (int64_t p = 0; p < n; p += kLanes) {
      float* const panel = panels + p * a.width;
      const int64_t count = smaller<int64_t>(kLanes, n - p);
      pack_keys(rows, a.strides[1], 1, a.width, tokens.index, p, count, panel);
      Vf factor = {};
      for (int64_t i = 0; i < count; ++i) factor[i] = scale[p + i];
      for (int64_t d = 0; d < a.width * kLanes; d += kLanes)
        store(panel + d, load<Vf>(panel + d) * factor);
    }
    Ahead nothing = {};
    const Range all = {0, n};
    for (int64_t g = 0; g < row_groups(all); ++g) {
      const Range group = row_group(all, g);
      const int64_t count = group.end - group.begin, first = group.begin / kLanes;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t r = group.begin + i;
        const float* from = panels + r / kLanes * kLanes * a.width + r % kLanes;
        for (int64_t d = 0; d < a.width; ++d) group_rows[d * count + i] = from[d * kLanes];
      }
      float most[kTileRows];
      logits_any(count, group_rows, panels + first * kLanes * a.width, a.width,
                 plan.padded / kLanes - first, matrix + group.begin * plan.padded + first * kLanes,
                 plan.padded, most, &nothing, 0);
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j) matrix[i * plan.padded + j] = matrix[j * plan.padded + i];
      for (int64_t j = n; j < plan.padded; ++j) matrix[i * plan.padded + j] = 0.0f;
    }
    filled = true;
  }

  // For a cut the matrix is (1 + cosine) / 2 between roots of the degrees, else cosine / n.
  void find_degrees() {
    for (int64_t i = 0; i < n; ++i) vectors[i] = 1.0f;
    apply_cosine(1);
    for (int64_t i = 0; i < n; ++i) {
      const double degree = (n + static_cast<double>(products[i])) / 2;
      // the degree of a zero row is n / 2, and that of none is 0
      root[i] = cut()
                    ? static_cast<float>(1 / __builtin_sqrt(degree > 1e-6 * n ? degree : 1e-6 * n))
                    : 1.0f;
      trivial[i] = 1 / root[i];
    }
    const float length = static_cast<float>(1 / __builtin_sqrt(dot(trivial, trivial, n)));
    for (int64_t i = 0; i < n; ++i) trivial[i] *= length;
  }

  // products = matrix vectors, both orthogonal to the trivial vector.
  void multiply(int size) {
    float sums[kVectors];
    for (int j = 0; j < size; ++j) {
      float* v = vectors + j * plan.padded;
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        v[i] *= root[i];
        sum += v[i];
      }
      sums[j] = static_cast<float>(sum);
    }
    apply_cosine(size);
    for (int j = 0; j < size; ++j) {
      float *v = vectors + j * plan.padded, *y = products + j * plan.padded;
      for (int64_t i = 0; i < n; ++i) {
        y[i] = cut() ? (sums[j] + y[i]) * 0.5f * root[i] : y[i] / static_cast<float>(n);
        v[i] /= root[i];
      }
      add_times(y, trivial, static_cast<float>(-dot(y, trivial, n)), n);
    }
  }

 private:
  // products = cosines of all rows, times vectors.
  void apply_cosine(int size) {
    if (filled) multiply_matrix(size);
    else if (extreme) multiply_rows<kVectors, true>();
    else if (size == 1) multiply_rows<1, false>();
    else multiply_rows<kVectors, false>();
  }

  void multiply_matrix(int size) {
    for (int64_t i = 0; i < plan.padded; i += kLanes) {
      Vf sum[kVectors] = {};
      const float* column = matrix + i;  // it is symmetric: a row of it
      for (int64_t k = 0; k < n; ++k) {
        const Vf m = load<Vf>(column + k * plan.padded);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[j] += splat(vectors[j * plan.padded + k]) * m;
      }
      for (int j = 0; j < size; ++j) store(products + j * plan.padded + i, sum[j]);
    }
  }

  // x (x^T v), of kCount vectors; those behind the last one count for nothing. kExtreme: rows are
  // brought to length 1 as they are read, else what is made of them is.
  template <int kCount, bool kExtreme>
  void multiply_rows() {
    for (int64_t d = 0; d < kCount * a.width; ++d) along[d] = 0.0f;
    for (int64_t i = 0; i < n; i += kRowsAtOnce) add_rows_along<kCount, kExtreme>(i);
    for (int64_t i = 0; i < n; i += kRowsAtOnce) multiply_along<kCount, kExtreme>(i);
  }

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
        factor[k][j] = i + k < n ? vectors[j * plan.padded + i + k] * x.factor(k) : 0.0f;
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
  void multiply_along(int64_t i) {
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
        products[j * plan.padded + i + k] = (reduce_add(sum[k][j]) + rest[k][j]) * x.factor(k);
  }

  static float* take(float** from, int64_t count) {
    float* taken = *from;
    *from += count;
    return taken;
  }
  const T* row(int64_t i) const {
    return rows + (tokens.index == nullptr ? i : tokens.index[i]) * a.strides[1];
  }
};

}  // namespace SMA_ISA
}  // namespace sma
