// One table of entry points for each instruction set that was compiled.
#pragma once
#include "../args.h"

namespace sma {

struct Kernels {
  const char* name;
  void (*attention_scores)(const AttentionScoresArgs&);
  void (*aggregate_attention)(const AggregateAttentionArgs&);
  void (*select_tokens)(const SelectTokensArgs&);
  void (*draw_queries)(const DrawQueriesArgs&);
  void (*gather_tokens)(const GatherTokensArgs&);
  void (*gather_tokens_backward)(const GatherTokensBackwardArgs&);
  void (*restore_tokens)(const RestoreTokensArgs&);
  void (*restore_tokens_backward)(const RestoreTokensBackwardArgs&);
  void (*self_guided_masking)(const SelfGuidedMaskingArgs&);
  void (*random_masking)(const RandomMaskingArgs&);
  void (*bipartition)(const BipartitionArgs&);
  void (*informed_scores)(const InformedScoresArgs&);
};

const Kernels& kernels_baseline();
#ifdef SMA_HAVE_X86
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

}  // namespace sma
