// What the threads of a warp or of a block do together. Included by emulated_cuda.h.
#pragma once

namespace emulated {

struct Shuffle {
  uint64_t value;
  unsigned source;
  uint64_t result;
};
struct Vote {
  bool predicate;
  unsigned result;
};
struct Reduction {
  unsigned value, result;
};
struct Match {
  uint64_t value;
  unsigned result;
};

void shuffle(void* const* operands);
void vote(void* const* operands);
void reduce_add(void* const* operands);
void reduce_min(void* const* operands);
void reduce_max(void* const* operands);
void reduce_min_signed(void* const* operands);
void reduce_max_signed(void* const* operands);
void reduce_and(void* const* operands);
void reduce_or(void* const* operands);
void reduce_xor(void* const* operands);
void match(void* const* operands);
void nothing(void* const* operands);

inline constexpr WarpOperation kShuffle = {"__shfl_sync", shuffle};
inline constexpr WarpOperation kShuffleUp = {"__shfl_up_sync", shuffle};
inline constexpr WarpOperation kShuffleDown = {"__shfl_down_sync", shuffle};
inline constexpr WarpOperation kShuffleXor = {"__shfl_xor_sync", shuffle};
inline constexpr WarpOperation kBallot = {"__ballot_sync", vote};
inline constexpr WarpOperation kAny = {"__any_sync", vote};
inline constexpr WarpOperation kAll = {"__all_sync", vote};
inline constexpr WarpOperation kReduceAdd = {"__reduce_add_sync", reduce_add};
inline constexpr WarpOperation kReduceMin = {"__reduce_min_sync", reduce_min};
inline constexpr WarpOperation kReduceMax = {"__reduce_max_sync", reduce_max};
inline constexpr WarpOperation kReduceMinSigned = {"__reduce_min_sync", reduce_min_signed};
inline constexpr WarpOperation kReduceMaxSigned = {"__reduce_max_sync", reduce_max_signed};
inline constexpr WarpOperation kReduceAnd = {"__reduce_and_sync", reduce_and};
inline constexpr WarpOperation kReduceOr = {"__reduce_or_sync", reduce_or};
inline constexpr WarpOperation kReduceXor = {"__reduce_xor_sync", reduce_xor};
inline constexpr WarpOperation kMatch = {"__match_any_sync", match};
inline constexpr WarpOperation kSyncWarp = {"__syncwarp", nothing};

template <class T>
T shuffle(const WarpOperation& operation, unsigned mask, T value, unsigned source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  Shuffle operands = {0, source, 0};
  memcpy(&operands.value, &value, sizeof value);
  warp_wait(operation, mask, &operands);
  memcpy(&value, &operands.result, sizeof value);
  return value;
}

inline unsigned ballot(const WarpOperation& operation, unsigned mask, bool predicate) {
  Vote operands = {predicate, 0};
  warp_wait(operation, mask, &operands);
  return operands.result;
}

inline unsigned reduce(const WarpOperation& operation, unsigned mask, unsigned value) {
  Reduction operands = {value, 0};
  warp_wait(operation, mask, &operands);
  return operands.result;
}

}  // namespace emulated

// Lanes outside of the segment of `width` lanes leave a lane its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned w = static_cast<unsigned>(width), lane = emulated::current->lane;
  return emulated::shuffle(emulated::kShuffle, mask, value,
                           (lane & ~(w - 1)) | (static_cast<unsigned>(source) & (w - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned w = static_cast<unsigned>(width), lane = emulated::current->lane;
  return emulated::shuffle(emulated::kShuffleUp, mask, value,
                           (lane & (w - 1)) >= delta ? lane - delta : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned w = static_cast<unsigned>(width), lane = emulated::current->lane;
  return emulated::shuffle(emulated::kShuffleDown, mask, value,
                           (lane & (w - 1)) + delta < w ? lane + delta : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned w = static_cast<unsigned>(width), lane = emulated::current->lane;
  const unsigned source = lane ^ static_cast<unsigned>(bits);
  // an earlier segment may be read, a later one not
  return emulated::shuffle(emulated::kShuffleXor, mask, value,
                           source <= (lane | (w - 1)) ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulated::ballot(emulated::kBallot, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulated::ballot(emulated::kAny, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return emulated::ballot(emulated::kAll, mask, predicate == 0) == 0;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emulated::reduce(emulated::kReduceAdd, mask, value);
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value)));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return emulated::reduce(emulated::kReduceMin, mask, value);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return emulated::reduce(emulated::kReduceMax, mask, value);
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return static_cast<int>(
      emulated::reduce(emulated::kReduceMinSigned, mask, static_cast<unsigned>(value)));
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return static_cast<int>(
      emulated::reduce(emulated::kReduceMaxSigned, mask, static_cast<unsigned>(value)));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return emulated::reduce(emulated::kReduceAnd, mask, value);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emulated::reduce(emulated::kReduceOr, mask, value);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return emulated::reduce(emulated::kReduceXor, mask, value);
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  emulated::Match operands = {0, 0};
  memcpy(&operands.value, &value, sizeof value);
  emulated::warp_wait(emulated::kMatch, mask, &operands);
  return operands.result;
}

inline void __syncwarp(unsigned mask = ~0u) {
  emulated::warp_wait(emulated::kSyncWarp, mask, nullptr);
}

inline void __syncthreads() {
  emulated::barrier_wait(emulated::current->block->barrier, "__syncthreads", 0);
}
inline int __syncthreads_count(int predicate) {
  return emulated::barrier_wait(emulated::current->block->barrier, "__syncthreads_count",
                                predicate);
}
inline int __syncthreads_or(int predicate) {
  return emulated::barrier_wait(emulated::current->block->barrier, "__syncthreads_or", predicate) !=
         0;
}
inline int __syncthreads_and(int predicate) {
  return emulated::barrier_wait(emulated::current->block->barrier, "__syncthreads_and",
                                predicate == 0) == 0;
}
