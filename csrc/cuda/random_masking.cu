// random_masking in one launch: a block, or from sm_90 on a cluster of blocks where samples are
// few, selects the tokens of a sample and copies the visible ones. Long rows, and large ones of few
// samples, take two launches: the selection, and the copy by as many blocks as it has work for.
//
// No ids are kept between the two: a search of ids_restore finds which token stands at a place.
#include <algorithm>

#include "rows.h"
#include "select_launch.h"

namespace sma {
namespace cuda {
namespace {

constexpr unsigned kMostThreads = 512;     // of a block that selects and copies
constexpr int64_t kPartBytes = 16 << 10;   // that a block copies at least where samples are shared,
constexpr int64_t kMostBytes = 128 << 10;  // and at most where they leave multiprocessors idle
constexpr int64_t kPartRows = 1024;        // that a block of the second launch copies at most

// The tokens of lowest noise are the chosen, num_masked of them, and stay visible.
struct KeepLowestArgs : SelectTokensArgs {
  float* float_mask;  // (B, N)
};

// What random_masking writes of a row, as MaskHighest.
class KeepLowest {
 public:
  using Args = KeepLowestArgs;
  static constexpr float kSign = -1.0f;
  static constexpr bool kIsPlain = true;
  static constexpr int64_t kLeast = 0;
  static constexpr bool kWritesPlaces = true;

  __device__ KeepLowest(const Args& a, int64_t sample, unsigned begin)
      : keep(static_cast<unsigned>(a.num_masked)),
        mask(hoisted(a.float_mask + sample * a.tokens + begin)),
        restore(hoisted(a.ids_restore + sample * a.tokens + begin)) {}

  __device__ void token(unsigned i, bool, bool chosen, unsigned at) const {
    restore[i] = at + (chosen ? 0 : keep);
    mask[i] = chosen ? 0.0f : 1.0f;
  }
  __device__ void end(unsigned, unsigned, const RowShare&) const {}

 private:
  const unsigned keep;
  float* const mask;
  int64_t* const restore;
};

KeepLowestArgs selection_of(const RandomMaskingArgs& a) {
  KeepLowestArgs args = {};
  args.scores = a.noise;
  args.dtype = kFloat32;
  args.batch = a.gather.batch;
  args.tokens = a.gather.tokens;
  args.width_masked = args.num_masked = a.gather.visible;
  args.mask_ratio = args.pool_ratio = -1;
  args.ids_restore = a.ids_restore;
  args.float_mask = a.mask;
  return args;
}

// The token at a place among the visible ones: the first with more of them up to it.
__device__ unsigned token_at(const int64_t* restore, unsigned tokens, unsigned keep,
                             unsigned place) {
  unsigned low = place, high = place + tokens - keep;
  while (low < high) {
    const unsigned middle = (low + high) / 2;
    const auto to = static_cast<unsigned>(restore[middle]);
    const unsigned up_to_it = to < keep ? to + 1 : middle - (to - keep);
    if (up_to_it > place) high = middle;
    else low = middle + 1;
  }
  return low;
}

// Where the visible rows come from that one block copies.
struct VisibleRows {
  static constexpr bool kReadsOnce = true;
  const char* rows;
  int64_t token_bytes;
  const unsigned* ids;  // from the row `first` on
  unsigned first;

