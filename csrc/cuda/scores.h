// Attention logits of a block of keys, on the tensor cores.
//
// A block keeps its keys of one head in shared memory, in tiles of 8 keys that its warps take in
// turns, and every selected query passes by, 16 rows at a time. So a key is read from memory once.
// Each lane reads 16 bytes of a row at a time, the same that it sent for, as the mma instructions
// want them but for the order of the features, which is another one for queries and keys alike.
#pragma once
#include "../args.h"
#include "device.h"

namespace sma {
namespace cuda {

constexpr int kRowTile = 16;      // rows of an mma
constexpr int kMostRowTiles = 4;  // of a chunk of rows
constexpr int kTiles = 8;         // of 8 keys that a warp takes, at most
constexpr int kStepBytes = 64;    // of a row of features: 16 bytes for each of 4 lanes
// GPUs from 12.0 on have half the shared memory: fewer warps, each of which has more registers.
constexpr unsigned score_warps(int major) { return major >= 12 ? 8 : 16; }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr unsigned kScoreThreads = score_warps(12) * kWarp, kTurnBlocks = 1;
#else
constexpr unsigned kScoreThreads = score_warps(0) * kWarp, kTurnBlocks = 2;
#endif
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2e = 1.44269504088896340736f;

// Of a row's exponentials: the largest logit, and the sum of exp2 of what all lie below it.
struct RowSum {
  float most, sum;
};

// -inf less -inf would be NaN.
__device__ inline float base_of(float most) { return most > -kInfinity ? most : 0.0f; }

// What a sum against its largest logit is against another one.
__device__ inline float rescaled(RowSum x, float most, float factor) {
  return x.sum == 0.0f ? 0.0f : x.sum * exp2_fast((x.most - base_of(most)) * factor);
}
__device__ inline RowSum join(RowSum x, RowSum y, float factor) {
  const float most = fmaxf(x.most, y.most);
  return {most, rescaled(x, most, factor) + rescaled(y, most, factor)};
}

// Which rows of queries a head has: positions in the query, in order.
struct RowList {
  const int* rows;
  int count;
};

// How a block's shared memory is used.
struct ScoreMemory {
  int steps;      // of kStepBytes in a row of features
  int tiles;      // of 8 keys that a warp takes
  int row_tiles;  // of queries that are there together: a chunk
  int buffers;    // of keys: 2 where those of the next head come while this one's are used

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

// What `warps` warps can do with `room` bytes; tiles is 0 where not even one fits.
inline ScoreMemory score_memory(const AttentionScoresArgs& a, unsigned warps, int buffers,
                                int64_t room) {
  const int64_t row_bytes = a.width * (a.dtype == kFloat32 ? 4 : 2);
  const int64_t steps = row_bytes == 0 ? 1 : (row_bytes + kStepBytes - 1) / kStepBytes;
  ScoreMemory m = {static_cast<int>(steps), kTiles, 1, buffers};
  while (m.row_tiles < kMostRowTiles && m.row_tiles * 2 * steps <= 16) m.row_tiles *= 2;
  while (m.tiles > 0 && static_cast<int64_t>(m.bytes(warps)) > room) --m.tiles;
  return m;
}

template <bool kWide>  // float32, else 16 bits
class Scorer {
 public:
  using Logits = float[kTiles][4];

  __device__ Scorer(const AttentionScoresArgs& args, const ScoreMemory& memory, int64_t sample,
                    char* shared)
      : factor(fabsf(args.scale) * kLog2e),
        a(args),
        m(memory),
        b(sample),
        sign(args.scale < 0 ? -1.0f : 1.0f),
        queries(reinterpret_cast<uint4*>(shared)),
        keys(queries + 2 * memory.chunk_words() + threadIdx.x) {
    clear_columns();
  }

  const float factor;  // makes exp2 of a logit its exponential, scaled

  __device__ void clear_columns() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) column[i][0] = column[i][1] = 0.0f;
  }

  static __device__ unsigned lane() { return threadIdx.x % kWarp; }
  static __device__ unsigned warp() { return threadIdx.x / kWarp; }
  static __device__ unsigned warps() { return blockDim.x / kWarp; }

