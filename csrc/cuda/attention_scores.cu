// attention_scores on a GPU, where the keys of a sample are too many for one launch (else
// self_guided_masking.cu): the sums of every row of attention, from parts of the keys; these parts
// put together; and with them the sums of every column. Rows whose sums are more than the scratch
// memory holds are taken in turns.
#include <algorithm>

#include "kernels.h"
#include "scores.h"

namespace sma {
namespace cuda {
namespace {

constexpr int64_t kMostSplits = 32;  // parts of the keys
constexpr int64_t kMostRows = 4096;  // of a head, in one turn
constexpr unsigned kTurnWarps = 8;   // of a block, at most

// What one turn looks at.
struct Turn {
  int64_t sample, samples, head, heads, row, rows;  // the first, and how many
  int64_t splits, split_keys;                       // parts of the keys, and keys of each
  ScoreMemory memory;
  RowSum* parts;  // [sample][head][split][row]
  RowSum* whole;  // [sample][head][row]: sum is one over it
};

struct TurnShared {
  RowSum sums[kMostRowTiles * kRowTile][kTurnWarps];
  int counts[kTurnWarps];
};

template <int kType>
__global__ void __launch_bounds__(kTurnWarps* kWarp,
                                  score_blocks(kType, kFewTiles, kScoreMajor, kTurnWarps))
    row_sums_kernel(const __grid_constant__ AttentionScoresArgs a,
                    const __grid_constant__ Turn turn) {
  using Score = Scorer<kType, kFewTiles>;
  char* const memory = shared_memory();
  auto& shared = *reinterpret_cast<TurnShared*>(memory + turn.memory.bytes(warps()));
  int* const rows = reinterpret_cast<int*>(&shared + 1);
  const int64_t split = blockIdx.x % turn.splits, at = blockIdx.x / turn.splits;
  const int64_t head = turn.head + at % turn.heads, b = turn.sample + at / turn.heads;
  const RowList list = list_rows(a, b, head, turn.row, turn.row + turn.rows, rows, shared.counts);
  Score scorer(a, turn.memory, b, memory);
  const int64_t first_key = split * turn.split_keys;
  const int64_t last_key = min(a.tokens, first_key + turn.split_keys);
  const int64_t keys = turn.memory.keys(warps());
  for (int first = 0; first < list.count; first += turn.memory.chunk_rows()) {
    const int count = min(turn.memory.chunk_rows(), list.count - first);
    // a warp keeps its own sums of the chunk's rows
    for (unsigned i = lane(); i < turn.memory.chunk_rows(); i += kWarp)
      shared.sums[i][warp()] = {-kInfinity, 0.0f};
    scorer.stage_queries(0, head, list, first);
    for (int64_t key = first_key; key < last_key; key += keys) {
      if (first == 0 || last_key - first_key > keys) {  // else they are there
        scorer.look_at(key, last_key);
        scorer.stage_keys(0, static_cast<int>(head) / turn.memory.sharing);
      }
      copy_async_commit();
      copy_async_wait<0>();
      __syncthreads();
      for (int tile = 0; tile * kRowTile < count; ++tile) {
        typename Score::Logits e;
        scorer.logits(0, 0, tile, e);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          RowSum& own = shared.sums[tile * kRowTile + half * 8 + lane() / 4][warp()];
          const RowSum more = scorer.exponentials(e, half);
          if (lane() % 4 == 0) own = join(own, more);
        }
      }
      __syncthreads();
    }
    RowSum* parts = turn.parts + (at * turn.splits + split) * turn.rows + first;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      RowSum sum = shared.sums[i][0];
      for (unsigned w = 1; w < warps(); ++w) sum = join(sum, shared.sums[i][w]);
      parts[i] = sum;
    }
    __syncthreads();
  }
}

// Puts the parts of each row together. Rows that no query takes hold nothing, and are not read.
__global__ void __launch_bounds__(256)
    join_kernel(const __grid_constant__ Turn turn, int64_t total) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const RowSum* parts = turn.parts + i / turn.rows * turn.splits * turn.rows + i % turn.rows;
  RowSum sum = parts[0];
  for (int64_t split = 1; split < turn.splits; ++split) sum = join(sum, parts[split * turn.rows]);
  turn.whole[i] = {sum.most, sum.sum == 0.0f ? 0.0f : 1.0f / sum.sum};
}

