// What several tests hold the core against.
#ifndef SHARDCKPT_TESTS_REFERENCE_H_
#define SHARDCKPT_TESTS_REFERENCE_H_

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

namespace shardckpt::testing {

// CRC32C by its definition, one bit at a time; shares nothing with the code under test.
inline uint32_t BitwiseCrc(uint32_t initial, const uint8_t* data, size_t size_bytes) {
  uint32_t state = ~initial;
  for (size_t i = 0; i < size_bytes; ++i) {
    state ^= data[i];
    for (int bit = 0; bit < 8; ++bit) {
      state = (state >> 1) ^ ((state & 1u) != 0 ? 0x82F63B78u : 0u);
    }
  }
  return ~state;
}

inline std::vector<uint8_t> RandomBytes(size_t size_bytes, std::mt19937* random) {
  std::vector<uint8_t> bytes(size_bytes);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>((*random)());
  return bytes;
}

}  // namespace shardckpt::testing

#endif  // SHARDCKPT_TESTS_REFERENCE_H_
