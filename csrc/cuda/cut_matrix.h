// The matrix that bipartition finds eigenvectors of, applied to the vectors of a sample.
//
// Rows x of length 1 are applied as x (x^T v), to four vectors at once: all of x^T v for some
// features, then their share of the products. Where slabs of features stay in the shared memory of
// a cluster, each block does so for all of its own; the shares of the blocks are added up by every
// block, in the order of their ranks. Else one block does it for slab after slab. All sums have a
// fixed order.
#pragma once
#include "cut_vectors.h"

namespace sma {
namespace cuda {

template <class T, bool kStay>
class CutMatrix : protected CutVectors {
 public:
  static constexpr int kWordFeatures = Slabs<T, kStay>::kWordFeatures;

  // places: for slabs in shared memory, in each block of a cluster.
  __host__ __device__ static CutMemory memory(int64_t tokens, unsigned blocks, int64_t places) {
    return CutMemory(tokens, blocks, Slabs<T, kStay>::kFeatures, kStay ? places : 1, places);
  }

  __device__ CutMatrix(const BipartitionArgs& args, int places, char* shared)
      : CutMatrix(args, places, shared, memory(args.tokens, cluster_size(), places)) {}

 protected:
  const BipartitionArgs& a;
  const int64_t b;
  Slabs<T, kStay> slabs;

  __device__ bool cut() const { return a.method == kNcut; }

  // False: an embedding is not finite. Sets `factor` to one over the lengths.
  __device__ bool find_lengths() {
    double* const squares = reinterpret_cast<double*>(share());
    for (unsigned i = warp(); i < n; i += kWarps) {
      float quick = 0;
#pragma unroll 4
      for (int word = lane(); word < slabs.words(); word += kWarp) {
        float x[kWordFeatures];
        slabs.any_word_of(i, word, x);
#pragma unroll
        for (int k = 0; k < kWordFeatures; ++k) quick += x[k] * x[k];
      }
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2)
        quick += __shfl_xor_sync(kAllLanes, quick, step);
      double sum = quick;
      if (!(quick > 1e-30f && quick < 1e38f)) {  // squares may leave float's range
        sum = 0;
        for (int word = lane(); word < slabs.words(); word += kWarp) {
          float x[kWordFeatures];
          slabs.any_word_of(i, word, x);
#pragma unroll
          for (int k = 0; k < kWordFeatures; ++k) sum += static_cast<double>(x[k]) * x[k];
        }
        for (int step = kWarp / 2; step > 0; step /= 2)
          sum += __shfl_xor_sync(kAllLanes, sum, step);
      }
      if (lane() == 0) squares[i] = sum;
    }
    bool finite = true;
    sync_shares();
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const double sum = total(squares, i);
      finite &= sum < __builtin_huge_val();
      const double length = sqrt(sum);
      factor[i] = length < kShortest ? 0.0f : static_cast<float>(1 / length);
    }
    return __syncthreads_and(finite);
  }

