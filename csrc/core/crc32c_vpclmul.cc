// Compiled with AVX-512 flags: keep every inline function out of this file that another file also
// emits, or the linker may hand that file our instructions.
#if defined(__x86_64__)

#include "core/crc32c_fold.h"
#include "core/crc32c_paths.h"

namespace shardckpt::crc {

bool HasVpclmul() {
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
         __builtin_cpu_supports("vpclmulqdq") != 0 && __builtin_cpu_supports("sse4.2") != 0;
}

uint32_t Vpclmul(uint32_t initial, const void* data, size_t size_bytes) {
  if (size_bytes < kBlockBytes) return ThreeWay(initial, data, size_bytes);
  const auto* bytes = static_cast<const uint8_t*>(data);
  Block block = StartFrom(initial, LoadBlock(bytes));
  bytes += kBlockBytes;
  size_bytes -= kBlockBytes;

  const __m512i by_block = Factors<8 * kBlockBytes>();
  for (; size_bytes >= kBlockBytes; size_bytes -= kBlockBytes, bytes += kBlockBytes) {
    block = FoldBlock(block, by_block, LoadBlock(bytes));
  }
  const __m512i by_register = Factors<512>();
  __m512i lanes = JoinBlock(block);
  for (; size_bytes >= 64; size_bytes -= 64, bytes += 64) {
    lanes = Fold(lanes, by_register, Load(bytes));
  }
  const uint32_t crc = Reduce(lanes);
  return size_bytes == 0 ? crc : ThreeWay(crc, bytes, size_bytes);
}

}  // namespace shardckpt::crc

#endif  // defined(__x86_64__)
