// The scores of a batch of whose samples no cluster of blocks holds the keys, or whose rows are so
// many that a cluster would take long. As many blocks as the GPU runs at once go through stages
// together: the sums of every row of attention, from parts of the keys; these parts put together;
// with them the sums of every column, from groups of heads where samples are few and short; and
// these put together. Rows whose sums are more than the scratch memory holds are taken in turns.
#pragma once
#include "grid_sync.h"
#include "scores.h"

namespace sma {
namespace cuda {

constexpr int kTurnRowTiles = 4;                     // of a chunk
constexpr int kTurnPassTiles = 2;                    // of these, whose logits a warp keeps
constexpr int kPartRows = kTurnRowTiles * kRowTile;  // whose sums a block makes at a time
constexpr int64_t kMostParts = 32;                   // of the rows of a head, times those of keys
constexpr int64_t kTurnRows = 512;                   // of a head, in one turn: leaves more samples
constexpr unsigned kTurnWarps = 8;                   // of a block, at most

// How samples, heads and rows are taken in turns, and keys apart.
struct Turns {
  int samples, heads, rows;  // of a turn, at most
  int row_parts;             // of kPartRows
  int splits, split_keys;    // parts of the keys, and keys of each
  int blocks;                // of keys
  int groups;                // of the heads of a turn
  ScoreMemory memory;
  bool selects;    // tokens too, by the scores
  RowSum* whole;   // [sample][head][row]: sum is one over it
  RowSum* parts;   // [sample][head][split][row]
  float* columns;  // [sample][group][token], where there are groups
};

// A turn's first sample, head and row; 32 bits count all that fits into a GPU.
struct Turn {
  int sample, head, row;
};

// In shared memory: the registers are for logits.
struct TurnShared {
  Turn turn;
  RowSum sums[kPartRows][kTurnWarps];
  int counts[kTurnWarps];
};

template <int kType>
class TurnScores {
 public:
  __device__ TurnScores(const AttentionScoresArgs& args, const Turns& turns) : a(args), t(turns) {}

  __device__ void run() {
#pragma unroll 1
    for (int sample = 0; sample < a.batch; sample += t.samples)
#pragma unroll 1
      for (int head = 0; head < a.heads; head += t.heads) {
        int row = 0;
        do {
          __syncthreads();
          if (threadIdx.x == 0) shared().turn = {sample, head, row};
          __syncthreads();
          run_turn();
          row += t.rows;
        } while (row < a.selected);
      }
  }

 private:
  using KeyScorer = Scorer<kType, kFewTiles, false>;

  const AttentionScoresArgs& a;
  const Turns& t;

  __device__ TurnShared& shared() const {
    return *reinterpret_cast<TurnShared*>(shared_memory() + t.memory.bytes);
  }
  __device__ LaneSums& own_sums(int row_tile) const {
    auto* const own = reinterpret_cast<LaneSums*>(shared_memory() + t.memory.sums_at);
    return own[(warp_again() * t.memory.row_tiles + row_tile) * kWarp + lane_again()];
  }
  __device__ int* list() const { return reinterpret_cast<int*>(&shared() + 1); }

  // The turn's first, and how many it has.
  __device__ int sample() const { return shared().turn.sample; }
  __device__ int head() const { return shared().turn.head; }
  __device__ int row() const { return shared().turn.row; }
  __device__ int samples() const { return min(t.samples, static_cast<int>(a.batch) - sample()); }
  __device__ int heads() const { return min(t.heads, static_cast<int>(a.heads) - head()); }
  __device__ int rows() const { return min(t.rows, static_cast<int>(a.selected) - row()); }

  __device__ bool apart() const { return a.reduce == kNone; }
  __device__ bool in_groups() const { return !apart() && t.groups > 1; }
  __device__ int groups() const { return apart() ? heads() : min(t.groups, heads()); }
  __device__ int first_head_of(int group) const { return head() + heads() * group / groups(); }

  __device__ void run_turn() {
    const int step = static_cast<int>(gridDim.x);
    const int parts = t.row_parts * t.splits;
    for (int i = static_cast<int>(blockIdx.x); i < samples() * heads() * parts; i += step)
      sum_rows(i / parts, i % parts / t.splits, i % t.splits);
    grid_sync();
    join_parts();
    grid_sync();
    const int items = samples() * groups() * t.blocks;
    for (int i = static_cast<int>(blockIdx.x); i < items; i += step)
      sum_columns(i / t.blocks, i % t.blocks);
    if (!in_groups()) return;
    grid_sync();
    add_groups();
  }

