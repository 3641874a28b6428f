// How keys and queries lie in a block's shared memory while their logits are computed.
#pragma once
#include <algorithm>
#include <cmath>

#include "../args.h"
#include "device.h"

namespace sma {
namespace cuda {

constexpr int kRowTile = 8;           // queries of an mma
constexpr int kKeyTile = 16;          // and its keys
constexpr int kStepBytes = 64;        // of a row of features, which 4 lanes send for
constexpr unsigned kScoreWarps = 16;  // of a block, at most
constexpr unsigned kWideWarps = 8;    // the same where a warp takes more registers
constexpr int kFewTiles = 4;          // of keys, of a warp,
constexpr int kManyTiles = 8;         // and where the warps are fewer
constexpr int kMostRowTiles = 6;      // of queries: a chunk
constexpr int kMostPassTiles = 3;     // of these, whose logits a warp has registers for: a pass
constexpr int kMostChunkSteps = 24;   // of all its row tiles
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLeastFactor = 1e-45f;  // not 0, which times -inf would be NaN

constexpr int pass_tiles(int type, int key_tiles) {
  return type == kFloat32 && key_tiles > kFewTiles ? 2 : kMostPassTiles;
}
// Warps that a multiprocessor has registers for. Code for GPUs from 10.0 on needs more of them.
constexpr unsigned score_warps(int type, int key_tiles, int major) {
  return type != kFloat32 && key_tiles == kFewTiles && major < 10 ? kScoreWarps : kWideWarps;
}
// Blocks that share a multiprocessor's registers.
constexpr unsigned score_blocks(int type, int key_tiles, int major, unsigned warps) {
  return warps > kWideWarps ? 1 : score_warps(type, key_tiles, major) / kWideWarps;
}
#ifdef __CUDA_ARCH__
constexpr int kScoreMajor = __CUDA_ARCH__ / 100;
#else
constexpr int kScoreMajor = 0;  // any: the emulator's
#endif
// Whether this code takes so many tiles at all: where it has all warps, it needs few.
template <int kType, int kTiles>
constexpr bool kIsTaken = kScoreMajor == 0 || kTiles == kFewTiles ||
                          score_warps(kType, kFewTiles, kScoreMajor) < kScoreWarps;

// How a block's shared memory is used.
struct ScoreMemory {
  int steps;      // of kStepBytes in a row of features
  int key_tiles;  // that a warp takes
  int row_tiles;  // of queries that are there together: a chunk
  int buffers;    // of keys: 2 where those of the next head come while this one's are used
  int sharing;    // heads that have the same keys
  bool queries_in_words, keys_in_words;  // all rows can be read 16 bytes at a time
  float sign, factor;  // of the scale; factor makes exp2 of a logit its exponential

  __host__ __device__ int keys(unsigned warps) const {
    return key_tiles * kKeyTile * static_cast<int>(warps);
  }
  __host__ __device__ int chunk_rows() const { return row_tiles * kRowTile; }
  __host__ __device__ int chunk_words() const { return row_tiles * steps * kWarp; }
  __host__ __device__ int key_words(unsigned warps) const {
    return key_tiles * 2 * steps * kWarp * static_cast<int>(warps);
  }
  __host__ __device__ size_t bytes(unsigned warps) const {
    return sizeof(uint4) * (2 * static_cast<size_t>(chunk_words()) +
                            static_cast<size_t>(buffers) * key_words(warps));
  }
};

// Whether all rows of a tensor (B, H, ., width) can be read 16 bytes at a time.
inline bool in_words(const void* first, const int64_t (&strides)[4], int64_t width, int64_t size) {
  const int64_t bits = (strides[0] | strides[1] | strides[2] | width) * size;
  return strides[3] == 1 && ((reinterpret_cast<uintptr_t>(first) | bits) & 15) == 0;
}

// What `warps` warps can do with `room` bytes for so many keys; key_tiles is 0 where none fit.
inline ScoreMemory score_memory(const AttentionScoresArgs& a, unsigned warps, int most_key_tiles,
                                int most_row_tiles, int64_t keys, int buffers, int64_t room) {
  const int64_t size = a.dtype == kFloat32 ? 4 : 2;
  const int64_t steps = std::max<int64_t>(ceil_div<int64_t>(a.width * size, kStepBytes), 1);
  ScoreMemory m = {};
  m.steps = static_cast<int>(steps);
  m.key_tiles = m.row_tiles = 1;
  m.buffers = buffers;
  m.sharing = static_cast<int>(a.heads / a.kv_heads);
  m.queries_in_words = in_words(a.query, a.query_strides, a.width, size);
  m.keys_in_words = in_words(a.key, a.key_strides, a.width, size);
  m.sign = std::copysign(1.0f, a.scale);
  m.factor = m.sign * std::max(std::fabs(a.scale) * kLog2e, kLeastFactor);
  while (m.key_tiles < most_key_tiles && m.keys(warps) < keys) ++m.key_tiles;
  while (m.row_tiles < most_row_tiles && (m.row_tiles + 1) * steps <= kMostChunkSteps &&
         m.chunk_rows() < a.selected)
    ++m.row_tiles;
  while (m.key_tiles > 0 && static_cast<int64_t>(m.bytes(warps)) > room) --m.key_tiles;
  return m;
}

}  // namespace cuda
}  // namespace sma
