// bipartition on a GPU: one block cuts a sample in two, as csrc/bipartition.h does.
//
// The similarities are not stored: rows x of length 1 are applied as x (x^T v), to four vectors at
// once. A slab of features of all rows comes to shared memory, is summed over the rows to its part
// of x^T v, and then adds its share to the products: so the embeddings are read once for each
// product, while the next slabs are on their way. Where not even one slab fits they are read from
// memory twice. All sums have a fixed order.
#include "cut_vectors.h"
#include "kernels.h"
#include "slabs.h"

namespace sma {
namespace cuda {
namespace {

constexpr int kRowsAtOnce = kThreads / kWords;
constexpr float kSignTie = 1e-3f;  // entries within this share of the largest count as large

template <class T>
class Cut : CutVectors {
 public:
  static constexpr int kEach = Slabs<T>::kEach;

  __device__ Cut(const BipartitionArgs& args, int buffers, char* shared)
      : CutVectors(shared, args.tokens),
        a(args),
        b(blockIdx.x),
        slabs(args, buffers, index, rest) {}

  __device__ void run() {
    list_valid();
    slabs.begin(n);
    const bool finite = find_lengths();
    const int size = min(kVectors, static_cast<int>(n) - 1);
    bool converged = false;
    double value = 0;
    if (finite && size > 0) {
      find_degrees();
      for (unsigned i = threadIdx.x; i < n; i += kThreads) vectors[i] = float4{0, 0, 0, 0};
      for (int j = 0; j < size; ++j) start(j, 0);
      for (int j = 0; j < size; ++j) make_orthogonal(j, 0);
      for (int64_t i = 0; i < a.iterations && !converged; ++i) {
        if (i > 0) {
          for (unsigned k = threadIdx.x; k < n; k += kThreads) vectors[k] = products[k];
          for (int j = 0; j < size; ++j) make_orthogonal(j, static_cast<unsigned>(i));
        }
        multiply();
        converged = turn_to_eigenvectors(size, a.tol);
      }
      value = s.values[0];
    }
    slabs.end();
    write(converged, value);
  }

 private:
  const BipartitionArgs& a;
  const int64_t b;
  Slabs<T> slabs;

  __device__ bool cut() const { return a.method == kNcut; }

  __device__ void list_valid() {
    const uint8_t* padding = a.padding == nullptr ? nullptr : a.padding + b * a.tokens;
    for (unsigned first = 0; first < a.tokens; first += kThreads) {
      const unsigned i = first + threadIdx.x;
      const bool valid = i < a.tokens && (padding == nullptr || !padding[i]);
      unsigned all;
      const unsigned before = before_me(valid, &all);
      if (valid) index[n + before] = static_cast<int>(i);
      n += all;
    }
    __syncthreads();
  }

  // The matrix

  // False: an embedding is not finite. Sets `factor` to one over the lengths.
  __device__ bool find_lengths() {
    bool finite = true;
    for (unsigned i = warp(); i < n; i += kWarps) {
      float quick = 0;
#pragma unroll 4
      for (int64_t d = lane() * kEach; d < a.width; d += kWarp * kEach) {
        float x[kEach];
        slabs.features(i, d, x);
#pragma unroll
        for (int k = 0; k < kEach; ++k) quick += x[k] * x[k];
      }
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2)
        quick += __shfl_xor_sync(kAllLanes, quick, step);
      double sum = quick;
      if (!(quick > 1e-30f && quick < 1e38f)) {  // squares may leave float's range
        sum = 0;
        for (int64_t d = lane() * kEach; d < a.width; d += kWarp * kEach) {
          float x[kEach];
          slabs.features(i, d, x);
#pragma unroll
          for (int k = 0; k < kEach; ++k) sum += static_cast<double>(x[k]) * x[k];
        }
        for (int step = kWarp / 2; step > 0; step /= 2)
          sum += __shfl_xor_sync(kAllLanes, sum, step);
        finite &= sum < __builtin_huge_val();
      }
      if (lane() == 0) factor[i] = sum > 0 ? static_cast<float>(fmin(1 / sqrt(sum), 3e38)) : 0.0f;
    }
    return __syncthreads_and(finite);
  }

  // For a cut the matrix is (1 + cosine) / 2 between roots of the degrees, else cosine / n.
  __device__ void find_degrees() {
    float squares[1] = {};
    if (cut()) {
      for (unsigned i = threadIdx.x; i < n; i += kThreads) vectors[i] = float4{1, 0, 0, 0};
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
    add_up(sums);
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

  // products = rows (rows^T vectors): each row but the product's times its factor.
  __device__ void apply_cosine() {
    for (unsigned i = threadIdx.x; i < n; i += kThreads) products[i] = float4{0, 0, 0, 0};
    __syncthreads();  // the vectors are written
    for (int slab = 0; slab < slabs.count; ++slab) {
      const char* const rows = slabs.next(slab);
      sum_rows(rows, slab);
      __syncthreads();
      for (unsigned at = threadIdx.x; at < Slabs<T>::kFeatures * kVectors; at += kThreads) {
        float sum = 0;
#pragma unroll
        for (unsigned w = 0; w < kWarps; ++w) sum += part(s.parts[w], 0)[at];
        part(s.along, 0)[at] = sum;
      }
      __syncthreads();
      add_products(rows, slab);
    }
  }

  // s.parts = each warp's part of x^T v. A lane takes one word of every fourth of its rows.
  __device__ void sum_rows(const char* rows, int slab) {
    float sum[kEach * kVectors] = {};
    const int word = static_cast<int>(lane() % kWords);
#pragma unroll(kVectors / kEach + 1)  // more do not fit in registers for 16 bits
    for (unsigned i = threadIdx.x / kWords; i < n; i += kRowsAtOnce) {
      float x[kEach];
      slabs.word_of(rows, slab, i, word, x);
      const float4 v = vectors[i];
      const float f = factor[i];
      const float each[kVectors] = {v.x * f, v.y * f, v.z * f, v.w * f};
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) sum[k * kVectors + j] += x[k] * each[j];
      }
    }
    // the four lanes of a word add up, each a fourth of the sums
    const bool high = lane() & 16, odd = lane() & 8;
    float half[kEach * kVectors / 2], quarter[kEach];
    fold(sum, half, high, 16);
    fold(half, quarter, odd, 8);
    const int feature = word * kEach + (2 * high + odd) * (kEach / kVectors);
#pragma unroll
    for (int k = 0; k < kEach; k += kVectors)
      s.parts[warp()][feature + k / kVectors] =
          float4{quarter[k], quarter[k + 1], quarter[k + 2], quarter[k + 3]};
  }
  // The lane that `bit` is set in keeps the upper half, and its neighbour the lower one.
  template <int kCount>
  static __device__ void fold(const float (&from)[2 * kCount], float (&to)[kCount], bool upper,
                              int bit) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float sent = upper ? from[i] : from[kCount + i];
      to[i] = (upper ? from[kCount + i] : from[i]) + __shfl_xor_sync(kAllLanes, sent, bit);
    }
  }

