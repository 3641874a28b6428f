// self_guided_masking in one launch, and attention_scores where it can share it: a block, or from
// sm_90 on a cluster of blocks, takes a sample from its keys to its gathered rows.
//
// Blocks share the heads where one can hold the keys of a sample, else the keys. For every 16 rows
// the warps turn their logits into exponentials once, against the largest of their own, tell each
// other (the largest, the sum), and add the exponentials to their columns with the weight that
// follows. Heads are added up in groups that do not depend on the number of blocks, and the groups
// in their order, so neither do the bits of the result.
#include <algorithm>

#include "kernels.h"
#include "rows.h"
#include "scores.h"
#include "select.h"

namespace sma {
namespace cuda {
namespace {

constexpr int64_t kMostListed = 4096;  // queries of a sample
constexpr unsigned kMostBlocks = 8;    // of a cluster, on every GPU that has them

struct Plan {
  bool possible;
  unsigned blocks, warps, groups;
  bool shares_keys;  // else heads
  int64_t part;      // tokens of a block, in selection and where keys are shared
  ScoreMemory memory;
  size_t shared_bytes;
};

struct RowSums {  // of a row tile, one for each parity
  RowSum of[2][kRowTile][score_warps(0)];
};

// What lies in shared memory behind the Scorer's.
struct ScoreShared {
  RowSums sums;
  int counts[score_warps(0)];
};

template <bool kWide>
class SampleScores {
 public:
  using Score = Scorer<kWide>;

  __device__ SampleScores(const AttentionScoresArgs& args, const Plan& plan, int64_t sample,
                          char* shared)
      : a(args),
        plan(plan),
        b(sample),
        scorer(args, plan.memory, sample, shared),
        shared(*reinterpret_cast<ScoreShared*>(shared + plan.memory.bytes(Score::warps()))),
        rows(reinterpret_cast<int*>(&this->shared + 1)),
        columns(reinterpret_cast<float*>(rows + args.selected)) {
    first_key = plan.shares_keys ? min(a.tokens, cluster_rank() * plan.part) : 0;
    own_groups = static_cast<int>(plan.shares_keys ? plan.groups : plan.groups / plan.blocks);
    first_group = plan.shares_keys ? 0 : cluster_rank() * own_groups;
    last_head = first_head_of(first_group + own_groups);
  }

  __device__ void run() {
    scorer.look_at(first_key, plan.shares_keys ? min(a.tokens, first_key + plan.part) : a.tokens);
    Item next = {first_head_of(first_group) - 1, kNotListed, 0, 0, 0};
    int head = next.head + 1;  // the first whose columns are not written
    bool more = find_next(&next);
    if (more) stage(&next, -1);
    while (more) {
      item = next;
      copy_async_wait<0>();
      __syncthreads();
      more = find_next(&next);
      const bool early = plan.memory.buffers == 2 || key_head(next.head) == key_head(item.head);
      if (more && early) stage(&next, key_head(item.head));
      for (; head < item.head; ++head) end_head(head);
      add_rows();
      if (more && !early) stage(&next, key_head(item.head));  // no thread reads another's keys
    }
    for (; head < last_head; ++head) end_head(head);
    if (a.reduce != kNone) write_sums();
    cluster_sync();  // what is shared may be written over, and scores read
  }

 private:
  static constexpr int kNotListed = -1;
  struct Item {  // a chunk of the rows of a head
    int head, count, first;
    int keys, queries;  // buffers
  };

  const AttentionScoresArgs& a;
  const Plan& plan;
  const int64_t b;
  Score scorer;
  ScoreShared& shared;
  int* const rows;
  float* const columns;  // sums over a group of heads; in a cluster that shares heads, over each
  int64_t first_key;
  int first_group, own_groups, last_head;
  Item item;
  int parity = 0;

  __device__ int key_head(int head) const { return head / static_cast<int>(a.heads / a.kv_heads); }

  // Goes on to the next chunk that has rows; false: there is none.
  __device__ bool find_next(Item* at) {
    at->first += plan.memory.chunk_rows();
    while (at->first >= at->count) {
      if (++at->head >= last_head) return false;
      at->first = 0;
      if (a.head_index != nullptr || at->count == kNotListed)
        at->count = list_rows(a, b, at->head, 0, a.selected, rows, shared.counts).count;
    }
    return true;
  }

