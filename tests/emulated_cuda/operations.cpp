// What the lanes of a warp do together, done by the last that arrives; and asynchronous copies.
#include "emulated_cuda.h"

namespace emulated {

namespace {

constexpr uint64_t kGarbage = 0xDEADBEEFDEADBEEF;

template <class Combine>
void reduce(void* const* operands, Combine combine) {
  bool first = true;
  unsigned result = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (operands[lane] == nullptr) continue;
    const unsigned value = static_cast<Reduction*>(operands[lane])->value;
    result = first ? value : combine(result, value);
    first = false;
  }
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (operands[lane] != nullptr) static_cast<Reduction*>(operands[lane])->result = result;
}

float bf16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// Fragments as in the PTX ISA: with g = lane / 4 and t = lane % 4, the words of `a` are at rows g
// and g + 8 (the odd words), those of b at column g, and each word holds `kPacked` neighbours in k,
// the first word (first two, of a) those from kPacked * t, the next the same half a matrix later.
template <int kDepth, int kPacked, class Unpack>
void multiply(void* const* operands, Unpack unpack) {
  double a[16][kDepth], b[kDepth][8];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (operands[lane] == nullptr)
      fail("mma without lane " + std::to_string(lane) + ", which has returned");
    const Matrices& m = *static_cast<Matrices*>(operands[lane]);
    const unsigned g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < kPacked; ++i) {
        const unsigned k = half * kDepth / 2 + kPacked * t + i;
        a[g][k] = unpack(m.a[2 * half], i);
        a[g + 8][k] = unpack(m.a[2 * half + 1], i);
        b[k][g] = unpack(m.b[half], i);
      }
    }
  }
  double sums[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kDepth; ++k)
      for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    float* d = static_cast<Matrices*>(operands[lane])->d;
    for (unsigned i = 0; i < 4; ++i) {
      const double sum = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      d[i] = static_cast<float>(d[i] + sum);
    }
  }
}

void finish(const Copy& copy) {
  if (copy.from == nullptr) memset(copy.to, 0, 16);
  else memcpy(copy.to, copy.from, 16);
}

}  // namespace

void nothing(void* const*) {}

void shuffle(void* const* operands) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (operands[lane] == nullptr) continue;
    Shuffle& own = *static_cast<Shuffle*>(operands[lane]);
    const auto* source = static_cast<const Shuffle*>(operands[own.source]);
    own.result = source == nullptr ? kGarbage : source->value;
  }
}

void vote(void* const* operands) {
  unsigned result = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (operands[lane] != nullptr && static_cast<Vote*>(operands[lane])->predicate)
      result |= 1u << lane;
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (operands[lane] != nullptr) static_cast<Vote*>(operands[lane])->result = result;
}

void match(void* const* operands) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (operands[lane] == nullptr) continue;
    Match& own = *static_cast<Match*>(operands[lane]);
    own.result = 0;
    for (unsigned other = 0; other < kLanes; ++other)
      if (operands[other] != nullptr && static_cast<Match*>(operands[other])->value == own.value)
        own.result |= 1u << other;
  }
}

void reduce_add(void* const* operands) {
  reduce(operands, [](unsigned x, unsigned y) { return x + y; });
}
void reduce_min(void* const* operands) {
  reduce(operands, [](unsigned x, unsigned y) { return min(x, y); });
}
void reduce_max(void* const* operands) {
  reduce(operands, [](unsigned x, unsigned y) { return max(x, y); });
}
void reduce_min_signed(void* const* operands) {
  reduce(operands, [](int x, int y) { return static_cast<unsigned>(min(x, y)); });
}
void reduce_max_signed(void* const* operands) {
  reduce(operands, [](int x, int y) { return static_cast<unsigned>(max(x, y)); });
}
void reduce_and(void* const* operands) {
  reduce(operands, [](unsigned x, unsigned y) { return x & y; });
}
void reduce_or(void* const* operands) {
  reduce(operands, [](unsigned x, unsigned y) { return x | y; });
}
void reduce_xor(void* const* operands) {
  reduce(operands, [](unsigned x, unsigned y) { return x ^ y; });
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7FFF;
  if (rest >= 0x7C00) return __uint_as_float(sign | 0x7F800000 | rest << 13);
  // shifted into place, the exponent lacks the difference of the biases; subnormals come out right
  const float magnitude = __uint_as_float(rest << 13) * 0x1p112f;
  return __uint_as_float(sign | __float_as_uint(magnitude));
}

