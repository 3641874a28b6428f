// The scores of one sample, by a block or by a cluster of blocks.
//
// Blocks share the heads where one can hold the keys of a sample, else the keys, which are read
// from memory once. For every chunk of queries the warps turn their logits into exponentials, put
// the sums of the rows together, and add the exponentials to their columns with the weight that
// follows. Exponents are counted from 0; where the sum of a row shows that this will not do, its
// row tiles are taken again one by one, with exponents counted from the largest logit of each row.
// Heads are added up in groups that do not depend on the number of blocks, and the groups in their
// order, so neither do the bits of the result.
#pragma once
#include "row_totals.h"
#include "scores.h"

namespace sma {
namespace cuda {

constexpr int kMostGroups = 16;  // of heads
constexpr int kFewGroups = 8;    // where they have few rows

// Sums of a row between which exponents are counted from 0: the largest one is then between -46 (of
// 16,384 equal ones) and 32, and rounded by 2^-19 at most.
constexpr float kLeastPlainSum = 0x1p-32f, kMostPlainSum = 0x1p32f;

// How a sample is shared.
struct Plan {
  unsigned blocks;   // of a sample; they are a cluster unless heads stay apart
  unsigned warps;    // of a block
  int key_tiles;     // that the kernel's warps can take
  int groups;        // of heads, added up in order; where heads stay apart, each is one
  int own_groups;    // of a block
  int group_shift;   // groups are 2 to the power of it; negative where each is a head
  bool shares_keys;  // else heads
  int64_t part;      // tokens of a block: those it adds up, and where it shares keys, its keys
  ScoreMemory memory;
  // Where things lie in shared memory, behind queries and keys.
  RowPlan totals;   // says so of RowParts
  size_t progress;  // Progress [warp]
  size_t counts;    // int [warp]
  size_t rows;      // int [selected]: the queries of a head
  size_t columns;   // float [groups of this block][token], where blocks share heads
  size_t bytes;
};

// A chunk of the rows of a head.
struct alignas(16) Chunk {
  int head, count, first;  // count: rows of the head
  short keys, queries;     // buffers
};
// Its rows, as a warp adds them up.
struct alignas(16) ChunkRows {
  int keys, queries;  // where their words are
  int count, pass;    // pass: row tiles of one

  __device__ int tiles() const { return ceil_div(count, kRowTile); }
};
// Where a warp is, and how far. In shared memory: the registers are for logits.
struct Progress {
  unsigned rank;  // of the block among those of the sample
  Chunk now, next;
  ChunkRows rows;
  bool stages_later;     // the next chunk, when this one's keys are used
  int last_head;         // behind those of this block
  int group, group_end;  // which heads are added up now, and the head behind them
};

template <int kType, int kMostTiles>
class SampleScores {
 public:
  // before sm_90 the registers do not last for a step apart
  using KeyScorer = Scorer<kType, kMostTiles, kScoreMajor == 0 || kScoreMajor >= 9>;

  __device__ SampleScores(const AttentionScoresArgs& args, const Plan& plan)
      : a(args),
        plan(plan),
        scorer(args, plan.memory, static_cast<int>(blockIdx.x / plan.blocks)),
        totals(plan.totals) {
    if (lane_again() == 0) progress().rank = blockIdx.x % plan.blocks;
    __syncwarp();
  }

  __device__ void run() {
    scorer.take_keys(first_key(),
                     plan.shares_keys ? min(a.tokens, first_key() + plan.part) : a.tokens);
    totals.begin(scorer.has_keys());
    Progress& progress = this->progress();
    const int pass = pass_of_block();
    const int first_head = first_head_of(first_group());
    const int behind = first_head_of(first_group() + plan.own_groups);
    Chunk first = {first_head - 1, kNotListed, 0, 0, 0};
    find_next(&first, behind);
    if (first.head < behind) stage(first, true);
    if (lane_again() == 0) {
      progress.now = first;
      progress.rows.pass = pass;
      progress.last_head = behind;
      progress.group = first_group();
      progress.group_end = first_head_of(first_group() + 1);
    }
    __syncwarp();
    end_heads(first_head, first.head);
    while (progress.now.head < progress.last_head) {
      copy_async_wait<0>();
      __syncthreads();
      const int last_head = progress.last_head;
      Chunk next = progress.now;
      find_next(&next, last_head);
      const bool more = next.head < last_head;
      const bool other_keys = more && key_head(next.head) != key_head(progress.now.head);
      next.queries ^= 1;
      if (other_keys) next.keys = static_cast<short>(plan.memory.buffers - 1 - next.keys);
      // Where there is one place for keys, others are sent for when these are used: no thread reads
      // another warp's.
      const bool later = other_keys && plan.memory.buffers == 1;
      if (lane_again() == 0) {
        progress.next = next;
        progress.stages_later = later;
      }
      if (more && !later) stage(next, other_keys);
      __syncwarp();
      add_rows(progress.now);
      if (progress.stages_later) stage(progress.next, true);
      end_heads(progress.now.head, progress.next.head);
      __syncwarp();
      if (lane_again() == 0) progress.now = progress.next;
      __syncwarp();
    }
    if (a.reduce != kNone) write_totals();
    cluster_sync();  // what is shared may be written over, and scores read
  }

