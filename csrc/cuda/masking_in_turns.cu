// self_guided_masking, and attention_scores, where neither a block nor a cluster of blocks holds
// the keys of a sample, or a cluster's rows are too many: one launch in which all blocks wait for
// each other between the stages.
#include <algorithm>

#include "grid_sync.h"
#include "kernels.h"
#include "rows.h"
#include "select.h"
#include "turn_scores.h"

namespace sma {
namespace cuda {
namespace {

constexpr int64_t kGatherBytes = 64 << 10;  // that a block copies at a time, about
constexpr int64_t kMostTurnGroups = 16;     // of heads, whose columns are summed apart
constexpr int64_t kColumnsShare = 4;        // of the scratch memory, the most that these sums take

template <int kType>
__global__ void __launch_bounds__(kTurnWarps* kWarp, score_blocks(kType, kScoreMajor))
    turns_kernel(const __grid_constant__ SelfGuidedMaskingArgs a,
                 const __grid_constant__ Turns turns) {
  TurnScores<kType>(a.attention, turns).run();
  if (!turns.selects) return;
  grid_sync();
  const auto batch = static_cast<unsigned>(a.attention.batch);
  for (unsigned b = blockIdx.x; b < batch; b += gridDim.x)
    select_sample<MaskHighest>(a.select, b, shared_memory());
  grid_sync();
  for (int i = 0; i < a.num_gathers; ++i) {
    const GatherTokensArgs& gather = a.gathers[i];
    const auto parts = 1 + static_cast<unsigned>(gather.visible * gather.row_bytes / kGatherBytes);
    for (unsigned at = blockIdx.x; at < batch * parts; at += gridDim.x)
      gather_sample(gather, at / parts, at % parts, parts);
  }
}

// What a launch takes, and how.
struct TurnsPlan {
  Turns turns;
  unsigned warps;      // of a block; 0: heads are too wide
  size_t bytes, room;  // of a block's shared memory: what scores take, and what there is
};

TurnsPlan turns_plan(const AttentionScoresArgs& a, const DeviceLimits& limits) {
  TurnsPlan plan = {};
  Turns& t = plan.turns;
  const int64_t selected = std::max<int64_t>(a.selected, 1);
  const int64_t most_rows = std::min(selected, kTurnRows);
  const size_t own = sizeof(TurnShared) + static_cast<size_t>(most_rows) * sizeof(int);
  const auto try_plan = [&](unsigned blocks, unsigned warps) {  // so many on a multiprocessor
    plan.room = static_cast<size_t>(shared_room(limits, blocks));
    t.memory = score_memory(a, warps, kFewTiles, kTurnRowTiles, a.tokens, 1,
                            static_cast<int64_t>(plan.room) - static_cast<int64_t>(own), true);
    plan.warps = t.memory.key_tiles > 0 ? warps : 0;
    plan.bytes = static_cast<size_t>(t.memory.bytes) + own;
  };
  try_plan(score_blocks(a.dtype, limits.major), kTurnWarps);
  // rows so long that not a tile of keys fits for each warp
  for (unsigned warps = kTurnWarps; plan.warps == 0 && warps > 0; warps /= 2) try_plan(1, warps);
  if (plan.warps == 0) return plan;
  const int64_t keys = t.memory.keys(plan.warps), blocks = ceil_div(a.tokens, keys);
  // a few rows have many parts of the keys
  const int64_t most_splits =
      std::max<int64_t>(kMostParts / ceil_div<int64_t>(selected, kPartRows), 1);
  const int64_t split_keys = std::min(ceil_div(blocks, most_splits) * keys, a.tokens);
  const int64_t splits = ceil_div(a.tokens, split_keys);
  // rows, heads and groups of a turn do not depend on the batch, nor do the bits of sums
  const auto column_bytes = static_cast<int64_t>(sizeof(float)) * a.tokens;
  int64_t groups = 1;
  while (groups < std::min(kMostTurnGroups, a.heads) &&
         2 * groups * column_bytes <= a.scratch_bytes / kColumnsShare)
    groups *= 2;
  groups = a.reduce == kNone ? 1 : std::min(groups, a.heads);
  const int64_t sample_columns = groups > 1 ? groups * column_bytes : 0;
  const auto row_bytes = static_cast<int64_t>((splits + 1) * sizeof(RowSum));
  const int64_t room = (a.scratch_bytes - sample_columns) / row_bytes;
  const int64_t rows = std::min(most_rows, room), heads = std::min(a.heads, room / rows);
  const int64_t sample_bytes = rows * heads * row_bytes + sample_columns;
  const int64_t samples = heads == a.heads ? std::min(a.batch, a.scratch_bytes / sample_bytes) : 1;
  t.samples = static_cast<int>(samples);
  t.heads = static_cast<int>(heads);
  t.rows = static_cast<int>(rows);
  t.row_parts = static_cast<int>(ceil_div<int64_t>(rows, kPartRows));
  t.splits = static_cast<int>(splits);
  t.split_keys = static_cast<int>(split_keys);
  t.blocks = static_cast<int>(blocks);
  t.groups = static_cast<int>(groups);
  t.whole = static_cast<RowSum*>(a.scratch);
  t.parts = t.whole + samples * heads * rows;
  t.columns = reinterpret_cast<float*>(t.parts + samples * heads * splits * rows);
  return plan;
}

}  // namespace

int masking_in_turns(const SelfGuidedMaskingArgs& a, bool selects, const Place& place) {
  const AttentionScoresArgs& scores = a.attention;
  if (scores.tokens == 0) return kNotAtOnce;                 // there are no scores
  if (scores.batch > INT32_MAX / 2) return kTooManySamples;  // which are counted in 32 bits
  const OnDevice on(place);
  if (on.error() != cudaSuccess) return on.error();
  TurnsPlan plan = turns_plan(scores, limits_of(place.device));
  if (plan.warps == 0) return kRowsTooLong;
  const size_t bytes =
      selects ? std::max(plan.bytes, select_sample_bytes(scores.tokens)) : plan.bytes;
  if (bytes > plan.room) return kNotAtOnce;
  Turns& t = plan.turns;
  t.selects = selects;
  const int64_t outputs = scores.reduce == kNone ? t.heads : t.groups;
  int64_t items =
      t.samples * std::max<int64_t>(t.heads * t.row_parts * t.splits, outputs * t.blocks);
  if (selects) items = INT32_MAX;  // all that the GPU runs at once gather
  Grid grid = {dim3(static_cast<unsigned>(items)), plan.warps * kWarp, bytes};
  grid.prefers_shared = grid.together = true;
  const auto kernel = scores.dtype == kFloat32    ? turns_kernel<kFloat32>
                      : scores.dtype == kBFloat16 ? turns_kernel<kBFloat16>
                                                  : turns_kernel<kFloat16>;
  return launch(kernel, grid, place, a, t);
}

}  // namespace cuda
}  // namespace sma
