// Attention logits of a block of keys, on the tensor cores.
//
// A warp keeps the logits of all its keys and of some row tiles in registers, keys along the rows
// of an mma: so a lane has a few keys, and most of what is added up over the queries, and over the
// keys, it adds up alone.
#pragma once
#include <type_traits>

#include "staged_rows.h"

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

// kType: of queries and keys; kTiles: of keys that a warp takes, at most; kPeels: the first step of
// features is apart, which saves zeros to add to but takes registers.
template <int kType, int kTiles, bool kPeels>
class Scorer : public StagedRows<kType, kTiles> {
 public:
  using Rows = StagedRows<kType, kTiles>;

  // Of a key tile and a row tile: [0] and [1] of key lane / 4 and of two queries, lane % 4 * 2 and
  // the next; [2] and [3] of the key 8 below.
  template <int kRowTiles>
  using Logits = float[kTiles][kRowTiles][4];
  // Of those two queries of each row tile.
  template <int kRowTiles>
  using OfRows = float[kRowTiles][2];

  __device__ Scorer(const AttentionScoresArgs& args, const ScoreMemory& memory, int sample,
                    char* shared)
      : Rows(args, memory, sample, shared) {
    const unsigned matrix = lane() / 8, row = lane() % 8;
    matrix_words = word_of(row, matrix % 2) | (matrix / 2 * kWarp) |
                   (word_of(row, matrix / 2) + matrix % 2 * kWarp) << 8;
    clear_columns();
  }

