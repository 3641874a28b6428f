// self_guided_masking on a GPU, and attention_scores where it can share the kernel: a block, or
// from sm_90 on a cluster of blocks, takes a sample from its keys to its gathered rows.
#include <algorithm>

#include "kernels.h"
#include "rows.h"
#include "sample_scores.h"
#include "select.h"

namespace sma {
namespace cuda {
namespace {

constexpr int64_t kMostListed = 4096;  // queries of a sample, and heads
constexpr int64_t kManyRows = 128;     // of a head: beside them, the end of a group is little
// Rows of all heads that a cluster takes which shares keys: more are work for the whole GPU, though
// in turns every exponential is made twice. Of the shape alone, as the bits of scores must be.
constexpr int64_t kMostClusterRows = 2048;

template <int kType, int kTiles>
__global__ void __launch_bounds__(kScoreWarps* kWarp, score_blocks(kType, kScoreMajor))
    masking_kernel(const __grid_constant__ SelfGuidedMaskingArgs a,
                   const __grid_constant__ Plan plan, bool selects) {
  SampleScores<kType, kTiles>(a.attention, plan).run();
  if (!selects) return;
  const unsigned sample = block_again() / plan.blocks;
  select_sample<MaskHighest>(a.select, sample, shared_memory());
  for (int i = 0; i < a.num_gathers; ++i)
    gather_sample(a.gathers[i], sample, cluster_rank(), cluster_size());
}

// A plan for blocks that hold all keys of a sample, or 1 / blocks of them; its warps are 0 where
// they do not fit into `room` bytes.
Plan plan_of(const AttentionScoresArgs& a, unsigned blocks, bool shares_keys, int groups,
             int row_tiles, int buffers, bool selects, int64_t room) {
  Plan plan = {};
  plan.blocks = blocks;
  plan.shares_keys = shares_keys;
  plan.groups = groups;
  plan.own_groups = shares_keys ? groups : groups / static_cast<int>(blocks);
  plan.group_shift = a.reduce == kNone ? -1 : 0;
  while (plan.group_shift >= 0 && 1 << plan.group_shift < groups) ++plan.group_shift;
  plan.part = ceil_div<int64_t>(a.tokens, blocks);
  const int64_t keys = shares_keys ? plan.part : a.tokens;
  const int64_t few = int64_t{kScoreWarps} * kFewTiles * kKeyTile;
  plan.key_tiles = keys <= few ? kFewTiles : kManyTiles;
  unsigned warps = 1;
  while (warps < kScoreWarps && warps * kFewTiles * kKeyTile < keys) warps *= 2;
  const int64_t sets = a.reduce != kNone && blocks > 1 && !shares_keys ? plan.own_groups : 0;
  const size_t own = sizeof(RowParts) + sizeof(Progress) * kScoreWarps +
                     sizeof(int) * (kScoreWarps + a.selected) +
                     sizeof(float) * static_cast<size_t>(sets * keys);
  plan.memory = score_memory(a, warps, plan.key_tiles, row_tiles, keys, buffers,
                             room - static_cast<int64_t>(own));
  if (plan.memory.key_tiles == 0 || plan.memory.keys(warps) < keys) return plan;
  plan.warps = warps;
  plan.totals = {static_cast<size_t>(plan.memory.bytes), shares_keys ? blocks : 1};
  plan.progress = plan.totals.parts + sizeof(RowParts);
  plan.counts = plan.progress + sizeof(Progress) * kScoreWarps;
  plan.rows = plan.counts + sizeof(int) * kScoreWarps;
  plan.columns = plan.rows + sizeof(int) * a.selected;
  plan.bytes = plan.totals.parts + own;
  if (selects) plan.bytes = std::max(plan.bytes, select_sample_bytes(a.tokens));
  if (static_cast<int64_t>(plan.bytes) > room) plan.warps = 0;
  return plan;
}

// The best plan; its warps are 0 where there is none. Whether keys are shared, and the groups, do
// not depend on the batch. `selects`: tokens are selected and gathered too.
Plan plan_of(const AttentionScoresArgs& a, const DeviceLimits& limits, bool selects) {
  if (std::max(a.selected, a.heads) > kMostListed) return {};
  const unsigned most_blocks = limits.large_clusters() ? kLargeCluster
                               : limits.major >= 9     ? kPortableCluster
                                                       : 1;
  const bool apart = a.reduce == kNone;
  const bool many_rows = a.head_index == nullptr && a.selected >= kManyRows;
  const int most_groups = many_rows ? kMostGroups : kFewGroups;
  int groups = 1;
  while (groups < most_groups && groups * 2 <= a.heads) groups *= 2;
  if (apart) groups = static_cast<int>(a.heads);
  const unsigned most_together = score_blocks(a.dtype, limits.major);  // blocks of a multiprocessor
  const auto plan_for = [&](unsigned blocks, bool shares_keys, int row_tiles) {
    // two blocks on a multiprocessor go before a second place for keys
    Plan best = {};
    for (unsigned together = most_together; together > 0; --together)
      for (const int buffers : {2, 1})
        if (best.warps == 0)
          best = plan_of(a, blocks, shares_keys, groups, row_tiles, buffers, selects,
                         shared_room(limits, together));
    return best;
  };
  // where keys leave little room, chunks of fewer queries, whatever the number of blocks
  Plan plan = {};
  for (int row_tiles = kMostRowTiles; plan.warps == 0 && row_tiles > 0; row_tiles /= 2)
    plan = plan_for(apart ? static_cast<unsigned>(a.heads) : 1, false, row_tiles);
  if (apart) return plan;
  const int64_t rows = a.selected * (a.head_index == nullptr ? a.heads : 1);
  if (plan.warps == 0 && rows <= kMostClusterRows)
    for (unsigned blocks = 2; plan.warps == 0 && blocks <= most_blocks; blocks *= 2)
      plan = plan_for(blocks, true, kMostRowTiles);
  if (plan.warps == 0 || plan.shares_keys) return plan;
  // few samples: as many blocks for each as the GPU has room for
  const auto most = std::min(most_blocks, static_cast<unsigned>(groups));
  for (unsigned blocks = 2; blocks <= most; blocks *= 2) {
    const Plan more = plan_for(blocks, false, plan.memory.row_tiles);
    const bool alone = static_cast<int64_t>(more.bytes) > shared_room(limits, most_together);
    if (more.warps == 0 || a.batch > limits.clusters_at_once(blocks, alone ? 1 : most_together))
      break;
    plan = more;
  }
  return plan;
}

using MaskingKernel = void (*)(SelfGuidedMaskingArgs, Plan, bool);

template <int kTiles>
MaskingKernel kernel_of(int dtype) {
  return dtype == kFloat32    ? masking_kernel<kFloat32, kTiles>
         : dtype == kBFloat16 ? masking_kernel<kBFloat16, kTiles>
                              : masking_kernel<kFloat16, kTiles>;
}

bool small_rows(const SelfGuidedMaskingArgs& a) {  // whose words 32 bits can count
  for (int i = 0; i < a.num_gathers; ++i)
    if (a.gathers[i].visible * a.gathers[i].row_bytes >= kSmallCopy) return false;
  return true;
}

}  // namespace

int masking_at_once(const SelfGuidedMaskingArgs& a, bool selects, const Place& place) {
  const OnDevice on(place);
  if (on.error() != cudaSuccess) return on.error();
  const Plan plan = plan_of(a.attention, limits_of(place.device), selects);
  if (plan.warps == 0) return kNotAtOnce;
  const int64_t blocks = a.attention.batch * plan.blocks;
  if (blocks > INT32_MAX) return kNotAtOnce;
  const MaskingKernel kernel = plan.key_tiles == kFewTiles
                                   ? kernel_of<kFewTiles>(a.attention.dtype)
                                   : kernel_of<kManyTiles>(a.attention.dtype);
  const unsigned cluster = a.attention.reduce == kNone ? 1 : plan.blocks;
  Grid grid = {dim3(static_cast<unsigned>(blocks)), plan.warps * kWarp, plan.bytes, cluster};
  grid.prefers_shared = true;
  return launch(kernel, grid, place, a, plan, selects);
}

int self_guided_masking(const SelfGuidedMaskingArgs& a, const Place& place) {
  if (a.attention.batch == 0) return 0;
  if (small_rows(a)) {
    int error = masking_at_once(a, true, place);
    if (error == kNotAtOnce) error = masking_in_turns(a, true, place);
    if (error != kNotAtOnce) return error;
  }
  int error = attention_scores(a.attention, place);
  if (error == 0) error = select_tokens(a.select, place);
  for (int i = 0; i < a.num_gathers && error == 0; ++i) error = gather_tokens(a.gathers[i], place);
  return error;
}

}  // namespace cuda
}  // namespace sma
