// The scheduler: fibers, their stacks, who waits for whom, and what a launch may not do.
#include "scheduler.h"

#include <sys/mman.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>

#include "faults.h"

dim3 gridDim, blockDim;

namespace emulated {

Fiber* current = nullptr;
Cluster cluster;

namespace {

#ifdef __SANITIZE_ADDRESS__  // whose frames are larger
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kPage = 4096;
constexpr size_t kGuarded = 4096;  // stacks: each takes two of 65,530 mappings that Linux allows
constexpr size_t kSharedAlignment = 128;
constexpr size_t kGuard = 1024;  // bytes behind the shared memory of a block
constexpr char kGuardByte = 0x5A;
constexpr char kUnwritten = static_cast<char>(0xFF);  // NaN in every floating-point format

std::mutex one_launch;
Context scheduler;
std::vector<Fiber> fibers;
std::vector<char*> stacks;
std::vector<Fiber*> ready;
std::vector<char> shared;
const std::function<void()>* kernel;
std::string failure;
uint64_t random_state;
size_t window;  // the next to run is one of so many that became ready last

unsigned draw(size_t bound) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<unsigned>((random_state * 0x2545F4914F6CDD1D >> 32) * bound >> 32);
}

std::string text(const uint3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) +
         ")";
}

std::string place(const Fiber& fiber) {
  return "block " + text(fiber.block->index) + ", thread " + text(fiber.thread);
}

std::string hex(unsigned value) {
  char digits[16];
  snprintf(digits, sizeof digits, "0x%08x", value);
  return digits;
}

std::string deadlock() {
  struct Group {
    int count = 0;
    const Fiber* first;
  };
  std::map<std::string, Group> groups;
  for (const Fiber* f = cluster.barrier.begin; f != cluster.barrier.end; ++f) {
    if (f->barrier == nullptr && f->operation == nullptr) continue;  // returned
    Group& group =
        groups[f->barrier != nullptr ? f->barrier->name
                                     : f->operation->name + (" with mask " + hex(f->mask))];
    if (group.count++ == 0) group.first = f;
  }
  std::string message = "deadlock:";
  for (const auto& [where, group] : groups)
    message += (message.back() == ':' ? " " : "; ") + std::to_string(group.count) +
               " threads wait in " + where + ", the first is " + place(*group.first);
  return message;
}

// Goes on with a fiber that can run; with the scheduler where there is none.
void run_next(Context& from) {
  if (ready.empty()) {
    if (cluster.barrier.live > 0) failure = deadlock();
    switch_context(from, scheduler);
    return;
  }
  const size_t newest = ready.size() - 1;
  std::swap(ready[newest - draw(std::min(ready.size(), window))], ready[newest]);
  Fiber* next = ready.back();
  ready.pop_back();
  if (&next->context == &from) return;
  current = next;
  switch_context(from, next->context);
}

// Does the operation that lanes of `mask` wait in, if all have arrived.
void try_operation(Warp& warp, const WarpOperation* operation, unsigned mask) {
  const unsigned lanes = mask & warp.live;
  if ((warp.waiting & lanes) != lanes) return;
  void* operands[kLanes] = {};
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    const Fiber& f = warp.first[__builtin_ctz(rest)];
    if (f.operation != operation || f.mask != mask) return;  // it comes later, or never
    operands[f.lane] = f.operands;
  }
  operation->perform(operands);
  warp.waiting &= ~lanes;
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    Fiber& f = warp.first[__builtin_ctz(rest)];
    f.operation = nullptr;
    ready.push_back(&f);
  }
}

void try_release(Barrier& barrier) {
  if (barrier.arrived == 0 || barrier.arrived != barrier.live) return;
  for (Fiber* f = barrier.begin; f != barrier.end; ++f) {
    if (f->barrier != &barrier) continue;
    f->barrier = nullptr;
    f->result = barrier.count;
    ready.push_back(f);
  }
  barrier.arrived = barrier.count = 0;
}

bool holds(const char* from, size_t bytes, char value) {
  return bytes == 0 || (from[0] == value && memcmp(from, from + 1, bytes - 1) == 0);
}

