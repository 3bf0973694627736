#include "core/guarded.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "tests/check.h"

namespace shardckpt {
namespace {

constexpr size_t kPageBytes = 4096;

struct Copy {
  uint8_t* dst;
  const volatile uint8_t* src;
  size_t size_bytes;
};

void Run(void* told) {
  const Copy& copy = *static_cast<Copy*>(told);
  for (size_t i = 0; i < copy.size_bytes; ++i) copy.dst[i] = copy.src[i];
}

uint8_t* Pages(size_t count) {
  return static_cast<uint8_t*>(mmap(nullptr, count * kPageBytes, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
}

TEST(AGuardedReadOfMemoryThatIsThereIsWhole) {
  EXPECT(CanCatchFaults(), "no handler");
  uint8_t* src = Pages(2);
  std::memset(src, 7, 2 * kPageBytes);
  uint8_t dst[kPageBytes + 1] = {};
  Copy copy{dst, src, sizeof(dst)};
  EXPECT(ReadGuarded(src, sizeof(dst), Run, &copy), "it faulted");
  EXPECT(std::memcmp(dst, src, sizeof(dst)) == 0, "other bytes");
  munmap(src, 2 * kPageBytes);
}

TEST(AGuardedReadEndsWhereTheMemoryDoesAndTheNextOneWorks) {
  EXPECT(CanCatchFaults(), "no handler");
  uint8_t* src = Pages(2);
  std::memset(src, 7, 2 * kPageBytes);
  munmap(src + kPageBytes, kPageBytes);
  uint8_t dst[2 * kPageBytes] = {};
  for (int round = 0; round < 3; ++round) {
    Copy copy{dst, src, sizeof(dst)};
    EXPECT(!ReadGuarded(src, sizeof(dst), Run, &copy), "memory that is not there was read");
    EXPECT(dst[kPageBytes - 1] == 7 && dst[kPageBytes] == 0, "it ended elsewhere");
    copy.size_bytes = kPageBytes;
    EXPECT(ReadGuarded(src, kPageBytes, Run, &copy), "the part that is there faulted");
  }
  munmap(src, kPageBytes);
}

// Runs `fault` in a child whose handlers were those of the system, and returns how it ended.
int StatusOfChild(void (*fault)()) {
  const pid_t child = fork();
  if (child == 0) {
    fault();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

// Volatile, so that the compiler does not know what it may leave out.
const volatile uint8_t* volatile nowhere = nullptr;

TEST(AFaultThatIsNotGuardedIsWhatItWas) {
  EXPECT(CanCatchFaults(), "no handler");
  const int plain = StatusOfChild([] { (void)*nowhere; });
  EXPECT(!WIFEXITED(plain) || WEXITSTATUS(plain) != 0, "a fault outside of a read was swallowed");
  const int inside = StatusOfChild([] {
    // Within `use`, but not of the memory that is guarded.
    const auto use = [](void*) { (void)*nowhere; };
    static uint8_t memory[16];
    _exit(ReadGuarded(memory, sizeof(memory), use, nullptr) ? 0 : 0);
  });
  EXPECT(!WIFEXITED(inside) || WEXITSTATUS(inside) != 0, "another's fault was swallowed");
}

TEST(ASignalThatSomebodySentEndsTheProcess) {
  EXPECT(CanCatchFaults(), "no handler");
  const int sent = StatusOfChild([] { raise(SIGSEGV); });
  EXPECT(!WIFEXITED(sent) || WEXITSTATUS(sent) != 0, "a signal was swallowed");
}

TEST(AHandlerThatTookThePlaceIsNoticed) {
  EXPECT(CanCatchFaults(), "no handler");
  struct sigaction theirs{};
  theirs.sa_handler = [](int) { _exit(3); };
  struct sigaction ours;
  sigaction(SIGSEGV, &theirs, &ours);
  EXPECT(!CanCatchFaults(), "faults would go to another handler");
  sigaction(SIGSEGV, &ours, nullptr);
  EXPECT(CanCatchFaults(), "the handler is back");
}

}  // namespace
}  // namespace shardckpt
