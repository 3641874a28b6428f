// restore_tokens_backward on a GPU: rows go back as those of gather_tokens do. The gradient of one
// fill for all tokens is a sum over parts of the rows, then over the parts, in an order that does
// not depend on the GPU. Only rows that were filled are read.
#include <algorithm>

#include "numbers.h"
#include "rows.h"

namespace sma {
namespace cuda {
namespace {

constexpr int64_t kLeastRows = 128;  // of a part
constexpr unsigned kPartLanes = 32;  // that share the parts of a column
constexpr int kLoads = 2;            // rows that a thread has on their way
constexpr int kBlocksAtOnce = 6;     // of a multiprocessor, on every GPU

// What one launch adds up: columns of all rows, which follow each other.
struct Sums {
  const void* grad;
  const int64_t* ids_restore;
  int64_t rows, row_words;
  int64_t visible, fill;  // ids in [visible, visible + fill) are those of filled rows
  int64_t part_rows, columns, chunks;
  unsigned lanes;  // words that a block takes of a row, a power of 2
  void* parts;     // (P, columns)
};

template <class T, class Word>
struct FilledShared {
  static constexpr int kNumbers = sizeof(Word) / sizeof(T);
  SumOf<T> sums[kCopyThreads * kNumbers];
  unsigned list[kCopyThreads];
  int counts[kCopyThreads / kWarp];
};

template <class T>
struct PartsShared {
  SumOf<T> sums[kPartLanes][kWarp];
};

// Lists those of the block's next rows, one for each thread, that were filled.
__device__ int list_filled(bool filled, unsigned* list, int* counts) {
  const unsigned takes = __ballot_sync(kAllLanes, filled);
  if (lane() == 0) counts[warp()] = __popc(takes);
  __syncthreads();
  int before = 0, total = 0;
  for (unsigned w = 0; w < kCopyThreads / kWarp; ++w) {
    if (w < warp()) before += counts[w];
    total += counts[w];
  }
  if (filled) list[before + __popc(takes & ((1u << lane()) - 1))] = threadIdx.x;
  __syncthreads();
  return total;
}

template <class T, class Word>
__global__ void __launch_bounds__(kCopyThreads, kBlocksAtOnce)
    sum_filled_kernel(const __grid_constant__ Sums s) {
  using Sum = SumOf<T>;
  using Shared = FilledShared<T, Word>;
  constexpr int kNumbers = Shared::kNumbers;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int64_t part = blockIdx.x / s.chunks, chunk = blockIdx.x % s.chunks;
  const unsigned word = threadIdx.x % s.lanes, row_lane = threadIdx.x / s.lanes;
  const unsigned row_lanes = kCopyThreads / s.lanes;
  const int64_t word_columns = s.columns / kNumbers;
  const int64_t column = chunk * s.lanes + word;
  const bool inside = column < word_columns;
  const Word* const words = static_cast<const Word*>(s.grad) + column;
  const int64_t end = min(s.rows, (part + 1) * s.part_rows);
  Sum sums[kNumbers] = {};
  for (int64_t first = part * s.part_rows; first < end; first += kCopyThreads) {
    const int64_t row = first + threadIdx.x;
    const int64_t id = row < end ? s.ids_restore[row] - s.visible : -1;
    const int count = list_filled(static_cast<uint64_t>(id) < static_cast<uint64_t>(s.fill),
                                  shared.list, shared.counts);
    const Word* const rows = words + first * s.row_words;
    for (int i = static_cast<int>(row_lane); inside && i < count; i += row_lanes * kLoads) {
      Word loaded[kLoads] = {};  // zeros add nothing
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const int at = i + k * static_cast<int>(row_lanes);
        if (at < count) loaded[k] = load_word(rows + shared.list[at] * s.row_words);
      }
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        T numbers[kNumbers];
        memcpy(numbers, &loaded[k], sizeof(Word));
#pragma unroll
        for (int n = 0; n < kNumbers; ++n) sums[n] += to_float(numbers[n]);
      }
    }
    // the list is read before the next one's first barrier is passed, and written behind it
  }
#pragma unroll
  for (int n = 0; n < kNumbers; ++n) shared.sums[threadIdx.x * kNumbers + n] = sums[n];
  __syncthreads();
  const unsigned numbers = s.lanes * kNumbers;
  for (unsigned n = threadIdx.x; n < numbers; n += kCopyThreads) {
    const int64_t at = chunk * numbers + n;
    if (at >= s.columns) continue;
    Sum total = 0;
    for (unsigned l = 0; l < row_lanes; ++l) total += shared.sums[l * numbers + n];
    static_cast<Sum*>(s.parts)[part * s.columns + at] = total;
  }
}

// A warp's lanes are columns, its warps parts.
template <class T>
__global__ void __launch_bounds__(kPartLanes* kWarp)
    sum_parts_kernel(const SumOf<T>* parts, int64_t number, int64_t columns, T* out) {
  using Sum = SumOf<T>;
  auto& shared = *reinterpret_cast<PartsShared<T>*>(shared_memory());
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane();
  Sum sum = 0;
  if (column < columns)
    for (int64_t part = warp(); part < number; part += kPartLanes)
      sum += parts[part * columns + column];
  shared.sums[warp()][lane()] = sum;
  __syncthreads();
  if (warp() != 0 || column >= columns) return;
  for (unsigned w = 1; w < kPartLanes; ++w) sum += shared.sums[w][lane()];
  from_float(sum, out + column);
}

// Adds up the columns [first, first + columns) of the rows.
template <class T, class Word>
cudaError_t sum_columns(const RestoreTokensBackwardArgs& a, int64_t first, int64_t columns,
                        const Place& place) {
  using Sum = SumOf<T>;
  constexpr int64_t kNumbers = sizeof(Word) / sizeof(T);
  const int64_t rows = a.batch * a.tokens, words = columns / kNumbers;
  const int64_t most = a.scratch_bytes / (columns * static_cast<int64_t>(sizeof(Sum)));
  const int64_t part_rows = std::max(ceil_div(rows, most), kLeastRows);
  const int64_t number = std::max<int64_t>(ceil_div(rows, part_rows), 1);
  // fewer words of a row are more blocks, of which the last ones end together
  const unsigned most_lanes = sizeof(Word) == sizeof(uint4) ? kWarp / 2 : kWarp;
  unsigned lanes = 1;
  while (lanes < most_lanes && lanes < words) lanes *= 2;
  const int64_t chunks = ceil_div<int64_t>(words, lanes);
  const Sums sums = {static_cast<const T*>(a.grad) + first,
                     a.ids_restore,
                     rows,
                     a.width / kNumbers,
                     a.visible,
                     a.fill,
                     part_rows,
                     columns,
                     chunks,
                     lanes,
                     a.scratch};
  const Grid of_rows = {dim3(static_cast<unsigned>(number * chunks)), kCopyThreads,
                        sizeof(FilledShared<T, Word>)};
  const cudaError_t error = launch(sum_filled_kernel<T, Word>, of_rows, place, sums);
  if (error != cudaSuccess) return error;
  const Grid of_parts = {dim3(static_cast<unsigned>(ceil_div<int64_t>(columns, kWarp))),
                         kPartLanes * kWarp, sizeof(PartsShared<T>)};
  return launch(sum_parts_kernel<T>, of_parts, place, static_cast<const Sum*>(a.scratch), number,
                columns, static_cast<T*>(a.grad_fill) + first);
}

template <class T>
cudaError_t sum_shared_fill(const RestoreTokensBackwardArgs& a, const Place& place) {
  // one turn, but for rows whose sums are more than the scratch memory holds
  const int64_t most = a.scratch_bytes / static_cast<int64_t>(sizeof(double)) / kWarp * kWarp;
  const uint64_t bits = bits_of(a.grad) | static_cast<uint64_t>(a.width) * sizeof(T);
  for (int64_t first = 0; first < a.width; first += most) {
    const int64_t columns = std::min(most, a.width - first);
    const cudaError_t error = bits % sizeof(uint4) == 0
                                  ? sum_columns<T, uint4>(a, first, columns, place)
                                  : sum_columns<T, T>(a, first, columns, place);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int restore_tokens_backward(const RestoreTokensBackwardArgs& a, const Place& place) {
  const auto back = [&](int64_t tokens, int64_t first_id, void* out) {
    const GatherTokensBackwardArgs rows = {a.grad,  a.dtype,       a.batch, a.tokens, tokens,
                                           a.width, a.ids_restore, out,     0};
    return gather_back(rows, first_id, place);
  };
  const int error = back(a.visible, 0, a.grad_visible);
  if (error != cudaSuccess) return error;
  if (!a.shared_fill) return back(a.fill, a.visible, a.grad_fill);
  const OnDevice on(place);
  if (on.error() != cudaSuccess) return on.error();
  return with_number(a.dtype,
                     [&](auto number) { return sum_shared_fill<decltype(number)>(a, place); });
}

}  // namespace cuda
}  // namespace sma
