// The selection of many rows in one launch: one block a row, or where the row is long a cluster of
// blocks; without clusters, several of a grid whose blocks all wait for each other.
#pragma once
#include <algorithm>

#include "kernels.h"
#include "select.h"

namespace sma {
namespace cuda {

constexpr int64_t kLargePart = 16384;   // tokens of a block above which large clusters are better
constexpr int64_t kMostTeam = 32;       // blocks of a grid for a row: a lane reads what each found
constexpr unsigned kTeamThreads = 512;  // of such a block, at most: it takes more registers
constexpr int64_t kLeastPart = 4096;    // tokens of a block that shares a row

static_assert(found_bytes(1) <= kLeastPart * static_cast<int64_t>(sizeof(int64_t)),
              "what blocks find lies in ids_restore");

// From 12.0 on the kernel takes more registers than 1024 threads can have.
constexpr unsigned select_threads(int major) { return major >= 12 ? 512 : 1024; }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr unsigned kSelectThreads = select_threads(12);
#else
constexpr unsigned kSelectThreads = select_threads(0);
#endif

constexpr bool has_clusters(int major) { return major >= 9; }
// Whether the GPU that this is compiled for searches rows so.
#ifdef __CUDA_ARCH__
template <Search kSearch>
constexpr bool kSearches =
    kSearch == kAlone || (kSearch == kCluster) == has_clusters(__CUDA_ARCH__ / 100);
#else
template <Search kSearch>
constexpr bool kSearches = true;
#endif

// The part's keys lie behind SelectShared in shared memory where kHeld says so.
template <bool kHeld, bool kPlain, Search kSearch, class Output>
__global__ void __launch_bounds__(kSearch == kGrid ? kTeamThreads : kSelectThreads, 1)
    select_kernel(const __grid_constant__ typename Output::Args a, unsigned part_tokens) {
  if constexpr (kSearches<kSearch>) {
    auto* const shared = reinterpret_cast<SelectShared*>(shared_memory());
    auto* const keys = kHeld ? reinterpret_cast<uint32_t*>(shared + 1) : nullptr;
    unsigned blocks = 1;
    if constexpr (kSearch == kCluster) blocks = cluster_size();
    if constexpr (kSearch == kGrid) blocks = gridDim.x / static_cast<unsigned>(a.batch);
    const unsigned rank = blockIdx.x % blocks;
    const Span part = part_of_row(static_cast<unsigned>(a.tokens), part_tokens, rank);
    SelectRow<kHeld, kPlain, kSearch, Output>(a, blockIdx.x / blocks, {rank, blocks, part, part},
                                              shared, keys)
        .run(a.dtype);
  }
}

// A row is shared by as few blocks as can hold it, and by more while the GPU has room for them.
// Without clusters, only a row that no block can hold, by as many as can run at once.
inline int64_t blocks_of_row(const SelectTokensArgs& a, const DeviceLimits& limits,
                             int64_t most_held) {
  int64_t blocks = 1;
  if (!has_clusters(limits.major)) {
    if (a.tokens > most_held)
      blocks = std::min({kMostTeam, a.tokens / kLeastPart, limits.multiprocessors / a.batch});
    return std::max(blocks, int64_t{1});
  }
  while (blocks < kPortableCluster && a.tokens > blocks * most_held) blocks *= 2;
  while (blocks < kPortableCluster && a.batch <= limits.clusters_at_once(blocks * 2) &&
         a.tokens >= blocks * kLeastPart)
    blocks *= 2;
  const bool large = a.tokens > kPortableCluster * kLargePart;
  return large && limits.large_clusters() ? kLargeCluster : blocks;
}

inline unsigned threads_of(int64_t part, int major) {
  return part <= 64      ? 32
         : part <= 256   ? 64
         : part <= 1024  ? 128
         : part <= 4096  ? 256
         : part <= 16384 ? 512
                         : select_threads(major);
}

template <class Output>
using SelectKernel = void (*)(typename Output::Args, unsigned);

template <class Output, bool kHeld, bool kPlain>
SelectKernel<Output> kernel_of(Search search) {
  if constexpr (Output::kWritesPlaces)
    if (search == kGrid) return select_kernel<kHeld, kPlain, kGrid, Output>;
  return search == kAlone ? select_kernel<kHeld, kPlain, kAlone, Output>
                          : select_kernel<kHeld, kPlain, kCluster, Output>;
}
template <class Output, bool kHeld>
SelectKernel<Output> kernel_of(bool plain, Search search) {
  if (Output::kIsPlain || plain) return kernel_of<Output, kHeld, true>(search);
  return kernel_of<Output, kHeld, Output::kIsPlain>(search);
}

// So many blocks write what Output does of every row.
template <class Output>
int launch_rows(const typename Output::Args& a, const DeviceLimits& limits, int64_t most_held,
                int64_t blocks, const Place& place) {
  if (a.batch * blocks > INT32_MAX) return kTooManySamples;
  const int64_t part = ceil_div(a.tokens, blocks);
  const bool held = part <= most_held, plain = is_plain(a);
  const Search search = blocks == 1 ? kAlone : has_clusters(limits.major) ? kCluster : kGrid;
  Grid grid = {dim3(static_cast<unsigned>(a.batch * blocks)), threads_of(part, limits.major),
               sizeof(SelectShared) + (held ? held_bytes(part) : 0)};
  if (search == kCluster) grid.cluster = static_cast<unsigned>(blocks);
  grid.together = grid.all_or_none = search == kGrid;
  if (grid.together) grid.threads = std::min(grid.threads, kTeamThreads);
  grid.prefers_shared = true;
  return launch(
      held ? kernel_of<Output, true>(plain, search) : kernel_of<Output, false>(plain, search), grid,
      place, a, part);
}

// Writes what Output does of every row.
template <class Output>
int launch_select(const typename Output::Args& a, const Place& place) {
  if (a.batch == 0) return cudaSuccess;
  const OnDevice on(place);
  if (on.error() != cudaSuccess) return on.error();
  const DeviceLimits limits = limits_of(place.device);
  const int64_t room = limits.shared_bytes - static_cast<int64_t>(sizeof(SelectShared));
  const int64_t most_held = room / static_cast<int64_t>(sizeof(uint4)) * 4;
  const bool together = Output::kWritesPlaces || has_clusters(limits.major);
  const int64_t blocks = together ? blocks_of_row(a, limits, most_held) : 1;
  const int error = launch_rows<Output>(a, limits, most_held, blocks, place);
  // where MPS or a green context keeps multiprocessors from this process, each row has one block
  if (error != cudaErrorCooperativeLaunchTooLarge) return error;
  cudaGetLastError();  // which nobody else need find
  return launch_rows<Output>(a, limits, most_held, 1, place);
}

}  // namespace cuda
}  // namespace sma
