// Every op, compiled for this instruction set.
#define SMA_ISA avx512
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

const Kernels& kernels_avx512() {
  static const Kernels table = {
      "avx512",
      avx512::attention_scores,
      avx512::aggregate_attention,
      avx512::select_tokens,
      avx512::draw_queries,
      avx512::gather_tokens,
      avx512::gather_tokens_backward,
      avx512::restore_tokens,
      avx512::restore_tokens_backward,
      avx512::self_guided_masking,
      avx512::random_masking,
      avx512::bipartition,
      avx512::informed_scores,
  };
  return table;
}

}  // namespace sma
