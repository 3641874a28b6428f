// random_masking: MAE's masking. The tokens of lowest noise stay, in raster order.
#pragma once
#include "gather_tokens.h"
#include "select_tokens.h"

namespace sma {
namespace SMA_ISA {

inline void random_masking(const RandomMaskingArgs& a) {
  const int64_t tokens = a.gather.tokens_count, keep = a.gather.visible;
  const int threads =
      threads_for(a.gather.batch * (tokens * 4 + keep * a.gather.row_bytes / 4), a.gather.threads);
  const int64_t size = round_up(SelectScratch::size(tokens), 16);
  const Scratch<int32_t> scratch(size * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const SelectScratch s(scratch.get() + omp_get_thread_num() * size, tokens);
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < a.gather.batch; ++b) {
      ordered_keys(a.noise + b * tokens, nullptr, {0, tokens}, -1.0f, s.keys);
      flag_largest(s.keys, tokens, keep, s.work, s.flags);
      int64_t place[2] = {keep, 0};  // of the next masked and the next visible token
      int64_t* visible = a.ids_visible + b * keep;
      for (int64_t n = 0; n < tokens; ++n) {
        const int flag = s.flags[n];
        a.mask[b * tokens + n] = flag ? 0.0f : 1.0f;
        if (flag) visible[place[1]] = n;
        a.ids_restore[b * tokens + n] = place[flag]++;
      }
      gather_rows(a.gather, b, {0, keep});
    }
    fence();
  }
}

}  // namespace SMA_ISA
}  // namespace sma
