// The ways to copy that stream_copy.cc chooses from.
//
// Every path lives in a file of its own, because each is compiled for its own instruction set. None
// may be called before its Has...() said yes. Each pair does what StreamCopy and CopyAndCrc
// promise.
#ifndef SHARDCKPT_CORE_STREAM_COPY_PATHS_H_
#define SHARDCKPT_CORE_STREAM_COPY_PATHS_H_

#include <cstddef>
#include <cstdint>

namespace shardckpt::stream {

// Stores past the caches pay for whole lines only.
inline constexpr size_t kLineBytes = 64;

// Returns the bytes before the first whole line of `dst`, at most `size_bytes`. Static, so that no
// path emits code that another could be linked to.
static inline size_t HeadBytes(const void* dst, size_t size_bytes) {
  const size_t head_bytes = -reinterpret_cast<uintptr_t>(dst) % kLineBytes;
  return head_bytes < size_bytes ? head_bytes : size_bytes;
}

#if defined(__x86_64__) || defined(__aarch64__)
// The widest stores past the caches that go with the CRC instruction: AVX2, or STNP on ARM.
bool HasThreeWay();
void CopyThreeWay(void* dst, const void* src, size_t size_bytes);
uint32_t CopyAndCrcThreeWay(uint32_t initial, void* dst, const void* src, size_t size_bytes);
#endif

#if defined(__x86_64__)
// Whole cache lines as 512-bit registers, checksummed by carry-less multiplication on their way.
bool HasVpclmul();
void CopyVpclmul(void* dst, const void* src, size_t size_bytes);
uint32_t CopyAndCrcVpclmul(uint32_t initial, void* dst, const void* src, size_t size_bytes);
#endif

}  // namespace shardckpt::stream

#endif  // SHARDCKPT_CORE_STREAM_COPY_PATHS_H_
