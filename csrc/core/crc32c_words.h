// The processor's CRC32C instruction, and the joining of streams that were computed side by side.
//
// For files compiled with -msse4.2 or -march=armv8-a+crc. Everything is local to the file that
// includes it, or the linker might hand its instructions to a file that must run on any processor.
#ifndef SHARDCKPT_CORE_CRC32C_WORDS_H_
#define SHARDCKPT_CORE_CRC32C_WORDS_H_

#if defined(__x86_64__)
#include <nmmintrin.h>
#else
#include <arm_acle.h>
#endif

#include "core/crc32c_paths.h"

namespace shardckpt::crc {
namespace {

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

// Three streams that lie one behind the other; the instruction's latency of three cycles hides
// among them.
struct ThreeStates {
  uint64_t first;
  uint64_t second = 0;
  uint64_t third = 0;

  template <size_t kStreamBytes>
  void Step(const uint8_t* bytes, size_t num_bytes) {
    for (size_t i = 0; i < num_bytes; i += 8) {
      first = StepWord(first, bytes + i);
      second = StepWord(second, bytes + kStreamBytes + i);
      third = StepWord(third, bytes + 2 * kStreamBytes + i);
    }
  }

  uint64_t Join(const ShiftTables& shift) const {
    const uint64_t front = shift.Shift(static_cast<uint32_t>(first)) ^ second;
    return shift.Shift(static_cast<uint32_t>(front)) ^ third;
  }
};

}  // namespace
}  // namespace shardckpt::crc

#endif  // SHARDCKPT_CORE_CRC32C_WORDS_H_
