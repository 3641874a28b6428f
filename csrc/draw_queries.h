// draw_queries: for each sample the candidates of lowest noise, ascending, -1 behind.
#pragma once
#include "select_tokens.h"

namespace sma {
namespace SMA_ISA {

inline void draw_queries(const DrawQueriesArgs& a) {
  const int threads = threads_for(a.batch * a.candidates * 4, a.threads);
  const int64_t size = round_up(SelectScratch::size(a.candidates), 16);
  const Scratch<int32_t> scratch(size * threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
  for (int64_t b = 0; b < a.batch; ++b) {
    const SelectScratch s(scratch.get() + omp_get_thread_num() * size, a.candidates);
    const uint8_t* padding = a.padding == nullptr ? nullptr : a.padding + b * a.candidates;
    const ValidTokens tokens(padding, a.candidates, s.index);
    const int64_t valid = tokens.count;
    int64_t k = a.num_queries;
    if (a.num_queries_rows != nullptr) k = smaller(a.num_queries_rows[b], k);
    k = smaller(smaller(larger<int64_t>(k, 1), valid), a.num_queries);
    ordered_keys(a.noise + b * a.candidates, tokens.index, {0, valid}, -1.0f, s.keys);
    flag_largest(s.keys, valid, k, s.work, s.flags);
    int64_t* out = a.query_index + b * a.num_queries;
    int64_t* const end = out + a.num_queries;
    for (int64_t i = 0; i < valid; ++i)
      if (s.flags[i]) *out++ = tokens.index == nullptr ? i : tokens.index[i];
    while (out < end) *out++ = -1;
  }
}

}  // namespace SMA_ISA
}  // namespace sma
