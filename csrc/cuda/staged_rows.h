// Keys of a head, and queries, brought to shared memory as the tensor cores want them.
//
// A block keeps its keys in tiles of 16, and the selected queries pass by in chunks, in tiles of 8.
// Each warp has keys of its own, as many as it can take, which no other warp reads; where none of
// them counts it only waits.
#pragma once
#include "row_sums.h"
#include "score_memory.h"

namespace sma {
namespace cuda {

// kType: of queries and keys; kTiles: of keys that a warp takes, at most.
template <int kType, int kTiles>
class StagedRows {
 public:
  __device__ StagedRows(const AttentionScoresArgs& args, const ScoreMemory& memory, int sample,
                        char* shared)
      : m(memory),
        a(args),
        b(sample),
        queries(reinterpret_cast<uint4*>(shared)),
        keys(queries + 2 * memory.chunk_words() +
             same_in_warp(warp()) * memory.key_tiles * 2 * memory.steps * kWarp) {}

  // Says which keys of the sample are the block's: before any of them are staged.
  __device__ void take_keys(int64_t first, int64_t last) {
    begin = static_cast<int>(first) +
            static_cast<int>(same_in_warp(warp())) * m.key_tiles * kKeyTile +
            static_cast<int>(lane() / 4);
    end = static_cast<int>(last);
    valid = live = 0;
    const uint8_t* padding = a.padding == nullptr ? nullptr : a.padding + int64_t{b} * a.tokens;
    bool lacks = false;
#pragma unroll 1
    for (int tile = 0; tile < m.key_tiles; ++tile) {
      uint32_t of_tile = 0;
      for (int half = 0; half < 2; ++half) {
        const int n = key_of(tile, half);
        if (n < end && (padding == nullptr || !padding[n])) of_tile |= 1u << half;
      }
      valid |= of_tile << (2 * tile);
      if (__ballot_sync(kAllLanes, of_tile != 0)) {
        live |= 1u << tile;
        lacks |= of_tile != 3;
      }
    }
    complete = __ballot_sync(kAllLanes, lacks) == 0;
  }

  // Whether any of this warp's keys counts.
  __device__ bool has_keys() const { return live != 0; }

  // Sends for the keys of a head; those that do not count are zeros.
  __device__ void stage_keys(int buffer, int key_head) {
    if (!has_keys()) return;
    const int64_t row_bytes = a.key_strides[2] * kSize;
    const char* const row = hoisted(
        bytes_at(a.key, b * a.key_strides[0] + key_head * a.key_strides[1]) + begin * row_bytes);
    const unsigned own = lane_again(), part = own % 4;  // of 16 bytes
    uint4* to = &keys[buffer * m.key_words(warps()) + word_of(own / 4, part)];
#pragma unroll 1
    for (int step = 0; step < m.steps; ++step, to += 2 * m.key_tiles * kWarp) {
      const int at = step * kStepBytes + static_cast<int>(part) * 16;
      if (m.keys_in_words) {
        const uint32_t reads = at < static_cast<int>(a.width) * kSize ? valid : 0;
        const char* from = row + at;
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i, from += 8 * row_bytes)
          if (live >> i / 2 & 1) copy_async_16_or_zeros(&to[i * kWarp], from, reads >> i & 1);
      } else {
#pragma unroll 1
        for (int i = 0; i < 2 * m.key_tiles; ++i)
          stage(&to[i * kWarp], row + i * 8 * row_bytes, a.key_strides[3], at, valid >> i & 1);
      }
    }
  }

  // Sends for the chunk of queries from `first` on of the list. Rows behind its end repeat its last
  // one: they have weight 0, and take no path that it does not.
  __device__ void stage_queries(int buffer, int64_t head, const RowList& list, int first) {
    const int left = min(m.chunk_rows(), ceil_div(list.count - first, kRowTile) * kRowTile);
    if (static_cast<int>(threadIdx.x / 4) >= left) return;
    const int64_t row_bytes = a.query_strides[2] * kSize;
    const char* rows = bytes_at(a.query, b * a.query_strides[0] + head * a.query_strides[1]);
    const unsigned part = threadIdx.x % 4;  // of 16 bytes
#pragma unroll 1
    for (unsigned row = threadIdx.x / 4; static_cast<int>(row) < left; row += blockDim.x / 4) {
      const char* from =
          rows + list.rows[min(first + static_cast<int>(row), list.count - 1)] * row_bytes;
      uint4* to =
          &queries[buffer * m.chunk_words() + static_cast<int>(row / kRowTile) * m.steps * kWarp +
                   word_of(row % kRowTile, part)];
#pragma unroll 1
      for (int at = static_cast<int>(part) * 16; at < m.steps * kStepBytes;
           at += kStepBytes, to += kWarp) {
        if (m.queries_in_words)
          copy_async_16_or_zeros(to, from + at, at < static_cast<int>(a.width) * kSize);
        else stage(to, from, a.query_strides[3], at, true);
      }
    }
  }

 protected:
  static constexpr bool kWide = kType == kFloat32;

  const ScoreMemory& m;
  int end = 0;            // of the block's keys
  bool complete = false;  // all keys of the tiles that are live count

  // The first words of a row tile's queries, and of this warp's keys.
  __device__ const uint4* queries_of(int buffer, int row_tile) const {
    return &queries[buffer * m.chunk_words() + row_tile * m.steps * kWarp];
  }
  __device__ const uint4* keys_of(int buffer) const { return &keys[buffer * m.key_words(warps())]; }

  // Where 16 bytes of a step are among the words of eight rows: the same ones of all rows, and all
  // of two rows, lie in different banks.
  static __device__ unsigned word_of(unsigned row, unsigned part) {
    return row * 4 + (part ^ (row / 2 % 4));
  }

  // This lane's key of a tile, of its upper or lower half.
  __device__ int key_of(int tile, int half) const { return begin + tile * kKeyTile + half * 8; }
  __device__ bool counts(int tile, int half) const { return valid >> (2 * tile + half) & 1; }

  // Calls body(tile) for each that has a key that counts.
  template <class Body>
  __device__ void for_each_tile(const Body& body) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      if (live >> tile & 1) body(tile);
  }

 private:
  static constexpr int kSize = kWide ? 4 : 2;  // bytes of an element

  const AttentionScoresArgs& a;
  const int b;
  uint4* const queries;
  uint4* const keys;   // this warp's
  int begin = 0;       // this lane's first key
  uint32_t valid = 0;  // a bit for each of this lane's keys that counts,
  uint32_t live = 0;   // and for each tile of which a key counts

  static __device__ const char* bytes_at(const void* base, int64_t elements) {
    return static_cast<const char*>(base) + elements * kSize;
  }

  // 16 bytes of a row to shared memory, zeros behind its end.
  __device__ void stage(uint4* to, const char* row, int64_t stride, int offset, bool read) const {
    const int bytes = read ? static_cast<int>(a.width) * kSize - offset : 0;
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
