// Ranged reads of which every chunk is checked and put into place: the read path of a load.
//
// The bytes that are checked are the bytes that are used. A range that lies in the page cache is
// read from there, any other past it; on the way the bytes go through a bounce buffer of the
// calling thread, or straight to their place where that is aligned for it.
#ifndef SHARDCKPT_CORE_CHUNK_READ_H_
#define SHARDCKPT_CORE_CHUNK_READ_H_

#include <cstdint>
#include <span>

#include "core/file.h"
#include "core/status.h"

namespace shardckpt {

// No range may be longer: its bytes have to fit into a thread's bounce buffer.
inline constexpr int64_t kMaxRangeBytes = int64_t{64} << 20;

// Where bytes are read from; both descriptors stay the caller's.
struct ChunkSource {
  const FileOps* ops;
  int fd;
  int direct_fd;  // The same file opened with O_DIRECT; -1 where it cannot be.
};

// Whole chunks of a file that belong together.
struct ChunkPiece {
  int64_t offset_bytes;  // Of the first chunk, in the file.
  int64_t size_bytes;    // The last chunk may be short.
  int64_t first_chunk;   // Position of its first checksum.
  int64_t address;       // Where the bytes go; 0 where the copy rows take them.
};

// What is read of one file, and where it goes.
struct ChunkRange {
  int64_t start_bytes;  // In the file; all pieces lie in [start, stop).
  int64_t stop_bytes;
  std::span<const ChunkPiece> pieces;
  // As for CopyRows, their src_address counted from start_bytes. They run when every chunk has
  // passed.
  std::span<const int64_t> rows;
  std::span<const uint8_t> crcs;  // One little-endian u32 per chunk of the file; see ChunkCrcs.
  uint32_t seed;
  int64_t chunk_bytes;
};

// What became of a range.
struct ChunkOutcome {
  int64_t end_bytes;         // Where the file ended, if that is before stop_bytes.
  int64_t bad_offset_bytes;  // Of the first chunk that did not match its checksum; -1: all did.
  uint32_t found_crc;        // What it had.
};

// Reads, checks and places a range. Thread-safe. Stops at the first chunk that does not match, or
// where the file ends: places may then hold anything. kInvalid: the range makes no sense; nothing
// was touched. kIo: a read failed.
Status ReadChunks(const ChunkSource& source, const ChunkRange& range, ChunkOutcome* outcome);

// The same for bytes that are in memory already: `bytes` holds [start_bytes, stop_bytes).
Status PlaceChunks(const uint8_t* bytes, const ChunkRange& range, ChunkOutcome* outcome);

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_CHUNK_READ_H_
