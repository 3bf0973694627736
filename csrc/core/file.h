// Whole reads and writes at an offset: short results and interruptions are carried on from, errors
// are not.
#ifndef SHARDCKPT_CORE_FILE_H_
#define SHARDCKPT_CORE_FILE_H_

#include <sys/types.h>

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

// Bound of EINTR and EAGAIN in a row; with kStallTimeoutMs each, a stuck file gives up after 10 s.
inline constexpr int kMaxStalls = 100;
inline constexpr int kStallTimeoutMs = 100;

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_FILE_H_