  __device__ void add_products(const char* rows, int slab) {
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      float4 y = products[i];
#pragma unroll 2
      for (int word = 0; word < kWords; ++word) {
        float x[kEach];
        slabs.word_of(rows, slab, i, word, x);
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
          const float4 along = s.along[word * kEach + k];
          y.x += x[k] * along.x;
          y.y += x[k] * along.y;
          y.z += x[k] * along.z;
          y.w += x[k] * along.w;
        }
      }
      products[i] = y;
    }
  }

  // The answer

  __device__ void write(bool converged, double value) {
    const bool found = n > 1 && value > kNothing;
    float most = 0, squares[1] = {};
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const float x = found ? vectors[i].x * root[i] : 0.0f;
      vectors[i].x = x;
      most = fmaxf(most, fabsf(x));
      squares[0] += x * x;
    }
    // sizes are in the order of their bits
    most = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(most)));
    __syncthreads();
    if (lane() == 0) s.counts[warp()] = __float_as_uint(most);
    add_up(squares);
    for (unsigned w = 0; w < kWarps; ++w) most = fmaxf(most, __uint_as_float(s.counts[w]));
    unsigned first = n;  // of the large entries
    for (unsigned i = threadIdx.x; i < n && first == n; i += kThreads)
      if (fabsf(vectors[i].x) >= (1 - kSignTie) * most) first = i;
    first = __reduce_min_sync(kAllLanes, first);
    __syncthreads();
    if (lane() == 0) s.counts[warp()] = first;
    __syncthreads();
    for (unsigned w = 0; w < kWarps; ++w) first = min(first, s.counts[w]);
    float scale = squares[0] > 0 ? 1 / sqrtf(squares[0]) : 0.0f;
    if (first < n && vectors[first].x < 0) scale = -scale;

    const int64_t from = b * a.tokens;
    for (int64_t i = threadIdx.x; i < a.tokens; i += kThreads) {
      a.vector[from + i] = 0;
      a.labels[from + i] = 0;
    }
    unsigned chosen = 0;
    for (unsigned start = 0; start < n; start += kThreads) {
      const unsigned i = start + threadIdx.x;
      const float x = i < n ? vectors[i].x * scale + 0.0f : 0.0f;
      unsigned all;
      const unsigned before = before_me(x > 0, &all);  // all zeros are written
      if (i < n) a.vector[from + index[i]] = x;
      if (x > 0) {
        a.labels[from + index[i]] = 1;
        a.ids[from + chosen + before] = index[i];
      }
      chosen += all;
    }
    for (int64_t i = chosen + threadIdx.x; i < a.tokens; i += kThreads) a.ids[from + i] = -1;
    if (threadIdx.x == 0) {
      const double eigenvalue = found ? value : 0;
      a.eigenvalue[b] = static_cast<float>(cut() ? 1 - eigenvalue : eigenvalue);
      a.converged[b] = converged;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    bipartition_kernel(const __grid_constant__ BipartitionArgs a, int buffers) {
  Cut<T>(a, buffers, shared_memory()).run();
}

}  // namespace

int bipartition(const BipartitionArgs& a, const Place& place) {
  if (a.batch == 0 || a.tokens == 0) return cudaSuccess;
  const OnDevice on(place);
  if (on.error() != cudaSuccess) return on.error();
  const int64_t room = limits_of(place.device).shared_bytes;
  if (bytes_of(a.tokens, 0) > room) return kTooManyTokens;
  // three slabs where two blocks still fit on a multiprocessor, which keeps 1024 bytes for each; or
  // as many as there is room for
  const int64_t half = room / 2 - 1024;
  int buffers = kMostBuffers;
  while (buffers > 0 && bytes_of(a.tokens, buffers) > (buffers > 2 ? half : room)) --buffers;
  const Grid grid = {dim3(static_cast<unsigned>(a.batch)), kThreads,
                     static_cast<size_t>(bytes_of(a.tokens, buffers))};
  if (a.dtype == kFloat32) return launch(bipartition_kernel<float>, grid, place, a, buffers);
  if (a.dtype == kBFloat16) return launch(bipartition_kernel<BFloat16>, grid, place, a, buffers);
  return launch(bipartition_kernel<Float16>, grid, place, a, buffers);
}

}  // namespace cuda
}  // namespace sma