// Once all its threads have returned, nothing may look at the shared memory of a block.
void finish_block(Block& block) {
  if (!holds(block.shared + cluster.shared_bytes, kGuard, kGuardByte))
    fail("wrote behind the " + std::to_string(cluster.shared_bytes) +
         " bytes of shared memory of the block");
  if (cluster.size > 1) memset(block.shared, kUnwritten, cluster.shared_bytes);
}

void thread_main() {
  (*kernel)();
  Fiber& self = *current;
  Warp& warp = *self.warp;
  warp.live &= ~(1u << self.lane);
  for (unsigned rest = warp.waiting; rest != 0; rest &= rest - 1) {
    const Fiber& f = warp.first[__builtin_ctz(rest)];
    if (f.operation != nullptr) try_operation(warp, f.operation, f.mask);
  }
  if (--self.block->barrier.live == 0) {
    finish_block(*self.block);
    cluster.left = cluster.cooperative;
    if (cluster.left && cluster.barrier.arrived > 0)
      fail("returned while others wait in grid_sync");
  }
  --cluster.barrier.live;
  try_release(self.block->barrier);
  try_release(cluster.barrier);
  run_next(self.context);
}

// One page below each of the first stacks cannot be touched: all threads run the same code, and
// what overflows one would overflow these. The pool only grows.
char* stack(size_t index) {
  constexpr size_t kChunk = 256;
  while (stacks.size() <= index) {
    void* memory = mmap(nullptr, kChunk * kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = 0; i < kChunk; ++i) {
      char* begin = static_cast<char*>(memory) + i * kStack;
      if (stacks.size() < kGuarded && mprotect(begin, kPage, PROT_NONE) != 0)
        throw std::runtime_error(
            "too many threads at once for this system: raise vm.max_map_count");
      stacks.push_back(begin);
    }
  }
  return stacks[index];
}

void start_thread(Fiber& f, size_t index) {
  // stacks that begin at the same place in their pages would share few lines of the cache
  start_context(f.context, stack(index), kStack - index % 32 * 64, thread_main);
#ifdef __SANITIZE_ADDRESS__  // the frames of the thread before it, which have not returned
  __asan_unpoison_memory_region(stack(index) + kPage, kStack - kPage);
#endif
  f.operation = nullptr;
  f.barrier = nullptr;
  f.copies.clear();
  f.groups.clear();
  f.uncommitted = 0;
}

// Starts the blocks of the cluster whose first block is at `origin`.
void start_cluster(const Launch& launch, uint3 origin) {
  const dim3 size = launch.block;
  const unsigned threads = size.x * size.y * size.z;
  const unsigned warps = (threads + kLanes - 1) / kLanes;
  ready.clear();
  for (unsigned rank = 0; rank < cluster.size; ++rank) {
    const dim3 c = launch.cooperative ? launch.grid : launch.cluster;
    Fiber* first = &fibers[rank * threads];
    Block& block = cluster.blocks[rank];
    block.index = {origin.x + rank % c.x, origin.y + rank / c.x % c.y, origin.z + rank / c.x / c.y};
    block.rank = rank;
    const size_t base = -reinterpret_cast<uintptr_t>(shared.data()) % kSharedAlignment;
    block.shared = &shared[base + rank * cluster.shared_stride];
    memset(block.shared, kUnwritten, cluster.shared_bytes);
    memset(block.shared + cluster.shared_bytes, kGuardByte, kGuard);
    block.barrier = block.part_barrier = {first, first + threads, static_cast<int>(threads)};
    for (unsigned w = 0; w < warps; ++w)
      cluster.warps[rank * warps + w] = {
          first + w * kLanes, threads - w * kLanes < kLanes ? (1u << threads % kLanes) - 1 : ~0u};
    for (unsigned t = 0; t < threads; ++t) {
      first[t].block = &block;
      first[t].warp = &cluster.warps[rank * warps + t / kLanes];
      first[t].lane = t % kLanes;
      first[t].thread = {t % size.x, t / size.x % size.y, t / size.x / size.y};
      start_thread(first[t], rank * threads + t);
      ready.push_back(&first[t]);
    }
  }
  const unsigned all = cluster.size * threads;
  cluster.barrier = {fibers.data(), fibers.data() + all, static_cast<int>(all)};
}

