// gather_tokens_backward on a GPU: a block fills a part of a sample's output. In shared memory it
// notes which row was gathered from each of its tokens, by looking at all ids of the sample. Tokens
// that several ids name are few: their rows are added up behind the others.
#include <algorithm>
#include <climits>

#include "numbers.h"
#include "rows.h"

namespace sma {
namespace cuda {
namespace {

// What is noted of a token: the place of an id that names it, with kSeveral where others do too.
constexpr int kNone = -1, kSeveral = INT_MIN;

constexpr int64_t kMostWords = int64_t{4} * kBlockWords;  // where a look at the ids costs little
constexpr int64_t kMostNotes = 8192;                      // so many notes fit
constexpr int64_t kBlocksEach = 32;  // of a multiprocessor: the last ones end together
constexpr int kBlocksAtOnce = 6;     // on one: registers for as many words on their way

// Which words of all samples the blocks take.
template <class Index>
struct Parts {
  int64_t sample;   // the first
  unsigned count;   // of a sample
  Index each, all;  // words of a part, and of a sample
  Index row_words;
  Divisor<Index> row;

  __device__ Words<Index> words(unsigned part) const {
    const Index begin = part * each;
    return {row_words, begin, all - begin < each ? all : begin + each, row};
  }
};

// Where the rows of a block come from.
template <class Index>
struct NotedRows {
  static constexpr bool kReadsOnce = true;
  const int* notes;
  Index first_row;
  const char* grad;
  int64_t row_bytes;

