// Whole reads and writes at an offset: short results and interruptions are carried on from, errors
// are not.
#ifndef SHARDCKPT_CORE_FILE_H_
#define SHARDCKPT_CORE_FILE_H_

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/status.h"

namespace shardckpt {

// The system calls below; tests pass their own, to cut calls short and to make them fail.
struct FileOps {
  ssize_t (*pwrite)(int fd, const void* data, size_t size_bytes, off_t offset_bytes);
  ssize_t (*pread)(int fd, void* data, size_t size_bytes, off_t offset_bytes);
  // Waits at most timeout_ms until fd takes or has bytes; the result does not matter.
  void (*wait_ready)(int fd, int timeout_ms);
  // pwrite that leaves nothing in the page cache (RWF_DONTCACHE); null where there is none.
  ssize_t (*pwrite_uncached)(int fd, const void* data, size_t size_bytes,
                             off_t offset_bytes) = nullptr;
  // Begins to write out a range of the page cache; null where there is none.
  int (*start_writeout)(int fd, off_t offset_bytes, off_t size_bytes) = nullptr;
};

const FileOps& SystemFileOps();

// Writes all of `data` at `offset_bytes`. Thread-safe for ranges that do not touch each other.
// kIo: an error, or no progress in kMaxStalls calls in a row; any part of the range may be written.
Status WriteFull(const FileOps& ops, int fd, const void* data, size_t size_bytes,
                 int64_t offset_bytes);

// Reads `size_bytes` at `offset_bytes` into `data` and stores how many came into `num_read_bytes`:
// fewer only where the file ends. Thread-safe.
// kIo: an error, or no progress in kMaxStalls calls in a row.
Status ReadFull(const FileOps& ops, int fd, void* data, size_t size_bytes, int64_t offset_bytes,
                size_t* num_read_bytes);

// Where extents of one new file go. The fastest way that the file system takes is found by trying:
// past the page cache (O_DIRECT), through it without staying there (RWF_DONTCACHE), buffered with
// the writing-out begun at once. A way that was refused is not tried again.
struct WriteTarget {
  int fd = -1;
  std::atomic<int> direct_fd{-1};  // The same file opened with O_DIRECT; -1: refused.
  std::atomic<bool> takes_uncached{true};
};

// Writes an extent whose address, size and offset are multiples of 4096. Thread-safe.
// kIo: as WriteFull.
Status WriteExtent(const FileOps& ops, WriteTarget* target, const void* data, size_t size_bytes,
                   int64_t offset_bytes);
// What O_DIRECT asks of offsets, sizes and memory; what a file system wants beyond it, it refuses
// with EINVAL.
inline constexpr size_t kBlockBytes = 4096;

// As ReadFull, by a descriptor that was opened with O_DIRECT: `data`, `size_bytes` and
// `offset_bytes` are multiples of kBlockBytes. Stops as soon as `needed_bytes` of them are there.
// kInvalid: they are no such multiples. kIo: an error, or no progress in kMaxStalls calls in a row.
Status ReadBlocks(const FileOps& ops, int fd, void* data, size_t size_bytes, size_t needed_bytes,
                  int64_t offset_bytes, size_t* num_read_bytes);

// Whether every byte of a range is in the page cache; false where the system does not tell.
bool IsCached(int fd, int64_t offset_bytes, size_t size_bytes);

// The same on kernels before 6.5: looks at the first, the middle and the last byte only.
bool IsCachedAtThreeBytes(int fd, int64_t offset_bytes, size_t size_bytes);

// Bound of EINTR and EAGAIN in a row; with kStallTimeoutMs each, a stuck file gives up after 10 s.
inline constexpr int kMaxStalls = 100;
inline constexpr int kStallTimeoutMs = 100;

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_FILE_H_
