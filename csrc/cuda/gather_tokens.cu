// gather_tokens on a GPU: one warp a row, 16 bytes a thread where addresses and sizes allow it.
// An id outside [0, N) reads nothing and gives zeros.
#include "device.h"
#include "kernels.h"

namespace sma {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;

template <class Word>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    gather_rows(const char* input, int64_t batch_bytes, int64_t token_bytes, int64_t row_words,
                int64_t tokens, int64_t visible, int64_t rows, const int64_t* ids, Word* out) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t row = first; row < rows; row += step) {
    const int64_t id = ids[row];
    Word* to = out + row * row_words;
    if (id < 0 || id >= tokens) {
      for (int64_t i = threadIdx.x; i < row_words; i += kWarp) to[i] = Word{};
      continue;
    }
    const Word* from =
        reinterpret_cast<const Word*>(input + row / visible * batch_bytes + id * token_bytes);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < row_words; i += kWarp) to[i] = from[i];
  }
}

template <class Word>
bool fits(const GatherTokensArgs& a) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(a.rows) | reinterpret_cast<uintptr_t>(a.out) |
                        static_cast<uint64_t>(a.batch_bytes) |
                        static_cast<uint64_t>(a.token_bytes) | static_cast<uint64_t>(a.row_bytes);
  return bits % sizeof(Word) == 0;
}

template <class Word>
cudaError_t launch(const GatherTokensArgs& a, cudaStream_t stream) {
  const int64_t rows = a.batch * a.visible;
  const int64_t blocks = (rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const unsigned grid = static_cast<unsigned>(blocks < (1 << 20) ? blocks : (1 << 20));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(kWarp, kWarpsPerBlock);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, gather_rows<Word>, static_cast<const char*>(a.rows),
                            a.batch_bytes, a.token_bytes,
                            a.row_bytes / static_cast<int64_t>(sizeof(Word)), a.tokens, a.visible,
                            rows, a.ids, static_cast<Word*>(a.out));
}

}  // namespace

const char* gather_tokens(const GatherTokensArgs& a, int device, void* stream) {
  if (a.batch * a.visible == 0 || a.row_bytes == 0) return nullptr;
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const auto s = static_cast<cudaStream_t>(stream);
  if (fits<uint4>(a)) error = launch<uint4>(a, s);
  else if (fits<uint32_t>(a)) error = launch<uint32_t>(a, s);
  else error = launch<uint8_t>(a, s);
  if (before != device) cudaSetDevice(before);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace sma