  // Sends for a chunk of queries, and for keys unless those of its head are there.
  __device__ void stage(Item* at, int key_head_there) {
    at->queries ^= 1;
    scorer.stage_queries(at->queries, at->head, {rows, at->count}, at->first);
    if (key_head(at->head) != key_head_there) {
      at->keys = (at->keys + 1) % plan.memory.buffers;
      scorer.stage_keys(at->keys, at->head);
    }
    copy_async_commit();
  }

  __device__ void add_rows() {
    for (int tile = 0; tile < plan.memory.row_tiles; ++tile, parity ^= 1) {
      const int left = item.count - item.first - tile * kRowTile;
      if (left <= 0) return;
      typename Score::Logits e;
      float most[2];
      scorer.logits(item.keys, item.queries, tile, e);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == 1 && left <= 8) break;
        most[half] = scorer.largest(e, half);
        const float sum = scorer.over_columns(scorer.exponentials(e, half, most[half]));
        if (Score::lane() % 4 == 0)
          shared.sums.of[parity][half * 8 + Score::lane() / 4][Score::warp()] = {most[half], sum};
      }
      if (plan.shares_keys) cluster_sync();
      else __syncthreads();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == 1 && left <= 8) break;
        const int row = half * 8 + Score::lane() / 4;
        const float weight = weight_of(row, most[half]);
        scorer.add(e, half, row < left ? weight : 0.0f);
      }
    }
  }

  // The weight of exponentials against `most`: one over what all keys of the row add up to.
  __device__ float weight_of(int row, float most) {
    const unsigned blocks = plan.shares_keys ? cluster_size() : 1;
    float highest = -kInfinity, sum = 0.0f;
#pragma unroll 1
    for (unsigned i = 0; i < blocks; ++i)
      for (unsigned w = Score::lane() % 4; w < Score::warps(); w += 4)
        highest = fmaxf(highest, sum_of(row, i, blocks, w).most);
    highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
#pragma unroll 1
    for (unsigned i = 0; i < blocks; ++i)
      for (unsigned w = Score::lane() % 4; w < Score::warps(); w += 4)
        sum += rescaled(sum_of(row, i, blocks, w), highest, scorer.factor);
    sum = scorer.over_columns(sum);
    return sum == 0.0f ? 0.0f : rescaled({most, 1.0f}, highest, scorer.factor) / sum;
  }
  __device__ RowSum sum_of(int row, unsigned block, unsigned blocks, unsigned warp) {
    RowSum* own = &shared.sums.of[parity][row][warp];
    return blocks == 1 ? *own : *cluster_map(own, block);
  }

  __device__ float factor() const {
    return a.reduce == kMean && a.head_index == nullptr ? 1.0f / static_cast<float>(a.heads) : 1.0f;
  }

  __device__ int first_head_of(int group) const {
    return static_cast<int>(a.heads) * group / static_cast<int>(plan.groups);
  }
  __device__ bool keeps_groups() const { return cluster_size() > 1 && !plan.shares_keys; }

  // Writes what a head's rows add up to, or adds it to its group's.
  __device__ void end_head(int head) {
    if (a.reduce == kNone) {
      float* scores = a.scores + (b * a.heads + head) * a.tokens;
      scorer.take_columns([&](int n, float sum) { scores[n] = sum; });
      return;
    }
    int group = first_group;
    while (first_head_of(group + 1) <= head) ++group;
    if (first_head_of(group + 1) != head + 1) return;
    const int64_t skip = plan.shares_keys ? first_key : 0;
    float* sums = columns - skip + (keeps_groups() ? (group - first_group) * a.tokens : 0);
    const bool first = keeps_groups() || group == first_group;
    scorer.take_columns([&](int n, float sum) { sums[n] = first ? sum : sums[n] + sum; });
  }

  __device__ void write_sums() {
    float* scores = a.scores + b * a.tokens;
    const int64_t begin = cluster_rank() * plan.part;
    const int64_t end = min(a.tokens, begin + plan.part);
    cluster_sync();
    for (int64_t n = begin + threadIdx.x; n < end; n += blockDim.x) {
      float total = 0.0f;
      if (keeps_groups())
        for (unsigned r = 0; r < cluster_size(); ++r)
          for (int group = 0; group < own_groups; ++group)
            total += cluster_map(columns, r)[group * a.tokens + n];
      else total = columns[plan.shares_keys ? n - first_key : n];
      scores[n] = total * factor();
    }
  }
};