template <int kType>
__global__ void __launch_bounds__(kTurnWarps* kWarp,
                                  score_blocks(kType, kFewTiles, kScoreMajor, kTurnWarps))
    column_sums_kernel(const __grid_constant__ AttentionScoresArgs a,
                       const __grid_constant__ Turn turn, int64_t blocks, bool adds) {
  using Score = Scorer<kType, kFewTiles>;
  char* const memory = shared_memory();
  auto& shared = *reinterpret_cast<TurnShared*>(memory + turn.memory.bytes(warps()));
  int* const rows = reinterpret_cast<int*>(&shared + 1);
  const int64_t keys = turn.memory.keys(warps());
  const bool apart = a.reduce == kNone;
  const int64_t first_key = blockIdx.x % blocks * keys, at = blockIdx.x / blocks;
  const int64_t b = turn.sample + (apart ? at / turn.heads : at);
  const int64_t first_head = turn.head + (apart ? at % turn.heads : 0);
  const int64_t last_head = apart ? first_head + 1 : turn.head + turn.heads;
  Score scorer(a, turn.memory, b, memory);
  scorer.look_at(first_key, min(a.tokens, first_key + keys));
  for (int64_t head = first_head; head < last_head; ++head) {
    const RowList list = list_rows(a, b, head, turn.row, turn.row + turn.rows, rows, shared.counts);
    const RowSum* whole =
        turn.whole + ((b - turn.sample) * turn.heads + head - turn.head) * turn.rows;
    if (list.count > 0) scorer.stage_keys(0, static_cast<int>(head) / turn.memory.sharing);
    for (int first = 0, buffer = 0; first < list.count;
         first += turn.memory.chunk_rows(), buffer ^= 1) {
      if (first == 0) scorer.stage_queries(buffer, head, list, first);
      copy_async_commit();
      copy_async_wait<0>();
      __syncthreads();
      if (first + turn.memory.chunk_rows() < list.count)
        scorer.stage_queries(buffer ^ 1, head, list, first + turn.memory.chunk_rows());
      for (int tile = 0; tile < turn.memory.row_tiles; ++tile) {
        const int left = list.count - first - tile * kRowTile;
        if (left <= 0) break;
        typename Score::Logits e;
        scorer.logits(0, buffer, tile, e);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = half * 8 + static_cast<int>(lane() / 4);
          const RowSum sum = row < left ? whole[first + tile * kRowTile + row] : RowSum{0.0f, 0.0f};
          scorer.exponentials(e, half, sum.most);
          scorer.add(e, half, sum.sum);
        }
      }
    }
    __syncthreads();  // keys and queries are taken
  }
  float factor = 1.0f;
  if (a.reduce == kMean && a.head_index == nullptr) factor /= static_cast<float>(a.heads);
  float* scores = a.scores + (apart ? b * a.heads + first_head : b) * a.tokens;
  scorer.take_columns(
      [&](int n, float sum) { scores[n] = (adds ? scores[n] : 0.0f) + sum * factor; });
}

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

template <int kType>
int in_turns(const AttentionScoresArgs& a, const Place& place) {
  Turn turn = {};
  const int64_t most_rows = std::min(std::max<int64_t>(a.selected, 1), kMostRows);
  const int64_t extra = sizeof(TurnShared) + most_rows * sizeof(int);
  const int64_t room_of_block = limits_of(place.device).shared_bytes;
  unsigned warps = kTurnWarps * 2;
  do {  // fewer where rows are so long that not a tile of keys fits for each
    warps /= 2;
    turn.memory = score_memory(a, warps, kFewTiles, a.tokens, 1, room_of_block - extra);
  } while (turn.memory.tiles == 0 && warps > 1);
  if (turn.memory.tiles == 0) return kRowsTooLong;
  const int64_t keys = turn.memory.keys(warps);
  const int64_t blocks = parts(a.tokens, keys);
  turn.split_keys = parts(blocks, kMostSplits) * keys;
  turn.splits = parts(a.tokens, turn.split_keys);
  const int64_t room = a.scratch_bytes / static_cast<int64_t>((turn.splits + 1) * sizeof(RowSum));
  const int64_t rows = std::min(most_rows, room);
  const int64_t heads = std::min(a.heads, room / rows);
  const int64_t samples = heads == a.heads ? std::min(a.batch, room / rows / heads) : 1;
  const unsigned threads = warps * kWarp;
  const size_t bytes = turn.memory.bytes(warps) + extra;
  int error = 0;
  for (turn.sample = 0; turn.sample < a.batch && error == 0; turn.sample += samples)
    for (turn.head = 0; turn.head < a.heads && error == 0; turn.head += heads)
      for (turn.row = 0; turn.row == 0 || (turn.row < a.selected && error == 0); turn.row += rows) {
        turn.samples = std::min(samples, a.batch - turn.sample);
        turn.heads = std::min(heads, a.heads - turn.head);
        turn.rows = std::min(rows, a.selected - turn.row);
        const int64_t total = turn.samples * turn.heads * turn.rows;
        turn.whole = static_cast<RowSum*>(a.scratch);
        turn.parts = turn.whole + total;
        const int64_t outputs = turn.samples * (a.reduce == kNone ? turn.heads : 1);
        const bool adds = turn.row > 0 || (a.reduce != kNone && turn.head > 0);
        if (total > 0)
          error = launch(row_sums_kernel<kType>,
                         {dim3(static_cast<unsigned>(turn.samples * turn.heads * turn.splits)),
                          threads, bytes},
                         place, a, turn);
        if (error == 0 && total > 0)
          error = launch(join_kernel, {dim3(static_cast<unsigned>(parts(total, 256))), 256}, place,
                         turn, total);
        if (error == 0)
          error = launch(column_sums_kernel<kType>,
                         {dim3(static_cast<unsigned>(outputs * blocks)), threads, bytes}, place, a,
                         turn, blocks, adds);
      }
  return error;
}

}  // namespace

int attention_scores(const AttentionScoresArgs& a, const Place& place) {
  if (a.batch == 0 || a.tokens == 0) return 0;
  const int error = attention_scores_at_once(a, place);
  if (error != kNotAtOnce) return error;
  const OnDevice on(place);
  if (on.error() != cudaSuccess) return on.error();
  return a.dtype == kFloat32    ? in_turns<kFloat32>(a, place)
         : a.dtype == kBFloat16 ? in_turns<kBFloat16>(a, place)
                                : in_turns<kFloat16>(a, place);
}

}  // namespace cuda
}  // namespace sma
