#include "core/arena.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>

namespace shardckpt {
namespace {

constexpr size_t kHugeBytes = size_t{2} << 20;
constexpr size_t kTouchBytes = size_t{64} << 20;
constexpr size_t kPageBytes = 4096;
constexpr int64_t kMaxTouchThreads = 8;
#ifdef MADV_POPULATE_WRITE
constexpr int kPopulateWrite = MADV_POPULATE_WRITE;
#else
constexpr int kPopulateWrite = 23;
#endif

struct Touch {
  uint8_t* address;
  size_t size_bytes;
  std::atomic<size_t> next{0};
  std::atomic<int> error{0};
};

void* TouchPieces(void* opaque) {
  Touch& touch = *static_cast<Touch*>(opaque);
  for (size_t at = touch.next.fetch_add(kTouchBytes); at < touch.size_bytes;
       at = touch.next.fetch_add(kTouchBytes)) {
    const size_t size = std::min(kTouchBytes, touch.size_bytes - at);
    if (madvise(touch.address + at, size, kPopulateWrite) == 0) continue;
    if (errno == ENOMEM || errno == EFAULT || errno == EHWPOISON) {
      touch.error = errno;
      break;
    }
    // Kernels before 5.14 do not know the advice.
    for (size_t page = 0; page < size; page += kPageBytes) touch.address[at + page] = 0;
  }
  return nullptr;
}

int TouchAll(uint8_t* address, size_t size_bytes, int64_t num_threads) {
  Touch touch{address, size_bytes};
  std::array<pthread_t, kMaxTouchThreads> helpers;
  const auto num_pieces = static_cast<int64_t>((size_bytes + kTouchBytes - 1) / kTouchBytes);
  const int64_t wanted = std::min({num_threads, num_pieces, kMaxTouchThreads}) - 1;
  size_t num_helpers = 0;
  while (static_cast<int64_t>(num_helpers) < wanted) {
    if (pthread_create(&helpers[num_helpers], nullptr, TouchPieces, &touch) != 0) break;
    ++num_helpers;
  }
  TouchPieces(&touch);
  for (size_t i = 0; i < num_helpers; ++i) pthread_join(helpers[i], nullptr);
  return touch.error;
}

}  // namespace

Arena::~Arena() {
  for (const Region& region : regions_) munmap(region.address, region.size_bytes);
}

Status Arena::Grow(int64_t num_slots, int64_t num_threads) {
  const int64_t num_new = num_slots - this->num_slots();
  if (num_new <= 0) return Status::Ok();
  const size_t size = static_cast<size_t>(num_new * kSlotBytes);
  // Private, because shared memory gets no huge pages on most machines.
  void* mapped = mmap(nullptr, size + kHugeBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  int error = mapped == MAP_FAILED ? errno : 0;
  if (error == 0) {
    auto* start = static_cast<uint8_t*>(mapped);
    const size_t head = (kHugeBytes - reinterpret_cast<uintptr_t>(start) % kHugeBytes) % kHugeBytes;
    if (head != 0) munmap(start, head);
    if (head != kHugeBytes) munmap(start + head + size, kHugeBytes - head);
    start += head;
    // Hints: a kernel without them takes the pages later, or copies the table at a fork.
    madvise(start, size, MADV_HUGEPAGE);
    madvise(start, size, MADV_DONTFORK);
    error = TouchAll(start, size, num_threads);
    if (error == 0) {
      regions_.push_back({start, size});
      for (size_t at = 0; at < size; at += kSlotBytes) slots_.push_back(start + at);
      return Status::Ok();
    }
    munmap(start, size);
  }
  return Status::Io(error, "no room for " + std::to_string(size) +
                               " more bytes of staging memory: " + std::strerror(error));
}

}  // namespace shardckpt
