// How keys and queries lie in a block's shared memory while their logits are computed.
#pragma once
#include "../args.h"
#include "device.h"

namespace sma {
namespace cuda {

constexpr int kRowTile = 16;          // rows of an mma
constexpr int kMostRowTiles = 4;      // of a chunk of rows
constexpr int kTileGroup = 4;         // tiles of 8 keys, one behind the other, skipped together
constexpr int kStepBytes = 64;        // of a row of features: 16 bytes for each of 4 lanes
constexpr unsigned kScoreWarps = 16;  // of a block, at most
constexpr unsigned kWideWarps = 8;    // the same where a warp takes more registers
constexpr int kFewTiles = 8;          // of a warp,
constexpr int kManyTiles = 16;        // and where the warps are fewer
constexpr int64_t kReservedShared = 1 << 10;  // bytes of each block's that CUDA takes
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLeastFactor = 1.17549435e-38f;  // not 0, which times -inf would be NaN

// Warps that a multiprocessor has registers for. Code for GPUs from 10.0 on needs more of them.
constexpr unsigned score_warps(int type, int tiles, int major) {
  return type != kFloat32 && tiles == kFewTiles && major < 10 ? kScoreWarps : kWideWarps;
}
// Blocks that share a multiprocessor's registers.
constexpr unsigned score_blocks(int type, int tiles, int major, unsigned warps) {
  return warps > kWideWarps ? 1 : score_warps(type, tiles, major) / kWideWarps;
}
#ifdef __CUDA_ARCH__
constexpr int kScoreMajor = __CUDA_ARCH__ / 100;
#else
constexpr int kScoreMajor = 0;
#endif

// How a block's shared memory is used.
struct ScoreMemory {
  int steps;      // of kStepBytes in a row of features
  int tiles;      // of 8 keys that a warp takes: a multiple of kTileGroup
  int row_tiles;  // of queries that are there together: a chunk
  int buffers;    // of keys: 2 where those of the next head come while this one's are used
  int sharing;    // heads that have the same keys

  __host__ __device__ int keys(unsigned warps) const { return tiles * 8 * static_cast<int>(warps); }
  __host__ __device__ int chunk_rows() const { return row_tiles * kRowTile; }
  __host__ __device__ int chunk_words() const { return row_tiles * steps * 2 * kWarp; }
  __host__ __device__ int key_words(unsigned warps) const {
    return tiles * steps * kWarp * static_cast<int>(warps);
  }
  __host__ __device__ size_t bytes(unsigned warps) const {
    return sizeof(uint4) * (2 * static_cast<size_t>(chunk_words()) +
                            static_cast<size_t>(buffers) * key_words(warps));
  }
};

// What `warps` warps can do with `room` bytes for so many keys; tiles is 0 where none fit.
inline ScoreMemory score_memory(const AttentionScoresArgs& a, unsigned warps, int most_tiles,
                                int64_t keys, int buffers, int64_t room) {
  const int64_t row_bytes = a.width * (a.dtype == kFloat32 ? 4 : 2);
  const int64_t steps = row_bytes == 0 ? 1 : ceil_div<int64_t>(row_bytes, kStepBytes);
  const int sharing = static_cast<int>(a.heads / a.kv_heads);
  ScoreMemory m = {static_cast<int>(steps), kTileGroup, 1, buffers, sharing};
  while (m.tiles < most_tiles && m.keys(warps) < keys) m.tiles += kTileGroup;
  while (m.row_tiles < kMostRowTiles && m.row_tiles * 2 * steps <= 16 &&
         m.chunk_rows() < a.selected)
    m.row_tiles *= 2;
  while (m.tiles > 0 && static_cast<int64_t>(m.bytes(warps)) > room) m.tiles -= kTileGroup;
  return m;
}

}  // namespace cuda
}  // namespace sma
