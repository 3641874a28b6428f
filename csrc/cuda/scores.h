// Attention logits of a block of keys, on the tensor cores.
//
// A block keeps its keys of one head in shared memory, in tiles of 8 keys, and every selected query
// passes by, 16 rows at a time. Each lane reads 16 bytes of a row at a time, the same that it sent
// for, as the mma instructions want them but for the order of the features, which is another one
// for queries and keys alike.
//
// What warps do for 16 rows takes most of the time, and more of it is for the rows than for the
// keys. So each warp has as many keys as it can take, and where none of them counts it only waits.
// Where none of a group of tiles counts, the warp skips it.
#pragma once
#include "row_sums.h"
#include "score_memory.h"

namespace sma {
namespace cuda {

// A row's largest logit, from which its exponents are counted, is a rounded product. Where it is
// large, its rounding alone could leave the range of exp2: from here on other logits are rounded in
// the same way, not fused. Parts of a row that differ in this differ by no more than that rounding.
constexpr float kLargeBase = 1 << 12;

// kType: of queries and keys; kTiles: of 8 keys that a warp takes, at most.
template <int kType, int kTiles>
class Scorer {
 public:
  using Logits = float[kTiles][4];

  __device__ Scorer(const AttentionScoresArgs& args, const ScoreMemory& memory, int64_t sample,
                    char* shared)
      : a(args),
        m(memory),
        b(sample),
        factor(fmaxf(fabsf(args.scale) * kLog2e, kLeastFactor)),
        queries(reinterpret_cast<uint4*>(shared)),
        keys(queries + 2 * memory.chunk_words() +
             same_in_warp(warp()) * memory.tiles * memory.steps * kWarp + lane()) {
    clear_columns();
  }

  // Says which keys of the sample are the block's: before any of them are staged.
  __device__ void look_at(int64_t first, int64_t last) {
    begin = static_cast<int>(first) + static_cast<int>(same_in_warp(warp())) * m.tiles * 8;
    end = static_cast<int>(last);
    valid = staged = live = full = 0;
    const uint8_t* padding = a.padding == nullptr ? nullptr : a.padding + b * a.tokens;
    const auto is_key = [&](int tile, unsigned place) {
      const int n = first_of(tile) + static_cast<int>(place);
      return tile < m.tiles && n < end && (padding == nullptr || !padding[n]);
    };
#pragma unroll 1
    for (int i = 0; i < kTiles; ++i) {
      for (unsigned j = 0; j < 2; ++j)
        if (is_key(i, lane() % 4 * 2 + j)) valid |= 1u << (2 * i + j);
      if (is_key(i, lane() / 4)) staged |= 1u << i;
    }
#pragma unroll
    for (int group = 0; group < kTiles / kTileGroup; ++group) {
      const uint32_t all = (1u << 2 * kTileGroup) - 1, bits = valid >> (2 * kTileGroup * group);
      if (__ballot_sync(kAllLanes, (bits & all) != 0)) live |= 1u << group;
      if (__ballot_sync(kAllLanes, (bits & all) == all) == kAllLanes) full |= 1u << group;
    }
  }

  // Whether any of this warp's keys counts.
  __device__ bool has_keys() const { return live != 0; }