 private:
  static constexpr int kNotListed = -1;

  const AttentionScoresArgs& a;
  const Plan& plan;
  KeyScorer scorer;
  RowTotals totals;

  template <class T>
  static __device__ T* at(size_t offset) {
    return reinterpret_cast<T*>(shared_memory() + offset);
  }
  __device__ Progress& progress() const { return at<Progress>(plan.progress)[warp_again()]; }
  // Of this block among those of the sample.
  __device__ unsigned rank() const { return progress().rank; }
  __device__ int64_t first_key() const {
    return plan.shares_keys ? min(a.tokens, rank() * plan.part) : 0;
  }
  __device__ int key_head(int head) const {
    return again(plan.memory.sharing) == 1 ? head : head / plan.memory.sharing;
  }

  // Row tiles of a pass: the same of all warps, and of all blocks that share keys.
  __device__ int pass_of_block() const {
    constexpr int kLeast = pass_tiles(kMostTiles), kMost = pass_tiles(1);
    if (kType == kFloat32 || kLeast == kMost || plan.shares_keys) return kLeast;
    return __syncthreads_or(pass_tiles(scorer.tiles()) < kMost) ? kLeast : kMost;
  }

  // Goes on to the next chunk that has rows; its head is last_head where there is none.
  __device__ void find_next(Chunk* chunk, int last_head) {
    int* const rows = at<int>(plan.rows);
    chunk->first += plan.memory.chunk_rows();
    while (chunk->first >= chunk->count) {
      if (++chunk->head >= last_head) return;
      chunk->first = 0;
      if (a.head_index != nullptr || chunk->count == kNotListed)
        chunk->count =
            list_rows(a, scorer.sample(), chunk->head, 0, a.selected, rows, at<int>(plan.counts))
                .count;
    }
  }

  // Sends for a chunk of queries, and for the keys of its head.
  __device__ void stage(const Chunk& chunk, bool other_keys) {
    scorer.stage_queries(chunk.queries, chunk.head, {at<int>(plan.rows), chunk.count}, chunk.first);
    if (other_keys) scorer.stage_keys(chunk.keys, key_head(chunk.head));
    copy_async_commit();
  }

  // Warps that take no part wait at the next chunk.
  __device__ void add_rows(const Chunk& chunk) {
    if (!totals.takes_part()) return;
    ChunkRows& rows = progress().rows;
    if (lane_again() == 0) {
      rows.keys = scorer.keys_at(chunk.keys);
      rows.queries = scorer.queries_at(chunk.queries);
      rows.count = min(chunk.count - chunk.first, plan.memory.chunk_rows());
    }
    __syncwarp();
    int first = 0;
    while (true) {
      if constexpr (kType == kFloat32) first = add_plainly<kMostTiles, false>(rows, first);
      else
        with_count<kMostTiles>(scorer.tiles(), [&](auto tiles) {
          first = add_plainly<decltype(tiles)::value, true>(rows, first);
        });
      const int end = min(rows.tiles(), first + rows.pass);
      if (first >= end) return;
#pragma unroll 1
      for (; first < end; ++first) add_carefully(rows, first);
    }
  }

  // Adds the rows of row tiles from `first` on, pass by pass, by the logits of kTiles tiles of keys
  // (kAll: as in Logits). Returns how far that went: to the end, or to a pass of which nothing is
  // added, as the sum of a row is too large or too small; all warps, of all blocks, find the same.
  template <int kTiles, bool kAll>
  __device__ int add_plainly(const ChunkRows& rows, int first) {
#pragma unroll 1
    for (; first < rows.tiles(); first += rows.pass) {
      bool added = false;
      with_count<pass_tiles(kTiles)>(min(rows.tiles() - first, rows.pass), [&](auto count) {
        Logits<kTiles, decltype(count)::value, kAll> e;
        added = add_pass(rows, first, e);
      });
      if (!added) break;
    }
    return first;
  }

