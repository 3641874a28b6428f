// CUDA threads as fibers on one processor thread. A fiber runs until it must wait for others; who
// runs next is drawn, so that a barrier that is missing shows as a wrong result.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "context.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 gridDim, blockDim;  // no macros: cudaLaunchConfig_t has members of these names

namespace emulated {

constexpr unsigned kLanes = 32;

struct Fiber;

// What all lanes of a mask do together: the last to arrive does it for all of them.
struct WarpOperation {
  const char* name;
  // operands[lane]: what the lane brought and takes away; null for lanes that take no part
  void (*perform)(void* const* operands);
};

struct Warp {
  Fiber* first;
  unsigned live = 0, waiting = 0;  // one bit a lane
};

// All threads of a block, or of a cluster.
struct Barrier {
  Fiber *begin, *end;
  int live;
  int arrived = 0, count = 0;  // count: of predicates that held
  const char* name = nullptr;  // of the operation that threads now wait in
};

struct Block {
  uint3 index;
  unsigned rank;  // in its cluster
  char* shared;
  Barrier barrier, part_barrier;  // of all threads, and of some
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Fiber {
  Context context;
  Block* block;
  Warp* warp;
  uint3 thread;
  unsigned lane;
  const WarpOperation* operation;  // with mask and operands: where it waits in its warp
  unsigned mask;
  void* operands;
  Barrier* barrier;  // where it waits, or null
  int result;
  std::vector<Copy> copies;  // asynchronous, not done yet
  std::vector<int> groups;   // how many of them each commit closed
  int uncommitted;
};

// A cluster of blocks, all running at once; without clusters, one block. Of a cooperative launch it
// is the whole grid, in which every block is a cluster of its own.
struct Cluster {
  unsigned size;
  bool cooperative, left;              // whether a block of a cooperative launch has returned
  size_t shared_bytes, shared_stride;  // of a block, and from one block to the next
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  Barrier barrier;
};

struct Launch {
  dim3 grid, block, cluster;
  bool cooperative;
  size_t shared_bytes;
  std::function<void()> kernel;
};

extern Fiber* current;
extern Cluster cluster;

// Runs the whole grid. Returns what went wrong, or nothing.
std::string run(const Launch& launch);

// Ends the launch with this message and where the running thread is.
[[noreturn]] void fail(const std::string& message);

// Waits until all lanes of `mask` that have not returned are in the same operation.
void warp_wait(const WarpOperation& operation, unsigned mask, void* operands);

// Waits for all threads that have not returned; returns how many predicates held.
int barrier_wait(Barrier& barrier, const char* name, int predicate);

// Waits for so many threads, of whole warps; all of them must name the same number.
void barrier_wait_some(Barrier& barrier, const char* name, unsigned threads);

}  // namespace emulated
