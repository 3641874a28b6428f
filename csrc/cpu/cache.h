// Large blocks of memory, kept when they are freed and handed out again.
//
// A fresh block of 100 MB costs the kernel a fault for every page, several times what it takes to
// fill it. Outputs of a training step have the same sizes every step, so keeping them pays. At most
// cache_limit() bytes are kept unused; the oldest go first.
#pragma once
#include <cstddef>

namespace sma {

constexpr size_t kCachedFrom = size_t{1} << 20;  // smaller blocks are left to malloc

// Returns memory aligned to at least a cache line; `size` gets the block's size, for give_block.
// Throws std::bad_alloc.
void* take_block(size_t bytes, size_t* size);
void give_block(void* block, size_t size);

size_t cache_limit();
void set_cache_limit(size_t bytes);

}  // namespace sma
