// Compiled with -msse4.2 or -march=armv8-a+crc: keep every inline function out of this file that
// another file also emits, or the linker may hand that file our instructions.
#if defined(__x86_64__) || defined(__aarch64__)

#include "core/crc32c_paths.h"
#include "core/crc32c_words.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace shardckpt::crc {
namespace {

// Long streams spend little on joining; short ones take over what is left of the input.
constexpr size_t kLongBytes = 4096;
constexpr size_t kShortBytes = 256;

constexpr ShiftTables kLongShift{kLongBytes};
constexpr ShiftTables kShortShift{kShortBytes};

template <size_t kStreamBytes>
const uint8_t* ThreeStreams(const ShiftTables& shift, const uint8_t* bytes, size_t* size_bytes,
                            uint64_t* state) {
  while (*size_bytes >= 3 * kStreamBytes) {
    ThreeStates states{*state};
    states.Step<kStreamBytes>(bytes, kStreamBytes);
    *state = states.Join(shift);
    bytes += 3 * kStreamBytes;
    *size_bytes -= 3 * kStreamBytes;
  }
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
