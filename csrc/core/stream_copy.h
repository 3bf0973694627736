// Copies past the caches: for bytes that this processor does not read again soon.
//
// One pair of functions, several instruction sets. The fastest path that the processor has is
// chosen once, at the first call; SHARDCKPT_COPY=<name> chooses another. All paths write equal
// bytes and give equal values. Copies too small to gain go through the caches. Thread-safe.
#ifndef SHARDCKPT_CORE_STREAM_COPY_H_
#define SHARDCKPT_CORE_STREAM_COPY_H_

#include <cstddef>
#include <cstdint>
#include <span>

namespace shardckpt {

// Copies `size_bytes` from `src` to `dst` and returns Crc32c(initial, src, size_bytes), all in one
// pass over memory. Any alignment; the two must not overlap, and `src` must not change meanwhile,
// or the value may belong to neither state. The stores are fenced at the end, so that `dst` may be
// handed to another thread like any memory.
uint32_t CopyAndCrc(uint32_t initial, void* dst, const void* src, size_t size_bytes);

// Whether CopyAndCrc loads each byte once when `dst` is aligned to 64 bytes and the size is a
// multiple of 4096: then the checksum is that of what was stored, though `src` changes meanwhile.
bool CopyAndCrcReadsOnce();

// The same without a checksum.
void StreamCopy(void* dst, const void* src, size_t size_bytes);

// Name of the path that both take unless there is too little to copy.
const char* StreamCopyPathName();

// One way to copy.
struct StreamCopyPath {
  const char* name;
  bool (*is_supported)();
  void (*copy)(void* dst, const void* src, size_t size_bytes);
  uint32_t (*copy_and_crc)(uint32_t initial, void* dst, const void* src, size_t size_bytes);
  bool reads_once;  // See CopyAndCrcReadsOnce.
};

// All paths in this build, fastest first; the last one, "memcpy", runs everywhere.
std::span<const StreamCopyPath> StreamCopyPaths();

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_STREAM_COPY_H_