  // Of kRowTiles row tiles of a chunk. Not yet scaled; a key that does not count has the logit that
  // scaling turns into -inf. Anything in tiles that are not live.
  template <int kRowTiles>
  __device__ void logits(int keys_buffer, int queries_buffer, int row_tile,
                         Logits<kRowTiles>& logit) const {
    const uint4* query = this->queries_of(queries_buffer, row_tile);
    const uint4* key = this->keys_of(keys_buffer);
    const auto next_step = [&] {
      query += kWarp;
      key += 2 * m.key_tiles * kWarp;
    };
    int left = m.steps;
    if constexpr (kPeels && !kWide) {
      multiply_narrow<true>(query, key, logit);
      next_step();
      --left;
    } else {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) set_zero(logit[tile]);
    }
#pragma unroll 1
    for (; left > 0; --left) {
      if constexpr (kWide) multiply_wide(query, key, logit);
      else multiply_narrow<false>(query, key, logit);
      next_step();
    }
    if (this->complete) return;
    for_each_tile([&](int tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!counts(tile, i / 2))
#pragma unroll
          for (int j = 0; j < kRowTiles; ++j) logit[tile][j][i] = -kInfinity * m.sign;
    });
  }

  // Turns the logits into exponentials against 0, of which a row's sum shows whether they can be
  // used. `sum`: over this lane's keys.
  template <int kRowTiles>
  __device__ void plain_exponentials(Logits<kRowTiles>& logit, OfRows<kRowTiles>& sum) const {
    exponentials_of(logit, sum, [&](int, int, float x) { return x * m.factor; });
  }

  // The largest logit of each row, of this lane's keys, times log2(e).
  template <int kRowTiles>
  __device__ void largest(const Logits<kRowTiles>& logit, OfRows<kRowTiles>& most) const {
    for_each_row(most, [](float& x) { x = -kInfinity; });
    for_each_tile([&](int tile) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          most[j][i % 2] = fmaxf(most[j][i % 2], logit[tile][j][i] * m.sign);
    });
    for_each_row(most, [&](float& x) { x *= fabsf(m.factor); });
  }

  // Turns the logits into exponentials against `most`; `sum`: over this lane's keys.
  template <int kRowTiles>
  __device__ void exponentials(Logits<kRowTiles>& logit, const OfRows<kRowTiles>& most,
                               OfRows<kRowTiles>& sum) const {
    OfRows<kRowTiles> base;
    bool any_large = false;
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j)
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
  template <int kRowTiles>
  __device__ void add(const Logits<kRowTiles>& e, const OfRows<kRowTiles>& weight) {
    for_each_tile([&](int tile) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j)
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
    const int first = static_cast<int>(lane_again() % 4) * kOwnTiles;
#pragma unroll
    for (int i = 0; i < 2 * kOwnTiles; ++i) {
      const int tile = first + i / 2;
      const int n = key_of(tile, i % 2);
      if (tile < m.key_tiles && n < this->end) body(n, counts(tile, i % 2) ? column[i] : 0.0f);
    }
    clear_columns();
  }

 private:
  using Rows::counts, Rows::for_each_tile, Rows::key_of, Rows::kWide, Rows::m, Rows::word_of;
  static constexpr int kOwnTiles = kTiles / 4;  // tiles whose columns a lane writes

  float column[2 * kTiles];  // of this lane's keys: sums over its queries
  unsigned matrix_words;     // where this lane's row of a matrix is: of queries, << 8 of keys

  // exponent(row tile, i, x): of a logit of the lane's query i of it, to the base 2.
  template <int kRowTiles, class Exponent>
  __device__ void exponentials_of(Logits<kRowTiles>& logit, OfRows<kRowTiles>& sum,
                                  const Exponent& exponent) const {
    for_each_row(sum, [](float& x) { x = 0.0f; });
    for_each_tile([&](int tile) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float &x = logit[tile][j][i], &low = logit[tile][j][2 + i];
          x = exp2_fast(exponent(j, i, x));
          low = exp2_fast(exponent(j, i, low));
          sum[j][i] = tile == 0 ? x + low : sum[j][i] + (x + low);
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

  static __device__ bool is_large(float base) { return fabsf(base) >= kLargeBase; }

  __device__ void clear_columns() {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) column[i] = 0.0f;
  }

  template <int kRowTiles, class Body>
  static __device__ void for_each_row(OfRows<kRowTiles>& x, const Body& body) {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) body(x[j][i]);
  }

  template <int kRowTiles>
  static __device__ void set_zero(float (&logit)[kRowTiles][4]) {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) logit[j][i] = 0.0f;
  }

  // One step of all key tiles and row tiles, of numbers of 16 bits: two mma each, of which none
  // waits for the one before it. kFirst: there is nothing to add to, and no tile is left out, which
  // would have to be zero; for those that are not there the last one is taken again.
  template <bool kFirst, int kRowTiles>
  __device__ void multiply_narrow(const uint4* query, const uint4* key,
                                  Logits<kRowTiles>& logit) const {
    constexpr int kBytes = sizeof(uint4), kSecond = 2 * kBytes;  // parts 2 and 3 of any row
    const int of_tile = m.steps * kWarp;
    const SharedAddress q =
        address_of(query + matrix_words % kWarp + (matrix_words & kWarp) * m.steps);
    const SharedAddress k = address_of(key + (matrix_words >> 8));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t of_queries[kRowTiles][2], of_keys[4];
#pragma unroll
      for (int j = 0; j < kRowTiles; j += 2) {
        const SharedAddress of_j = flipped(q, half * kSecond) + j * of_tile * kBytes;
        if (j + 1 < kRowTiles) {
          uint32_t two[4];
          load_matrices(of_j, two);
#pragma unroll
          for (int i = 0; i < 4; ++i) of_queries[j + i / 2][i % 2] = two[i];
        } else {
          load_matrices(of_j, of_queries[j]);
        }
      }
      const auto of_tile_of_keys = [&](int tile) {
        const int place = kFirst ? min(tile, m.key_tiles - 1) : tile;
        load_matrices(flipped(k, half * kSecond) + 2 * place * kWarp * kBytes, of_keys);
        if (kFirst && half == 0) set_zero(logit[tile]);
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j) {
          float (&sum)[4] = logit[tile][j];
          if constexpr (kType == kBFloat16)
            mma_bf16(sum, of_keys, of_queries[j][0], of_queries[j][1]);
          else mma_fp16(sum, of_keys, of_queries[j][0], of_queries[j][1]);
        }
      };
      if constexpr (kFirst) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) of_tile_of_keys(tile);
      } else {
        for_each_tile(of_tile_of_keys);
      }
    }
  }

  // The same of float32: as the sum of two numbers of the tensor cores, of which the smaller one is
  // multiplied with `finite`: with infinity, 0 would give NaN. Which features lie side by side does
  // not matter, if it is the same for queries and keys: a lane reads 16 bytes of a row.
  template <int kRowTiles>
  __device__ void multiply_wide(const uint4* query, const uint4* key,
                                Logits<kRowTiles>& logit) const {
    const unsigned own = lane_again(), word = word_of(own / 4, own % 4);
    Split<2> q[2][kRowTiles];
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
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
        for (int j = 0; j < kRowTiles; ++j)
          mma_tf32(logit[tile][j], k.finite, q[half][j].rest[0], q[half][j].rest[1]);
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j)
          mma_tf32(logit[tile][j], k.rest, q[half][j].finite[0], q[half][j].finite[1]);
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j)
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
