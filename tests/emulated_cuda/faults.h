// Turns what would kill the process while a kernel runs (a bad address, a stack that is full, a
// division of integers by zero) into a failure of the launch.
#pragma once
#include <signal.h>

namespace emulated {

class CatchFaults {  // on this thread, as long as it lives
 public:
  CatchFaults();
  ~CatchFaults();
  CatchFaults(const CatchFaults&) = delete;
  CatchFaults& operator=(const CatchFaults&) = delete;

 private:
  stack_t stack_before_;
};

}  // namespace emulated
