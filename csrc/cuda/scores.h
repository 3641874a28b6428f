// Attention logits of a block of keys, on the tensor cores.
//
// A block keeps its keys of one head in shared memory, in tiles of 16, and the selected queries
// pass by in chunks, in tiles of 8. Each warp has keys of its own, as many as it can take; where
// none of them counts it only waits. It keeps the logits of all its keys and of some row tiles in
// registers, keys along the rows of an mma: so a lane has a few keys, and most of what is added up
// over the queries, and over the keys, it adds up alone.
#pragma once
#include <type_traits>

#include "row_sums.h"
#include "score_memory.h"

namespace sma {
namespace cuda {

// A row's largest logit, from which its exponents are counted, is a rounded product. Where it is
// large, its rounding alone could leave the range of exp2: from here on other logits are rounded in
// the same way, not fused. Parts of a row that differ in this differ by no more than that rounding.
constexpr float kLargeBase = 1 << 12;
constexpr uint32_t kBelowTf32 = 0x1FFF;  // bits of a float32 that tf32 lacks

// Calls body with a number of row tiles, 1 to kMost, as one that the compiler knows.
template <int kMost, class Body>
__device__ void with_row_tiles(int count, const Body& body) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_row_tiles<kMost - 1>(count, body);
  }
  body(std::integral_constant<int, kMost>());
}

// kType: of queries and keys; kTiles: of keys that a warp takes, at most.
template <int kType, int kTiles>
class Scorer {
 public:
  // Of a key tile and a row tile: [0] and [1] of key lane / 4 and of two queries, lane % 4 * 2 and
  // the next; [2] and [3] of the key 8 below.
  template <int kRows>
  using Logits = float[kTiles][kRows][4];
  // Of those two queries of each row tile.
  template <int kRows>
  using OfRows = float[kRows][2];

  __device__ Scorer(const AttentionScoresArgs& args, const ScoreMemory& memory, int sample,
                    char* shared)
      : a(args),
        m(memory),
        b(sample),
        queries(reinterpret_cast<uint4*>(shared)),
        keys(queries + 2 * memory.chunk_words() +
             same_in_warp(warp()) * memory.key_tiles * 2 * memory.steps * kWarp) {
    clear_columns();
  }

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

  // Sends for the chunk of queries from `first` on of the list; behind its end its last one fills a
  // row tile: what is found for it does not count, but it is nothing new.
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

