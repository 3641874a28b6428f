// bipartition: the patches of a sample cut in two, by the second eigenvector of their similarity.
//
// One sample at a time, and its rows stay in the cache: a block of four vectors is multiplied with
// the similarities again and again, made orthogonal to the trivial vector and to each other, and
// turned to the eigenvectors of the 4 x 4 problem between them (subspace iteration with
// Rayleigh-Ritz). The similarities are applied as x (x^T v), which costs less than their matrix
// where few iterations are enough, as they mostly are. Where they are not, their matrix is made of
// the rows after all, up to kStoredTokens tokens: one half in the register tiles of
// attention_scores, the other half copied.
#pragma once
#include "attention_scores.h"
#include "small_eigen.h"

namespace sma {
namespace SMA_ISA {

constexpr int64_t kStoredTokens = 256;
constexpr int kDirectTokens = 8;  // the matrix pays after an iteration for each so many tokens
constexpr int kVectors = 4;
constexpr int kRowsAtOnce = 4;
constexpr double kFarBelow = 0.8;  // of the second eigenvalue, that a polynomial tells from it
constexpr float kNothing = 1e-6f;  // eigenvalues up to here count as 0
constexpr float kSignTie = 1e-3f;  // entries within this share of the largest count as large,
constexpr float kZero = 1e-4f;     // and up to this share of it as 0

// x^T y in double, over n floats.
inline double dot(const float* x, const float* y, int64_t n) {
  double sum = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += reduce_add(load<Vf>(x + i) * load<Vf>(y + i));
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * y[i];
  return sum;
}
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
class Cut {
 public:
  Cut(const BipartitionArgs& args, const BipartitionPlan& plan, int64_t sample, float* scratch)
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

  // False: an embedding is not finite.
  bool run() {
    if (!find_scales()) return false;
    const int size = static_cast<int>(smaller<int64_t>(kVectors, n - 1));
    double values[kVectors] = {};
    bool converged = false;
    if (size > 0) {
      if (plan.stored && extreme) fill_matrix();
      find_degrees();
      for (int j = 0; j < kVectors; ++j) start(j, 0);
      for (int j = 0; j < size; ++j) gram_schmidt(vectors, j, 0);
      for (int64_t i = 0; i < a.iterations && !converged; ++i) {
        if (plan.stored && !filled && i >= n / kDirectTokens) fill_matrix();
        if (i > 1 && i + 1 < a.iterations && values[kVectors - 1] > kNothing &&
            values[kVectors - 1] < kFarBelow * values[0]) {
          filter(static_cast<float>(values[kVectors - 1]));
          ++i;
        }
        if (i > 0) next_vectors(size, i);
        multiply(size);
        converged = rayleigh_ritz(size, values);
      }
    }
    write(converged, values[0]);
    return true;
  }

 private:
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

  static float* take(float** from, int64_t count) {
    float* taken = *from;
    *from += count;
    return taken;
  }
  const T* row(int64_t i) const {
    return rows + (tokens.index == nullptr ? i : tokens.index[i]) * a.strides[1];
  }
  bool cut() const { return a.method == kNcut; }

  bool find_scales() {
    for (int64_t i = 0; i < n; ++i) {
      double sum = squares(row(i), a.width);
      if (!(sum > 1e-30 && sum < 1e30)) {  // a float cannot tell
        sum = 0;
        for (int64_t d = 0; d < a.width; ++d) {
          const double x = to_float(row(i)[d]);
          sum += x * x;
        }
        extreme = extreme || sum > 0;
      }
      if (!(sum < __builtin_huge_val())) return false;
      // of a row of subnormals the float would be infinite
      scale[i] = sum > 0 ? static_cast<float>(smaller(1 / __builtin_sqrt(sum), 3e38)) : 0.0f;
    }
    return true;
  }

  static float squares(const T* x, int64_t width) {
    Vf sum[4] = {};
    int64_t d = 0;
    for (; d + 4 * kLanes <= width; d += 4 * kLanes)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vf v = load_floats(x + d + j * kLanes);
        sum[j] += v * v;
      }
    float rest = 0;
    for (; d < width; ++d) rest += to_float(x[d]) * to_float(x[d]);
    return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
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

