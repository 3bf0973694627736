#include "core/guarded.h"

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <mutex>

namespace shardckpt {
namespace {

struct Guarded {
  const uint8_t* begin;
  const uint8_t* end;
  sigjmp_buf jump;
};

// Initial-exec: a handler must not be the one for whom the thread's storage is made.
__attribute__((tls_model("initial-exec"))) thread_local Guarded* current = nullptr;

struct sigaction before_segv;
struct sigaction before_bus;

void Handle(int signal, siginfo_t* info, void* context) {
  Guarded* guarded = current;
  const auto* at = static_cast<const uint8_t*>(info->si_addr);
  const bool is_fault = info->si_code > 0;  // Else somebody sent it.
  if (is_fault && guarded != nullptr && at >= guarded->begin && at < guarded->end) {
    current = nullptr;
    // As the fault found it: the jump skips the return that would restore it.
    pthread_sigmask(SIG_SETMASK, &static_cast<ucontext_t*>(context)->uc_sigmask, nullptr);
    siglongjmp(guarded->jump, 1);
  }
  const struct sigaction& before = signal == SIGBUS ? before_bus : before_segv;
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(signal, info, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(signal);
  } else {
    // The instruction faults again, or the signal comes again, and the system does what it does.
    sigaction(signal, &before, nullptr);
    if (!is_fault) raise(signal);
  }
}

bool IsInstalled(int signal) {
  struct sigaction now;
  return sigaction(signal, nullptr, &now) == 0 && (now.sa_flags & SA_SIGINFO) != 0 &&
         now.sa_sigaction == Handle;
}

}  // namespace

bool CanCatchFaults() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction ours{};
    ours.sa_sigaction = Handle;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGSEGV, &ours, &before_segv);
    sigaction(SIGBUS, &ours, &before_bus);
  });
  return IsInstalled(SIGSEGV) && IsInstalled(SIGBUS);
}

bool ReadGuarded(const void* src, size_t size_bytes, void (*use)(void* told), void* told) {
  Guarded guarded;
  guarded.begin = static_cast<const uint8_t*>(src);
  guarded.end = guarded.begin + size_bytes;
  if (sigsetjmp(guarded.jump, 0) != 0) return false;
  current = &guarded;
  std::atomic_signal_fence(std::memory_order_seq_cst);
  use(told);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  current = nullptr;
  return true;
}

}  // namespace shardckpt
