// Compiled with AVX-512 flags: keep every inline function out of this file that another file also
// emits, or the linker may hand that file our instructions.
#if defined(__x86_64__)

#include <cstring>

#include "core/crc32c_fold.h"
#include "core/crc32c_paths.h"
#include "core/stream_copy_paths.h"

namespace shardckpt::stream {
namespace {

using crc::Block;
using crc::kBlockBytes;

// The processor's own prefetching leaves a sixth of the bandwidth unused; this far ahead is enough.
constexpr size_t kAheadBytes = 1024;

// Returns what it copied, for the checksum.
inline Block CopyBlock(uint8_t* dst, const uint8_t* src) {
  for (size_t i = 0; i < kBlockBytes; i += kLineBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(src + kAheadBytes + i), _MM_HINT_T0);
  }
  const Block block = crc::LoadBlock(src);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), block.x0);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + 64), block.x1);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + 128), block.x2);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + 192), block.x3);
  return block;
}

}  // namespace

bool HasVpclmul() { return crc::HasVpclmul(); }

void CopyVpclmul(void* dst, const void* src, size_t size_bytes) {
  auto* to = static_cast<uint8_t*>(dst);
  const auto* from = static_cast<const uint8_t*>(src);
  const size_t head_bytes = HeadBytes(to, size_bytes);
  if (head_bytes > 0) std::memcpy(to, from, head_bytes);
  size_t i = head_bytes;
  for (; size_bytes - i >= kBlockBytes; i += kBlockBytes) CopyBlock(to + i, from + i);
  if (i < size_bytes) std::memcpy(to + i, from + i, size_bytes - i);
  _mm_sfence();
}

uint32_t CopyAndCrcVpclmul(uint32_t initial, void* dst, const void* src, size_t size_bytes) {
  auto* to = static_cast<uint8_t*>(dst);
  const auto* from = static_cast<const uint8_t*>(src);
  const size_t head_bytes = HeadBytes(to, size_bytes);
  if (head_bytes > 0) std::memcpy(to, from, head_bytes);
  uint32_t crc = crc::ThreeWay(initial, from, head_bytes);
  size_t i = head_bytes;
  if (size_bytes - i >= kBlockBytes) {
    const __m512i by_block = crc::Factors<8 * kBlockBytes>();
    Block block = crc::StartFrom(crc, CopyBlock(to + i, from + i));
    for (i += kBlockBytes; size_bytes - i >= kBlockBytes; i += kBlockBytes) {
      block = crc::FoldBlock(block, by_block, CopyBlock(to + i, from + i));
    }
    crc = crc::Reduce(crc::JoinBlock(block));
  }
  if (i < size_bytes) std::memcpy(to + i, from + i, size_bytes - i);
  _mm_sfence();
  return crc::ThreeWay(crc, from + i, size_bytes - i);
}

}  // namespace shardckpt::stream

#endif  // defined(__x86_64__)
