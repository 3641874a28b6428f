// What a row of attention adds up to, kept so that parts of it can be put together, and which rows
// a head has.
#pragma once
#include "../args.h"
#include "device.h"

namespace sma {
namespace cuda {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kMostFloat = 3.402823466e38f;

// Of a row's exponentials: the largest logit, times log2(e), and the sum of exp2 of what all lie
// below it.
struct RowSum {
  float most, sum;
};

// What exponents are counted from: -inf less -inf would be NaN.
__device__ inline float base_of(float most) { return fmaxf(most, -kMostFloat); }

// What a sum against its largest logit is against another one.
__device__ inline float rescaled(RowSum x, float most) {
  return x.sum * exp2_fast(x.most - base_of(most));
}
__device__ inline RowSum join(RowSum x, RowSum y) {
  const float most = fmaxf(x.most, y.most);
  return {most, rescaled(x, most) + rescaled(y, most)};
}

// Which rows of queries a head has: positions in the query, in order.
struct RowList {
  const int* rows;
  int count;
};

// Lists the queries of a head among the candidates [first, last) in `rows`. All threads of a block
// call it; `counts` has a place for each warp.
__device__ inline RowList list_rows(const AttentionScoresArgs& a, int64_t b, int64_t head,
                                    int64_t first, int64_t last, int* rows, int* counts) {
  int total = 0;
#pragma unroll 1
  for (int64_t from = first; from < last; from += blockDim.x) {
    const int64_t r = from + threadIdx.x;
    int64_t query = -1;
    if (r < last) {
      query = a.query_index == nullptr ? r : a.query_index[b * a.index_stride + r];
      if (query >= a.queries) query = -1;
      if (a.head_index != nullptr && a.head_index[b * a.selected + r] != head) query = -1;
    }
    const unsigned takes = __ballot_sync(kAllLanes, query >= 0);
    if (lane() == 0) counts[warp()] = __popc(takes);
    __syncthreads();
    const int of_warp = lane() < warps() ? counts[lane()] : 0;
    const int before = total + __reduce_add_sync(kAllLanes, lane() < warp() ? of_warp : 0);
    total += __reduce_add_sync(kAllLanes, of_warp);
    if (query >= 0) rows[before + __popc(takes & ((1u << lane()) - 1))] = static_cast<int>(query);
    __syncthreads();  // the counts are read, the rows written
  }
  return {rows, total};
}

// What scores that were summed over all heads are multiplied by.
__device__ inline float head_share(const AttentionScoresArgs& a) {
  return a.reduce == kMean && a.head_index == nullptr ? 1.0f / static_cast<float>(a.heads) : 1.0f;
}

}  // namespace cuda
}  // namespace sma