  // products = cosines of all rows, times vectors.
  void apply_cosine(int size) {
    if (filled) multiply_matrix(size);
    else if (size == 1) multiply_rows<1>();
    else multiply_rows<kVectors>();
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

  // x (x^T v), of kCount vectors; those behind the last one count for nothing.
  template <int kCount>
  void multiply_rows() {
    for (int64_t d = 0; d < kCount * a.width; ++d) along[d] = 0.0f;
    for (int64_t i = 0; i < n; i += kRowsAtOnce) add_rows_along<kCount>(i);
    for (int64_t i = 0; i < n; i += kRowsAtOnce) multiply_along<kCount>(i);
  }

  // Rows from i on; those behind the last repeat it.
  struct Rows {
    const T* of[kRowsAtOnce];
  };
  Rows rows_from(int64_t i) const {
    Rows some;
    for (int k = 0; k < kRowsAtOnce; ++k) some.of[k] = row(smaller(i + k, n - 1));
    return some;
  }

  template <int kCount>
  void add_rows_along(int64_t i) {
    const Rows x = rows_from(i);
    float factor[kRowsAtOnce][kCount];
    for (int k = 0; k < kRowsAtOnce; ++k)
      for (int j = 0; j < kCount; ++j)
        factor[k][j] = i + k < n ? vectors[j * plan.padded + i + k] * scale[i + k] : 0.0f;
    int64_t d = 0;
    for (; d + kLanes <= a.width; d += kLanes) {
      Vf v[kRowsAtOnce];
#pragma GCC unroll 4
      for (int k = 0; k < kRowsAtOnce; ++k) v[k] = load_floats(x.of[k] + d);
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
          along[j * a.width + d] += factor[k][j] * to_float(x.of[k][d]);
  }

  template <int kCount>
  void multiply_along(int64_t i) {
    const Rows x = rows_from(i);
    Vf sum[kRowsAtOnce][kCount] = {};
    float rest[kRowsAtOnce][kCount] = {};
    int64_t d = 0;
    for (; d + kLanes <= a.width; d += kLanes) {
      Vf v[kRowsAtOnce];
#pragma GCC unroll 4
      for (int k = 0; k < kRowsAtOnce; ++k) v[k] = load_floats(x.of[k] + d);
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        const Vf w = load<Vf>(along + j * a.width + d);
#pragma GCC unroll 4
        for (int k = 0; k < kRowsAtOnce; ++k) sum[k][j] += w * v[k];
      }
    }
    for (; d < a.width; ++d)
      for (int k = 0; k < kRowsAtOnce; ++k)
        for (int j = 0; j < kCount; ++j)
          rest[k][j] += along[j * a.width + d] * to_float(x.of[k][d]);
    for (int k = 0; k < kRowsAtOnce && i + k < n; ++k)
      for (int j = 0; j < kCount; ++j)
        products[j * plan.padded + i + k] = (reduce_add(sum[k][j]) + rest[k][j]) * scale[i + k];
  }

  // Deterministic noise in [-1, 1).
  void start(int j, int64_t round) {
    float* v = vectors + j * plan.padded;
    for (int64_t i = 0; i < plan.padded; ++i) {
      uint32_t x = static_cast<uint32_t>((i * kVectors + j + 1) * 2654435761u + round * 40503u);
      x ^= x >> 15;
      x *= 2246822519u;
      x ^= x >> 13;
      v[i] = i < n ? static_cast<float>(static_cast<int32_t>(x)) * 4.656612873e-10f : 0.0f;
    }
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

  // Instead of the product with the matrix, a polynomial of it of the second degree: Chebyshev's,
  // which is small on [0, bound], where what is not wanted lies, and grows fastest above. It takes
  // one more product.
  void filter(float bound) {
    const int64_t size = kVectors * plan.padded;
    const float half = bound / 2, inverse = 1 / half;
    memcpy(before, vectors, static_cast<size_t>(size) * sizeof(float));
    for (int64_t i = 0; i < size; ++i) vectors[i] = products[i] * inverse - vectors[i];
    multiply(kVectors);
    for (int64_t i = 0; i < size; ++i)
      products[i] = 2 * (products[i] * inverse - vectors[i]) - before[i];
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
    return values[0] > kNothing && __builtin_sqrt(errors[0]) <= a.tol * (values[0] - second);
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
    a.eigenvalue[b] = static_cast<float>(cut() ? 1 - eigenvalue : eigenvalue);
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
