#include "cache.h"

#include <pthread.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sma {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Block {
  void* memory;
  size_t size;
};

struct Cache {
  std::mutex lock;
  std::vector<Block> free_blocks;  // oldest first
  size_t kept = 0;
  size_t limit = size_t{512} << 20;

  // Takes out the oldest blocks until `bytes` are kept; the caller frees them without the lock.
  std::vector<Block> shrink_to(size_t bytes) {
    size_t out = 0;
    for (; kept > bytes; ++out) kept -= free_blocks[out].size;
    std::vector<Block> gone(free_blocks.begin(), free_blocks.begin() + static_cast<long>(out));
    free_blocks.erase(free_blocks.begin(), free_blocks.begin() + static_cast<long>(out));
    return gone;
  }
};

Cache& cache() {
  static Cache* one = [] {  // never destroyed: tensors may outlive static destructors
    pthread_atfork([] { cache().lock.lock(); }, [] { cache().lock.unlock(); },
                   [] { cache().lock.unlock(); });
    return new Cache;
  }();
  return *one;
}

void free_all(const std::vector<Block>& blocks) {
  for (const Block& block : blocks) std::free(block.memory);
}

}  // namespace

void* take_block(size_t bytes, size_t* size) {
  if (bytes < kCachedFrom) {
    *size = (bytes + 63) / 64 * 64;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, *size + 64) != 0) throw std::bad_alloc();
    return memory;
  }
  Cache& c = cache();
  {
    const std::lock_guard<std::mutex> hold(c.lock);
    size_t best = c.free_blocks.size();
    for (size_t i = 0; i < c.free_blocks.size(); ++i) {
      const size_t have = c.free_blocks[i].size;
      if (have < bytes || have > bytes + bytes / 4 + kHugePage) continue;
      if (best == c.free_blocks.size() || have < c.free_blocks[best].size) best = i;
    }
    if (best < c.free_blocks.size()) {
      const Block block = c.free_blocks[best];
      c.free_blocks.erase(c.free_blocks.begin() + static_cast<std::ptrdiff_t>(best));
      c.kept -= block.size;
      *size = block.size;
      return block.memory;
    }
  }
  *size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* memory = nullptr;
  if (posix_memalign(&memory, kHugePage, *size) != 0) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(memory, *size, MADV_HUGEPAGE);
#endif
  return memory;
}

void give_block(void* block, size_t size) {
  std::vector<Block> gone = {{block, size}};
  if (size > kCachedFrom) {
    Cache& c = cache();
    const std::lock_guard<std::mutex> hold(c.lock);
    if (size <= c.limit) {
      gone = c.shrink_to(c.limit - size);
      c.free_blocks.push_back({block, size});
      c.kept += size;
    }
  }
  free_all(gone);
}

size_t cache_limit() { return cache().limit; }

void set_cache_limit(size_t bytes) {
  Cache& c = cache();
  std::vector<Block> gone;
  {
    const std::lock_guard<std::mutex> hold(c.lock);
    c.limit = bytes;
    gone = c.shrink_to(bytes);
  }
  free_all(gone);
}

}  // namespace sma
