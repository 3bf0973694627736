// Compiled with -msse4.2 or -march=armv8-a+crc: keep every inline function out of this file that
// another file also emits, or the linker may hand that file our instructions.
#if defined(__x86_64__) || defined(__aarch64__)

#include "core/crc32c_paths.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#else
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace shardckpt::crc {
namespace {

// Long streams spend little on joining; short ones take over what is left of the input.
constexpr size_t kLongBytes = 4096;
constexpr size_t kShortBytes = 256;

// Multiplies a state by x^(8 * stream length) with four look-ups.
struct ShiftTables {
  uint32_t entries[4][256];

  consteval explicit ShiftTables(size_t num_bytes) : entries{} {
    for (uint32_t byte_index = 0; byte_index < 4; ++byte_index) {
      // Shifting is linear, so eight single bits give all 256 entries.
      uint32_t bits[8] = {};
      for (uint32_t bit = 0; bit < 8; ++bit) {
        bits[bit] = Multiply(1u << (8 * byte_index + bit), PowerOfX(8 * num_bytes));
      }
      for (uint32_t byte = 0; byte < 256; ++byte) {
        for (uint32_t bit = 0; bit < 8; ++bit) {
          if ((byte >> bit & 1u) != 0) entries[byte_index][byte] ^= bits[bit];
        }
      }
    }
  }

  uint32_t Shift(uint32_t state) const {
    return entries[0][state & 0xFF] ^ entries[1][(state >> 8) & 0xFF] ^
           entries[2][(state >> 16) & 0xFF] ^ entries[3][state >> 24];
  }
};

constexpr ShiftTables kLongShift{kLongBytes};
constexpr ShiftTables kShortShift{kShortBytes};

inline uint32_t StepByte(uint32_t state, uint8_t byte) {
#if defined(__x86_64__)
  return _mm_crc32_u8(state, byte);
#else
  return __crc32cb(state, byte);
#endif
}

inline uint64_t StepWord(uint64_t state, const uint8_t* bytes) {
  uint64_t word;
  __builtin_memcpy(&word, bytes, sizeof(word));
#if defined(__x86_64__)
  return _mm_crc32_u64(state, word);
#else
  return __crc32cd(static_cast<uint32_t>(state), word);
#endif
}

template <size_t kStreamBytes>
const uint8_t* ThreeStreams(const ShiftTables& shift, const uint8_t* bytes, size_t* size_bytes,
                            uint64_t* state) {
  uint64_t first = *state;
  while (*size_bytes >= 3 * kStreamBytes) {
    uint64_t second = 0;
    uint64_t third = 0;
    for (size_t i = 0; i < kStreamBytes; i += 8) {
      first = StepWord(first, bytes + i);
      second = StepWord(second, bytes + kStreamBytes + i);
      third = StepWord(third, bytes + 2 * kStreamBytes + i);
    }
    first = shift.Shift(static_cast<uint32_t>(first)) ^ second;
    first = shift.Shift(static_cast<uint32_t>(first)) ^ third;
    bytes += 3 * kStreamBytes;
    *size_bytes -= 3 * kStreamBytes;
  }
  *state = first;
  return bytes;
}

}  // namespace

bool HasThreeWay() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("sse4.2") != 0;
#else
  return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#endif
}

uint32_t ThreeWay(uint32_t initial, const void* data, size_t size_bytes) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  uint64_t state = static_cast<uint32_t>(~initial);
  bytes = ThreeStreams<kLongBytes>(kLongShift, bytes, &size_bytes, &state);
  bytes = ThreeStreams<kShortBytes>(kShortShift, bytes, &size_bytes, &state);
  for (; size_bytes >= 8; size_bytes -= 8, bytes += 8) state = StepWord(state, bytes);
  auto rest = static_cast<uint32_t>(state);
  for (; size_bytes > 0; --size_bytes, ++bytes) rest = StepByte(rest, *bytes);
  return ~rest;
}

}  // namespace shardckpt::crc

#endif  // defined(__x86_64__) || defined(__aarch64__)
