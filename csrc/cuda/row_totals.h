// What is found for rows of attention by the lanes of a warp, by the warps of a block and by the
// blocks of a cluster, put together: sums, or the largest.
#pragma once
#include "row_sums.h"
#include "score_memory.h"

namespace sma {
namespace cuda {

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
  float of_blocks[2][kMostPassTiles * kRowTile];                // one of them is still read:
  int still_read[kScoreWarps];                                  // which, as each warp knows it
};

// Where RowParts are in shared memory, and blocks of a cluster that have parts of the same rows.
struct RowPlan {
  size_t parts;
  unsigned blocks;
};

class RowTotals {
 public:
  __device__ explicit RowTotals(const RowPlan& plan) : plan(plan) {
    if (lane_again() == 0) parts().still_read[warp()] = 0;
    // warps that are not there, or have no keys, stay at this
    for (unsigned i = threadIdx.x; i < kPlaces * kRowTile * kScoreWarps; i += blockDim.x)
      parts().of_warps[0][i] =
          i / (kRowTile * kScoreWarps) == kPlaceMost ? MostOfParts::kNeutral : SumOfParts::kNeutral;
  }

  // Says whether this warp has any part; a barrier of the block. Of several blocks all warps do:
  // only a whole cluster can wait.
  __device__ void begin(bool has_part) {
    const bool takes_part = has_part || plan.blocks > 1;
    threads = static_cast<unsigned>(__syncthreads_count(takes_part));
    if (!takes_part) threads = 0;
  }
  __device__ bool takes_part() const { return threads > 0; }

  // own[j][i]: this lane's part of row lane % 4 * 2 + i of row tile j. Returns the total of one of
  // these rows, row_of. All warps that take part call it.
  template <class Join, int kRowTiles>
  __device__ float put_together(int place, const float (&own)[kRowTiles][2]) {
    tell_warps<Join>(own, place);
    const int row = row_of<kRowTiles>();
    sync_some(threads);
    const float of_block = of_warps<Join>(place * kRowTile + row);
    return plan.blocks == 1 ? of_block : of_blocks<Join>(of_block, row, kRowTiles * kRowTile);
  }

  // The row of kRowTiles row tiles whose total this lane is given.
  template <int kRowTiles>
  static __device__ int row_of() {
    static_assert(kRowTiles * kRowTile <= kWarp, "each row has a lane");
    return static_cast<int>(lane_again() % (kRowTiles * kRowTile));
  }

  // From a number for row row_of, those for rows lane % 4 * 2 and the next of each row tile.
  template <int kRowTiles>
  static __device__ void spread(float x, float (&own)[kRowTiles][2]) {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        own[j][i] = __shfl_sync(kAllLanes, x, j * kRowTile + lane_again() % kQuad * 2 + i);
  }

 private:
  const RowPlan& plan;   // in the constant memory: the registers are for logits
  unsigned threads = 0;  // that take part; 0 where this one does not

  __device__ RowParts& parts() const {
    return *reinterpret_cast<RowParts*>(shared_memory() + plan.parts);
  }

  // Where in a row the part of a warp is: rows that are read at once have it in different banks.
  static __device__ unsigned warp_place(unsigned row, unsigned warp) { return warp ^ (row & 4); }

  // In three steps the lanes that have parts of the same rows halve what each of them joins.
  template <class Join, int kRowTiles>
  __device__ void tell_warps(const float (&own)[kRowTiles][2], int place) {
    static_assert(2 * kRowTiles <= kRowTile, "a lane ends with one at most");
    float part[2 * kRowTiles];
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) part[i] = own[i / 2][i % 2];
    int which = 0;
    const unsigned own_lane = lane_again();
    const bool any = halve<Join, 2 * kRowTiles, kWarp / 2>(part, own_lane, which);
    if (!any) return;
    const unsigned row = own_lane % kQuad * 2 + static_cast<unsigned>(which % 2);
    parts().of_warps[(place + which / 2) * kRowTile + row][warp_place(row, warp_again())] = part[0];
  }

  // kLeft: parts that are left; `which`: of these, is this lane's. False where it has none.
  template <class Join, int kLeft, int kOther>
  static __device__ bool halve(float* part, unsigned own_lane, int& which) {
    constexpr int kKeep = (kLeft + 1) / 2;
    const bool upper = own_lane & kOther;
#pragma unroll
    for (int i = 0; i < kKeep; ++i) {
      const float low = part[i], high = kKeep + i < kLeft ? part[kKeep + i] : Join::kNeutral;
      part[i] = kLeft == 1 ? Join::of(low, __shfl_xor_sync(kAllLanes, low, kOther))
                           : Join::of(upper ? high : low,
                                      __shfl_xor_sync(kAllLanes, upper ? low : high, kOther));
    }
    int within = 0;
    bool any = true;
    if constexpr (kOther > kQuad) any = halve<Join, kKeep, kOther / 2>(part, own_lane, within);
    which = within + (upper ? kKeep : 0);
    return any && which < kLeft;
  }

  // Of a row, from this block's total of it. Each block tells it of so many rows.
  template <class Join>
  __device__ float of_blocks(float of_block, int row, unsigned rows) const {
    constexpr unsigned kAtOnce = 4;  // on their way
    int& still_read = parts().still_read[warp_again()];
    const int which = still_read ^ 1;
    float* const place = &parts().of_blocks[which][row];
    if (threadIdx.x < rows) *place = of_block;
    cluster_sync();
    float all = Join::kNeutral;
#pragma unroll 1
    for (unsigned first = 0; first < plan.blocks; first += kAtOnce) {
      float some[kAtOnce];
#pragma unroll
      for (unsigned i = 0; i < kAtOnce; ++i)
        some[i] = first + i < plan.blocks ? cluster_load(place, first + i) : Join::kNeutral;
#pragma unroll
      for (unsigned i = 0; i < kAtOnce; ++i) all = Join::of(all, some[i]);
    }
    __syncwarp();
    if (lane_again() == 0) still_read = which;
    __syncwarp();
    return all;
  }

  template <class Join>
  __device__ float of_warps(int row) const {
    static_assert(kScoreWarps == 8, "two words");
    const auto* const words = reinterpret_cast<const float4*>(parts().of_warps[row]);
    const float4 x = words[warp_place(row, 0) / 4], y = words[warp_place(row, 4) / 4];
    return Join::of(Join::of(Join::of(x.x, x.y), Join::of(x.z, x.w)),
                    Join::of(Join::of(y.x, y.y), Join::of(y.z, y.w)));
  }
};

}  // namespace cuda
}  // namespace sma
