#include "core/file.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>

namespace shardckpt {
namespace {

// Linux moves at most 0x7ffff000 bytes in one call; a smaller round number keeps offsets aligned.
constexpr size_t kMaxCallBytes = size_t{1} << 30;

ssize_t PwriteUncached(int fd, const void* data, size_t size_bytes, off_t offset_bytes) {
#ifndef RWF_DONTCACHE
  constexpr int RWF_DONTCACHE = 0x80;  // Linux 6.14.
#endif
  const iovec piece{const_cast<void*>(data), size_bytes};
  return pwritev2(fd, &piece, 1, offset_bytes, RWF_DONTCACHE);
}

int StartWriteout(int fd, off_t offset_bytes, off_t size_bytes) {
  return sync_file_range(fd, offset_bytes, size_bytes, SYNC_FILE_RANGE_WRITE);
}

void PollReady(int fd, int timeout_ms) {
  pollfd entry{fd, POLLIN | POLLOUT, 0};
  poll(&entry, 1, timeout_ms);
}

Status Failure(const char* operation, int system_errno, int fd, size_t size_bytes,
               int64_t offset_bytes, size_t done_bytes) {
  return Status::Io(system_errno, std::string(operation) + " of " + std::to_string(size_bytes) +
                                      " bytes at offset " + std::to_string(offset_bytes) +
                                      " of fd " + std::to_string(fd) + " failed after " +
                                      std::to_string(done_bytes) +
                                      " bytes: " + std::strerror(system_errno));
}

Status CheckRange(const char* operation, const void* data, size_t size_bytes,
                  int64_t offset_bytes) {
  int64_t end = 0;
  if (offset_bytes < 0 || __builtin_add_overflow(offset_bytes, size_bytes, &end) ||
      (data == nullptr && size_bytes > 0)) {
    return Status::Invalid(std::string(operation) + ": " + std::to_string(size_bytes) +
                           " bytes at offset " + std::to_string(offset_bytes) +
                           (data == nullptr ? " of null memory" : "") +
                           " is no range of a file; pass an offset >= 0 and memory that exists.");
  }
  return Status::Ok();
}

// Calls transfer(start_bytes, size_bytes) until `needed_bytes` are done, it gets no further, or it
// fails. Every call starts at a multiple of `step_bytes`.
template <typename Transfer>
int TransferAll(const FileOps& ops, int fd, size_t size_bytes, size_t needed_bytes,
                size_t step_bytes, size_t* done_bytes, Transfer transfer) {
  int num_stalls = 0;
  while (*done_bytes < needed_bytes) {
    const size_t start = *done_bytes / step_bytes * step_bytes;
    const ssize_t result = transfer(start, std::min(size_bytes - start, kMaxCallBytes));
    if (result >= 0) {
      const size_t stop = start + static_cast<size_t>(result);
      if (stop <= *done_bytes) break;
      *done_bytes = stop;
      num_stalls = 0;
      continue;
    }
    const int error = errno;
    const bool is_busy = error == EAGAIN || error == EWOULDBLOCK;
    if ((error != EINTR && !is_busy) || ++num_stalls >= kMaxStalls) return error;
    if (is_busy) ops.wait_ready(fd, kStallTimeoutMs);
  }
  return 0;
}

Status Read(const char* operation, const FileOps& ops, int fd, void* data, size_t size_bytes,
            size_t needed_bytes, size_t step_bytes, int64_t offset_bytes, size_t* num_read_bytes) {
  if (Status status = CheckRange(operation, data, size_bytes, offset_bytes); !status.ok()) {
    return status;
  }
  auto* bytes = static_cast<uint8_t*>(data);
  size_t done = 0;
  const int error = TransferAll(
      ops, fd, size_bytes, needed_bytes, step_bytes, &done, [&](size_t start, size_t size) {
        return ops.pread(fd, bytes + start, size, offset_bytes + static_cast<int64_t>(start));
      });
  if (error != 0) return Failure(operation, error, fd, size_bytes, offset_bytes, done);
  *num_read_bytes = done;
  return Status::Ok();
}

// As in linux/mman.h, which older systems have without it.
constexpr long kCachestatCall = 451;
struct CachestatRange {
  uint64_t offset_bytes;
  uint64_t size_bytes;
};
struct Cachestat {
  uint64_t num_cached_pages;
  uint64_t num_dirty_pages;
  uint64_t num_writeback_pages;
  uint64_t num_evicted_pages;
  uint64_t num_recently_evicted_pages;
};

}  // namespace

const FileOps& SystemFileOps() {
  static constexpr FileOps kOps{::pwrite, ::pread, PollReady, PwriteUncached, StartWriteout};
  return kOps;
}

Status WriteFull(const FileOps& ops, int fd, const void* data, size_t size_bytes,
                 int64_t offset_bytes) {
  if (Status status = CheckRange("write_full", data, size_bytes, offset_bytes); !status.ok()) {
    return status;
  }
  const auto* bytes = static_cast<const uint8_t*>(data);
  size_t done = 0;
  int error =
      TransferAll(ops, fd, size_bytes, size_bytes, 1, &done, [&](size_t start, size_t size) {
        return ops.pwrite(fd, bytes + start, size, offset_bytes + static_cast<int64_t>(start));
      });
  // A write that takes nothing and names no reason would be tried for ever.
  if (error == 0 && done < size_bytes) error = EIO;
  if (error != 0) return Failure("write_full", error, fd, size_bytes, offset_bytes, done);
  return Status::Ok();
}

Status WriteExtent(const FileOps& ops, WriteTarget* target, const void* data, size_t size_bytes,
                   int64_t offset_bytes) {
  if (const int direct_fd = target->direct_fd; direct_fd >= 0) {
    Status status = WriteFull(ops, direct_fd, data, size_bytes, offset_bytes);
    // EINVAL: blocks larger than ours. Written again from the start, which gives the same bytes.
    if (status.system_errno() != EINVAL) return status;
    target->direct_fd = -1;
  }
  if (ops.pwrite_uncached != nullptr && target->takes_uncached) {
    FileOps uncached = ops;
    uncached.pwrite = ops.pwrite_uncached;
    Status status = WriteFull(uncached, target->fd, data, size_bytes, offset_bytes);
    const int error = status.system_errno();
    if (error != EOPNOTSUPP && error != EINVAL && error != ENOSYS) return status;
    target->takes_uncached = false;
  }
  Status status = WriteFull(ops, target->fd, data, size_bytes, offset_bytes);
  if (status.ok() && ops.start_writeout != nullptr) {
    // Only a hint: the flush at the end is what counts, and it reports every error.
    ops.start_writeout(target->fd, offset_bytes, static_cast<off_t>(size_bytes));
  }
  return status;
}

Status ReadFull(const FileOps& ops, int fd, void* data, size_t size_bytes, int64_t offset_bytes,
                size_t* num_read_bytes) {
  return Read("read_full", ops, fd, data, size_bytes, size_bytes, 1, offset_bytes, num_read_bytes);
}

Status ReadBlocks(const FileOps& ops, int fd, void* data, size_t size_bytes, size_t needed_bytes,
                  int64_t offset_bytes, size_t* num_read_bytes) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  if (address % kBlockBytes != 0 || size_bytes % kBlockBytes != 0 ||
      static_cast<uint64_t>(offset_bytes) % kBlockBytes != 0 || needed_bytes > size_bytes) {
    return Status::Invalid(
        "read_blocks: " + std::to_string(needed_bytes) + " of " + std::to_string(size_bytes) +
        " bytes at offset " + std::to_string(offset_bytes) + " into memory at " +
        std::to_string(address) + " are no blocks of " + std::to_string(kBlockBytes) + " bytes.");
  }
  return Read("read_blocks", ops, fd, data, size_bytes, needed_bytes, kBlockBytes, offset_bytes,
              num_read_bytes);
}

