#include "core/stream_copy.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "core/crc32c.h"
#include "core/stream_copy_paths.h"

namespace shardckpt {
namespace {

// The fence waits for memory, some 250 ns, which fewer bytes do not win back.
constexpr size_t kStreamFromBytes = 4096;

// What the checksum has just read is still in the first-level cache when it is copied.
constexpr size_t kBlockBytes = size_t{12} << 10;

void MemcpyCopy(void* dst, const void* src, size_t size_bytes) {
  if (size_bytes > 0) std::memcpy(dst, src, size_bytes);
}

uint32_t MemcpyCopyAndCrc(uint32_t initial, void* dst, const void* src, size_t size_bytes) {
  auto* to = static_cast<uint8_t*>(dst);
  const auto* from = static_cast<const uint8_t*>(src);
  uint32_t crc = initial;
  for (size_t start = 0; start < size_bytes; start += kBlockBytes) {
    const size_t block_bytes = std::min(kBlockBytes, size_bytes - start);
    crc = Crc32c(crc, from + start, block_bytes);
    std::memcpy(to + start, from + start, block_bytes);
  }
  return crc;
}

constexpr StreamCopyPath kPaths[] = {
#if defined(__x86_64__)
    {"avx512", stream::HasVpclmul, stream::CopyVpclmul, stream::CopyAndCrcVpclmul, true},
    {"avx2", stream::HasThreeWay, stream::CopyThreeWay, stream::CopyAndCrcThreeWay, false},
#elif defined(__aarch64__)
    {"armv8", stream::HasThreeWay, stream::CopyThreeWay, stream::CopyAndCrcThreeWay, false},
#endif
    {"memcpy", [] { return true; }, MemcpyCopy, MemcpyCopyAndCrc, false},
};

const StreamCopyPath& ChoosePath() {
  // An unknown or unsupported name falls through to the fastest path: the bytes are the same.
  const char* wanted = std::getenv("SHARDCKPT_COPY");
  if (wanted != nullptr) {
    for (const StreamCopyPath& path : kPaths) {
      if (std::strcmp(path.name, wanted) == 0 && path.is_supported()) return path;
    }
  }
  for (const StreamCopyPath& path : kPaths) {
    if (path.is_supported()) return path;
  }
  return kPaths[std::size(kPaths) - 1];
}

const StreamCopyPath& ChosenPath() {
  static const StreamCopyPath& path = ChoosePath();
  return path;
}

}  // namespace

uint32_t CopyAndCrc(uint32_t initial, void* dst, const void* src, size_t size_bytes) {
  if (size_bytes < kStreamFromBytes) return MemcpyCopyAndCrc(initial, dst, src, size_bytes);
  return ChosenPath().copy_and_crc(initial, dst, src, size_bytes);
}

bool CopyAndCrcReadsOnce() { return ChosenPath().reads_once; }

void StreamCopy(void* dst, const void* src, size_t size_bytes) {
  if (size_bytes < kStreamFromBytes) return MemcpyCopy(dst, src, size_bytes);
  ChosenPath().copy(dst, src, size_bytes);
}

const char* StreamCopyPathName() { return ChosenPath().name; }

std::span<const StreamCopyPath> StreamCopyPaths() { return kPaths; }

}  // namespace shardckpt
