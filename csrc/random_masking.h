// random_masking: MAE's masking. The tokens of lowest noise stay, in raster order.
#pragma once
#include "gather_tokens.h"
#include "select_tokens.h"

namespace sma {
namespace SMA_ISA {

inline void random_masking(const RandomMaskingArgs& a) {
  const int64_t tokens = a.gather.tokens, keep = a.gather.visible;
  const int64_t work = a.gather.batch * (tokens * 4 + keep * a.gather.row_bytes / 4);
  for_each_row(a.gather.batch, tokens, work, a.gather.threads,
               [&](int64_t b, const SelectScratch& s, const Team& team) {
                 const Range mine = share(tokens, team);
                 ordered_keys(a.noise + b * tokens, nullptr, mine, -1.0f, s.keys);
                 team.wait();
                 if (team.id == 0) flag_largest(s.keys, tokens, keep, s.work, s.flags);
                 team.wait();
                 int64_t before = 0;  // visible tokens in front of this thread's own
                 for (int64_t n = 0; n < mine.begin; ++n) before += s.flags[n];
                 int64_t place[2] = {keep + mine.begin - before,
                                     before};  // of the next masked, the next visible
                 int64_t* visible = a.ids_visible + b * keep;
                 for (int64_t n = mine.begin; n < mine.end; ++n) {
                   const int flag = s.flags[n];
                   a.mask[b * tokens + n] = flag ? 0.0f : 1.0f;
                   if (flag) visible[place[1]] = n;
                   a.ids_restore[b * tokens + n] = place[flag]++;
                 }
                 team.wait();
                 gather_rows(a.gather, b, share(keep, team));
                 team.wait();
               });
}

}  // namespace SMA_ISA
}  // namespace sma
