// Entry points of the CUDA kernels, without CUDA's headers. Each launches on the given device and
// stream and returns 0 or CUDA's error; none allocates or synchronises.
#pragma once
#include <string>

#include "../args.h"

namespace sma {
namespace cuda {

// Beside CUDA's errors. Queries and keys of so many features do not fit into shared memory.
constexpr int kRowsTooLong = -1;
// One launch cannot do it all; nothing was launched, several can.
constexpr int kNotAtOnce = -2;
// Vectors over so many tokens do not fit into shared memory.
constexpr int kTooManyTokens = -3;
// More samples than a launch can have blocks for.
constexpr int kTooManySamples = -4;

struct Place {
  int device;
  void* stream;
};

int attention_scores(const AttentionScoresArgs& a, const Place& place);
int self_guided_masking(const SelfGuidedMaskingArgs& a, const Place& place);
// Scores, and for `selects` selection and gathers, in one launch, or kNotAtOnce. masking_at_once: a
// block or a cluster has each sample. masking_in_turns: all blocks make scores, part after part,
// and each then selects for samples of its own.
int masking_at_once(const SelfGuidedMaskingArgs& a, bool selects, const Place& place);
int masking_in_turns(const SelfGuidedMaskingArgs& a, bool selects, const Place& place);
int draw_queries(const DrawQueriesArgs& a, const Place& place);
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
