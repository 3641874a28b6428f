// Entry points of the CUDA kernels, without CUDA's headers. Each launches on the given device and
// stream and returns 0 or CUDA's error; none allocates or synchronises.
#pragma once
#include <string>

#include "../args.h"

namespace sma {
namespace cuda {

// Beside CUDA's errors: queries and keys are too wide for shared memory.
constexpr int kRowsTooLong = -1;
// It does not go in that one launch: take another way.
constexpr int kNotAtOnce = -2;
// The vectors of a sample of so many tokens are too long for it.
constexpr int kTooManyTokens = -3;
// A launch has no blocks for so many samples.
constexpr int kTooManySamples = -4;

struct Place {
  int device;
  void* stream;
};

int attention_scores(const AttentionScoresArgs& a, const Place& place);
int self_guided_masking(const SelfGuidedMaskingArgs& a, const Place& place);
// Both in one launch; without `selects` scores only. At once: where a block, or a cluster of
// blocks, takes a sample; in turns: where a block selects the tokens of one. Else kNotAtOnce.
int masking_at_once(const SelfGuidedMaskingArgs& a, bool selects, const Place& place);
int masking_in_turns(const SelfGuidedMaskingArgs& a, bool selects, const Place& place);
int random_masking(const RandomMaskingArgs& a, const Place& place);
int bipartition(const BipartitionArgs& a, const Place& place);
int gather_tokens(const GatherTokensArgs& a, const Place& place);
int gather_tokens_backward(const GatherTokensBackwardArgs& a, const Place& place);
// The same for the ids [first_id, first_id + a.tokens).
int gather_back(const GatherTokensBackwardArgs& a, int64_t first_id, const Place& place);
int restore_tokens(const RestoreTokensArgs& a, const Place& place);
int restore_tokens_backward(const RestoreTokensBackwardArgs& a, const Place& place);
int select_tokens(const SelectTokensArgs& a, const Place& place);

// What an error means, and what to do.
std::string error_text(int error);

}  // namespace cuda
}  // namespace sma
