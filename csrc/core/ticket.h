// One save as the engine sees it: payloads, the extents its files are cut into, and witnesses.
//
// Parsing and copying are free functions over plain data, so that they can be tested without
// threads.
#ifndef SHARDCKPT_CORE_TICKET_H_
#define SHARDCKPT_CORE_TICKET_H_

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "core/device.h"
#include "core/status.h"

namespace shardckpt {

inline constexpr int64_t kChunkBytes = 64 * 1024;
inline constexpr int64_t kHeaderBytes = 4096;
inline constexpr int kMaxPayloadDims = 64;
inline constexpr int64_t kEager = 0;

// A range of one array's C-order bytes and its place in a file.
struct Payload {
  const uint8_t* src;  // Of byte `start` where num_dims is 0, else of element 0.
  int64_t size_bytes;
  int64_t file;
  int64_t offset_bytes;
  int64_t group;   // kEager, or the fence that ends the time in which it may be read.
  int64_t device;  // CUDA ordinal, -1: host memory.
  int64_t start;   // First byte in C order; of strided arrays only.
  int64_t itemsize_bytes;
  int64_t num_dims;  // 0: contiguous.
  const int64_t* shape;
  const int64_t* strides_bytes;
  int64_t first_chunk;     // Index of its first checksum.
  uint32_t first_witness;  // Index of its first witness.
  uint32_t num_witnesses;

  bool is_lazy() const { return group != kEager; }
};

// Bytes `[first, last)` of a payload.
struct Piece {
  uint32_t payload;
  int64_t first;
  int64_t last;
};

// A few bytes of a lazy payload as they were when the save began.
struct Witness {
  int64_t at;  // Byte of the payload.
  uint8_t size_bytes;
  std::array<uint8_t, 16> bytes;
};

enum class ExtentState : uint8_t { kQueued, kCopying, kStaged, kWriting, kDone };

// At most a slot of one file's bytes, aligned to pages.
struct Extent {
  int64_t file;
  int64_t offset_bytes;
  int64_t size_bytes;
  uint32_t first_piece;
  uint32_t last_piece;
  int64_t slot = -1;
  ExtentState state = ExtentState::kQueued;
  bool is_eager = false;
  bool on_device = false;  // Some of its payloads.
  int num_pending = 0;     // Of an extent on devices: threads that are not done with it.
};

// The checksum of the later part of a chunk that two extents share.
struct ChunkTail {
  int64_t chunk;
  uint32_t crc;
  int64_t size_bytes;
};

// Owns the numbers its payloads point to; the memory of the arrays is the caller's.
struct SaveTable {
  std::vector<int64_t> numbers;
  std::vector<Payload> payloads;
  std::vector<Piece> pieces;
  std::vector<Extent> extents;
  std::vector<uint32_t> order;  // Extents as they are copied: those with eager payloads first.
  std::vector<Witness> witnesses;
  int64_t num_chunks = 0;
};

// Reads a table of payloads, each
//   src_address, nbytes, file, offset, group, device, start, itemsize_bytes, ndim, shape[ndim],
//   strides_bytes[ndim]
// in file order. Arrays on a device are contiguous or have two dims, the inner one contiguous.
// `file_bytes` holds for each file the bytes of header and payloads, a multiple of 4096. Takes the
// witnesses, so the arrays must be there. kInvalid: no such table; names the payload.
Status ParseSaveTable(std::span<const int64_t> numbers, std::span<const int64_t> file_bytes,
                      SaveTable* out);

// Memory of one copying thread.
class Scratch {
 public:
  static constexpr int64_t kBytes = kChunkBytes;
  Scratch();
  uint8_t* data() { return bytes_.data(); }

 private:
  std::vector<uint8_t> bytes_;
};

// What copying one extent gave.
struct Copied {
  std::vector<ChunkTail> tails;
  int64_t torn_payload = -1;  // Its memory changed or went away since the save began.
  bool is_gone = false;       // Went away.
};

// Copies an extent's payloads in host memory to `dst`, zeroes between all of them, and stores the
// checksum of every chunk that begins here into `crcs`. Lazy payloads are read under guard or by
// the kernel, so memory that is no longer there ends the copy instead of the process.
void CopyExtent(const SaveTable& table, const Extent& extent, uint8_t* dst, uint32_t* crcs,
                Scratch* scratch, Copied* out);

// The copies that bring what `device` holds of an extent to `dst`.
std::vector<DeviceRows> DeviceCopies(const SaveTable& table, const Extent& extent, int64_t device,
                                     uint8_t* dst);

// The devices that hold parts of an extent.
std::vector<int64_t> DevicesOf(const SaveTable& table, const Extent& extent);

// The same checksums of an extent that is in place.
void ChecksumExtent(const SaveTable& table, const Extent& extent, const uint8_t* data,
                    uint32_t* crcs, std::vector<ChunkTail>* tails);

// Returns whether the witnesses of a lazy payload still hold in the array itself.
bool StillHolds(const SaveTable& table, const Payload& payload);

// Stores the checksums of lazy contiguous payloads as the arrays are now; 0 elsewhere.
void ChecksumSources(const SaveTable& table, std::vector<uint32_t>* crcs);

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_TICKET_H_