  // Of kRows row tiles of a chunk. Not yet scaled; of keys that do not count those that turn into
  // -inf. Nothing in tiles that are not live.
  template <int kRows>
  __device__ void logits(int keys_buffer, int queries_buffer, int row_tile,
                         Logits<kRows>& logit) const {
    const uint4* query = &queries[queries_buffer * m.chunk_words() + row_tile * m.steps * kWarp];
    const uint4* key = &keys[keys_buffer * m.key_words(warps())];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int j = 0; j < kRows; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) logit[tile][j][i] = 0.0f;
    int left = m.steps;
#pragma unroll 1
    do {
      if constexpr (kWide) multiply_wide(query, key, logit);
      else multiply_narrow(query, key, logit);
      query += kWarp;
      key += 2 * m.key_tiles * kWarp;
    } while (--left > 0);
    if (complete) return;
    for_each_tile([&](int tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!counts(tile, i / 2))
#pragma unroll
          for (int j = 0; j < kRows; ++j) logit[tile][j][i] = -kInfinity * m.sign;
    });
  }

  // Turns the logits into exponentials against 0, of which a row's sum shows whether they can be
  // used. `sum`: over this lane's keys.
  template <int kRows>
  __device__ void plain_exponentials(Logits<kRows>& logit, OfRows<kRows>& sum) const {
    exponentials_of(logit, sum, [&](int, int, float x) { return x * m.factor; });
  }

  // The largest logit of each row, of this lane's keys, times log2(e).
  template <int kRows>
  __device__ void largest(const Logits<kRows>& logit, OfRows<kRows>& most) const {
    for_each_row(most, [](float& x) { x = -kInfinity; });
    for_each_tile([&](int tile) {
#pragma unroll
      for (int j = 0; j < kRows; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          most[j][i % 2] = fmaxf(most[j][i % 2], logit[tile][j][i] * m.sign);
    });
    for_each_row(most, [&](float& x) { x *= fabsf(m.factor); });
  }

  // Turns the logits into exponentials against `most`; `sum`: over this lane's keys.
  template <int kRows>
  __device__ void exponentials(Logits<kRows>& logit, const OfRows<kRows>& most,
                               OfRows<kRows>& sum) const {
    OfRows<kRows> base;
    bool any_large = false;
#pragma unroll
    for (int j = 0; j < kRows; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        base[j][i] = base_of(most[j][i]);
        any_large |= is_large(base[j][i]);
      }
    if (any_large)
      exponentials_of(logit, sum, [&](int j, int i, float x) {
        return is_large(base[j][i]) ? __fmul_rn(x, m.factor) - base[j][i]
                                    : fmaf(x, m.factor, -base[j][i]);
      });
    else
      exponentials_of(logit, sum,
                      [&](int j, int i, float x) { return fmaf(x, m.factor, -base[j][i]); });
  }

  // Adds the exponentials, with the weight of their row, to the columns; that of a row that is none
  // is 0.
  template <int kRows>
  __device__ void add(const Logits<kRows>& e, const OfRows<kRows>& weight) {
    for_each_tile([&](int tile) {
#pragma unroll
      for (int j = 0; j < kRows; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          column[2 * tile + i / 2] =
              fmaf(e[tile][j][i], weight[j][i % 2], column[2 * tile + i / 2]);
    });
  }

  // Calls body(key of the sample, sum over all rows) for each of the block's keys, and begins anew.
  template <class Body>
  __device__ void take_columns(const Body& body) {
    halve_columns<kTiles, 2>();
#pragma unroll
    for (int i = 0; i < 2 * kEach; ++i) {
      const int tile = static_cast<int>(lane_again() % 4) * kEach + i / 2;
      const int n = key_of(tile, i % 2);
      if (tile < m.key_tiles && n < end) body(n, counts(tile, i % 2) ? column[i] : 0.0f);
    }
    clear_columns();
  }

 private:
  static constexpr bool kWide = kType == kFloat32;
  static constexpr int kSize = kWide ? 4 : 2;  // bytes of an element
  static constexpr int kEach = kTiles / 4;     // tiles whose columns a lane writes

  const AttentionScoresArgs& a;
  const ScoreMemory& m;
  const int b;
  uint4* const queries;
  uint4* const keys;         // this warp's
  float column[2 * kTiles];  // of this lane's keys: sums over its queries
  int begin = 0, end = 0;    // this lane's first key, and the end of the block's
  uint32_t valid = 0;        // a bit for each of this lane's keys that counts,
  uint32_t live = 0;         // and for each tile of which a key counts
  bool complete = false;     // all keys of those tiles count

  // exponent(row tile, i, x): of a logit of the lane's query i of it, to the base 2.
  template <int kRows, class Exponent>
  __device__ void exponentials_of(Logits<kRows>& logit, OfRows<kRows>& sum,
                                  const Exponent& exponent) const {
    for_each_row(sum, [](float& x) { x = 0.0f; });
    for_each_tile([&](int tile) {
#pragma unroll
      for (int j = 0; j < kRows; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float &x = logit[tile][j][i], &low = logit[tile][j][2 + i];
          x = exp2_fast(exponent(j, i, x));
          low = exp2_fast(exponent(j, i, low));
          sum[j][i] += x + low;
        }
    });
  }

  // In two steps the lanes of a key halve what each of them adds up.
  template <int kLeft, int kOther>
  __device__ void halve_columns() {
    const bool upper = lane() & kOther;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const float give = upper ? column[i] : column[i + kLeft];
      const float keep = upper ? column[i + kLeft] : column[i];
      column[i] = keep + __shfl_xor_sync(kAllLanes, give, kOther);
    }
    if constexpr (kOther > 1) halve_columns<kLeft / 2, kOther / 2>();
  }

  // This lane's key of a tile, of its upper or lower half.
  __device__ int key_of(int tile, int half) const { return begin + tile * kKeyTile + half * 8; }
  __device__ bool counts(int tile, int half) const { return valid >> (2 * tile + half) & 1; }
  static __device__ bool is_large(float base) { return fabsf(base) >= kLargeBase; }
  static __device__ const char* bytes_at(const void* base, int64_t elements) {
    return static_cast<const char*>(base) + elements * kSize;
  }

  __device__ void clear_columns() {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) column[i] = 0.0f;
  }

  // Calls body(tile) for each that has a key that counts.
  template <class Body>
  __device__ void for_each_tile(const Body& body) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      if (live >> tile & 1) body(tile);
  }
  template <int kRows, class Body>
  static __device__ void for_each_row(OfRows<kRows>& x, const Body& body) {
#pragma unroll
    for (int j = 0; j < kRows; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) body(x[j][i]);
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

  // Where 16 bytes of a step are among the words of eight rows: the same ones of all rows, and all
  // of two rows, lie in different banks.
  static __device__ unsigned word_of(unsigned row, unsigned part) {
    return row * 4 + (part ^ (row / 2 % 4));
  }

  // One step of all key tiles and row tiles, of numbers of 16 bits: two mma each, of which none
  // waits for the one before it.
  template <int kRows>
  __device__ void multiply_narrow(const uint4* query, const uint4* key,
                                  Logits<kRows>& logit) const {
    constexpr int kBytes = sizeof(uint4), kSecond = 2 * kBytes;  // parts 2 and 3 of any row
    const unsigned own = lane_again(), matrix = own / 8, row = own % 8;
    const int of_tile = m.steps * kWarp;
    const SharedAddress q = address_of(query + word_of(row, matrix % 2) + matrix / 2 * of_tile);
    const SharedAddress k = address_of(key + word_of(row, matrix / 2) + matrix % 2 * kWarp);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t of_queries[kRows][2], of_keys[4];
#pragma unroll
      for (int j = 0; j < kRows; j += 2) {
        const SharedAddress of_j = flipped(q, half * kSecond) + j * of_tile * kBytes;
        if (j + 1 < kRows) {
          uint32_t two[4];
          load_matrices(of_j, two);
#pragma unroll
          for (int i = 0; i < 4; ++i) of_queries[j + i / 2][i % 2] = two[i];
        } else {
          load_matrices(of_j, of_queries[j]);
        }
      }
      for_each_tile([&](int tile) {
        load_matrices(flipped(k, half * kSecond) + 2 * tile * kWarp * kBytes, of_keys);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          float (&sum)[4] = logit[tile][j];
          if constexpr (kType == kBFloat16)
            mma_bf16(sum, of_keys, of_queries[j][0], of_queries[j][1]);
          else mma_fp16(sum, of_keys, of_queries[j][0], of_queries[j][1]);
        }
      });
    }
  }

  // The same of float32: as the sum of two numbers of the tensor cores, of which the smaller one is
  // multiplied with `finite`: with infinity, 0 would give NaN. Which features lie side by side does
  // not matter, if it is the same for queries and keys: a lane reads 16 bytes of a row.
  template <int kRows>
  __device__ void multiply_wide(const uint4* query, const uint4* key, Logits<kRows>& logit) const {
    const unsigned own = lane_again(), word = word_of(own / 4, own % 4);
    Split<2> q[2][kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const uint4 x = query[j * m.steps * kWarp + word];
      q[0][j].set({x.x, x.y});
      q[1][j].set({x.z, x.w});
    }
    for_each_tile([&](int tile) {
      const uint4 up = key[2 * tile * kWarp + word], low = key[(2 * tile + 1) * kWarp + word];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Split<4> k;
        if (half == 0) k.set({up.x, low.x, up.y, low.y});
        else k.set({up.z, low.z, up.w, low.w});
#pragma unroll
        for (int j = 0; j < kRows; ++j)
          mma_tf32(logit[tile][j], k.finite, q[half][j].rest[0], q[half][j].rest[1]);
#pragma unroll
        for (int j = 0; j < kRows; ++j)
          mma_tf32(logit[tile][j], k.rest, q[half][j].finite[0], q[half][j].finite[1]);
#pragma unroll
        for (int j = 0; j < kRows; ++j)
          mma_tf32(logit[tile][j], k.high, q[half][j].high[0], q[half][j].high[1]);
      }
    });
  }

  template <int kWords>
  struct Split {
    uint32_t high[kWords], finite[kWords], rest[kWords];

    __device__ void set(const uint32_t (&words)[kWords]) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const float x = __uint_as_float(words[i]);
        const bool is_finite = fabsf(x) < kInfinity;
        // the largest are not rounded up, to infinity
        const bool cuts = is_finite && fabsf(__uint_as_float(to_tf32(x))) == kInfinity;
        high[i] = cuts ? words[i] & ~kBelowTf32 : to_tf32(x);
        finite[i] = is_finite ? high[i] : 0;
        const float left = is_finite ? x - __uint_as_float(high[i]) : 0.0f;
        rest[i] = cuts ? __float_as_uint(left) & ~kBelowTf32 : to_tf32(left);
      }
    }
  };
};

}  // namespace cuda
}  // namespace sma
