// informed_scores: the cosine similarity of each patch to the mean of one of two clusters.
//
// One sample at a time. A few rows at once come into the nearest cache, where they are measured and
// those of the cluster are added up; when the mean is known, all are multiplied with it. Memory is
// read once, as the rows of a sample are still in a cache the second time.
#pragma once
#include "unit_rows.h"

namespace sma {
namespace SMA_ISA {

constexpr int kRowsAdded = 4;           // at once
constexpr double kShortestMean = 1e-6;  // of rows of length 1: below, they cancel each other out

template <class T>
class ClusterSimilarity {
 public:
  static int64_t doubles(const InformedScoresArgs& a) { return a.width + a.tokens; }
  static int64_t floats(const InformedScoresArgs& a) { return a.width; }

  ClusterSimilarity(const InformedScoresArgs& args, int64_t sample, double* doubles, float* floats)
      : a(args),
        rows(static_cast<const T*>(args.embeddings) + sample * args.strides[0]),
        labels(args.labels + sample * args.tokens),
        padding(args.padding == nullptr ? nullptr : args.padding + sample * args.tokens),
        scores(args.scores + sample * args.tokens),
        sum(doubles),
        scale(doubles + args.width),
        mean(floats) {}

  // False: an embedding is not finite.
  bool run() {
    const bool chosen = chosen_label();
    const T* some[kRowsAdded] = {};
    float factor[kRowsAdded] = {};
    int64_t members = 0, waiting = 0;
    for (int64_t d = 0; d < a.width; ++d) sum[d] = 0;
    for (int64_t i = 0; i < a.tokens; ++i) {
      if (padded(i)) continue;
      const RowScale found = row_scale(row(i), a.width);
      if (found.factor != found.factor) return false;
      scale[i] = found.extreme ? -found.factor : found.factor;
      if ((labels[i] != 0) != chosen) continue;
      ++members;
      if (found.extreme) {
        add_exactly(row(i), found.factor);
        continue;
      }
      some[waiting] = row(i);
      factor[waiting] = static_cast<float>(found.factor);
      if (++waiting < kRowsAdded) continue;
      add(some, factor);
      waiting = 0;
    }
    for (int64_t k = 0; k < waiting; ++k) add_exactly(some[k], factor[k]);
    find_mean(members);
    for (int64_t i = 0; i < a.tokens; ++i) scores[i] = padded(i) ? 0.0f : score(i);
    return true;
  }

 private:
  const InformedScoresArgs& a;
  const T* const rows;
  const uint8_t *const labels, *const padding;
  float* const scores;
  double* const sum;    // of the cluster's rows, of length 1 each
  double* const scale;  // of each token: one over its row's length, negative for extreme ones
  float* const mean;    // of length 1, or 0

  const T* row(int64_t i) const { return rows + i * a.strides[1]; }
  bool padded(int64_t i) const { return padding != nullptr && padding[i] != 0; }

  bool chosen_label() const {
    int64_t labelled = 0, others = 0;
    for (int64_t i = 0; i < a.tokens; ++i) {
      if (padded(i)) continue;
      ++(labels[i] != 0 ? labelled : others);
    }
    if (a.cluster == kSmaller) return labelled <= others;
    if (a.cluster == kLarger) return labelled >= others;
    return a.cluster == kObject;
  }

  void add(const T* const (&some)[kRowsAdded], const float (&factor)[kRowsAdded]) {
    int64_t d = 0;
    for (; d + kLanes <= a.width; d += kLanes) {
      Vf v = {};
#pragma GCC unroll 4
      for (int k = 0; k < kRowsAdded; ++k) v += splat(factor[k]) * load_floats(some[k] + d);
      add_to(sum + d, v);
    }
    for (; d < a.width; ++d)
      for (int k = 0; k < kRowsAdded; ++k) sum[d] += factor[k] * to_float(some[k][d]);
  }
  void add_exactly(const T* x, double factor) {
    for (int64_t d = 0; d < a.width; ++d) sum[d] += factor * to_float(x[d]);
  }

  void find_mean(int64_t members) {
    double squared = 0;
    for (int64_t d = 0; d < a.width; ++d) squared += sum[d] * sum[d];
    const double length = __builtin_sqrt(squared);
    const double factor = length > kShortestMean * members ? 1 / length : 0;
    for (int64_t d = 0; d < a.width; ++d) mean[d] = static_cast<float>(sum[d] * factor);
  }

  float score(int64_t i) const {
    const T* const x = row(i);
    if (scale[i] < 0) {
      double total = 0;
      for (int64_t d = 0; d < a.width; ++d) total += static_cast<double>(to_float(x[d])) * mean[d];
      return static_cast<float>(total * -scale[i]);
    }
    Vf total[4] = {};
    int64_t d = 0;
    for (; d + 4 * kLanes <= a.width; d += 4 * kLanes)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        total[j] += load_floats(x + d + j * kLanes) * load<Vf>(mean + d + j * kLanes);
    float rest = 0;
    for (; d < a.width; ++d) rest += to_float(x[d]) * mean[d];
    rest += reduce_add((total[0] + total[1]) + (total[2] + total[3]));
    return static_cast<float>(rest * scale[i]);
  }
};

template <class T>
void informed_scores_of(const InformedScoresArgs& a) {
  const int64_t doubles = round_up(ClusterSimilarity<T>::doubles(a), kLanes);
  const int64_t floats = round_up(ClusterSimilarity<T>::floats(a), kLanes);
  const int threads = static_cast<int>(smaller<int64_t>(
      threads_for(a.batch * a.tokens * a.width, a.threads), larger<int64_t>(a.batch, 1)));
  const Scratch<double> sums(doubles * threads);
  const Scratch<float> means(floats * threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < a.batch; ++b) {
    const int own = omp_get_thread_num();
    ClusterSimilarity<T> sample(a, b, sums.get() + own * doubles, means.get() + own * floats);
    if (!sample.run()) *a.not_finite = 1;  // any thread writes the same
  }
}

inline void informed_scores(const InformedScoresArgs& a) {
  if (a.dtype == kFloat32) informed_scores_of<float>(a);
  else if (a.dtype == kBFloat16) informed_scores_of<BFloat16>(a);
  else informed_scores_of<Float16>(a);
}

}  // namespace SMA_ISA
}  // namespace sma