  __device__ RowList list_rows_of(int64_t b, int h) const {
    return list_rows(a, b, h, row(), row() + rows(), list(), shared().counts);
  }

  // The sums of one part of the rows of a head, and of the keys.
  __device__ void sum_rows(int at, int part, int split) {
    const int h = head() + at % heads(), b = sample() + at / heads();
    RowList of_head = list_rows_of(b, h);
    of_head.count = min(of_head.count, (part + 1) * kPartRows);
    KeyScorer scorer(a, t.memory, b);
    const int begin = part * kPartRows;
    for (int first = begin; first < of_head.count; first += t.memory.chunk_rows()) {
      const int count = min(t.memory.chunk_rows(), of_head.count - first);
      scorer.stage_queries(0, h, of_head, first);
      sum_chunk(scorer, h / t.memory.sharing, split, ceil_div(count, kRowTile), first == begin);
      __syncthreads();
      RowSum* parts = t.parts + (at * t.splits + split) * rows() + first;
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        RowSum sum = shared().sums[i][0];
        for (unsigned w = 1; w < warps(); ++w) sum = join(sum, shared().sums[i][w]);
        parts[i] = sum;
      }
      __syncthreads();
    }
  }

  // Each lane keeps the sums of its keys until all have passed by.
  __device__ void sum_chunk(KeyScorer& scorer, int key_head, int split, int row_tiles,
                            bool is_first) {
    const int first_key = split * t.split_keys, keys = t.memory.keys(warps());
    const int last_key = static_cast<int>(min(a.tokens, int64_t{first_key} + t.split_keys));
    for (int j = 0; j < row_tiles; ++j)
      own_sums(j).rows[0] = own_sums(j).rows[1] = {-kInfinity, 0.0f};
#pragma unroll 1
    for (int key = first_key; key < last_key; key += keys) {
      if (is_first || last_key - first_key > keys) {  // else they are there
        scorer.take_keys(key, last_key);
        scorer.stage_keys(0, key_head);
      }
      copy_async_commit();
      copy_async_wait<0>();
      __syncthreads();
      if (scorer.has_keys()) {
#pragma unroll 1
        for (int tile = 0; tile < row_tiles; tile += kTurnPassTiles)
          with_logits(scorer, row_tiles - tile, [&](auto& e) { join_tiles(scorer, tile, e); });
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int j = 0; j < row_tiles; ++j) {
      const LaneSums own = own_sums(j);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const RowSum sum = join_lanes(own.rows[i]);
        if (lane() < kQuad) shared().sums[j * kRowTile + lane() * 2 + i][warp()] = sum;
      }
    }
  }

  // Calls body with a place for the logits of a warp and of so many row tiles, of a pass at most.
  template <class Body>
  static __device__ void with_logits(const KeyScorer& scorer, int row_tiles, const Body& body) {
    with_count<kTurnPassTiles>(row_tiles, [&](auto count) {
      if constexpr (kType != kFloat32) {
        if (scorer.tiles() == kFewTiles) {
          Logits<kFewTiles, decltype(count)::value, true> e;
          return body(e);
        }
      }
      Logits<kFewTiles, decltype(count)::value, false> e;
      body(e);
    });
  }

  template <int kTiles, int kRowTiles, bool kAll>
  __device__ void join_tiles(const KeyScorer& scorer, int row_tile,
                             Logits<kTiles, kRowTiles, kAll>& e) {
    typename KeyScorer::template OfRows<kRowTiles> most, sum;
    scorer.logits(scorer.keys_at(0), scorer.queries_at(0, row_tile), e);
    scorer.largest(e, most);
    scorer.exponentials(e, most, sum);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      LaneSums own = own_sums(row_tile + j);
#pragma unroll
      for (int i = 0; i < 2; ++i) own.rows[i] = join(own.rows[i], {most[j][i], sum[j][i]});
      own_sums(row_tile + j) = own;
    }
  }

  // Over the lanes that have parts of the same row.
  static __device__ RowSum join_lanes(RowSum x) {
#pragma unroll
    for (int other = 4; other < kWarp; other *= 2)
      x = join(
          x, {__shfl_xor_sync(kAllLanes, x.most, other), __shfl_xor_sync(kAllLanes, x.sum, other)});
    return x;
  }

