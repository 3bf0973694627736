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

constexpr size_t kStreamBytes = 512;
constexpr size_t kBlockBytes = 3 * kStreamBytes;
constexpr crc::ShiftTables kShift{kStreamBytes};
// The processor does not see by itself that three streams are one: without this a block takes three
// times as long. A plain copy gains a tenth.
constexpr size_t kAheadBytes = kBlockBytes;

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

// Copies kBlockBytes and returns the state behind them.
inline uint64_t CopyBlock(uint64_t state, uint8_t* dst, const uint8_t* src) {
  crc::ThreeStates states{state};
  for (size_t i = 0; i < kStreamBytes; i += kLineBytes) {
    for (size_t line = 0; line < 3 * kLineBytes; line += kLineBytes) {
      __builtin_prefetch(src + kAheadBytes + 3 * i + line);
    }
    // Read before the stores: a load just behind a store to the same place of another page waits.
    states.Step<kStreamBytes>(src + i, kLineBytes);
    for (size_t stream = 0; stream < kBlockBytes; stream += kStreamBytes) {
      CopyLine(dst + stream + i, src + stream + i);
    }
  }
  return states.Join(kShift);
}

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
  const size_t head_bytes = HeadBytes(to, size_bytes);
  if (head_bytes > 0) std::memcpy(to, from, head_bytes);
  size_t i = head_bytes;
  for (; size_bytes - i >= kLineBytes; i += kLineBytes) {
    __builtin_prefetch(from + i + kAheadBytes);
    CopyLine(to + i, from + i);
  }
  if (i < size_bytes) std::memcpy(to + i, from + i, size_bytes - i);
  Fence();
}

uint32_t CopyAndCrcThreeWay(uint32_t initial, void* dst, const void* src, size_t size_bytes) {
  auto* to = static_cast<uint8_t*>(dst);
  const auto* from = static_cast<const uint8_t*>(src);
  const size_t head_bytes = HeadBytes(to, size_bytes);
  if (head_bytes > 0) std::memcpy(to, from, head_bytes);
  uint64_t state = static_cast<uint32_t>(~crc::ThreeWay(initial, from, head_bytes));
  size_t i = head_bytes;
  for (; size_bytes - i >= kBlockBytes; i += kBlockBytes) {
    state = CopyBlock(state, to + i, from + i);
  }
  CopyThreeWay(to + i, from + i, size_bytes - i);  // Fences.
  return crc::ThreeWay(~static_cast<uint32_t>(state), from + i, size_bytes - i);
}

}  // namespace shardckpt::stream

#endif  // defined(__x86_64__) || defined(__aarch64__)