  template <int kTiles, int kRowTiles, bool kAll>
  __device__ bool add_pass(const ChunkRows& rows, int first, Logits<kTiles, kRowTiles, kAll>& e) {
    typename KeyScorer::template OfRows<kRowTiles> sum, weight;
    scorer.logits(rows.keys, rows.queries + first * plan.memory.tile_words, e);
    scorer.plain_exponentials(e, sum);
    const float total = totals.put_together<SumOfParts>(first, sum);
    if (!__all_sync(kAllLanes, total > kLeastPlainSum && total < kMostPlainSum)) return false;
    totals.spread(weight_of<kRowTiles>(rows, first, total), weight);
    scorer.add(e, weight);
    return true;
  }

  __device__ void add_carefully(const ChunkRows& rows, int row_tile) {
    Logits<kMostTiles, 1, false> e;
    typename KeyScorer::template OfRows<1> most, sum, weight;
    scorer.logits(rows.keys, rows.queries + row_tile * plan.memory.tile_words, e);
    scorer.largest(e, most);
    totals.spread(totals.put_together<MostOfParts>(kPlaceMost, most), most);
    scorer.exponentials(e, most, sum);
    const float total = totals.put_together<SumOfParts>(kPlaceSum, sum);
    totals.spread(weight_of<1>(rows, row_tile, total), weight);
    scorer.add(e, weight);
  }

  // What the exponentials of the row whose sum a lane has are multiplied by.
  template <int kRowTiles>
  static __device__ float weight_of(const ChunkRows& rows, int first, float sum) {
    const bool is_row = first * kRowTile + RowTotals::row_of<kRowTiles>() < rows.count;
    return is_row ? reciprocal_fast(sum) : 0.0f;
  }

  // The first of the groups that this block adds up.
  __device__ int first_group() const {
    return plan.shares_keys ? 0 : static_cast<int>(rank()) * plan.own_groups;
  }
  __device__ int first_head_of(int group) const {
    return plan.group_shift < 0 ? group : static_cast<int>(a.heads) * group >> plan.group_shift;
  }
  __device__ bool keeps_groups() const { return plan.blocks > 1 && !plan.shares_keys; }

  // Writes what the rows of a group of heads add up to, or adds it to the sample's.
  __device__ void end_heads(int head, int last) {
    Progress& progress = this->progress();
#pragma unroll 1
    for (; head < last; ++head) {
      if (head + 1 != progress.group_end) continue;
      const int group = progress.group;
      if (scorer.has_keys()) scorer.add_to_totals();
      if (a.reduce == kNone || keeps_groups()) {
        float* const sums =
            a.reduce == kNone
                ? a.scores + (scorer.sample() * a.heads + head) * a.tokens
                : at<float>(plan.columns) + (group - first_group()) * static_cast<int>(a.tokens);
        scorer.take_totals([&](int n, float sum) { sums[n] = sum; });
      }
      __syncwarp();
      if (lane_again() == 0) {
        progress.group = group + 1;
        progress.group_end = first_head_of(group + 2);
      }
      __syncwarp();
    }
  }

  // The scores of the keys that this block has, or of its part of the tokens.
  __device__ void write_totals() {
    const float share = head_share(a);
    float* const scores = a.scores + scorer.sample() * a.tokens;
    if (!keeps_groups()) {
      scorer.take_totals([&](int n, float total) { scores[n] = total * share; });
      return;
    }
    const int64_t begin = rank() * plan.part, end = min(a.tokens, begin + plan.part);
    cluster_sync();
    for (int64_t n = begin + threadIdx.x; n < end; n += blockDim.x) {
      float sums[kMostGroups];  // all on their way at once
#pragma unroll
      for (int group = 0; group < kMostGroups; ++group) {
        const unsigned r = group * plan.blocks >> plan.group_shift;
        if (group < plan.groups)
          sums[group] =
              cluster_map(at<float>(plan.columns), r)[(group - r * plan.own_groups) * a.tokens + n];
      }
      float total = 0.0f;
#pragma unroll
      for (int group = 0; group < kMostGroups; ++group)
        if (group < plan.groups) total += sums[group];
      scores[n] = total * share;
    }
  }
};

}  // namespace cuda
}  // namespace sma
