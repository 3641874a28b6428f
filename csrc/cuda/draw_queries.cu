// draw_queries on a GPU: a selection of the candidates of lowest noise.
#include "select_launch.h"

namespace sma {
namespace cuda {
namespace {

// Those of lowest noise are the chosen.
struct DrawLowestArgs : SelectTokensArgs {
  int64_t* query_index;  // (B, width_masked)
};

// What draw_queries writes of a row, as MaskHighest.
class DrawLowest {
 public:
  using Args = DrawLowestArgs;
  static constexpr float kSign = -1.0f;
  static constexpr bool kIsPlain = false;
  static constexpr int64_t kLeast = 1;  // query, where there is a candidate
  static constexpr bool kWritesPlaces = false;

  __device__ DrawLowest(const Args& a, int64_t sample, unsigned begin)
      : begin(begin),
        width(static_cast<unsigned>(a.width_masked)),
        drawn(hoisted(a.query_index + sample * a.width_masked)) {}

  __device__ void token(unsigned i, bool, bool chosen, unsigned at) const {
    if (chosen) drawn[at] = begin + i;
  }
  __device__ void end(unsigned count, unsigned, const RowShare& share) const {
    const unsigned threads = share.blocks * blockDim.x;
    for (int64_t i = count + share.rank * blockDim.x + threadIdx.x; i < width; i += threads)
      drawn[i] = -1;
  }

 private:
  const unsigned begin, width;
  int64_t* const drawn;
};

}  // namespace

int draw_queries(const DrawQueriesArgs& a, const Place& place) {
  if (a.batch * a.num_queries == 0) return cudaSuccess;
  DrawLowestArgs args = {};
  args.scores = a.noise;
  args.dtype = kFloat32;
  args.padding = a.padding;
  args.batch = a.batch;
  args.tokens = a.candidates;
  args.width_masked = args.num_masked = a.num_queries;
  args.num_masked_rows = a.num_queries_rows;
  args.mask_ratio = args.pool_ratio = -1;
  args.query_index = a.query_index;
  return launch_select<DrawLowest>(args, place);
}

}  // namespace cuda
}  // namespace sma