  // Sends for the keys of a head; those that do not count are zeros.
  __device__ void stage_keys(int buffer, int key_head) {
    const int64_t row_bytes = a.key_strides[2] * kSize;
    const char* rows = bytes_at(a.key, b * a.key_strides[0] + key_head * a.key_strides[1]);
    const bool in_words = are_words(rows, row_bytes, a.key_strides[3]);
    const int offset = static_cast<int>(lane() % 4) * 16;
    uint4* const to = &keys[buffer * m.key_words(warps())];
#pragma unroll 1
    for (int first = 0; first < m.tiles; first += kTileGroup) {
      if (!(live >> first / kTileGroup & 1)) continue;
      const char* row =
          hoisted(rows + (first_of(first) + static_cast<int>(lane() / 4)) * row_bytes);
#pragma unroll 1
      for (int step = 0; step < m.steps; ++step) {
        uint4* const place = &to[(step * m.tiles + first) * kWarp];
        if (in_words) {
          const int at = step * kStepBytes + offset;
          const uint32_t reads = at < static_cast<int>(a.width) * kSize ? staged >> first : 0;
          const char* from = row + at;
#pragma unroll
          for (int i = 0; i < kTileGroup; ++i, from += 8 * row_bytes)
            if (reads >> i & 1) copy_async_16(&place[i * kWarp], from);
            else place[i * kWarp] = uint4{};
        } else {
#pragma unroll 1
          for (int i = 0; i < kTileGroup; ++i)
            stage(&place[i * kWarp], row + i * 8 * row_bytes, a.key_strides[3],
                  step * kStepBytes + offset, staged >> first >> i & 1);
        }
      }
    }
  }

  // Sends for the chunk of queries from `first` on of the list; rows behind its end are zeros.
  __device__ void stage_queries(int buffer, int64_t head, const RowList& list, int first) {
    const int64_t sample = a.query_strides[0] == 0 ? 0 : b, row_bytes = a.query_strides[2] * kSize;
    const char* rows = bytes_at(a.query, sample * a.query_strides[0] + head * a.query_strides[1]);
    const bool in_words = are_words(rows, row_bytes, a.query_strides[3]);
    const int left = min(m.chunk_rows(), ceil_div(list.count - first, kRowTile) * kRowTile);
    const int part = static_cast<int>(threadIdx.x % 4);  // of 16 bytes
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x / 4); row < left; row += blockDim.x / 4) {
      const bool read = first + row < list.count;
      const char* from = rows + (read ? list.rows[first + row] : 0) * row_bytes;
      uint4* to = &queries[buffer * m.chunk_words() +
                           (row / kRowTile * m.steps * 2 + row % kRowTile / 8) * kWarp +
                           row % 8 * 4 + part];
#pragma unroll 1
      for (int at = part * 16; at < m.steps * kStepBytes; at += kStepBytes, to += 2 * kWarp) {
        if (!in_words) stage(to, from, a.query_strides[3], at, read);
        else if (read && at < a.width * kSize) copy_async_16(to, from + at);
        else *to = uint4{};
      }
    }
  }

  // logit[i][0..1]: of row lane / 4 of the row tile and two columns of tile i; logit[i][2..3]: of
  // the row 8 below. Not yet scaled, but with the scale's sign: the largest stays the largest. -inf
  // where the key does not count; nothing in groups that are not live.
  __device__ void logits(int keys_buffer, int queries_buffer, int row_tile, Logits& logit) const {
    const uint4* query =
        &queries[queries_buffer * m.chunk_words() + row_tile * m.steps * 2 * kWarp + lane()];
    const uint4* key = &keys[keys_buffer * m.key_words(warps())];
    const uint32_t flip = a.scale < 0 ? kSign : 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) logit[i][j] = 0.0f;
#pragma unroll 1
    for (int step = 0; step < m.steps; ++step) {
      const uint4 up = query[0], low = query[kWarp];
      const uint32_t even[4] = {up.x ^ flip, low.x ^ flip, up.y ^ flip, low.y ^ flip};
      const uint32_t odd[4] = {up.z ^ flip, low.z ^ flip, up.w ^ flip, low.w ^ flip};
      // a float32 needs so many registers that both at once would not fit
#pragma unroll
      for (int part = 0; part < (kWide ? 2 : 1); ++part)
        for_each_group([&](int first) {
#pragma unroll
          for (int i = first; i < first + kTileGroup; ++i) {
            const uint4 k = key[i * kWarp];
            if (part == 0) multiply(even, k.x, k.y, logit[i]);
            if (!kWide || part == 1) multiply(odd, k.z, k.w, logit[i]);
          }
        });
      query += 2 * kWarp;
      key += m.tiles * kWarp;
    }
    if (full == live) return;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (!counts(i, j % 2)) logit[i][j] = -kInfinity;
  }

  // Of kHalves 8-row halves of a row tile, whose steps are taken together: they do not wait for
  // each other. The largest logit of each, of this warp's keys, times log2(e).
  template <int kHalves>
  __device__ void largest(const Logits& logit, float (&most)[kHalves]) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) most[half] = -kInfinity;
    for_each_group([&](int first) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        float of[kTileGroup];
#pragma unroll
        for (int i = 0; i < kTileGroup; ++i)
          of[i] = fmaxf(logit[first + i][2 * half], logit[first + i][2 * half + 1]);
        most[half] = fmaxf(most[half], fmaxf(fmaxf(of[0], of[1]), fmaxf(of[2], of[3])));
      }
    });
