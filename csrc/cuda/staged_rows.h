// Keys of a head, and queries, brought to shared memory as the tensor cores want them.
//
// A block keeps its keys in tiles of 16, and the selected queries pass by in chunks, in tiles of 8.
// Each warp has tiles of its own, which no other warp reads: every so many-th of the block's, so
// that all have about as many wherever the keys of a sample end. What lies behind the last tile of
// which a key counts is left out; warps that have nothing else wait for the others, or, where a
// whole cluster of blocks waits, take one tile of which nothing counts.
#pragma once
#include "row_sums.h"
#include "score_memory.h"

namespace sma {
namespace cuda {

// kType: of queries and keys; kTiles: of keys that a warp takes, at most.
template <int kType, int kTiles>
class StagedRows {
 public:
  __device__ StagedRows(const AttentionScoresArgs& args, const ScoreMemory& memory, int sample)
      : m(memory), a(args) {
    __syncwarp();  // the one before it may still be read
    if (lane_again() == 0) range().sample = sample;
    __syncwarp();
  }

  // Says which keys of the sample are the block's: before any of them are staged.
  __device__ void take_keys(int64_t first, int64_t last) {
    __syncwarp();
    if (lane_again() == 0) {
      range().begin = static_cast<int>(first) + static_cast<int>(warp()) * kKeyTile;
      range().end = static_cast<int>(last);
      range().keys =
          static_cast<const char*>(a.key) + sample() * m.sample_bytes + range().begin * m.row_bytes;
    }
    __syncwarp();
    // a lane finds out about four keys of a tile: what it reads is on its way at once
    static_assert(kTiles * kQuad <= kWarp, "all keys have a lane");
    const unsigned of_warp = lane_again();
    const auto own_tile = static_cast<int>(of_warp / kQuad);
    const int own = key_of(own_tile, of_warp % kQuad * 4), left = range().end - own;
    uint32_t four = 0;
    if (own_tile < m.key_tiles && left > 0) {
      four = left < 4 ? (1u << left) - 1 : 0xF;
      if (a.padding != nullptr)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (a.padding[sample() * a.tokens + min(own + i, range().end - 1)]) four &= ~(1u << i);
    }
    uint32_t valid = 0;
#pragma unroll 1
    for (int i = 0; i < 2 * m.key_tiles; ++i) {  // eight keys, that have two lanes
      const uint32_t of_key = __shfl_sync(kAllLanes, four, i * 2 + static_cast<int>(of_warp / 16));
      valid |= (of_key >> of_warp / kQuad % 4 & 1) << i;
    }
    const int bits = 32 - __clz(static_cast<int>(__reduce_or_sync(kAllLanes, valid)));
    const int tiles = (bits + 1) / 2;
    const bool complete = __all_sync(kAllLanes, valid == (1u << (2 * tiles)) - 1);
    range().valid[of_warp] = valid;
    if (of_warp == 0) {
      range().tiles = tiles;
      range().complete = complete && tiles > 0;
    }
    __syncwarp();
  }

  __device__ int64_t sample() const { return range().sample; }
  // Whether any of this warp's keys counts.
  __device__ bool has_keys() const { return range().tiles > 0; }
  // Its tiles up to the last of which a key counts: one where none does.
  __device__ int tiles() const { return max(range().tiles, 1); }

  // Sends for the keys of a head. Those that do not count are anything: their logits are not used.
  __device__ void stage_keys(int buffer, int key_head) {
    const int count = range().tiles;
    if (count == 0) return;
    const unsigned own = lane_again(), part = own % kQuad;  // of 16 bytes
    const uint32_t valid = range().valid[own];
    const int64_t tile_bytes = static_cast<int>(warps()) * kKeyTile * m.row_bytes;
    const char* const row = hoisted(range().keys + key_head * m.head_bytes +
                                    static_cast<int>(own / kQuad) * m.row_bytes);
    uint4* to = &words()[keys_at(buffer) + word_of(own / kQuad, part)];
#pragma unroll 1
    for (int step = 0; step < m.steps; ++step, to += 2 * m.key_tiles * kWarp) {
      const int at = step * kStepBytes + static_cast<int>(part) * 16;
      if (again(m.keys_in_words)) {
        const bool reads = at < static_cast<int>(a.width) * kSize;
        const char *up = row + at, *low = up + kKeyTile / 2 * m.row_bytes;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile, up += tile_bytes, low += tile_bytes) {
          uint4* const to_tile = &to[2 * tile * kWarp];
          if (valid >> 2 * tile & 1) copy_async_16_or_zeros(to_tile, up, reads);
          if (valid >> 2 * tile & 2) copy_async_16_or_zeros(to_tile + kWarp, low, reads);
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < 2 * count; ++i)
          if (valid >> i & 1)
            stage(&to[i * kWarp], row + i / 2 * tile_bytes + i % 2 * (kKeyTile / 2) * m.row_bytes,
                  a.key_strides[3], at);
      }
    }
  }

