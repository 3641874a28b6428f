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
  int64_t part;      // tokens of a block: of its selection and, where it shares keys, its keys
  ScoreMemory memory;
  // Where things lie in shared memory, behind queries and keys.
  size_t totals;    // RowParts
  size_t progress;  // Progress [warp]
  size_t counts;    // int [warp]
  size_t rows;      // int [selected]: the queries of a head
  size_t columns;   // float [groups of this block, or one][keys]
  size_t bytes;
};

// A chunk of the rows of a head.
struct alignas(16) Chunk {
  int head, count, first;  // count: rows of the head
  short keys, queries;     // buffers
};
// How far a warp is. In shared memory: the registers are for logits.
struct Progress {
  Chunk now, next;
  int last_head;         // behind those of this block
  int group, group_end;  // which heads are added up now, and the head behind them
};

template <int kType, int kTiles>
class SampleScores {
 public:
  using KeyScorer = Scorer<kType, kTiles, kScoreMajor == 0 || kScoreMajor >= 9>;

  __device__ SampleScores(const AttentionScoresArgs& args, const Plan& plan, int sample,
                          unsigned rank)
      : a(args),
        plan(plan),
        b(sample),
        rank(rank),
        scorer(args, plan.memory, sample, shared_memory()),
        totals(*at<RowParts>(plan.totals), plan.shares_keys ? plan.blocks : 1) {}

