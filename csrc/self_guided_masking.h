// self_guided_masking: scores, selection and gather of one sample after the other, in one pass.
#pragma once
#include "attention_scores.h"
#include "gather_tokens.h"
#include "select_tokens.h"

namespace sma {
namespace SMA_ISA {

inline void self_guided_masking(const SelfGuidedMaskingArgs& a) {
  if (a.attention.batch == 0) return;
  ScoresPlan plan(a.attention);
  const int64_t select_offset = round_up(plan.shared, 16);
  plan.shared = select_offset + SelectScratch::size(a.attention.tokens);
  for_each_sample(a.attention, plan, [&](int64_t b, float* shared, float* own, const Team& team) {
    score_sample(a.attention, plan, b, shared, own, team);
    const SelectScratch scratch(reinterpret_cast<int32_t*>(shared + select_offset),
                                a.attention.tokens);
    select_row(a.select, b, a.attention.scores + b * a.attention.tokens, scratch, team);
    for (int i = 0; i < a.num_gathers; ++i)
      gather_rows(a.gathers[i], b, share(a.gathers[i].visible, team));
    fence();
  });
}

}  // namespace SMA_ISA
}  // namespace sma