  // Puts the parts of each row together. Rows that no query takes hold nothing, and are not read.
  __device__ void join_parts() {
    const int total = samples() * heads() * rows(), step = static_cast<int>(gridDim.x * blockDim.x);
    for (int first = static_cast<int>(blockIdx.x * blockDim.x); first < total; first += step) {
      const int i = first + static_cast<int>(threadIdx.x);
      if (i >= total) break;
      const RowSum* parts = t.parts + i / rows() * t.splits * rows() + i % rows();
      RowSum sum = parts[0];
      for (int split = 1; split < t.splits; ++split) sum = join(sum, parts[split * rows()]);
      t.whole[i] = {sum.most, 1.0f / sum.sum};
    }
  }

  // Adds this turn's rows of a group of heads to the columns of one block of keys.
  __device__ void sum_columns(int at, int block) {
    const int64_t first_key = int64_t{block} * t.memory.keys(warps());
    const int b = sample() + at / groups();
    const int first_head = first_head_of(at % groups()),
              last_head = first_head_of(at % groups() + 1);
    KeyScorer scorer(a, t.memory, b);
    scorer.take_keys(first_key, min(a.tokens, first_key + t.memory.keys(warps())));
    for (int h = first_head; h < last_head; ++h) {
      const RowList of_head = list_rows_of(b, h);
      const RowSum* whole = t.whole + ((b - sample()) * heads() + h - head()) * rows();
      if (of_head.count > 0) scorer.stage_keys(0, h / t.memory.sharing);
      for (int first = 0, buffer = 0; first < of_head.count;
           first += t.memory.chunk_rows(), buffer ^= 1) {
        if (first == 0) scorer.stage_queries(buffer, h, of_head, first);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        if (first + t.memory.chunk_rows() < of_head.count)
          scorer.stage_queries(buffer ^ 1, h, of_head, first + t.memory.chunk_rows());
        if (!scorer.has_keys()) continue;
        const int count = min(t.memory.chunk_rows(), of_head.count - first);
        const int row_tiles = ceil_div(count, kRowTile);
#pragma unroll 1
        for (int tile = 0; tile < row_tiles; tile += kTurnPassTiles)
          with_logits(scorer, row_tiles - tile,
                      [&](auto& e) { add_tiles(scorer, buffer, tile, whole + first, count, e); });
      }
      __syncthreads();  // keys and queries are taken
    }
    scorer.add_to_totals();
    if (in_groups()) {
      float* const sums = t.columns + int64_t{at} * a.tokens;
      scorer.take_totals([&](int n, float sum) { sums[n] = sum; });
    } else {
      float* const scores = a.scores + (apart() ? int64_t{b} * a.heads + first_head : b) * a.tokens;
      scorer.take_totals([&](int n, float sum) { add(&scores[n], sum); });
    }
  }

  // Puts the columns of the groups together.
  __device__ void add_groups() {
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    for (int b = 0; b < samples(); ++b) {
      const float* sums = t.columns + int64_t{b} * groups() * a.tokens;
      float* const scores = a.scores + int64_t{sample() + b} * a.tokens;
      for (int64_t n = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; n < a.tokens; n += step) {
        float sum = 0.0f;
        for (int group = 0; group < groups(); ++group) sum += sums[group * a.tokens + n];
        add(&scores[n], sum);
      }
    }
  }

  // Adds a turn's sum to a score; the first turn begins it.
  __device__ void add(float* score, float sum) const {
    const bool adds = row() > 0 || (!apart() && head() > 0);
    *score = (adds ? *score : 0.0f) + sum * head_share(a);
  }

  // whole: of the chunk's rows, of which there are `count`.
  template <int kTiles, int kRowTiles, bool kAll>
  static __device__ void add_tiles(KeyScorer& scorer, int buffer, int row_tile, const RowSum* whole,
                                   int count, Logits<kTiles, kRowTiles, kAll>& e) {
    typename KeyScorer::template OfRows<kRowTiles> most, weight, sum;
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = (row_tile + j) * kRowTile + static_cast<int>(lane() % 4 * 2) + i;
        const RowSum of_row = whole[min(row, count - 1)];
        most[j][i] = of_row.most;
        weight[j][i] = row < count ? of_row.sum : 0.0f;
      }
    scorer.logits(scorer.keys_at(0), scorer.queries_at(buffer, row_tile), e);
    scorer.exponentials(e, most, sum);
    scorer.add(e, weight);
  }
};

}  // namespace cuda
}  // namespace sma