  __device__ int id(Index row) const { return notes[row - first_row]; }
  __device__ const char* row(Index, int place) const {
    return place < 0 ? nullptr : grad + static_cast<uint32_t>(place) * row_bytes;
  }
};

// Notes the places of ids in [first_id, first_id + rows). Returns whether one has several.
__device__ bool note(const int64_t* ids, int64_t count, int64_t first_id, int rows, int* notes) {
  for (int i = threadIdx.x; i < rows; i += kCopyThreads) notes[i] = kNone;
  __syncthreads();
  bool several = false;
  for (int64_t first = threadIdx.x; first < count; first += kBlockWords) {
    int64_t id[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t place = first + i * kCopyThreads;
      id[i] = place < count ? ids[place] - first_id : -1;
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (static_cast<uint64_t>(id[i]) >= static_cast<uint64_t>(rows)) continue;
      int* const at = notes + id[i];
      if (atomicExch(at, static_cast<int>(first + i * kCopyThreads)) == kNone) continue;
      atomicOr(at, kSeveral);  // behind the last exchange, so it stays
      several = true;
    }
  }
  return __syncthreads_or(several);
}

// The elements [begin, end) of a token's row: sums over the rows whose id is `wanted`, in order.
// The whole warp calls it.
template <class T>
__device__ void sum_row(const T* grad, const int64_t* ids, int64_t count, int64_t wanted,
                        int64_t width, int64_t begin, int64_t end, T* out) {
  constexpr int kSums = 4;
  for (int64_t first = begin; first < end; first += kSums * kWarp) {
    SumOf<T> sums[kSums] = {};
    for (int64_t from = 0; from < count; from += kWarp) {
      const int64_t place = from + lane();
      unsigned hits = __ballot_sync(kAllLanes, place < count && ids[place] == wanted);
      for (; hits != 0; hits &= hits - 1) {
        const T* row = grad + (from + __ffs(static_cast<int>(hits)) - 1) * width;
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          const int64_t column = first + i * kWarp + lane();
          if (column < end) sums[i] += to_float(row[column]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int64_t column = first + i * kWarp + lane();
      if (column < end) from_float(sums[i], out + column);
    }
  }
}

template <class T, class Word, class Index>
__global__ void __launch_bounds__(kCopyThreads, kBlocksAtOnce)
    gather_back_kernel(const __grid_constant__ GatherTokensBackwardArgs a, int64_t first_id,
                       const __grid_constant__ Parts<Index> parts) {
  int* const notes = reinterpret_cast<int*>(shared_memory());
  const int64_t sample = parts.sample + blockIdx.x / parts.count;
  const Words<Index> words = parts.words(blockIdx.x % parts.count);
  const Index first_row = words.row.quotient(words.begin);
  const int rows = static_cast<int>(words.row.quotient(words.end - 1) - first_row) + 1;
  const int64_t* const ids = a.ids + sample * a.visible;
  const T* const grad = static_cast<const T*>(a.grad) + sample * a.visible * a.width;
  T* const out = static_cast<T*>(a.out) + sample * a.tokens * a.width;
  first_id += static_cast<int64_t>(first_row);
  const bool several = note(ids, a.visible, first_id, rows, notes);
  const NotedRows<Index> from = {notes, first_row, reinterpret_cast<const char*>(grad),
                                 a.width * static_cast<int64_t>(sizeof(T))};
  copy_rows(reinterpret_cast<Word*>(out), words, threadIdx.x, kCopyThreads, from);
  if (!several) return;
  __syncthreads();  // zeros were written where sums come
  const auto elements = [](Index word) {
    return static_cast<int64_t>(word) * static_cast<int64_t>(sizeof(Word)) /
           static_cast<int64_t>(sizeof(T));
  };
  for (int i = static_cast<int>(warp()); i < rows; i += static_cast<int>(warps())) {
    if (notes[i] >= 0 || notes[i] == kNone) continue;
    const int64_t start = (static_cast<int64_t>(first_row) + i) * a.width;
    sum_row(grad, ids, a.visible, first_id + i, a.width,
            max(elements(words.begin) - start, int64_t{0}),
            min(elements(words.end) - start, a.width), out + start);
  }
}

// Launches one kernel, or a few where samples are more than the blocks of one.
template <class T, class Word, class Index>
cudaError_t launch_back(const GatherTokensBackwardArgs& a, int64_t first_id, const Place& place) {
  constexpr int64_t kSize = sizeof(Word);
  const int64_t row_words = a.width * static_cast<int64_t>(sizeof(T)) / kSize;
  const int64_t all = a.tokens * row_words;
  // a part is longer where there are many ids to look at, but enough of them keep all at work
  const int64_t many = std::max(kMostWords, 4 * a.visible * 8 / kSize);
  const int64_t fills = a.batch * all / (limits_of(place.device).multiprocessors * kBlocksEach);
  const int64_t most =
      std::max(std::min({many, fills, kMostNotes * row_words}), int64_t{kBlockWords});
  int64_t count = ceil_div(all, most);
  const int64_t each = ceil_div<int64_t>(ceil_div(all, count), kWarp) * kWarp;  // whole numbers
  count = ceil_div(all, each);
  const int64_t rows = std::min(each / row_words + 2, a.tokens);
  const int64_t samples = std::max<int64_t>(INT_MAX / count, 1);
  for (int64_t first = 0; first < a.batch; first += samples) {
    const int64_t blocks = std::min(samples, a.batch - first) * count;
    const Grid grid = {dim3(static_cast<unsigned>(blocks)), kCopyThreads,
                       static_cast<size_t>(rows) * sizeof(int)};
    const Parts<Index> parts = {first,
                                static_cast<unsigned>(count),
                                static_cast<Index>(each),
                                static_cast<Index>(all),
                                static_cast<Index>(row_words),
                                Divisor<Index>(row_words)};
    const cudaError_t error =
        launch(gather_back_kernel<T, Word, Index>, grid, place, a, first_id, parts);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int gather_back(const GatherTokensBackwardArgs& a, int64_t first_id, const Place& place) {
  if (a.batch * a.tokens * a.width == 0) return cudaSuccess;
  const OnDevice on(place);
  if (on.error() != cudaSuccess) return on.error();
  return with_number(a.dtype, [&](auto number) {
    using T = decltype(number);
    const auto row_bytes = static_cast<uint64_t>(a.width) * sizeof(T);
    cudaError_t error = cudaErrorInvalidValue;
    with_word(bits_of(a.grad) | bits_of(a.out) | row_bytes, [&](auto word) {
      using Word = decltype(word);
      const int64_t words = a.tokens * static_cast<int64_t>(row_bytes / sizeof(Word));
      if constexpr (sizeof(Word) >= sizeof(T) || sizeof(Word) == sizeof(uint32_t))
        error = words < kSmallCopy ? launch_back<T, Word, uint32_t>(a, first_id, place)
                                   : launch_back<T, Word, uint64_t>(a, first_id, place);
    });
    return error;
  });
}

int gather_tokens_backward(const GatherTokensBackwardArgs& a, const Place& place) {
  return gather_back(a, 0, place);
}

}  // namespace cuda
}  // namespace sma
