// Every op, compiled for this instruction set.
#define SMA_ISA avx2
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

const Kernels& kernels_avx2() {
  static const Kernels table = {
      "avx2",
      avx2::attention_scores,
      avx2::aggregate_attention,
      avx2::select_tokens,
      avx2::draw_queries,
      avx2::gather_tokens,
      avx2::gather_tokens_backward,
      avx2::restore_tokens,
      avx2::restore_tokens_backward,
      avx2::self_guided_masking,
      avx2::random_masking,
      avx2::bipartition,
      avx2::informed_scores,
  };
  return table;
}

}  // namespace sma