  template <class Index>
  __device__ int64_t id(Index row) const {
    return ids[static_cast<unsigned>(row) - first];
  }
  template <class Index>
  __device__ const char* row(Index, int64_t id) const {
    return id < 0 ? nullptr : rows + id * token_bytes;
  }
};

// A block copies its share of a sample's visible rows. ids: room for as many as it copies from.
template <class Index>
__device__ void copy_visible(const GatherTokensArgs& a, const int64_t* ids_restore, int64_t sample,
                             unsigned rank, unsigned blocks, unsigned* ids) {
  with_word(word_bits(a), [&](auto word) {
    using Word = decltype(word);
    const int64_t row_words = a.row_bytes / static_cast<int64_t>(sizeof(Word));
    const auto words = share_of_words<Index>(a.visible, row_words, rank, blocks);
    if (words.begin == words.end) return;
    const auto first = static_cast<unsigned>(words.row.quotient(words.begin));
    const auto last = static_cast<unsigned>(words.row.quotient(words.end - 1));
    for (unsigned row = first + threadIdx.x; row <= last; row += blockDim.x)
      ids[row - first] = token_at(ids_restore + sample * a.tokens, static_cast<unsigned>(a.tokens),
                                  static_cast<unsigned>(a.visible), row);
    __syncthreads();
    const char* const rows = static_cast<const char*>(a.rows) + sample * a.batch_bytes;
    copy_rows(static_cast<Word*>(a.out) + sample * a.visible * row_words, words, threadIdx.x,
              blockDim.x, VisibleRows{rows, a.token_bytes, ids, first});
  });
}

__global__ void __launch_bounds__(kMostThreads)
    random_masking_kernel(const __grid_constant__ KeepLowestArgs select,
                          const __grid_constant__ GatherTokensArgs gather) {
  char* const memory = shared_memory();
  const unsigned sample = blockIdx.x / cluster_size();
  select_sample<KeepLowest>(select, sample, memory);
  // keys are not needed any more: ids go to their place
  copy_visible<uint32_t>(gather, select.ids_restore, sample, cluster_rank(), cluster_size(),
                         reinterpret_cast<unsigned*>(memory + sizeof(SelectShared)));
}

template <class Index>
__global__ void __launch_bounds__(kCopyThreads)
    copy_visible_kernel(const __grid_constant__ GatherTokensArgs a, const int64_t* ids_restore,
                        unsigned parts) {
  copy_visible<Index>(a, ids_restore, blockIdx.x / parts, blockIdx.x % parts, parts,
                      reinterpret_cast<unsigned*>(shared_memory()));
}

int copy_visible(const RandomMaskingArgs& a, const Place& place) {
  const GatherTokensArgs& g = a.gather;
  const int64_t bytes = g.visible * g.row_bytes;
  if (bytes == 0) return cudaSuccess;
  const OnDevice on(place);
  if (on.error() != cudaSuccess) return on.error();
  const int64_t parts = std::max(ceil_div(bytes, kPartBytes), ceil_div(g.visible, kPartRows));
  if (g.batch * parts > INT32_MAX) return kTooManySamples;
  const Grid grid = {dim3(static_cast<unsigned>(g.batch * parts)), kCopyThreads,
                     sizeof(unsigned) * (kPartRows + 2)};
  return launch(bytes < kSmallCopy ? copy_visible_kernel<uint32_t> : copy_visible_kernel<uint64_t>,
                grid, place, g, a.ids_restore, parts);
}

// The blocks that share a sample: as many as the GPU has room for.
int64_t blocks_of_sample(const GatherTokensArgs& a, const DeviceLimits& limits) {
  int64_t blocks = 1;
  if (limits.major < 9) return blocks;
  while (blocks < kPortableCluster && a.batch <= limits.clusters_at_once(blocks * 2) &&
         a.visible * a.row_bytes >= blocks * 2 * kPartBytes)
    blocks *= 2;
  return blocks;
}

// Launches it where samples are short enough, and as many as keep the GPU busy; else kNotAtOnce.
int launch_at_once(const RandomMaskingArgs& a, const Place& place) {
  const GatherTokensArgs& g = a.gather;
  const OnDevice on(place);
  if (on.error() != cudaSuccess) return on.error();
  const DeviceLimits limits = limits_of(place.device);
  const int64_t bytes = g.visible * g.row_bytes, blocks = blocks_of_sample(g, limits);
  const auto shared_bytes = static_cast<int64_t>(select_sample_bytes(g.tokens));
  // two blocks on a multiprocessor: one copies while the other selects
  if (shared_bytes * 2 > limits.shared_bytes || bytes >= kSmallCopy) return kNotAtOnce;
  if (g.batch * blocks < limits.multiprocessors && bytes > blocks * kMostBytes) return kNotAtOnce;
  if (g.batch * blocks > INT32_MAX) return kNotAtOnce;
  Grid grid = {dim3(static_cast<unsigned>(g.batch * blocks)),
               std::clamp(threads_of(g.tokens, limits.major), kCopyThreads, kMostThreads),
               static_cast<size_t>(shared_bytes), static_cast<unsigned>(blocks)};
  grid.prefers_shared = true;
  return launch(random_masking_kernel, grid, place, selection_of(a), g);
}

}  // namespace

int random_masking(const RandomMaskingArgs& a, const Place& place) {
  if (a.gather.batch * a.gather.tokens == 0) return cudaSuccess;
  int error = launch_at_once(a, place);
  if (error != kNotAtOnce) return error;
  error = launch_select<KeepLowest>(selection_of(a), place);
  return error == 0 ? copy_visible(a, place) : error;
}

}  // namespace cuda
}  // namespace sma
