// CRC32C (Castagnoli, reflected, as in iSCSI and ext4): the checksum of every chunk.
//
// One function, several instruction sets. The fastest path that the processor has is chosen once,
// at the first call; SHARDCKPT_CRC=<name> chooses another. All paths give equal values.
// Thread-safe.
#ifndef SHARDCKPT_CORE_CRC32C_H_
#define SHARDCKPT_CORE_CRC32C_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/status.h"

namespace shardckpt {

// Returns the CRC of `size_bytes` at `data`, continuing from `initial`, the CRC of the bytes before
// (0 at the start). Crc32c(0, "123456789", 9) == 0xE3069283.
uint32_t Crc32c(uint32_t initial, const void* data, size_t size_bytes);

// Returns the CRC of A followed by B, given the CRC of each (from 0) and B's length. Costs
// under 100 ns for every bit set in the length.
uint32_t Crc32cCombine(uint32_t first, uint32_t second, uint64_t second_size_bytes);

// Name of the path that Crc32c takes.
const char* Crc32cPathName();

// One way to compute the CRC.
struct Crc32cPath {
  const char* name;
  bool (*is_supported)();
  uint32_t (*compute)(uint32_t initial, const void* data, size_t size_bytes);
};

// All paths in this build, fastest first; the last one, "table", runs everywhere.
std::span<const Crc32cPath> Crc32cPaths();

// Returns what a chunk's CRC is XORed with: Crc32c(seed, its file offset as little-endian u64). A
// chunk found in another place or file does not pass.
uint32_t PlaceCrc(uint32_t seed, uint64_t file_offset_bytes);

// A piece of memory to be checksummed, and the place it takes in its file.
struct ChunkRow {
  int64_t address;
  int64_t size_bytes;
  int64_t file_offset_bytes;
};

// Counts the chunks of `rows` into `num_chunks`; every row starts a chunk of its own.
// kInvalid: chunk_bytes < 1, a negative field, or a null address with bytes.
Status CountChunks(std::span<const ChunkRow> rows, int64_t chunk_bytes, size_t* num_chunks);

// Writes one little-endian u32 for each chunk to `out`, which holds 4 * num_chunks bytes:
// Crc32c(chunk) XOR PlaceCrc(seed, file offset of its first byte). Call CountChunks first: nothing
// is checked here.
void ChunkCrcs(std::span<const ChunkRow> rows, uint32_t seed, int64_t chunk_bytes, uint8_t* out);

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_CRC32C_H_
