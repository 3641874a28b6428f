// The scores of one sample, by a block or by a cluster of blocks.
//
// Blocks share the heads where one can hold the keys of a sample, else the keys, which are read
// from memory once. For every 16 rows the warps turn their logits into exponentials once, against
// the largest of their own, tell each other (the largest, the sum), and add the exponentials to
// their columns with the weight that follows. Heads are added up in groups that do not depend on
// the number of blocks, and the groups in their order, so neither do the bits of the result.
#pragma once
#include "scores.h"

namespace sma {
namespace cuda {

constexpr unsigned kMostBlocks = 16;  // of a cluster
constexpr int kMostGroups = 8;        // of heads
constexpr int kQuad = 4;              // lanes that share a row

// Sums of a row, two at a time: what a lane reads at once.
struct alignas(16) RowSumPair {
  RowSum of[2];
};
constexpr int kPairs = kScoreWarps / 2;
constexpr unsigned kWarpsOfQuad = 2 * kQuad;  // whose sums its lanes read at once
static_assert(kPairs % kQuad == 0, "each lane of a row reads the sums of as many warps");

// How a sample is shared.
struct Plan {
  unsigned blocks;   // of a sample; they are a cluster unless heads stay apart
  unsigned warps;    // of a block
  int tiles;         // of 8 keys that the kernel's warps can take
  int groups;        // of heads, added up in order; where heads stay apart, each is one
  int own_groups;    // of a block
  int group_shift;   // groups are 2 to the power of it; negative where each is a head
  bool shares_keys;  // else heads
  int64_t part;      // tokens of a block: of its selection and, where it shares keys, its keys
  ScoreMemory memory;
  // Where things lie in shared memory, behind the Scorer's.
  size_t row_sums;    // RowSumPair [parity][row][kPairs]: of each warp
  size_t block_sums;  // RowSum [parity][row]: of all warps, for the other blocks
  size_t counts;      // int [warp]
  size_t rows;        // int [selected]: the queries of a head
  size_t columns;     // float [groups of this block, or one][keys]
  size_t bytes;
};

template <int kType, int kTiles>
class SampleScores {
 public:
  using Score = Scorer<kType, kTiles>;

  __device__ SampleScores(const AttentionScoresArgs& args, const Plan& plan, int64_t sample,
                          unsigned rank, char* shared)
      : a(args),
        plan(plan),
        b(sample),
        rank(rank),
        scorer(args, plan.memory, sample, shared),
        row_sums(reinterpret_cast<RowSumPair (*)[kRowTile][kPairs]>(shared + plan.row_sums)),
        block_sums(reinterpret_cast<RowSum (*)[kRowTile]>(shared + plan.block_sums)),
        counts(reinterpret_cast<int*>(shared + plan.counts)),
        rows(reinterpret_cast<int*>(shared + plan.rows)),
        columns(reinterpret_cast<float*>(shared + plan.columns)) {
    first_key = plan.shares_keys ? min(a.tokens, rank * plan.part) : 0;
    last_head = first_head_of(first_group() + plan.own_groups);
    group = first_group();
    group_end = first_head_of(group + 1);
    // warps that are not there, or have no keys, stay at this
    for (unsigned i = threadIdx.x; i < 2 * kRowTile * kPairs; i += blockDim.x)
      row_sums[0][0][i] = {{{-kInfinity, 0.0f}, {-kInfinity, 0.0f}}};
  }

  __device__ void run() {
    scorer.look_at(first_key, plan.shares_keys ? min(a.tokens, first_key + plan.part) : a.tokens);
    int head = first_head_of(first_group());  // the first whose columns are not written
    Item next = {head - 1, kNotListed, 0, 0, 0};
    bool here = false, more = true;  // is there a chunk of rows, and one behind it?
    while (more) {
      const Item item = next;
      if (here) {
        copy_async_wait<0>();
        __syncthreads();
      }
      more = find_next(&next);
      const bool other_keys = !here || key_head(next.head) != key_head(item.head);
      // Where there is one place for keys, others are sent for when these are used: no thread reads
      // another's.
      const int turn = here && other_keys && plan.memory.buffers == 1;
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        if (more && i == turn) stage(&next, other_keys);
        if (here && i == 0) add_rows(item);
      }
      const int until = more ? next.head : last_head;
#pragma unroll 1
      for (; head < until; ++head) end_head(head);
      here = true;
    }
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
  const unsigned rank;  // of this block among those of the sample
  Score scorer;
  RowSumPair (*const row_sums)[kRowTile][kPairs];
  RowSum (*const block_sums)[kRowTile];
  int* const counts;
  int* const rows;
  float* const columns;
  int64_t first_key;
  int last_head;
  int group, group_end;  // which heads are added up now, and the head behind them
  int parity = 0;

  __device__ int key_head(int head) const {
    return plan.memory.sharing == 1 ? head : head / plan.memory.sharing;
  }

  // Goes on to the next chunk that has rows; false: there is none.
  __device__ bool find_next(Item* at) {
    at->first += plan.memory.chunk_rows();
    while (at->first >= at->count) {
      if (++at->head >= last_head) return false;
      at->first = 0;
      if (a.head_index != nullptr || at->count == kNotListed)
        at->count = list_rows(a, b, at->head, 0, a.selected, rows, counts).count;
    }
    return true;
  }

  // Sends for a chunk of queries, and for the keys of its head.
  __device__ void stage(Item* at, bool other_keys) {
    at->queries ^= 1;
    scorer.stage_queries(at->queries, at->head, {rows, at->count}, at->first);
    if (other_keys) {
      at->keys = plan.memory.buffers - 1 - at->keys;
      scorer.stage_keys(at->keys, key_head(at->head));
    }
    copy_async_commit();
  }

