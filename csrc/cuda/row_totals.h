// What is found for rows of attention by the lanes of a warp, by the warps of a block and by the
// blocks of a cluster, put together: sums, or the largest.
#pragma once
#include "row_sums.h"
#include "score_memory.h"

namespace sma {
namespace cuda {

constexpr int kQuad = 4;  // lanes that share a row
constexpr int kWarpsOfLane = kScoreWarps / kQuad;

struct SumOfParts {
  static constexpr float kNeutral = 0.0f;
  static __device__ float of(float x, float y) { return x + y; }
};
struct MostOfParts {
  static constexpr float kNeutral = -kInfinity;
  static __device__ float of(float x, float y) { return fmaxf(x, y); }
};

// Where parts lie in shared memory. A pass writes where the one before it may still be read, so
// each row tile of a chunk has a place, and so have largest and sum where rows are taken carefully.
constexpr int kPlaceMost = kMostRowTiles, kPlaceSum = kPlaceMost + 1;
constexpr int kPlaces = kPlaceSum + 1;
struct RowParts {
  alignas(16) float of_warps[kPlaces * kRowTile][kScoreWarps];  // at warp_place
  float of_blocks[2][kMostPassTiles * kRowTile];                // one of them is still read
  float of_all[kMostPassTiles * kRowTile];
};

class RowTotals {
 public:
  // blocks: of a cluster, that have parts of the same rows.
  __device__ RowTotals(RowParts& parts, unsigned blocks) : parts(parts), blocks(blocks) {
    // warps that are not there, or have no keys, stay at this
    for (unsigned i = threadIdx.x; i < kPlaces * kRowTile * kScoreWarps; i += blockDim.x)
      parts.of_warps[0][i] =
          i / (kRowTile * kScoreWarps) == kPlaceMost ? MostOfParts::kNeutral : SumOfParts::kNeutral;
  }

  // Says whether this warp has any part; a barrier of the block. Of several blocks all warps do:
  // only a whole cluster can wait.
  __device__ void begin(bool has_part) {
    const bool takes_part = has_part || blocks > 1;
    threads = static_cast<unsigned>(__syncthreads_count(takes_part));
    if (!takes_part) threads = 0;
  }
  __device__ bool takes_part() const { return threads > 0; }

  // own[j][i]: this lane's part of row lane % 4 * 2 + i of row tile j. Returns the total of row
  // lane / 4 of each row tile. All warps that take part call it.
  template <class Join, int kRowTiles>
  __device__ void put_together(int place, const float (&own)[kRowTiles][2],
                               float (&total)[kRowTiles]) {
    tell_warps<Join>(own, place);
    if (blocks == 1) {
      sync_some(threads);
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) total[j] = of_warps<Join>(place + j);
      return;
    }
    __syncthreads();
    float* const own_block = parts.of_blocks[parity];
#pragma unroll 1
    for (unsigned j = warp(); j < kRowTiles; j += warps()) {
      const float all = of_warps<Join>(place + static_cast<int>(j));
      if (lane() % kQuad == 0) own_block[j * kRowTile + row()] = all;
    }
    cluster_sync();
#pragma unroll 1
    for (unsigned j = warp(); j < kRowTiles; j += warps()) {
      const float all = of_blocks<Join>(&own_block[j * kRowTile + row()]);
      if (lane() % kQuad == 0) parts.of_all[j * kRowTile + row()] = all;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) total[j] = parts.of_all[j * kRowTile + row()];
    parity ^= 1;
  }

  // From a number for row lane / 4 of each row tile, those for rows lane % 4 * 2 and the next.
  template <int kRowTiles>
  static __device__ void spread(const float (&total)[kRowTiles], float (&own)[kRowTiles][2]) {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        own[j][i] = __shfl_sync(kAllLanes, total[j], (lane() % kQuad * 2 + i) * kQuad);
  }

 private:
  RowParts& parts;
  const unsigned blocks;
  unsigned threads = 0;  // that take part; 0 where this one does not
  int parity = 0;

  static __device__ int row() { return static_cast<int>(lane()) / kQuad; }

  // Where in a row the part of a warp is: rows of a tile have it in different banks. Four parts
  // that a lane reads at once stay together, and what is made of them the same.
  static __device__ unsigned warp_place(unsigned pair_of_rows) { return warp() ^ pair_of_rows; }

  // In three steps the lanes that have parts of the same rows halve what each of them joins.
  template <class Join, int kRowTiles>
  __device__ void tell_warps(const float (&own)[kRowTiles][2], int place) {
    static_assert(2 * kRowTiles <= kRowTile, "a lane ends with one at most");
    float part[2 * kRowTiles];
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) part[i] = own[i / 2][i % 2];
    int which = 0;
    const bool any = halve<Join, 2 * kRowTiles, kWarp / 2>(part, which);
    if (!any) return;
    const unsigned pair = lane_again() % kQuad;
    const int row = (place + which / 2) * kRowTile + static_cast<int>(pair) * 2 + which % 2;
    parts.of_warps[row][warp_place(pair)] = part[0];
  }

  // kLeft: parts that are left; `which`: of these, is this lane's. False where it has none.
  template <class Join, int kLeft, int kOther>
  static __device__ bool halve(float* part, int& which) {
    constexpr int kKeep = (kLeft + 1) / 2;
    const bool upper = lane() & kOther;
#pragma unroll
    for (int i = 0; i < kKeep; ++i) {
      const float low = part[i], high = kKeep + i < kLeft ? part[kKeep + i] : Join::kNeutral;
      part[i] = kLeft == 1 ? Join::of(low, __shfl_xor_sync(kAllLanes, low, kOther))
                           : Join::of(upper ? high : low,
                                      __shfl_xor_sync(kAllLanes, upper ? low : high, kOther));
    }
    int within = 0;
    bool any = true;
    if constexpr (kOther > kQuad) any = halve<Join, kKeep, kOther / 2>(part, within);
    which = within + (upper ? kKeep : 0);
    return any && which < kLeft;
  }

  // Over the lanes that share a row.
  template <class Join>
  static __device__ float of_quad(float x) {
    x = Join::of(x, __shfl_xor_sync(kAllLanes, x, 1));
    return Join::of(x, __shfl_xor_sync(kAllLanes, x, 2));
  }

  template <class Join>
  __device__ float of_warps(int place) const {
    static_assert(kWarpsOfLane == 4, "which a lane reads at once");
    const float4 x = *reinterpret_cast<const float4*>(parts.of_warps[place * kRowTile + row()] +
                                                      lane() % kQuad * kWarpsOfLane);
    return of_quad<Join>(Join::of(Join::of(x.x, x.y), Join::of(x.z, x.w)));
  }

  template <class Join>
  __device__ float of_blocks(const float* own) const {
    float all = Join::kNeutral;
#pragma unroll 1
    for (unsigned block = lane() % kQuad; block < blocks; block += kQuad)
      all = Join::of(all, cluster_load(own, block));
    return of_quad<Join>(all);
  }
};

}  // namespace cuda
}  // namespace sma