  // Says which keys of the sample are the block's: before any of them are staged.
  __device__ void look_at(int64_t first, int64_t last) {
    begin = static_cast<int>(first);
    end = static_cast<int>(last);
    valid = live = 0;
    const uint8_t* padding = a.padding == nullptr ? nullptr : a.padding + b * a.tokens;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int n = column_of(i, j);
        if (i < m.tiles && n < end && (padding == nullptr || !padding[n]))
          valid |= 1u << (2 * i + j);
      }
      if (__ballot_sync(kAllLanes, valid >> (2 * i) & 3)) live |= 1u << i;
    }
  }

  // Sends for the keys of a head.
  __device__ void stage_keys(int buffer, int64_t head) {
    const int64_t key_head = head / (a.heads / a.kv_heads);
    const char* rows = bytes_at(a.key, b * a.key_strides[0] + key_head * a.key_strides[1]);
    for (int i = 0; i < m.tiles; ++i) {
      if (!(live >> i & 1)) continue;
      const int n = begin + static_cast<int>((i * warps() + warp()) * 8 + lane() / 4);
      for (int step = 0; step < m.steps; ++step)
        stage(key_at(buffer, i, step), rows + n * a.key_strides[2] * kSize, a.key_strides[3],
              step * kStepBytes + static_cast<int>(lane() % 4) * 16, n < end);
    }
  }

  // Sends for the chunk of queries from `first` on of the list; rows behind its end are zeros.
  __device__ void stage_queries(int buffer, int64_t head, const RowList& list, int first) {
    const int64_t sample = a.query_strides[0] == 0 ? 0 : b;
    const char* rows = bytes_at(a.query, sample * a.query_strides[0] + head * a.query_strides[1]);
    const int left = (list.count - first + kRowTile - 1) / kRowTile * kRowTile;
    const int parts = m.steps * 4;  // of 16 bytes
#pragma unroll 1
    for (int i = threadIdx.x; i < min(m.chunk_rows(), left) * parts; i += blockDim.x) {
      const int row = i / parts, part = i % parts;
      const bool read = first + row < list.count;
      const int64_t from = read ? list.rows[first + row] : 0;
      const int half = (row / kRowTile * m.steps + part / 4) * 2 + row % kRowTile / 8;
      stage(&queries[buffer * m.chunk_words() + half * kWarp + row % 8 * 4 + part % 4],
            rows + from * a.query_strides[2] * kSize, a.query_strides[3], part * 16, read);
    }
  }

  // logit[i][0..1]: of row lane / 4 of the row tile and two columns of tile i; logit[i][2..3]: of
  // the row 8 below. -inf where the key does not count.
  __device__ void logits(int keys_buffer, int queries_buffer, int row_tile, Logits& logit) const {
    const uint4* q =
        &queries[queries_buffer * m.chunk_words() + row_tile * m.steps * 2 * kWarp + lane()];
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) logit[i][j] = 0.0f;
    for (int step = 0; step < m.steps; ++step) {
      const uint4 up = q[step * 2 * kWarp], low = q[(step * 2 + 1) * kWarp];
      const uint32_t even[4] = {up.x, low.x, up.y, low.y}, odd[4] = {up.z, low.z, up.w, low.w};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (!(live >> i & 1)) continue;
        const uint4 key = *key_at(keys_buffer, i, step);
        multiply(even, key.x, key.y, logit[i]);
        multiply(odd, key.z, key.w, logit[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) logit[i][j] = counts(i, j % 2) ? logit[i][j] * sign : -kInfinity;
  }

  // The largest logit of a half of the rows, of this warp's keys.
  __device__ float largest(const Logits& logit, int half) const {
    float most = -kInfinity;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      most = fmaxf(most, fmaxf(logit[i][2 * half], logit[i][2 * half + 1]));
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
    return fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
  }

  // Turns the logits of a half of the rows into exponentials against `most`; returns their sum over
  // this lane's columns.
  __device__ float exponentials(Logits& logit, int half, float most) const {
    const float base = base_of(most);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (!(live >> i & 1)) {
        logit[i][2 * half] = logit[i][2 * half + 1] = 0.0f;
        continue;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& x = logit[i][2 * half + j];
        x = counts(i, j) ? exp2_fast((x - base) * factor) : 0.0f;
        sum += x;
      }
    }
    return sum;
  }
  static __device__ float over_columns(float sum) {
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    return sum + __shfl_xor_sync(kAllLanes, sum, 2);
  }

  // Adds the exponentials of a half of the rows, with their row's weight, to the columns.
  __device__ void add(const Logits& e, int half, float weight) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) column[i][j] += e[i][2 * half + j] * weight;
    }
  }

  // Calls body(key of the sample, sum over all rows) for each of the block's keys, and begins anew.
  template <class Body>
  __device__ void take_columns(const Body& body) {
    // in three steps the lanes of a column halve what each of them adds up: tile lane / 4 is left
#pragma unroll
    for (int left = kTiles / 2; left > 0; left /= 2) {
      const bool upper = lane() / 4 & left;
#pragma unroll
      for (int i = 0; i < left; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float give = upper ? column[i][j] : column[i + left][j];
          const float keep = upper ? column[i + left][j] : column[i][j];
          column[i][j] = keep + __shfl_xor_sync(kAllLanes, give, left * 4);
        }
    }
    const int tile = lane() / 4;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (tile < m.tiles && column_of(tile, j) < end)
        body(column_of(tile, j), counts(tile, j) ? column[0][j] : 0.0f);
    clear_columns();
  }

 private:
  static constexpr int kSize = kWide ? 4 : 2;  // bytes of an element

  const AttentionScoresArgs& a;
  const ScoreMemory& m;
  const int64_t b;
  const float sign;  // of the scale, put into the logits: the largest stays the largest
  uint4* const queries;
  uint4* const keys;        // this thread's places, blockDim.x apart
  float column[kTiles][2];  // sums over this lane's rows
  int begin = 0, end = 0;
  uint32_t valid = 0;  // a bit for each of this lane's columns that counts,
  uint32_t live = 0;   // and for each tile of this warp that has one

  __device__ uint4* key_at(int buffer, int tile, int step) const {
    return keys + buffer * m.key_words(warps()) + (tile * m.steps + step) * blockDim.x;
  }
  __device__ int column_of(int tile, int j) const {
    return begin + static_cast<int>((tile * warps() + warp()) * 8 + lane() % 4 * 2) + j;
  }
  __device__ bool counts(int tile, int j) const { return valid >> (2 * tile + j) & 1; }
  static __device__ const char* bytes_at(const void* base, int64_t elements) {
    return static_cast<const char*>(base) + elements * kSize;
  }

  // 16 bytes of a row to shared memory, zeros behind its end.
  __device__ void stage(uint4* to, const char* row, int64_t stride, int offset, bool read) const {
    const int bytes = read ? static_cast<int>(a.width) * kSize - offset : 0;
    if (bytes <= 0) {
      *to = uint4{};
    } else if (bytes >= 16 && stride == 1 && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
      copy_async_16(to, row + offset, 16);
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

  __device__ void multiply(const uint32_t (&q)[4], uint32_t k0, uint32_t k1,
                           float (&logit)[4]) const {
    if constexpr (kWide) {
      uint32_t high[4], rest[4], high0, rest0, high1, rest1;
#pragma unroll
      for (int j = 0; j < 4; ++j) split(q[j], &high[j], &rest[j]);
      split(k0, &high0, &rest0);
      split(k1, &high1, &rest1);
      mma_tf32(logit, high, rest0, rest1);
      mma_tf32(logit, rest, high0, high1);
      mma_tf32(logit, high, high0, high1);
    } else if (a.dtype == kBFloat16) {
      mma_bf16(logit, q, k0, k1);
    } else {
      mma_fp16(logit, q, k0, k1);
    }
  }

  // A float32 as the sum of two numbers of the tensor cores.
  static __device__ void split(uint32_t bits, uint32_t* high, uint32_t* rest) {
    const float x = __uint_as_float(bits);
    *high = to_tf32(x);
    *rest = fabsf(x) < kInfinity ? to_tf32(x - __uint_as_float(*high)) : 0;
  }
};

// Lists the queries of a head among the candidates [first, last) in `rows`. All threads of a block
// call it; `counts` has a place for each warp.
__device__ inline RowList list_rows(const AttentionScoresArgs& a, int64_t b, int64_t head,
                                    int64_t first, int64_t last, int* rows, int* counts) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int total = 0;
  for (int64_t from = first; from < last; from += blockDim.x) {
    const int64_t r = from + threadIdx.x;
    int64_t query = -1;
    if (r < last) {
      query = a.query_index == nullptr ? r : a.query_index[b * a.selected + r];
      if (query >= a.queries) query = -1;
      if (a.head_index != nullptr && a.head_index[b * a.selected + r] != head) query = -1;
    }
    const unsigned takes = __ballot_sync(kAllLanes, query >= 0);
    if (lane == 0) counts[warp] = __popc(takes);
    __syncthreads();
    int before = total;
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w) {
      if (w < warp) before += counts[w];
      total += counts[w];
    }
    if (query >= 0) rows[before + __popc(takes & ((1u << lane) - 1))] = static_cast<int>(query);
    __syncthreads();  // the counts are read, the rows written
  }
  return {rows, total};
}

}  // namespace cuda
}  // namespace sma
