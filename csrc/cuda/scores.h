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

// Calls body with a count, 1 to kMost, as one that the compiler knows.
template <int kMost, class Body>
__device__ void with_count(int count, const Body& body) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, body);
  }
  body(std::integral_constant<int, kMost>());
}

// Of a warp's first kTiles key tiles and of kRowTiles row tiles: [0] and [1] of key lane / 4 and of
// two queries, lane % 4 * 2 and the next; [2] and [3] of the key 8 below. kAll: these are all tiles
// that the warp has, else each is asked whether it is one of them.
template <int kTiles, int kRowTiles, bool kAll>
struct Logits {
  float of[kTiles][kRowTiles][4];
};

// kType: of queries and keys; kMostTiles: of keys that a warp takes; kPeels: the first step of
// features is apart, which saves zeros to add to but takes registers.
template <int kType, int kMostTiles, bool kPeels>
class Scorer : public StagedRows<kType, kMostTiles> {
 public:
  using Rows = StagedRows<kType, kMostTiles>;

  // Of those two queries of each row tile.
  template <int kRowTiles>
  using OfRows = float[kRowTiles][2];

  __device__ Scorer(const AttentionScoresArgs& args, const ScoreMemory& memory, int sample)
      : Rows(args, memory, sample) {
    for (int i = static_cast<int>(lane_again()); i < m.columns; i += kWarp) this->columns()[i] = {};
    __syncwarp();
  }

