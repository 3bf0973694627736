#include <array>
#include <cstdint>

#include "core/crc32c_paths.h"

namespace shardckpt::crc {
namespace {

using Table256 = std::array<uint32_t, 256>;

// Entry [n][b] is the state of byte b followed by n zero bytes.
consteval std::array<Table256, 8> MakeTables() {
  std::array<Table256, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t state = byte;
    for (Table256& table : tables) {
      state = ShiftByBits(state, 8);
      table[byte] = state;
    }
  }
  return tables;
}

constexpr std::array<Table256, 8> kTables = MakeTables();

}  // namespace

uint32_t Table(uint32_t initial, const void* data, size_t size_bytes) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  uint32_t state = ~initial;
  // Bytes are put together by hand, so that the host's byte order does not matter.
  for (; size_bytes >= 8; size_bytes -= 8, bytes += 8) {
    state ^= static_cast<uint32_t>(bytes[0]) | static_cast<uint32_t>(bytes[1]) << 8 |
             static_cast<uint32_t>(bytes[2]) << 16 | static_cast<uint32_t>(bytes[3]) << 24;
    state = kTables[7][state & 0xFF] ^ kTables[6][(state >> 8) & 0xFF] ^
            kTables[5][(state >> 16) & 0xFF] ^ kTables[4][state >> 24] ^ kTables[3][bytes[4]] ^
            kTables[2][bytes[5]] ^ kTables[1][bytes[6]] ^ kTables[0][bytes[7]];
  }
  for (; size_bytes > 0; --size_bytes, ++bytes) {
    state = kTables[0][(state ^ *bytes) & 0xFF] ^ (state >> 8);
  }
  return ~state;
}

}  // namespace shardckpt::crc
