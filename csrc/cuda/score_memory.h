// How keys and queries lie in a block's shared memory while their logits are computed.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "../args.h"
#include "row_sums.h"

namespace sma {
namespace cuda {

constexpr int kRowTile = 8;          // queries of an mma
constexpr int kKeyTile = 16;         // and its keys
constexpr int kQuad = 4;             // lanes that share a row of one, or of the other
constexpr int kStepBytes = 64;       // of a row of features, which 4 lanes send for
constexpr unsigned kScoreWarps = 8;  // of a block, at most
constexpr int kFewTiles = 4;         // of keys, of a warp,
constexpr int kManyTiles = 8;        // and where a block has more keys
constexpr int kMostRowTiles = 6;     // of queries: a chunk
constexpr int kMostPassTiles = 3;    // of these, whose logits a warp has registers for: a pass
constexpr int kMostChunkSteps = 24;  // of all its row tiles
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLeastFactor = 1e-45f;  // not 0, which times -inf would be NaN

// Row tiles of a pass, of a warp that has so many tiles of keys.
__host__ __device__ constexpr int pass_tiles(int key_tiles) {
  return key_tiles > 5 ? 2 : kMostPassTiles;
}
// Blocks that share a multiprocessor's registers. Code for GPUs from 10.0 on needs more of them.
constexpr unsigned score_blocks(int type, int major) {
  return type != kFloat32 && major < 10 ? kMostTogether : 1;
}
#ifdef __CUDA_ARCH__
constexpr int kScoreMajor = __CUDA_ARCH__ / 100;
#else
constexpr int kScoreMajor = 0;  // any: the emulator's
#endif

// Of a key and the one 8 below: what some lane adds up over its queries.
struct alignas(8) Column {
  float up, low;
};

// Of a lane's keys, of the two rows of a row tile that it has.
struct alignas(16) LaneSums {
  RowSum rows[2];
};

// Which keys of which sample a warp has. In shared memory: the registers are for logits.
struct alignas(16) KeyRange {
  const char* keys;        // its first key of head 0
  int sample, begin, end;  // begin: its first key; end: behind all keys of the block
  int tiles;               // of its own, up to the last of which a key counts
  bool complete;           // all keys of these count
  // Of each lane: a bit for key lane / 4 of each tile, and one for the key 8 below, that counts.
  uint32_t valid[kWarp];
};

// How a block's shared memory is used: two chunks of queries [buffer], keys [warp][buffer],
// columns [warp], a KeyRange [warp] and, where rows are only added up, LaneSums [warp][row
// tile][lane].
struct ScoreMemory {
  int steps;      // of kStepBytes in a row of features
  int key_tiles;  // that a warp takes
  int row_tiles;  // of queries that are there together: a chunk
  int buffers;    // of keys: 2 where those of the next head come while this one's are used
  int sharing;    // heads that have the same keys
  int tile_words, chunk_words, key_words;  // of queries: a row tile and a chunk; of a warp's keys
  int columns;                             // of a warp: of each lane, and of all together
  int keys_at, columns_at, ranges_at, sums_at, bytes;  // keys_at: words, the others bytes
  bool queries_in_words, keys_in_words;                // all rows can be read 16 bytes at a time
  int64_t sample_bytes, head_bytes, row_bytes;         // of keys: from one to the next
  float sign, factor;  // of the scale; factor makes exp2 of a logit its exponential
  float nothing;       // the logit of a key that does not count: scaling makes it -inf

  __host__ __device__ int keys(unsigned warps) const {
    return key_tiles * kKeyTile * static_cast<int>(warps);
  }
  __host__ __device__ int chunk_rows() const { return row_tiles * kRowTile; }
};

// Whether all rows of a tensor (B, H, ., width) can be read 16 bytes at a time.
inline bool in_words(const void* first, const int64_t (&strides)[4], int64_t width, int64_t size) {
  const int64_t bits = (strides[0] | strides[1] | strides[2] | width) * size;
  return strides[3] == 1 && ((reinterpret_cast<uintptr_t>(first) | bits) & 15) == 0;
}

// What `warps` warps can do with `room` bytes for so many keys; key_tiles is 0 where none fit.
inline ScoreMemory score_memory(const AttentionScoresArgs& a, unsigned warps, int most_key_tiles,
                                int most_row_tiles, int64_t keys, int buffers, int64_t room,
                                bool keeps_sums = false) {
  const int64_t size = a.dtype == kFloat32 ? 4 : 2;
  const int64_t steps = std::max<int64_t>(ceil_div<int64_t>(a.width * size, kStepBytes), 1);
  ScoreMemory m = {};
  m.steps = static_cast<int>(steps);
  m.key_tiles = m.row_tiles = 1;
  m.buffers = buffers;
  m.sharing = static_cast<int>(a.heads / a.kv_heads);
  m.queries_in_words = in_words(a.query, a.query_strides, a.width, size);
  m.keys_in_words = in_words(a.key, a.key_strides, a.width, size);
  m.sample_bytes = a.key_strides[0] * size;
  m.head_bytes = a.key_strides[1] * size;
  m.row_bytes = a.key_strides[2] * size;
  m.sign = std::copysign(1.0f, a.scale);
  m.nothing = -m.sign * std::numeric_limits<float>::infinity();
  m.factor = m.sign * std::max(std::fabs(a.scale) * kLog2e, kLeastFactor);
  while (m.key_tiles < most_key_tiles && m.keys(warps) < keys) ++m.key_tiles;
  while (m.row_tiles < most_row_tiles && (m.row_tiles + 1) * steps <= kMostChunkSteps &&
         m.chunk_rows() < a.selected)
    ++m.row_tiles;
  const int64_t tile_words = steps * kWarp, all = warps;
  const int64_t columns = kWarp + kKeyTile / 2;  // of a key tile
  const auto size_of = [](auto part, int64_t count) {
    return static_cast<int64_t>(sizeof part) * count;
  };
  const int64_t tile_bytes =
      size_of(uint4{}, 2 * buffers * tile_words) + size_of(Column{}, columns);
  const int64_t sums_bytes = size_of(LaneSums{}, keeps_sums ? all * m.row_tiles * kWarp : 0);
  const int64_t left =
      room - size_of(uint4{}, 2 * m.row_tiles * tile_words) - size_of(KeyRange{}, all) - sums_bytes;
  m.key_tiles = static_cast<int>(std::clamp<int64_t>(left / (all * tile_bytes), 0, m.key_tiles));
  if (m.key_tiles == 0) return m;
  m.tile_words = static_cast<int>(tile_words);
  m.chunk_words = m.row_tiles * m.tile_words;
  m.key_words = 2 * m.key_tiles * m.tile_words;
  m.columns = m.key_tiles * static_cast<int>(columns);
  m.keys_at = 2 * m.chunk_words;
  m.columns_at = static_cast<int>(size_of(uint4{}, m.keys_at + all * buffers * m.key_words));
  m.ranges_at = m.columns_at + static_cast<int>(size_of(Column{}, all * m.columns));
  m.sums_at = m.ranges_at + static_cast<int>(size_of(KeyRange{}, all));
  m.bytes = m.sums_at + static_cast<int>(sums_bytes);
  return m;
}

}  // namespace cuda
}  // namespace sma