template <bool kWide>
__global__ void __launch_bounds__(kScoreThreads, 1)
    masking_kernel(const __grid_constant__ SelfGuidedMaskingArgs a,
                   const __grid_constant__ Plan plan, bool selects) {
  char* const memory = shared_memory();
  const int64_t sample = blockIdx.x / cluster_size();
  SampleScores<kWide>(a.attention, plan, sample, memory).run();
  if (!selects) return;
  select_sample(a.select, sample, memory);
  for (int i = 0; i < a.num_gathers; ++i) gather_sample(a.gathers[i], sample);
}

// How a sample is shared. `selects`: tokens are selected and gathered too.
Plan plan_of(const AttentionScoresArgs& a, const DeviceLimits& limits, bool selects) {
  Plan plan = {};
  if (a.selected > kMostListed) return plan;
  const unsigned most_blocks = limits.major >= 9 ? kMostBlocks : 1;
  const unsigned most_warps = score_warps(limits.major);
  plan.groups = 1;
  while (plan.groups < kMostBlocks && plan.groups * 2 <= a.heads) plan.groups *= 2;
  int64_t extra = 0;
  // as many warps as the keys of a block want
  const auto fits = [&](unsigned key_blocks, int buffers) {
    const int64_t keys = (a.tokens + key_blocks - 1) / key_blocks;
    const int64_t columns = keys * (key_blocks > 1 ? 1 : (plan.groups + 1) / 2);
    extra = sizeof(ScoreShared) + (a.selected + columns) * int64_t{sizeof(float)};
    plan.warps = 1;
    while (plan.warps < most_warps && plan.warps * kTiles * 8 < keys) plan.warps *= 2;
    plan.memory = score_memory(a, plan.warps, buffers, limits.shared_bytes - extra);
    return plan.memory.keys(plan.warps) >= keys;
  };
  unsigned key_blocks = 1;
  while (!fits(key_blocks, 1))
    if ((key_blocks *= 2) > most_blocks) return plan;
  if (!fits(key_blocks, 2)) fits(key_blocks, 1);
  plan.shares_keys = key_blocks > 1;
  plan.blocks = key_blocks;
  while (!plan.shares_keys && plan.blocks * 2 <= std::min(most_blocks, plan.groups) &&
         a.batch * plan.blocks * 2 * plan.warps <= limits.multiprocessors * int64_t{most_warps})
    plan.blocks *= 2;
  plan.part = (a.tokens + plan.blocks - 1) / plan.blocks;
  const size_t selection = selects ? select_sample_bytes(a.tokens) : 0;
  plan.shared_bytes = std::max(plan.memory.bytes(plan.warps) + extra, selection);
  plan.possible = true;
  return plan;
}

// Launches it where a cluster of blocks can hold the keys of a sample.
int launch_masking(const SelfGuidedMaskingArgs& a, bool selects, const Place& place,
                   bool* possible) {
  const OnDevice on(place);
  *possible = on.error() != cudaSuccess;
  if (*possible) return on.error();
  const Plan plan = plan_of(a.attention, limits_of(place.device), selects);
  *possible = plan.possible;
  if (!plan.possible) return 0;
  const Grid grid = {dim3(static_cast<unsigned>(a.attention.batch * plan.blocks)),
                     plan.warps * kWarp, plan.shared_bytes, plan.blocks};
  return launch(a.attention.dtype == kFloat32 ? masking_kernel<true> : masking_kernel<false>, grid,
                place, a, plan, selects);
}

bool small_rows(const SelfGuidedMaskingArgs& a) {  // whose words 32 bits can count
  for (int i = 0; i < a.num_gathers; ++i)
    if (a.gathers[i].visible * a.gathers[i].row_bytes >= kSmallCopy) return false;
  return true;
}

}  // namespace

int attention_scores_at_once(const AttentionScoresArgs& a, const Place& place, bool* possible) {
  SelfGuidedMaskingArgs all = {};
  all.attention = a;
  return launch_masking(all, false, place, possible);
}

int self_guided_masking(const SelfGuidedMaskingArgs& a, const Place& place) {
  if (a.attention.batch == 0) return 0;
  if (small_rows(a)) {
    bool possible = false;
    const int error = launch_masking(a, true, place, &possible);
    if (possible) return error;
  }
  int error = attention_scores(a.attention, place);
  if (error == 0) error = select_tokens(a.select, place);
  for (int i = 0; i < a.num_gathers && error == 0; ++i) error = gather_tokens(a.gathers[i], place);
  return error;
}

}  // namespace cuda
}  // namespace sma
