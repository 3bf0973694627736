// The ways to compute CRC32C that crc32c.cc chooses from, and the polynomial arithmetic they share.
//
// Every path lives in a file of its own, because each is compiled for its own instruction set. None
// may be called before its Has...() said yes.
#ifndef SHARDCKPT_CORE_CRC32C_PATHS_H_
#define SHARDCKPT_CORE_CRC32C_PATHS_H_

#include <cstddef>
#include <cstdint>

namespace shardckpt::crc {

// 0x1EDC6F41 with its bits reversed: bit 31 is x^0.
inline constexpr uint32_t kPolynomial = 0x82F63B78u;

// The arithmetic runs at compile time, or is static where it also runs later, so that no path emits
// code that another could be linked to.
//
// Multiplies by x^num_bits modulo the polynomial: the state after num_bits zero bits.
consteval uint32_t ShiftByBits(uint32_t state, size_t num_bits) {
  for (size_t i = 0; i < num_bits; ++i) {
    state = (state >> 1) ^ ((state & 1u) != 0 ? kPolynomial : 0u);
  }
  return state;
}

// Returns x^exponent modulo the polynomial.
consteval uint32_t PowerOfX(size_t exponent) { return ShiftByBits(0x80000000u, exponent); }

// Multiplies two polynomials modulo the polynomial.
static constexpr uint32_t Multiply(uint32_t left, uint32_t right) {
  uint32_t product = 0;
  for (int bit = 31; bit >= 0; --bit) {  // Bit 31 is x^0.
    product ^= right & (0u - (left >> bit & 1u));
    right = (right >> 1) ^ (kPolynomial & (0u - (right & 1u)));
  }
  return product;
}

// Slicing by eight; runs everywhere.
uint32_t Table(uint32_t initial, const void* data, size_t size_bytes);

#if defined(__x86_64__) || defined(__aarch64__)
// The processor's CRC instruction on three streams at once, which hides its latency of three
// cycles.
bool HasThreeWay();
uint32_t ThreeWay(uint32_t initial, const void* data, size_t size_bytes);
#endif

#if defined(__x86_64__)
// Carry-less multiplication on four 512-bit registers.
bool HasVpclmul();
uint32_t Vpclmul(uint32_t initial, const void* data, size_t size_bytes);
#endif

}  // namespace shardckpt::crc

#endif  // SHARDCKPT_CORE_CRC32C_PATHS_H_
