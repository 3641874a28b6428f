// attention_scores on a GPU: in the kernels of self_guided_masking, without its selection.
#include "kernels.h"

namespace sma {
namespace cuda {

int attention_scores(const AttentionScoresArgs& a, const Place& place) {
  if (a.batch == 0 || a.tokens == 0) return 0;
  SelfGuidedMaskingArgs all = {};
  all.attention = a;
  const int error = masking_at_once(all, false, place);
  return error == kNotAtOnce ? masking_in_turns(all, false, place) : error;
}

}  // namespace cuda
}  // namespace sma
