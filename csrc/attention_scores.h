// attention_scores: the attention each key receives from the selected queries.
//
// One sample at a time, one key head at a time, in chunks of keys:
//   A  pack the chunk's valid keys so that a vector holds one feature of kLanes keys, multiply with
//      the selected queries in register tiles, exponentiate against the chunk's own maximum;
//   -  join the chunks' maxima and sums into each row's softmax denominator, in chunk order;
//   B  add up the rows of the chunk, each with its weight.
// Keys are read once (kRowsAtLeast says when not). What is kept is R x N exponentials of one head,
// never the (M, N) map.
// Chunks do not depend on the number of threads, so neither do the bits of the result.
#pragma once
#include "sample_scores.h"

namespace sma {
namespace SMA_ISA {

inline void score_sample(const AttentionScoresArgs& a, const ScoresPlan& plan, int64_t b,
                         float* shared, float* own, const Team& team) {
  if (a.dtype == kFloat32) SampleScores<float>(a, plan, b, shared, own, team).run();
  else if (a.dtype == kBFloat16) SampleScores<BFloat16>(a, plan, b, shared, own, team).run();
  else SampleScores<Float16>(a, plan, b, shared, own, team).run();
}

// Threads take a sample each where there are enough, else all work on one sample together.
inline bool share_samples(int64_t batch, int64_t chunks, int threads) {
  return threads > 1 && (batch < threads || (batch < 4 * threads && chunks >= 8 * threads));
}

// Calls body(b, shared, own, team) for every sample.
template <class Body>
void for_each_sample(const AttentionScoresArgs& a, const ScoresPlan& plan, const Body& body) {
  const int64_t work = a.batch * a.kv_heads * a.tokens * a.width;
  const int threads = threads_for(work, a.threads);
  const bool together = share_samples(a.batch, plan.chunks, threads);
  const int64_t shared_size = round_up(plan.shared, 64), own_size = round_up(plan.own, 64);
  const Scratch<float> shared(shared_size * (together ? 1 : threads));
  const Scratch<float> own(own_size * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int id = omp_get_thread_num(), count = omp_get_num_threads();
    if (together) {
      for (int64_t b = 0; b < a.batch; ++b)
        body(b, shared.get(), own.get() + id * own_size, Team{id, count});
    } else {
      const int64_t run = larger<int64_t>(1, a.batch / (count * 16));  // of neighbours in memory
#pragma omp for schedule(dynamic, run)
      for (int64_t b = 0; b < a.batch; ++b)
        body(b, shared.get() + id * shared_size, own.get() + id * own_size, Team{0, 1});
    }
  }
}

inline void attention_scores(const AttentionScoresArgs& a) {
  if (a.batch == 0 || a.tokens == 0) return;
  const ScoresPlan plan(a);
  for_each_sample(a, plan, [&](int64_t b, float* shared, float* own, const Team& team) {
    score_sample(a, plan, b, shared, own, team);
  });
}

}  // namespace SMA_ISA
}  // namespace sma