uint16_t float_to_half(float x) {
  const uint32_t bits = __float_as_uint(x), rest = bits & 0x7FFFFFFF;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (rest > 0x7F800000) return 0x7FFF;          // NaN
  if (rest >= 0x477FF000) return sign | 0x7C00;  // 65520 and more
  // a unit in the last place that float16 has there, at least 2^-24: dividing is exact
  const uint32_t unit = max(rest >> 23, 113u) - 10;
  const float units = nearbyintf(__uint_as_float(rest) / __uint_as_float(unit << 23));
  // those of a normal number are 1024 and more, which counts the exponent up by one
  return sign | static_cast<uint16_t>(((unit - 103) << 10) + static_cast<uint32_t>(units));
}

void mma_bf16(void* const* operands) {
  multiply<16, 2>(operands, [](uint32_t word, int i) {
    return bf16_to_float(static_cast<uint16_t>(word >> 16 * i));
  });
}
void mma_fp16(void* const* operands) {
  multiply<16, 2>(operands, [](uint32_t word, int i) {
    return half_to_float(static_cast<uint16_t>(word >> 16 * i));
  });
}
void mma_tf32(void* const* operands) {  // the low 13 bits are not looked at
  multiply<8, 1>(operands, [](uint32_t word, int) { return __uint_as_float(word & ~0x1FFFu); });
}

// Matrix i has its rows from the lanes 8 i to 8 i + 7; a lane gets 4 bytes of row lane / 4 of each.
void load_matrices(void* const* operands) {
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (operands[lane] == nullptr)
      fail("load_matrices without lane " + std::to_string(lane) + ", which has returned");
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    MatrixRow& own = *static_cast<MatrixRow*>(operands[lane]);
    for (unsigned i = 0; i < own.matrices; ++i) {
      const void* row = static_cast<const MatrixRow*>(operands[8 * i + lane / 4])->row;
      memcpy(&own.words[i], static_cast<const char*>(row) + lane % 4 * 4, 4);
    }
  }
}

char* cluster_map(char* at, unsigned rank) {
  char* own = current->block->shared;
  const unsigned size = cluster.cooperative ? 1 : cluster.size;
  if (rank >= size)
    fail("cluster_map to block " + std::to_string(rank) + " of " + std::to_string(size));
  if (at < own || at > own + cluster.shared_bytes)
    fail(
        "cluster_map of another address than one "
        "of the block's own shared memory");
  return (cluster.cooperative ? own : cluster.blocks[rank].shared) + (at - own);
}

void copy_async(void* to, const void* from) {
  const char* own = current->block->shared;
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0)
    fail("copy_async_16 at a misaligned address");
  if (to < own || static_cast<char*>(to) + 16 > own + cluster.shared_bytes)
    fail("copy_async_16 beyond the shared memory of the block");
  memset(to, 0xFF, 16);
  current->copies.push_back({to, from});
  ++current->uncommitted;
}

void copy_async_wait(size_t left) {
  std::vector<int>& groups = current->groups;
  if (groups.size() <= left) return;
  const size_t count = groups.size() - left;
  size_t done = 0;
  for (size_t i = 0; i < count; ++i) done += static_cast<size_t>(groups[i]);
  std::vector<Copy>& copies = current->copies;
  for (size_t i = 0; i < done; ++i) finish(copies[i]);
  copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(done));
  groups.erase(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(count));
}

}  // namespace emulated