  __device__ void run() {
    scorer.take_keys(first_key(),
                     plan.shares_keys ? min(a.tokens, first_key() + plan.part) : a.tokens);
    totals.begin(scorer.has_keys());
    Progress& progress = at<Progress>(plan.progress)[warp()];
    const int first_head = first_head_of(first_group());
    const int behind = first_head_of(first_group() + plan.own_groups);
    Chunk first = {first_head - 1, kNotListed, 0, 0, 0};
    find_next(&first, behind);
    if (first.head < behind) stage(first, true);
    if (lane() == 0)
      progress = {first, first, behind, first_group(), first_head_of(first_group() + 1)};
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
      if (lane() == 0) progress.next = next;
      // Where there is one place for keys, others are sent for when these are used: no thread reads
      // another warp's.
      const bool later = other_keys && plan.memory.buffers == 1;
      if (more && !later) stage(next, other_keys);
      __syncwarp();
      add_rows(progress.now);
      if (later) stage(progress.next, true);
      end_heads(progress.now.head, progress.next.head);
      __syncwarp();
      if (lane() == 0) progress.now = progress.next;
      __syncwarp();
    }
    if (a.reduce != kNone) write_sums();
    cluster_sync();  // what is shared may be written over, and scores read
  }

 private:
  static constexpr int kNotListed = -1;
  static constexpr int kPassTiles = pass_tiles(kType, kTiles);

  const AttentionScoresArgs& a;
  const Plan& plan;
  const int b;
  const unsigned rank;  // of this block among those of the sample
  KeyScorer scorer;
  RowTotals totals;

  template <class T>
  static __device__ T* at(size_t offset) {
    return reinterpret_cast<T*>(shared_memory() + offset);
  }
  __device__ int64_t first_key() const {
    return plan.shares_keys ? min(a.tokens, rank * plan.part) : 0;
  }
  __device__ int key_head(int head) const {
    return plan.memory.sharing == 1 ? head : head / plan.memory.sharing;
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
            list_rows(a, b, chunk->head, 0, a.selected, rows, at<int>(plan.counts)).count;
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
    const int rows = min(chunk.count - chunk.first, plan.memory.chunk_rows());
    const auto row_tiles = static_cast<int>(ceil_div<unsigned>(rows, kRowTile));
#pragma unroll 1
    for (int first = 0; first < row_tiles; first += kPassTiles) {
      const int count = min(row_tiles - first, kPassTiles);
      bool done = false;
      with_row_tiles<kPassTiles>(count, [&](auto tiles) {
        done = add_plainly<decltype(tiles)::value>(chunk, first, rows);
      });
#pragma unroll 1
      for (int i = 0; !done && i < count; ++i) add_carefully(chunk, first + i, rows);
    }
  }

  // kRowTiles: row tiles from `first` on, of a chunk of so many rows. False: nothing is added, the
  // sum of a row is too large or too small. All warps, of all blocks, find the same.
  template <int kRowTiles>
  __device__ bool add_plainly(const Chunk& chunk, int first, int rows) {
    typename KeyScorer::template Logits<kRowTiles> e;
    typename KeyScorer::template OfRows<kRowTiles> sum, weight;
    float total[kRowTiles];
    scorer.logits(chunk.keys, chunk.queries, first, e);
    scorer.plain_exponentials(e, sum);
    totals.put_together<SumOfParts>(first, sum, total);
    bool is_plain = true;
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j)
      is_plain &= total[j] > kLeastPlainSum && total[j] < kMostPlainSum;
    if (!__all_sync(kAllLanes, is_plain)) return false;
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j)
      total[j] = is_row_of(first + j, rows) ? reciprocal_fast(total[j]) : 0.0f;
    totals.spread(total, weight);
    scorer.add(e, weight);
    return true;
  }

  // A row tile of a chunk of so many rows.
  __device__ void add_carefully(const Chunk& chunk, int row_tile, int rows) {
    typename KeyScorer::template Logits<1> e;
    typename KeyScorer::template OfRows<1> most, sum, weight;
    float total[1];
    scorer.logits(chunk.keys, chunk.queries, row_tile, e);
    scorer.largest(e, most);
    totals.put_together<MostOfParts>(kPlaceMost, most, total);
    totals.spread(total, most);
    scorer.exponentials(e, most, sum);
    totals.put_together<SumOfParts>(kPlaceSum, sum, total);
    total[0] = is_row_of(row_tile, rows) ? reciprocal_fast(total[0]) : 0.0f;
    totals.spread(total, weight);
    scorer.add(e, weight);
  }

  // Whether the row whose total a lane has is one.
  static __device__ bool is_row_of(int row_tile, int rows) {
    return row_tile * kRowTile + static_cast<int>(lane() / 4) < rows;
  }

  // The first of the groups that this block adds up.
  __device__ int first_group() const {
    return plan.shares_keys ? 0 : static_cast<int>(rank) * plan.own_groups;
  }
  __device__ int first_head_of(int group) const {
    return plan.group_shift < 0 ? group : static_cast<int>(a.heads) * group >> plan.group_shift;
  }
  __device__ bool keeps_groups() const { return plan.blocks > 1 && !plan.shares_keys; }

  // Writes what the rows of heads add up to, or adds it to their group's.
  __device__ void end_heads(int head, int last) {
    Progress& progress = at<Progress>(plan.progress)[warp()];
#pragma unroll 1
    for (; head < last; ++head) {
      if (head + 1 != progress.group_end) continue;
      const int group = progress.group;
      if (a.reduce == kNone) {
        float* const sums = a.scores + (int64_t{b} * a.heads + head) * a.tokens;
        scorer.take_columns([&](int n, float sum) { sums[n] = sum; });
      } else {
        const bool first = keeps_groups() || group == first_group();
        const int before =
            keeps_groups() ? (group - first_group()) * static_cast<int>(a.tokens) : 0;
        float* const sums = at<float>(plan.columns) + before;
        const int begin = static_cast<int>(first_key());
        if (first || scorer.has_keys())
          scorer.take_columns([&](int n, float sum) {
            float& all = sums[n - begin];
            all = first ? sum : all + sum;
          });
      }
      __syncwarp();
      if (lane() == 0) {
        progress.group = group + 1;
        progress.group_end = first_head_of(group + 2);
      }
      __syncwarp();
    }
  }

  __device__ void write_sums() {
    const float share = head_share(a);
    float* scores = a.scores + int64_t{b} * a.tokens;
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
            sums[group] = cluster_map(at<float>(plan.columns),
                                      r)[(group - r * plan.own_groups) * a.tokens + n];
        }
#pragma unroll
        for (int group = 0; group < kMostGroups; ++group)
          if (group < plan.groups) total += sums[group];
      } else total = at<float>(plan.columns)[n - first_key()];
      scores[n] = total * share;
    }
  }
};

}  // namespace cuda
}  // namespace sma