  __device__ void add_rows(const Item& item) {
#pragma unroll 1
    for (int tile = 0; tile < plan.memory.row_tiles; ++tile, parity ^= 1) {
      const int left = item.count - item.first - tile * kRowTile;
      if (left <= 0) return;
      if (!scorer.has_keys()) wait_for_others();
      else if (left > 8) add_tile<2>(item, tile, left);
      else add_tile<1>(item, tile, left);
    }
  }

  // The sums of all warps, and blocks, are there behind it. Warps with and without keys come here
  // from different places, which a barrier allows.
  __device__ void wait_for_others() {
    __syncthreads();
    if (plan.shares_keys) tell_blocks();
  }

  // kHalves: of the rows that are there.
  template <int kHalves>
  __device__ void add_tile(const Item& item, int tile, int left) {
    typename Score::Logits e;
    RowSum own[kHalves], all[kHalves];
    scorer.logits(item.keys, item.queries, tile, e);
    scorer.exponentials(e, own);
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
      if (lane() % kQuad == 0)
        row_sums[parity][row_of(half)][warp() / 2].of[warp() % 2] = own[half];
    wait_for_others();
    if (plan.shares_keys) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) all[half] = of_blocks(row_of(half));
    } else {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) all[half] = of_warps(row_of(half));
    }
    float weight[kHalves];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      weight[half] =
          rescaled({own[half].most, 1.0f}, all[half].most) * reciprocal_fast(all[half].sum);
      if (row_of(half) >= left) weight[half] = 0.0f;
    }
    scorer.add(e, weight);
  }

  static __device__ int row_of(int half) { return half * 8 + static_cast<int>(lane()) / kQuad; }

  template <int kEach>  // pairs of warps that a lane takes
  struct Parts {
    RowSum of[2 * kEach];
  };
  template <int kEach>
  __device__ Parts<kEach> of_pairs(int row) const {
    Parts<kEach> parts;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const RowSumPair pair = row_sums[parity][row][lane() % kQuad + i * kQuad];
      parts.of[2 * i] = pair.of[0];
      parts.of[2 * i + 1] = pair.of[1];
    }
    return parts;
  }

  // What the keys of this block add up to.
  __device__ RowSum of_warps(int row) const {
    if (warps() <= kWarpsOfQuad) return join_row(of_pairs<1>(row).of);
    return join_row(of_pairs<kPairs / kQuad>(row).of);
  }

  // What the keys of all blocks add up to.
  __device__ void tell_blocks() {
    if (warp() < 2) {
      const int row = row_of(static_cast<int>(warp()));
      const RowSum all = of_warps(row);
      if (lane() % kQuad == 0) block_sums[parity][row] = all;
    }
    cluster_sync();
  }
  __device__ RowSum of_blocks(int row) const {
    RowSum parts[kMostBlocks / kQuad];
#pragma unroll
    for (unsigned i = 0; i < kMostBlocks / kQuad; ++i) {
      const unsigned block = lane() % kQuad + i * kQuad;
      parts[i] = {-kInfinity, 0.0f};
      if (block < plan.blocks) parts[i] = *cluster_map(&block_sums[parity][row], block);
    }
    return join_row(parts);
  }

  // The first of the groups that this block adds up.
  __device__ int first_group() const {
    return plan.shares_keys ? 0 : static_cast<int>(rank) * plan.own_groups;
  }
  __device__ int first_head_of(int group) const {
    return plan.group_shift < 0 ? group : static_cast<int>(a.heads) * group >> plan.group_shift;
  }
  __device__ bool keeps_groups() const { return plan.blocks > 1 && !plan.shares_keys; }

  // Writes what a head's rows add up to, or adds it to its group's.
  __device__ void end_head(int head) {
    if (head + 1 != group_end) return;
    float* sums = columns - first_key + (keeps_groups() ? (group - first_group()) * a.tokens : 0);
    bool first = keeps_groups() || group == first_group();
    if (a.reduce == kNone) {
      sums = a.scores + (b * a.heads + head) * a.tokens;
      first = true;
    }
    if (first || scorer.has_keys())
      scorer.take_columns([&](int n, float sum) { sums[n] = first ? sum : sums[n] + sum; });
    group_end = first_head_of(++group + 1);
  }

  __device__ void write_sums() {
    float factor = 1.0f;
    if (a.reduce == kMean && a.head_index == nullptr) factor /= static_cast<float>(a.heads);
    float* scores = a.scores + b * a.tokens;
    const int64_t begin = rank * plan.part, end = min(a.tokens, begin + plan.part);
    cluster_sync();
    for (int64_t n = begin + threadIdx.x; n < end; n += blockDim.x) {
      float total = 0.0f;
      if (keeps_groups()) {
        float sums[kMostGroups];  // all on their way at once
#pragma unroll
        for (int group = 0; group < kMostGroups; ++group) {
          const unsigned r = group * plan.blocks >> plan.group_shift;
          if (group < plan.groups)
            sums[group] = cluster_map(columns, r)[(group - r * plan.own_groups) * a.tokens + n];
        }
#pragma unroll
        for (int group = 0; group < kMostGroups; ++group)
          if (group < plan.groups) total += sums[group];
      } else total = columns[n - first_key];
      scores[n] = total * factor;
    }
  }
};

}  // namespace cuda
}  // namespace sma
