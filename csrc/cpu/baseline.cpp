// Every op, compiled for this instruction set.
#define SMA_ISA baseline
#include "../aggregate_attention.h"
#include "../attention_scores.h"
#include "../bipartition.h"
#include "../draw_queries.h"
#include "../gather_tokens.h"
#include "../informed_scores.h"
#include "../random_masking.h"
#include "../restore_tokens.h"
#include "../select_tokens.h"
#include "../self_guided_masking.h"
#include "kernels.h"

namespace sma {

const Kernels& kernels_baseline() {
  static const Kernels table = {
      "baseline",
      baseline::attention_scores,
      baseline::aggregate_attention,
      baseline::select_tokens,
      baseline::draw_queries,
      baseline::gather_tokens,
      baseline::gather_tokens_backward,
      baseline::restore_tokens,
      baseline::restore_tokens_backward,
      baseline::self_guided_masking,
      baseline::random_masking,
      baseline::bipartition,
      baseline::informed_scores,
  };
  return table;
}

}  // namespace sma
