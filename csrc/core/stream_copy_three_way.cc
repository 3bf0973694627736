// Compiled with -mavx2 -msse4.2 or -march=armv8-a+crc: keep every inline function out of this file
// that another file also emits, or the linker may hand that file our instructions.
#if defined(__x86_64__) || defined(__aarch64__)

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/crc32c_paths.h"
#include "core/crc32c_words.h"
#include "core/stream_copy_paths.h"

namespace shardckpt::stream {
namespace {

constexpr size_t kLineBytes = 64;
// Three streams this long lie in so few lines that their copy hits the first-level cache and the
// processor still prefetches ahead; with longer ones it does not (a third of the speed).
constexpr size_t kStreamBytes = 256;
constexpr size_t kBlockBytes = 3 * kStreamBytes;
constexpr crc::ShiftTables kShift{kStreamBytes};

// Bytes before the first whole line of `dst`, at most `size_bytes`.
inline size_t HeadBytes(const uint8_t* dst, size_t size_bytes) {
  const size_t head_bytes = -reinterpret_cast<uintptr_t>(dst) % kLineBytes;
  return head_bytes < size_bytes ? head_bytes : size_bytes;
}

#if defined(__x86_64__)
inline void CopyLine(uint8_t* dst, const uint8_t* src) {
  const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
  const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + 32));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(dst), first);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + 32), second);
}

// Stores past the caches are not ordered with what publishes `dst`.
inline void Fence() { _mm_sfence(); }
#else
inline void CopyLine(uint8_t* dst, const uint8_t* src) {
  // No intrinsic stores a pair with the hint not to cache it.
  asm volatile(
      "ldp q0, q1, [%1]\n\t"
      "ldp q2, q3, [%1, #32]\n\t"
      "stnp q0, q1, [%0]\n\t"
      "stnp q2, q3, [%0, #32]"
      :
      : "r"(dst), "r"(src)
      : "v0", "v1", "v2", "v3", "memory");
}

// STNP is ordered by a release like any store.
inline void Fence() {}
#endif

}  // namespace

bool HasThreeWay() {
#if defined(__x86_64__)
  return crc::HasThreeWay() && __builtin_cpu_supports("avx2") != 0;
#else
  return crc::HasThreeWay();
#endif
}

void CopyThreeWay(void* dst, const void* src, size_t size_bytes) {
  auto* to = static_cast<uint8_t*>(dst);
  const auto* from = static_cast<const uint8_t*>(src);
  const uint8_t* end = from + size_bytes;
  if (const size_t head_bytes = HeadBytes(to, size_bytes); head_bytes > 0) {
    std::memcpy(to, from, head_bytes);
    to += head_bytes;
    from += head_bytes;
  }
  for (; static_cast<size_t>(end - from) >= kLineBytes; to += kLineBytes, from += kLineBytes) {
    CopyLine(to, from);
  }
  if (from < end) std::memcpy(to, from, static_cast<size_t>(end - from));
  Fence();
}

uint32_t CopyAndCrcThreeWay(uint32_t initial, void* dst, const void* src, size_t size_bytes) {
  auto* to = static_cast<uint8_t*>(dst);
  const auto* from = static_cast<const uint8_t*>(src);
  const uint8_t* end = from + size_bytes;
  uint32_t crc = initial;
  if (const size_t head_bytes = HeadBytes(to, size_bytes); head_bytes > 0) {
    crc = crc::ThreeWay(crc, from, head_bytes);
    std::memcpy(to, from, head_bytes);
    to += head_bytes;
    from += head_bytes;
  }
  uint64_t state = static_cast<uint32_t>(~crc);
  for (; static_cast<size_t>(end - from) >= kBlockBytes; to += kBlockBytes, from += kBlockBytes) {
    crc::ThreeStates states{state};
    for (size_t i = 0; i < kStreamBytes; i += kLineBytes) {
      // Read before the stores: a load just behind a store to the same place in another page waits.
      states.Step<kStreamBytes>(from + i, kLineBytes);
      CopyLine(to + i, from + i);
      CopyLine(to + kStreamBytes + i, from + kStreamBytes + i);
      CopyLine(to + 2 * kStreamBytes + i, from + 2 * kStreamBytes + i);
    }
    state = states.Join(kShift);
  }
  crc = ~static_cast<uint32_t>(state);
  if (from < end) {
    crc = crc::ThreeWay(crc, from, static_cast<size_t>(end - from));
    std::memcpy(to, from, static_cast<size_t>(end - from));
  }
  Fence();
  return crc;
}

}  // namespace shardckpt::stream

#endif  // defined(__x86_64__) || defined(__aarch64__)
