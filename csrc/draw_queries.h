// draw_queries: for each sample the candidates of lowest noise, ascending, -1 behind.
#pragma once
#include "select_tokens.h"

namespace sma {
namespace SMA_ISA {

inline void draw_queries(const DrawQueriesArgs& a) {
  for_each_row(a.batch, a.candidates, a.batch * a.candidates * 4, a.threads,
               [&](int64_t b, const SelectScratch& s, const Team& team) {
                 const uint8_t* padding =
                     a.padding == nullptr ? nullptr : a.padding + b * a.candidates;
                 if (team.id == 0) {
                   const ValidTokens tokens(padding, a.candidates, s.index);
                   *s.row = {tokens.count, 0, tokens.index, {}, {}};
                 }
                 team.wait();
                 const int64_t valid = s.row->valid;
                 const int32_t* index = s.row->index;
                 ordered_keys(a.noise + b * a.candidates, index, share(valid, team), -1.0f, s.keys);
                 team.wait();
                 if (team.id == 0) {
                   int64_t k = a.num_queries;
                   if (a.num_queries_rows != nullptr) k = smaller(a.num_queries_rows[b], k);
                   k = smaller(smaller(larger<int64_t>(k, 1), valid), a.num_queries);
                   flag_largest(s.keys, valid, k, s.work, s.flags);
                   int64_t* out = a.query_index + b * a.num_queries;
                   int64_t* const end = out + a.num_queries;
                   for (int64_t i = 0; i < valid; ++i)
                     if (s.flags[i]) *out++ = index == nullptr ? i : index[i];
                   while (out < end) *out++ = -1;
                 }
                 team.wait();
               });
}

}  // namespace SMA_ISA
}  // namespace sma
