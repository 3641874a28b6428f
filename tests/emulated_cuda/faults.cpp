#include "faults.h"

#include <cstdio>

#include "scheduler.h"

namespace emulated {

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction before[3];
thread_local bool catching = false;
alignas(16) char own_stack[64 << 10];  // the one that faulted may be full

void handle(int signal, siginfo_t* info, void*) {
  if (!catching || current == nullptr) {  // nothing of a kernel: it happens again, as without us
    for (int i = 0; i < 3; ++i)
      if (kSignals[i] == signal) sigaction(signal, &before[i], nullptr);
    return;
  }
  char message[96];
  snprintf(message, sizeof message,
           signal == SIGFPE ? "an integer divided by zero (at %p)"
                            : "illegal memory access at address %p, or a stack that is full",
           info->si_addr);
  fail(message);  // the signal is not blocked meanwhile, so nothing needs to return from here
}

}  // namespace

CatchFaults::CatchFaults() {
  stack_t stack = {};
  stack.ss_sp = own_stack;
  stack.ss_size = sizeof own_stack;
  sigaltstack(&stack, &stack_before_);
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &before[i]);
  catching = true;
}

CatchFaults::~CatchFaults() {
  catching = false;
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &before[i], nullptr);
  sigaltstack(&stack_before_, nullptr);
}

}  // namespace emulated