bool IsCached(int fd, int64_t offset_bytes, size_t size_bytes) {
  static const auto page_bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  static std::atomic<bool> is_call_known{true};
  if (size_bytes == 0) return true;
  const auto start = static_cast<uint64_t>(offset_bytes);
  const uint64_t num_pages = (start + size_bytes - 1) / page_bytes - start / page_bytes + 1;
  if (is_call_known.load(std::memory_order_relaxed)) {
    const CachestatRange range{start, size_bytes};
    Cachestat found{};
    if (syscall(kCachestatCall, fd, &range, &found, 0) == 0) {
      return found.num_cached_pages >= num_pages;
    }
    // EPERM: a sandbox's filter that does not know the call.
    if (errno != ENOSYS && errno != EPERM) return false;
    is_call_known.store(false, std::memory_order_relaxed);
  }
  return IsCachedAtThreeBytes(fd, offset_bytes, size_bytes);
}

bool IsCachedAtThreeBytes(int fd, int64_t offset_bytes, size_t size_bytes) {
  if (size_bytes == 0) return true;
  const auto last = static_cast<int64_t>(size_bytes) - 1;
  for (const int64_t place : {int64_t{0}, last / 2, last}) {
    char byte = 0;
    const iovec target{&byte, 1};
    if (preadv2(fd, &target, 1, offset_bytes + place, RWF_NOWAIT) != 1) return false;
  }
  return true;
}

}  // namespace shardckpt
