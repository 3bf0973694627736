// Folding for CRC32C: carry-less multiplication on four 512-bit registers.
//
// For files compiled with AVX-512 flags. Everything is local to the file that includes it, or the
// linker might hand its instructions to a file that must run on any processor.
//
// Source: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ" (Intel,
// 2009).
#ifndef SHARDCKPT_CORE_CRC32C_FOLD_H_
#define SHARDCKPT_CORE_CRC32C_FOLD_H_

#include <immintrin.h>

#include "core/crc32c_paths.h"

namespace shardckpt::crc {
namespace {

constexpr size_t kBlockBytes = 256;

struct Block {
  __m512i x0, x1, x2, x3;
};

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

inline Block LoadBlock(const uint8_t* bytes) {
  return {Load(bytes), Load(bytes + 64), Load(bytes + 128), Load(bytes + 192)};
}

// Lets the first block of a message continue from the CRC of the bytes before it.
inline Block StartFrom(uint32_t initial, Block first) {
  const __m512i state = _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int32_t>(~initial)));
  first.x0 = _mm512_xor_si512(first.x0, state);
  return first;
}

// Moves `lanes` forward and adds what lies there.
inline __m512i Fold(__m512i lanes, __m512i factors, __m512i next) {
  const __m512i first = _mm512_clmulepi64_epi128(lanes, factors, 0x00);
  const __m512i second = _mm512_clmulepi64_epi128(lanes, factors, 0x11);
  return _mm512_ternarylogic_epi64(first, second, next, 0x96);
}

inline Block FoldBlock(Block block, __m512i factors, Block next) {
  return {Fold(block.x0, factors, next.x0), Fold(block.x1, factors, next.x1),
          Fold(block.x2, factors, next.x2), Fold(block.x3, factors, next.x3)};
}

// Folds the first three registers onto the last one.
inline __m512i JoinBlock(Block block) {
  const __m512i factors = Factors<512>();
  const __m512i front = Fold(Fold(block.x0, factors, block.x1), factors, block.x2);
  return Fold(front, factors, block.x3);
}

// Folds the first three lanes onto the last one, divides the rest by the polynomial and returns the
// CRC of what was folded.
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
  return ~static_cast<uint32_t>(_mm_crc32_u64(_mm_crc32_u64(0, low), high));
}

}  // namespace
}  // namespace shardckpt::crc

#endif  // SHARDCKPT_CORE_CRC32C_FOLD_H_