#pragma unroll
    for (int half = 0; half < kHalves; ++half) most[half] = most_of_row(most[half]) * factor;
  }

  // Turns the logits into exponentials against `most`; `sum`: over this lane's columns.
  template <int kHalves>
  __device__ void exponentials(Logits& logit, const float (&most)[kHalves],
                               float (&sum)[kHalves]) const {
    bool is_large[kHalves], any_large = false;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      is_large[half] = fabsf(base_of(most[half])) >= kLargeBase;
      any_large |= is_large[half];
    }
    if (any_large)
      exponentials_of(logit, most, sum, [&](int half, float x, float base) {
        return is_large[half] ? __fmul_rn(x, factor) - base : fmaf(x, factor, -base);
      });
    else
      exponentials_of(logit, most, sum,
                      [&](int, float x, float base) { return fmaf(x, factor, -base); });
  }

  // The same against the largest of this warp's keys, with their sum.
  template <int kHalves>
  __device__ void exponentials(Logits& logit, RowSum (&row)[kHalves]) const {
    float most[kHalves], sum[kHalves];
    largest(logit, most);
    exponentials(logit, most, sum);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) row[half] = {most[half], sum_of_row(sum[half])};
  }

  // Adds the exponentials, with the weight of their row, to the columns. A row that is none has
  // weight 0 and is left out: zeros times an infinite key are NaN.
  template <int kHalves>
  __device__ void add(const Logits& e, const float (&weight)[kHalves]) {
    for_each_group([&](int first) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
#pragma unroll
        for (int i = first; i < first + kTileGroup; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            if (weight[half] != 0.0f)
              column[i][j] = fmaf(e[i][2 * half + j], weight[half], column[i][j]);
    });
  }

  // Calls body(key of the sample, sum over all rows) for each of the block's keys, and begins anew.
  template <class Body>
  __device__ void take_columns(const Body& body) {
    halve_columns<kTiles / 2, kWarp / 2>();
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int tile = lane() / 4 * kEach + i;
        const int n = first_of(tile) + static_cast<int>(lane() % 4 * 2) + j;
        if (tile < m.tiles && n < end) body(n, counts(tile, j) ? column[i][j] : 0.0f);
      }
    clear_columns();
  }

 private:
  static constexpr bool kWide = kType == kFloat32;
  static constexpr int kSize = kWide ? 4 : 2;                           // bytes of an element
  static constexpr uint32_t kSign = kWide ? 0x80000000u : 0x80008000u;  // bits of 4 bytes

  const AttentionScoresArgs& a;
  const ScoreMemory& m;
  const int64_t b;
  const float factor;  // makes exp2 of a logit its exponential
  uint4* const queries;
  uint4* const keys;        // this lane's places
  float column[kTiles][2];  // sums over this lane's rows
  int begin = 0, end = 0;   // this warp's first key, and the end of the block's
  uint32_t valid = 0;       // a bit for each of this lane's columns that counts,
  uint32_t staged = 0;      // for each key that this lane sends for,
  uint32_t live = 0;        // for each group of tiles of which a key counts,
  uint32_t full = 0;        // and for each of which all do

  static constexpr int kEach = kTiles / 8;  // tiles that a lane writes

  // exponent(half, x, base): of a logit, to the base 2.
  template <int kHalves, class Exponent>
  __device__ void exponentials_of(Logits& logit, const float (&most)[kHalves],
                                  float (&sum)[kHalves], const Exponent& exponent) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) sum[half] = 0.0f;
    for_each_group([&](int first) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const float base = base_of(most[half]);
        float of[kTileGroup];
#pragma unroll
        for (int i = 0; i < kTileGroup; ++i) {
          float* const x = &logit[first + i][2 * half];
          x[0] = exp2_fast(exponent(half, x[0], base));
          x[1] = exp2_fast(exponent(half, x[1], base));
          of[i] = x[0] + x[1];
        }
        sum[half] += (of[0] + of[1]) + (of[2] + of[3]);
      }
    });
  }

  // In three steps the lanes of a column halve what each of them adds up.
  template <int kLeft, int kOther>
  __device__ void halve_columns() {
    const bool upper = lane() & kOther;
#pragma unroll
    for (int i = 0; i < kLeft; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float give = upper ? column[i][j] : column[i + kLeft][j];
        const float keep = upper ? column[i + kLeft][j] : column[i][j];
        column[i][j] = keep + __shfl_xor_sync(kAllLanes, give, kOther);
      }
    if constexpr (kLeft > kEach) halve_columns<kLeft / 2, kOther / 2>();
  }

  // The first key of a tile of this warp.
  __device__ int first_of(int tile) const { return begin + tile * 8; }
  __device__ bool counts(int tile, int j) const { return valid >> (2 * tile + j) & 1; }
  static __device__ const char* bytes_at(const void* base, int64_t elements) {
    return static_cast<const char*>(base) + elements * kSize;
  }

  __device__ void clear_columns() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) column[i][0] = column[i][1] = 0.0f;
  }

  // Calls body(first tile) for each group that has a key that counts.
  template <class Body>
  __device__ void for_each_group(const Body& body) const {
#pragma unroll
    for (int group = 0; group < kTiles / kTileGroup; ++group)
      if (live >> group & 1) body(group * kTileGroup);
  }

  // Whether rows of a head can be read 16 bytes at a time.
  __device__ bool are_words(const char* rows, int64_t row_bytes, int64_t stride) const {
    return stride == 1 && ((reinterpret_cast<uintptr_t>(rows) | static_cast<uint64_t>(row_bytes) |
                            static_cast<uint64_t>(a.width * kSize)) &
                           15) == 0;
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

  static __device__ void multiply(const uint32_t (&q)[4], uint32_t k0, uint32_t k1,
                                  float (&logit)[4]) {
    if constexpr (kWide) {
      uint32_t high[4], finite[4], rest[4], rest0, rest1;
#pragma unroll
      for (int j = 0; j < 4; ++j) split(q[j], &high[j], &finite[j], &rest[j]);
      uint32_t high0, high1, finite0, finite1;
      split(k0, &high0, &finite0, &rest0);
      split(k1, &high1, &finite1, &rest1);
      mma_tf32(logit, finite, rest0, rest1);
      mma_tf32(logit, rest, finite0, finite1);
      mma_tf32(logit, high, high0, high1);
    } else if constexpr (kType == kBFloat16) {
      mma_bf16(logit, q, k0, k1);
    } else {
      mma_fp16(logit, q, k0, k1);
    }
  }

  // A float32 as the sum of two numbers of the tensor cores. The smaller one is multiplied with
  // `finite`: with infinity, 0 would give NaN.
  static __device__ void split(uint32_t bits, uint32_t* high, uint32_t* finite, uint32_t* rest) {
    const float x = __uint_as_float(bits);
    *high = to_tf32(x);
    *finite = fabsf(x) < kInfinity ? *high : 0;
    *rest = to_tf32(fabsf(x) < kInfinity ? x - __uint_as_float(*high) : 0.0f);
  }
};

}  // namespace cuda
}  // namespace sma
