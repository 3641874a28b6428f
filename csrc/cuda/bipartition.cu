// bipartition on a GPU: a block, or a cluster of blocks, cuts a sample in two, by the rules of
// cut_rules.h: four vectors are multiplied with the similarities again and again, made orthogonal
// to the trivial vector and to each other, and turned to the eigenvectors between them (subspace
// iteration with Rayleigh-Ritz).
//
// The embeddings of a sample are read once where the shared memory of a cluster's blocks holds
// them: each block keeps as many of the features, and all do the same with the vectors. Elsewhere
// one block reads them for each product of the matrix (cut_matrix.h); where not even one slab of
// features fits, twice.
#include "cut_matrix.h"
#include "kernels.h"

namespace sma {
namespace cuda {
namespace {

template <class T, bool kStay>
class Cut : CutMatrix<T, kStay> {
 public:
  using CutMatrix<T, kStay>::CutMatrix;

  __device__ void run() {
    list_valid();
    slabs.begin(n);
    const bool finite = this->find_lengths();
    const int size = min(kVectors, static_cast<int>(n) - 1);
    bool converged = false;
    double value = 0;
    if (finite && size > 0) {
      this->find_degrees();
      for (unsigned i = threadIdx.x; i < n; i += kThreads) vectors[i] = float4{0, 0, 0, 0};
      if (threadIdx.x == 0) s.remembered = 0;
      for (int j = 0; j < size; ++j) this->start(j, 0);
      for (unsigned i = 0; i < a.iterations && !converged; ++i) {
        if (i == 0 || !this->orthogonal_products(size)) {
          if (i > 0)
            for (unsigned k = threadIdx.x; k < n; k += kThreads) vectors[k] = products[k];
          for (int j = 0; j < size; ++j) this->gram_schmidt(j, i);
        }
        this->multiply();
        const bool told = i + 1 >= kFewest || n - 1 <= kVectors;  // or the span is all there is
        converged = this->rayleigh_ritz(size, static_cast<float>(a.tol)) && told;
      }
      value = s.values[0];
    }
    slabs.end();
    if constexpr (kStay) cluster_sync();  // others may still read this block's shared memory
    if (cluster_rank() == 0) write(converged, value);
  }

 private:
  using Base = CutMatrix<T, kStay>;
  using Base::a, Base::b, Base::slabs, Base::s, Base::of, Base::n;
  using Base::vectors, Base::products, Base::root, Base::index;

  __device__ void list_valid() {
    const uint8_t* padding = a.padding == nullptr ? nullptr : a.padding + b * a.tokens;
    for (unsigned first = 0; first < a.tokens; first += kThreads) {
      const unsigned i = first + threadIdx.x;
      const bool valid = i < a.tokens && (padding == nullptr || !padding[i]);
      unsigned all;
      const unsigned before = this->before_me(valid, &all);
      if (valid) index[n + before] = static_cast<int>(i);
      n += all;
    }
    __syncthreads();
  }

  __device__ void write(bool converged, double value) {
    const bool found = n > 1 && value > kNothing;
    float most = 0, squares[1] = {};
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const float x = found ? vectors[i].x * root[i] : 0.0f;
      vectors[i].x = x;
      most = fmaxf(most, fabsf(x));
      squares[0] += x * x;
    }
    this->add_up(squares);
    most = this->largest(most);
    unsigned first = n;  // of the large entries
    for (unsigned i = threadIdx.x; i < n && first == n; i += kThreads)
      if (fabsf(vectors[i].x) >= (1 - kSignTie) * most) first = i;
    first = this->least(first);
    float scale = squares[0] > 0 ? 1 / sqrtf(squares[0]) : 0.0f;
    most *= scale;
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
      const bool chosen_too = x > kZero * most;
      const unsigned before = this->before_me(chosen_too, &all);  // all zeros are written
      if (i < n) a.vector[from + index[i]] = x;
      if (chosen_too) {
        a.labels[from + index[i]] = 1;
        a.ids[from + chosen + before] = index[i];
      }
      chosen += all;
    }
    for (int64_t i = chosen + threadIdx.x; i < a.tokens; i += kThreads) a.ids[from + i] = -1;
    if (threadIdx.x == 0) {
      const double eigenvalue = found ? value : 0;
      a.eigenvalue[b] = static_cast<float>(this->cut() ? 1 - eigenvalue : eigenvalue);
      a.converged[b] = converged;
    }
  }
};

template <class T, bool kStay>
__global__ void __launch_bounds__(kThreads, 2)
    bipartition_kernel(const __grid_constant__ BipartitionArgs a, int places) {
  Cut<T, kStay>(a, places, shared_memory()).run();
}

template <class T, bool kStay>
int launch_cut(const BipartitionArgs& a, unsigned blocks, int64_t places, const Place& place) {
  if (a.batch * blocks > INT32_MAX) return kTooManySamples;
  const CutMemory memory = CutMatrix<T, kStay>::memory(a.tokens, blocks, places);
  Grid grid = {dim3(static_cast<unsigned>(a.batch) * blocks), kThreads,
               static_cast<size_t>(memory.bytes), blocks};
  grid.prefers_shared = true;
  return launch(bipartition_kernel<T, kStay>, grid, place, a, static_cast<int>(places));
}

template <class T>
int bipartition_of(const BipartitionArgs& a, const Place& place) {
  const DeviceLimits limits = limits_of(place.device);
  const int64_t room = limits.shared_bytes;
  // the fewest blocks that hold a sample, whatever the batch: the order of sums depends on it
  for (unsigned blocks = 1; blocks <= (limits.major >= 9 ? kPortableCluster : 1); blocks *= 2) {
    const int64_t share = ceil_div<int64_t>(Slabs<T, true>::count_of(a.width), blocks);
    if (CutMatrix<T, true>::memory(a.tokens, blocks, share).bytes <= room)
      return launch_cut<T, true>(a, blocks, share, place);
  }
  const auto bytes_with = [&](int places) {
    return CutMatrix<T, false>::memory(a.tokens, 1, places).bytes;
  };
  if (bytes_with(0) > room) return kTooManyTokens;
  // three slabs where two blocks still fit on a multiprocessor; or as many as there is room for
  const int64_t half = shared_room(limits, 2);
  int places = kMostPlaces;
  while (places > 0 && bytes_with(places) > (places > 2 ? half : room)) --places;
  return launch_cut<T, false>(a, 1, places, place);
}

}  // namespace

int bipartition(const BipartitionArgs& a, const Place& place) {
  if (a.batch == 0 || a.tokens == 0) return cudaSuccess;
  const OnDevice on(place);
  if (on.error() != cudaSuccess) return on.error();
  if (a.dtype == kFloat32) return bipartition_of<float>(a, place);
  if (a.dtype == kBFloat16) return bipartition_of<BFloat16>(a, place);
  return bipartition_of<Float16>(a, place);
}

}  // namespace cuda
}  // namespace sma