void run_cluster() {
  window = size_t{1} << draw(12);
  run_next(scheduler);
  for (const Block& block : cluster.blocks)  // with one block there is nobody to write there
    if (failure.empty() && cluster.size > 1 &&
        !holds(block.shared, cluster.shared_bytes, kUnwritten))
      failure = "wrote to the shared memory of block " + text(block.index) + " after it returned";
}

}  // namespace

void fail(const std::string& message) {
  failure = message + ", in " + place(*current);
  switch_context(current->context, scheduler);
  abort();  // never reached: a launch that failed is not gone on with
}

void warp_wait(const WarpOperation& operation, unsigned mask, void* operands) {
  Fiber& self = *current;
  if ((mask >> self.lane & 1) == 0)
    fail(std::string(operation.name) + " with mask " + hex(mask) + ", which lacks the lane itself");
  self.operation = &operation;
  self.mask = mask;
  self.operands = operands;
  self.warp->waiting |= 1u << self.lane;
  try_operation(*self.warp, &operation, mask);
  run_next(self.context);
}

int barrier_wait(Barrier& barrier, const char* name, int predicate) {
  if (barrier.arrived > 0 && strcmp(barrier.name, name) != 0)
    fail(std::string(name) + " while others wait in " + barrier.name);
  Fiber& self = *current;
  barrier.name = name;
  barrier.count += predicate != 0;
  ++barrier.arrived;
  self.barrier = &barrier;
  try_release(barrier);
  run_next(self.context);
  return self.result;
}

void barrier_wait_some(Barrier& barrier, const char* name, unsigned threads) {
  const auto all = static_cast<unsigned>(barrier.end - barrier.begin);
  if (threads == 0 || threads % kLanes != 0 || threads > all)
    fail(std::string(name) + " of " + std::to_string(threads) + " threads of " +
         std::to_string(all));
  if (barrier.arrived > 0 && barrier.live != static_cast<int>(threads))
    fail(std::string(name) + " of " + std::to_string(threads) + " threads while others wait for " +
         std::to_string(barrier.live));
  barrier.live = static_cast<int>(threads);
  barrier_wait(barrier, name, 0);
}

std::string run(const Launch& launch) {
  const std::lock_guard<std::mutex> guard(one_launch);
  const CatchFaults catch_faults;
  const dim3 b = launch.block, c = launch.cooperative ? launch.grid : launch.cluster;
  const unsigned threads = b.x * b.y * b.z, size = c.x * c.y * c.z;
  const char* seed = getenv("SMA_EMULATED_SEED");
  random_state = (seed == nullptr ? 0 : strtoull(seed, nullptr, 10)) * 0x9E3779B97F4A7C15 + 1;
  for (int i = 0; i < 8; ++i) draw(1);  // near seeds begin alike
  gridDim = launch.grid;
  blockDim = b;
  kernel = &launch.kernel;
  failure.clear();
  cluster.size = size;
  cluster.cooperative = launch.cooperative;
  cluster.left = false;
  cluster.shared_bytes = launch.shared_bytes;
  cluster.shared_stride = (launch.shared_bytes + kGuard + kSharedAlignment - 1) & -kSharedAlignment;
  cluster.blocks.resize(size);
  cluster.warps.resize(size * ((threads + kLanes - 1) / kLanes));
  if (fibers.size() < size * threads) fibers.resize(size * threads);
  shared.resize(cluster.shared_stride * size + kSharedAlignment);

  // clusters in an order of their own: a step that has no factor in common with their number
  const dim3 clusters(launch.grid.x / c.x, launch.grid.y / c.y, launch.grid.z / c.z);
  const uint64_t count = uint64_t{clusters.x} * clusters.y * clusters.z;
  uint64_t at = draw(count), step = 1 + draw(count);
  while (std::gcd(step, count) != 1) ++step;
  for (uint64_t i = 0; i < count && failure.empty(); ++i, at = (at + step) % count) {
    const auto x = static_cast<unsigned>(at % clusters.x);
    const auto y = static_cast<unsigned>(at / clusters.x % clusters.y);
    const auto z = static_cast<unsigned>(at / clusters.x / clusters.y);
    start_cluster(launch, {x * c.x, y * c.y, z * c.z});
    run_cluster();
  }
  current = nullptr;
  return failure;
}

}  // namespace emulated