  // For a cut the matrix is (1 + cosine) / 2 between roots of the degrees, else cosine / n.
  __device__ void find_degrees() {
    float squares[1] = {};
    if (cut()) {
      for (unsigned i = threadIdx.x; i < n; i += kThreads) vectors[i] = float4{1, 0, 0, 0};
      __syncthreads();
      apply_cosine();
    }
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      float degree = 1;
      if (cut()) {
        const float number = static_cast<float>(n);
        degree = fmaxf((number + products[i].x * factor[i]) / 2, 1e-6f * number);
      }
      trivial[i] = sqrtf(degree);
      root[i] = 1 / trivial[i];
      squares[0] += degree;
    }
    add_up(squares);  // which all wait for: factor was read by all
    const float length = 1 / sqrtf(squares[0]);
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      trivial[i] *= length;
      factor[i] *= root[i];
    }
  }

  // products = matrix vectors, both orthogonal to the trivial vector.
  __device__ void multiply() {
    float sums[kVectors] = {}, along_trivial[kVectors] = {};
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const float4 v = vectors[i];
      sums[0] += v.x * root[i];
      sums[1] += v.y * root[i];
      sums[2] += v.z * root[i];
      sums[3] += v.w * root[i];
    }
    add_up(sums);  // which all wait for: the vectors are written
    apply_cosine();
    const float half = cut() ? 0.5f : 1 / static_cast<float>(n);
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const float ones = cut() ? half * root[i] : 0.0f, cosine = half * factor[i];
      float4 y = products[i];
      y = float4{sums[0] * ones + y.x * cosine, sums[1] * ones + y.y * cosine,
                 sums[2] * ones + y.z * cosine, sums[3] * ones + y.w * cosine};
      products[i] = y;
      along_trivial[0] += y.x * trivial[i];
      along_trivial[1] += y.y * trivial[i];
      along_trivial[2] += y.z * trivial[i];
      along_trivial[3] += y.w * trivial[i];
    }
    add_up(along_trivial);
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const float t = trivial[i];
      float4& y = products[i];
      y = float4{y.x - along_trivial[0] * t, y.y - along_trivial[1] * t, y.z - along_trivial[2] * t,
                 y.w - along_trivial[3] * t};
    }
  }

 private:
  static_assert(kWarps == kWords, "each warp sums up a word of a slab");
  static constexpr int kRowsAtOnce = kStay ? 8 : 2;  // of a lane, whose vectors stay in registers
  static constexpr int kRowsOfLane = 4;              // in products
  static constexpr unsigned kApart = kWarp / kRowsOfLane;  // lanes, with rows in different banks

  const unsigned blocks;  // of the cluster
  float4* const along;    // x^T v
  float4* const shares;   // this block's parts of two sums over the cluster, where it has others
  int shares_at = 0;      // which of them is next

  __device__ CutMatrix(const BipartitionArgs& args, int places, char* shared,
                       const CutMemory& memory)
      : CutVectors(shared, args.tokens, memory),
        a(args),
        b(blockIdx.x / cluster_size()),
        slabs(args, b, places, index, shared + memory.slabs),
        blocks(kStay ? cluster_size() : 1),
        along(reinterpret_cast<float4*>(shared + memory.along)),
        shares(reinterpret_cast<float4*>(shared + memory.shares)) {}

  // A sum over the cluster: each block writes its part to share(), and reads those of all between
  // sync_shares() and the next one. Behind that one share() is this place again: all have read it.
  __device__ float4* share() const { return blocks > 1 ? shares + shares_at * a.tokens : products; }
  __device__ void sync_shares() {
    if (blocks > 1) cluster_sync();
    else __syncthreads();
    shares_at ^= 1;
  }
  template <class Sum>
  __device__ Sum total(Sum* share, unsigned i) const {
    if (blocks == 1) return share[i];
    Sum sum = {};
#pragma unroll 4
    for (unsigned rank = 0; rank < blocks; ++rank) sum = added(sum, cluster_map(share, rank)[i]);
    return sum;
  }
  static __device__ double added(double x, double y) { return x + y; }
  static __device__ float4 added(float4 x, float4 y) {
    return float4{x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
  }

  // products = rows (rows^T vectors): each row but the product's times its factor. All have written
  // the vectors; each thread may read the products of its own tokens.
  __device__ void apply_cosine() {
    float4* const sums = share();
    for (int turn = 0; turn < slabs.turns(); ++turn) {
      slabs.next(turn);
      sum_rows();
      __syncthreads();
      add_products(sums, turn == 0);
    }
    if (blocks == 1) return;
    sync_shares();
    for (unsigned i = threadIdx.x; i < n; i += kThreads) products[i] = total(sums, i);
  }

  // along = x^T v of the slabs at hand. A warp takes one word of each, a lane every 32nd row.
  __device__ void sum_rows() {
    const int word = static_cast<int>(warp());
    for (unsigned first = lane(); first - lane() < n; first += kRowsAtOnce * kWarp) {
      float4 v[kRowsAtOnce];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const unsigned i = first + r * kWarp;
        const float f = i < n ? factor[i] : 0.0f;
        v[r] = i < n ? vectors[i] : float4{0, 0, 0, 0};
        v[r] = float4{v[r].x * f, v[r].y * f, v[r].z * f, v[r].w * f};
      }
#pragma unroll 1
      for (int slab = 0; slab < slabs.at_once(); ++slab) {
        float sum[kWordFeatures * kVectors] = {};
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          // rows go two by two; behind the last one it comes again, times 0
          if (r % 2 == 0 && first - lane() + r * kWarp >= n) break;
          float x[kWordFeatures];
          slabs.word_of(slab, min(first + r * kWarp, n - 1), word, x);
#pragma unroll
          for (int k = 0; k < kWordFeatures; ++k) {
            sum[k * kVectors] += x[k] * v[r].x;
            sum[k * kVectors + 1] += x[k] * v[r].y;
            sum[k * kVectors + 2] += x[k] * v[r].z;
            sum[k * kVectors + 3] += x[k] * v[r].w;
          }
        }
        const float own = sum_of_lanes(sum);
        // lanes, which hold the same sum
        constexpr unsigned kEqual = kWarp / (kWordFeatures * kVectors);
        float* const to = part(along + (slab * kWords + word) * kWordFeatures, 0) + lane() / kEqual;
        if (lane() % kEqual == 0) *to = first == lane() ? own : *to + own;
      }
    }
  }

  // sums = x along, of the slabs at hand; or adds it. A warp takes 32 rows, a lane every eighth of
  // them, and every fourth word of a slab.
  __device__ void add_products(float4* sums, bool set) {
    for (unsigned first = threadIdx.x - lane(); first < n; first += kThreads) {
      float y[kRowsOfLane * kVectors] = {};
#pragma unroll 1
      for (int slab = 0; slab < slabs.at_once(); ++slab) {
#pragma unroll(kStay ? 2 : 1)  // more do not fit in registers with reads from memory
        for (int half = 0; half < kWords; half += kWords / 2) {
          const int word = half + static_cast<int>(lane() / kApart);
          float x[kRowsOfLane][kWordFeatures];
#pragma unroll
          for (int r = 0; r < kRowsOfLane; ++r)
            slabs.word_of(slab, min(first + lane() % kApart + r * kApart, n - 1), word, x[r]);
          const float4* const sum = along + (slab * kWords + word) * kWordFeatures;
#pragma unroll
          for (int k = 0; k < kWordFeatures; ++k) {
            const float4 t = sum[k];
#pragma unroll
            for (int r = 0; r < kRowsOfLane; ++r) {
              y[r * kVectors] += x[r][k] * t.x;
              y[r * kVectors + 1] += x[r][k] * t.y;
              y[r * kVectors + 2] += x[r][k] * t.z;
              y[r * kVectors + 3] += x[r][k] * t.w;
            }
          }
        }
      }
      float two[2 * kVectors],
          one[kVectors];  // rows; the lane's own is left, summed over four lanes
      fold(y, two, 16);
      fold(two, one, 8);
      const unsigned i = first + lane();
      const float4 own = float4{one[0], one[1], one[2], one[3]};
      if (i < n) sums[i] = set ? own : added(sums[i], own);
    }
  }
};

}  // namespace cuda
}  // namespace sma
