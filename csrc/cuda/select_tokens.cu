// select_tokens on a GPU: one block a row, or a cluster of blocks where the row is long.
#include "kernels.h"
#include "select.h"

namespace sma {
namespace cuda {
namespace {

constexpr int64_t kMostCluster = 8;  // blocks that every GPU with clusters can bring together

// held: the part's keys and states lie behind SelectShared in shared memory.
__global__ void __launch_bounds__(1024, 1)
    select_kernel(const __grid_constant__ SelectTokensArgs a, unsigned part_tokens, bool held) {
  char* const memory = shared_memory();
  auto* const keys = reinterpret_cast<uint32_t*>(memory + sizeof(SelectShared));
  auto* const state = reinterpret_cast<uint8_t*>(keys + part_tokens);
  SelectRow(a, blockIdx.x / cluster_size(), part_tokens, reinterpret_cast<SelectShared*>(memory),
            held ? keys : nullptr, held ? state : nullptr)
      .run();
}

// A row is shared by as few blocks as can hold it, and by more while the GPU has room for them.
int64_t blocks_of_row(const SelectTokensArgs& a, const DeviceLimits& limits, int64_t most_held) {
  if (limits.major < 9) return 1;
  int64_t blocks = 1;
  while (blocks < kMostCluster && a.tokens > blocks * most_held) blocks *= 2;
  while (blocks < kMostCluster && a.batch * blocks * 2 <= limits.multiprocessors &&
         a.tokens >= blocks * 4096)
    blocks *= 2;
  return blocks;
}

unsigned threads_of(int64_t part) {
  return part <= 64      ? 32
         : part <= 256   ? 64
         : part <= 1024  ? 128
         : part <= 4096  ? 256
         : part <= 16384 ? 512
                         : 1024;
}

}  // namespace

int select_tokens(const SelectTokensArgs& a, const Place& place) {
  if (a.batch == 0) return cudaSuccess;
  const OnDevice on(place);
  if (on.error() != cudaSuccess) return on.error();
  const DeviceLimits& limits = limits_of(place.device);
  const int64_t room = limits.shared_bytes - static_cast<int64_t>(sizeof(SelectShared));
  const int64_t most_held = (room - 16) / 5;
  const int64_t blocks = blocks_of_row(a, limits, most_held);
  const int64_t part = (a.tokens + blocks - 1) / blocks;
  const bool held = part <= most_held;
  const Grid grid = {dim3(static_cast<unsigned>(a.batch * blocks)), threads_of(part),
                     sizeof(SelectShared) + (held ? held_bytes(part) : 0),
                     static_cast<unsigned>(blocks)};
  return launch(select_kernel, grid, place, a, part, held);
}

}  // namespace cuda
}  // namespace sma