  // Sends for the chunk of queries from `first` on of the list. Rows behind its end repeat its last
  // one: they have weight 0, and take no path that it does not.
  __device__ void stage_queries(int buffer, int64_t head, const RowList& list, int first) {
    const int left = min(m.chunk_rows(), ceil_div(list.count - first, kRowTile) * kRowTile);
    if (static_cast<int>(threadIdx.x / kQuad) >= left) return;
    const int64_t row_bytes = a.query_strides[2] * kSize;
    const char* rows = bytes_at(a.query, sample() * a.query_strides[0] + head * a.query_strides[1]);
    const unsigned part = threadIdx.x % kQuad;  // of 16 bytes
#pragma unroll 1
    for (unsigned row = threadIdx.x / kQuad; static_cast<int>(row) < left;
         row += blockDim.x / kQuad) {
      const char* from =
          rows + list.rows[min(first + static_cast<int>(row), list.count - 1)] * row_bytes;
      uint4* to = &words()[queries_at(buffer, static_cast<int>(row / kRowTile)) +
                           word_of(row % kRowTile, part)];
#pragma unroll 1
      for (int at = static_cast<int>(part) * 16; at < m.steps * kStepBytes;
           at += kStepBytes, to += kWarp) {
        if (again(m.queries_in_words))
          copy_async_16_or_zeros(to, from + at, at < static_cast<int>(a.width) * kSize);
        else stage(to, from, a.query_strides[3], at);
      }
    }
  }

  // Where the words of a chunk's queries begin, from a row tile on, and those of this warp's keys.
  __device__ int queries_at(int buffer, int row_tile = 0) const {
    return buffer * m.chunk_words + row_tile * m.tile_words;
  }
  __device__ int keys_at(int buffer) const {
    const auto own = static_cast<int>(warp_again());
    return m.keys_at + (own * m.buffers + buffer) * m.key_words;
  }

 protected:
  static constexpr bool kWide = kType == kFloat32;

  const ScoreMemory& m;

  __device__ KeyRange& range() const {
    return reinterpret_cast<KeyRange*>(shared_memory() + m.ranges_at)[warp_again()];
  }
  // Of queries and keys.
  static __device__ uint4* words() { return reinterpret_cast<uint4*>(shared_memory()); }
  // This warp's [tile][lane], and behind them their totals [tile][key].
  __device__ Column* columns() const {
    return reinterpret_cast<Column*>(shared_memory() + m.columns_at) + warp_again() * m.columns;
  }

  // Where 16 bytes of a step are among the words of eight rows: the same ones of all rows, and all
  // of two rows, lie in different banks.
  static __device__ unsigned word_of(unsigned row, unsigned part) {
    return row * 4 + (part ^ (row / 2 % 4));
  }

  __device__ bool is_padding(int key) const {
    return a.padding != nullptr && a.padding[sample() * a.tokens + key];
  }

  // A key of one of this warp's tiles, among those of the sample.
  __device__ int key_of(int tile, unsigned key) const {
    return range().begin + tile * static_cast<int>(warps()) * kKeyTile + static_cast<int>(key);
  }

 private:
  static constexpr int kSize = kWide ? 4 : 2;  // bytes of an element

  const AttentionScoresArgs& a;

  static __device__ const char* bytes_at(const void* base, int64_t elements) {
    return static_cast<const char*>(base) + elements * kSize;
  }

  // 16 bytes of a row to shared memory, zeros behind its end.
  __device__ void stage(uint4* to, const char* row, int64_t stride, int offset) const {
    const int bytes = static_cast<int>(a.width) * kSize - offset;
    if (bytes <= 0) {
      *to = uint4{};
    } else {
      uint32_t half[8] = {};  // two of them are a float32
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int64_t element = (offset + 2 * i) / kSize;
        if (2 * i < bytes)
          half[i] =
              *reinterpret_cast<const uint16_t*>(row + element * stride * kSize + 2 * i % kSize);
      }
      *to = {half[0] | half[1] << 16, half[2] | half[3] << 16, half[4] | half[5] << 16,
             half[6] | half[7] << 16};
    }
  }
};

}  // namespace cuda
}  // namespace sma