  // Of all tiles() of keys and of kRowTiles row tiles, from those words on. Not yet scaled; a key
  // that does not count has the logit that scaling turns into -inf.
  template <int kTiles, int kRowTiles, bool kAll>
  __device__ void logits(int keys_at, int queries_at,
                         Logits<kTiles, kRowTiles, kAll>& logit) const {
    const uint4 *key = this->words() + keys_at, *query = this->words() + queries_at;
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
      each_tile<kTiles, kAll>([&](int tile) { set_zero(logit.of[tile]); });
    }
#pragma unroll 1
    for (; left > 0; --left) {
      if constexpr (kWide) multiply_wide(query, key, logit);
      else multiply_narrow<false>(query, key, logit);
      next_step();
    }
    if (this->range().complete) return;
    const uint32_t valid = this->range().valid[lane_again()];
    each_tile<kTiles, kAll>([&](int tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!(valid >> (2 * tile + i / 2) & 1))
#pragma unroll
          for (int j = 0; j < kRowTiles; ++j) logit.of[tile][j][i] = m.nothing;
    });
  }

  // Turns the logits into exponentials against 0, of which a row's sum shows whether they can be
  // used. `sum`: over this lane's keys.
  template <int kTiles, int kRowTiles, bool kAll>
  __device__ void plain_exponentials(Logits<kTiles, kRowTiles, kAll>& logit,
                                     OfRows<kRowTiles>& sum) const {
    exponentials_of(logit, sum, [&](int, int, float x) { return x * m.factor; });
  }

  // The largest logit of each row, of this lane's keys, times log2(e).
  template <int kTiles, int kRowTiles, bool kAll>
  __device__ void largest(const Logits<kTiles, kRowTiles, kAll>& logit,
                          OfRows<kRowTiles>& most) const {
    for_each_row(most, [](float& x) { x = -kInfinity; });
    each_tile<kTiles, kAll>([&](int tile) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          most[j][i % 2] = fmaxf(most[j][i % 2], logit.of[tile][j][i] * m.sign);
    });
    for_each_row(most, [&](float& x) { x *= fabsf(m.factor); });
  }

  // Turns the logits into exponentials against `most`; `sum`: over this lane's keys.
  template <int kTiles, int kRowTiles, bool kAll>
  __device__ void exponentials(Logits<kTiles, kRowTiles, kAll>& logit,
                               const OfRows<kRowTiles>& most, OfRows<kRowTiles>& sum) const {
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

  // Adds the exponentials, with the weight of their row, to this lane's columns; that of a row that
  // is none is 0.
  template <int kTiles, int kRowTiles, bool kAll>
  __device__ void add(const Logits<kTiles, kRowTiles, kAll>& e, const OfRows<kRowTiles>& weight) {
    Column* const own = &this->columns()[lane_again()];
    each_tile<kTiles, kAll>([&](int tile) {
      Column sum = own[tile * kWarp];
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sum.up = fmaf(e.of[tile][j][i], weight[j][i], sum.up);
          sum.low = fmaf(e.of[tile][j][2 + i], weight[j][i], sum.low);
        }
      own[tile * kWarp] = sum;
    });
  }

  // Adds the columns to the totals, and begins them anew.
  __device__ void add_to_totals() {
    __syncwarp();
    for_each_own_key([&](int tile, unsigned key, Column& total) {
      Column* const of_key = &this->columns()[tile * kWarp + key * kQuad];
      total.up += (of_key[0].up + of_key[1].up) + (of_key[2].up + of_key[3].up);
      total.low += (of_key[0].low + of_key[1].low) + (of_key[2].low + of_key[3].low);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) of_key[i] = {};
    });
    __syncwarp();
  }

  // Calls body(key of the sample, its total) for each whose total this lane has, of all keys of the
  // block, and begins the totals anew.
  template <class Body>
  __device__ void take_totals(const Body& body) {
    for_each_own_key([&](int tile, unsigned key, Column& total) {
      const int up = this->key_of(tile, key), low = up + kKeyTile / 2;
      if (up < this->range().end) body(up, this->is_padding(up) ? 0.0f : total.up);
      if (low < this->range().end) body(low, this->is_padding(low) ? 0.0f : total.low);
      total = {};
    });
  }

 private:
  using Rows::key_of, Rows::kWide, Rows::m, Rows::word_of;

  // exponent(row tile, i, x): of a logit of the lane's query i of it, to the base 2.
  template <int kTiles, int kRowTiles, bool kAll, class Exponent>
  __device__ void exponentials_of(Logits<kTiles, kRowTiles, kAll>& logit, OfRows<kRowTiles>& sum,
                                  const Exponent& exponent) const {
    each_tile<kTiles, kAll>([&](int tile) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float &x = logit.of[tile][j][i], &low = logit.of[tile][j][2 + i];
          x = exp2_fast(exponent(j, i, x));
          low = exp2_fast(exponent(j, i, low));
          sum[j][i] = tile == 0 ? x + low : sum[j][i] + (x + low);
        }
    });
  }

  // Calls body(tile) for each of tiles(): kTiles, or as many at most.
  template <int kTiles, bool kAll, class Body>
  __device__ void each_tile(const Body& body) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      if (kAll || tile == 0 || tile < this->tiles()) body(tile);
  }

  static __device__ bool is_large(float base) { return fabsf(base) >= kLargeBase; }

  // Calls body(tile, key of it, total) for each whose total is this lane's.
  template <class Body>
  __device__ void for_each_own_key(const Body& body) {
    const unsigned own = lane_again();
    constexpr int kHalf = kKeyTile / 2;
    Column* const totals = &this->columns()[m.key_tiles * kWarp];
#pragma unroll 1
    for (int tile = static_cast<int>(own / kHalf); tile < m.key_tiles; tile += kWarp / kHalf)
      body(tile, own % kHalf, totals[tile * kHalf + own % kHalf]);
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
  // waits for the one before it. kFirst: there is nothing to add to.
  template <bool kFirst, int kTiles, int kRowTiles, bool kAll>
  __device__ void multiply_narrow(const uint4* query, const uint4* key,
                                  Logits<kTiles, kRowTiles, kAll>& logit) const {
    constexpr int kBytes = sizeof(uint4), kSecond = 2 * kBytes;  // parts 2 and 3 of any row
    const int of_tile = m.tile_words;
    // this lane's row of the matrices that are loaded at once
    const unsigned own = lane_again(), matrix = own / 8, row = own % 8;
    const SharedAddress q = address_of(query + matrix / 2 * of_tile + word_of(row, matrix % 2));
    const SharedAddress k = address_of(key + matrix % 2 * kWarp + word_of(row, matrix / 2));
    uint32_t of_queries[2][kRowTiles][2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kRowTiles; j += 2) {
        const SharedAddress of_j = flipped(q, half * kSecond) + j * of_tile * kBytes;
        if (j + 1 < kRowTiles) {
          uint32_t two[4];
          load_matrices(of_j, two);
#pragma unroll
          for (int i = 0; i < 4; ++i) of_queries[half][j + i / 2][i % 2] = two[i];
        } else {
          load_matrices(of_j, of_queries[half][j]);
        }
      }
    each_tile<kTiles, kAll>([&](int tile) {
      if (kFirst) set_zero(logit.of[tile]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t of_keys[4];
        load_matrices(flipped(k, half * kSecond) + 2 * tile * kWarp * kBytes, of_keys);
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j) {
          float (&sum)[4] = logit.of[tile][j];
          const uint32_t (&words)[2] = of_queries[half][j];
          if constexpr (kType == kBFloat16) mma_bf16(sum, of_keys, words[0], words[1]);
          else mma_fp16(sum, of_keys, words[0], words[1]);
        }
      }
    });
  }

  // The same of float32: as the sum of two numbers of the tensor cores, of which the smaller one is
  // multiplied with `finite`: with infinity, 0 would give NaN. Which features lie side by side does
  // not matter, if it is the same for queries and keys: a lane reads 16 bytes of a row.
  template <int kTiles, int kRowTiles, bool kAll>
  __device__ void multiply_wide(const uint4* query, const uint4* key,
                                Logits<kTiles, kRowTiles, kAll>& logit) const {
    const unsigned own = lane_again(), word = word_of(own / kQuad, own % kQuad);
    Split<2> q[2][kRowTiles];
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      const uint4 x = query[j * m.tile_words + word];
      q[0][j].set({x.x, x.y});
      q[1][j].set({x.z, x.w});
    }
    each_tile<kTiles, kAll>([&](int tile) {
      const uint4 up = key[2 * tile * kWarp + word], low = key[(2 * tile + 1) * kWarp + word];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Split<4> k;
        if (half == 0) k.set({up.x, low.x, up.y, low.y});
        else k.set({up.z, low.z, up.w, low.w});
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j)
          mma_tf32(logit.of[tile][j], k.finite, q[half][j].rest[0], q[half][j].rest[1]);
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j)
          mma_tf32(logit.of[tile][j], k.rest, q[half][j].finite[0], q[half][j].finite[1]);
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j)
          mma_tf32(logit.of[tile][j], k.high, q[half][j].high[0], q[half][j].high[1]);
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
