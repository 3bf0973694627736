// Compiled with AVX-512 flags: keep every inline function out of this file that another file also
// emits, or the linker may hand that file our instructions.
//
// Source: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ" (Intel,
// 2009).
#if defined(__x86_64__)

#include <immintrin.h>

#include "core/crc32c_paths.h"

namespace shardckpt::crc {
namespace {

constexpr size_t kBlockBytes = 256;

// Factors that move a 128-bit lane `num_bits` towards the end of the message: the lane's first
// eight bytes have the higher powers. The product of two reflected values lies one bit low, hence
// 31 and 33.
consteval int64_t FirstFactor(size_t num_bits) { return PowerOfX(num_bits + 31); }
consteval int64_t SecondFactor(size_t num_bits) { return PowerOfX(num_bits - 33); }

template <size_t kNumBits>
inline __m512i Factors() {
  return _mm512_broadcast_i32x4(_mm_set_epi64x(SecondFactor(kNumBits), FirstFactor(kNumBits)));
}

inline __m512i Load(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }

// Moves `lanes` forward and adds what lies there.
inline __m512i Fold(__m512i lanes, __m512i factors, __m512i next) {
  const __m512i first = _mm512_clmulepi64_epi128(lanes, factors, 0x00);
  const __m512i second = _mm512_clmulepi64_epi128(lanes, factors, 0x11);
  return _mm512_ternarylogic_epi64(first, second, next, 0x96);
}

// Folds the first three lanes onto the last one and divides the rest by the polynomial.
inline uint32_t Reduce(__m512i lanes) {
  const __m512i factors = _mm512_set_epi64(  // The last lane stays where it is.
      0, 0, SecondFactor(128), FirstFactor(128), SecondFactor(256), FirstFactor(256),
      SecondFactor(384), FirstFactor(384));
  const __m512i moved = _mm512_xor_si512(_mm512_clmulepi64_epi128(lanes, factors, 0x00),
                                         _mm512_clmulepi64_epi128(lanes, factors, 0x11));
  alignas(64) uint64_t words[8];
  alignas(64) uint64_t tail[8];
  _mm512_store_si512(words, moved);
  _mm512_store_si512(tail, lanes);
  const uint64_t low = words[0] ^ words[2] ^ words[4] ^ tail[6];
  const uint64_t high = words[1] ^ words[3] ^ words[5] ^ tail[7];
  return static_cast<uint32_t>(_mm_crc32_u64(_mm_crc32_u64(0, low), high));
}

}  // namespace

bool HasVpclmul() {
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
         __builtin_cpu_supports("vpclmulqdq") != 0 && __builtin_cpu_supports("sse4.2") != 0;
}

uint32_t Vpclmul(uint32_t initial, const void* data, size_t size_bytes) {
  if (size_bytes < kBlockBytes) return ThreeWay(initial, data, size_bytes);
  const auto* bytes = static_cast<const uint8_t*>(data);
  const __m512i start = _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int32_t>(~initial)));
  __m512i x0 = _mm512_xor_si512(Load(bytes), start);
  __m512i x1 = Load(bytes + 64);
  __m512i x2 = Load(bytes + 128);
  __m512i x3 = Load(bytes + 192);
  bytes += kBlockBytes;
  size_bytes -= kBlockBytes;

  const __m512i by_block = Factors<8 * kBlockBytes>();
  for (; size_bytes >= kBlockBytes; size_bytes -= kBlockBytes, bytes += kBlockBytes) {
    x0 = Fold(x0, by_block, Load(bytes));
    x1 = Fold(x1, by_block, Load(bytes + 64));
    x2 = Fold(x2, by_block, Load(bytes + 128));
    x3 = Fold(x3, by_block, Load(bytes + 192));
  }
  const __m512i by_register = Factors<512>();
  x0 = Fold(Fold(Fold(x0, by_register, x1), by_register, x2), by_register, x3);
  for (; size_bytes >= 64; size_bytes -= 64, bytes += 64) x0 = Fold(x0, by_register, Load(bytes));
  const uint32_t crc = ~Reduce(x0);
  return size_bytes == 0 ? crc : ThreeWay(crc, bytes, size_bytes);
}

}  // namespace shardckpt::crc

#endif  // defined(__x86_64__)
