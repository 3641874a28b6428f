// select_tokens: which tokens of each row are masked, and where every token is found again.
//
// The k largest of a row are found without sorting: scores become integers in the same order, a
// bisection over the integers counts how many lie above the middle (kLanes at a time) and keeps
// only the candidates that are still in doubt. One ordered sweep over the row then writes the ids.
// Long rows are sampled first and shared among threads.
#pragma once
#include "select_long_row.h"

namespace sma {
namespace SMA_ISA {

inline void select_short_row(const SelectTokensArgs& a, int64_t b, const float* scores,
                             const SelectScratch& s, const Team& team) {
  const SelectRow& row = *s.row;
  const Range mine = share(row.valid, team);
  ordered_keys(scores, row.index, mine, 1.0f, s.keys);
  team.wait();
  if (team.id == 0) choose_row(a, b, s);
  team.wait();
  int64_t masked = 0;
  for (int64_t i = 0; i < mine.begin; ++i) masked += s.flags[i];
  Sweep sweep(a, b, mine.begin, masked);
  sweep.write(s.flags + mine.begin, row.index, mine);
  if (team.id == team.size - 1) sweep.finish();
}

// Selects row b from `scores`. Every thread of the team calls it, with the same scratch.
inline void select_row(const SelectTokensArgs& a, int64_t b, const float* scores,
                       const SelectScratch& s, const Team& team) {
  if (team.id == 0) prepare_row(a, b, s);
  team.wait();
  if (is_long(a, *s.row)) select_long_row(a, b, scores, s, team);
  else select_short_row(a, b, scores, s, team);
  team.wait();
}

constexpr int64_t kSharedRow = int64_t{1} << 18;  // work of a row from which threads share it

// Calls body(b, scratch, team) for every row of `tokens`: a row for each thread, or all threads on
// one row where there are fewer rows than threads and a row is long.
template <class Body>
void for_each_row(int64_t batch, int64_t tokens, int64_t work, int threads, const Body& body) {
  threads = threads_for(work, threads);
  const bool together = threads > 1 && batch < threads && work >= batch * kSharedRow;
  const int64_t size = round_up(SelectScratch::size(tokens), 16);
  const Scratch<int32_t> scratch(size * (together ? 1 : threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int id = omp_get_thread_num();
    const SelectScratch s(scratch.get() + (together ? 0 : id * size), tokens);
    if (together) {
      for (int64_t b = 0; b < batch; ++b) body(b, s, Team{id, omp_get_num_threads()});
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t b = 0; b < batch; ++b) body(b, s, Team{0, 1});
    }
    fence();
  }
}

inline void select_tokens(const SelectTokensArgs& a) {
  const float* scores = static_cast<const float*>(a.scores);
  for_each_row(a.batch, a.tokens, a.batch * a.tokens * 4, a.threads,
               [&](int64_t b, const SelectScratch& s, const Team& team) {
                 select_row(a, b, scores + b * a.tokens, s, team);
               });
}

}  // namespace SMA_ISA
}  // namespace sma
