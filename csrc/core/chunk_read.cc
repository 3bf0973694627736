#include "core/chunk_read.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <string>

#include "core/copy.h"
#include "core/crc32c.h"
#include "core/stream_copy.h"

namespace shardckpt {
namespace {

constexpr int64_t kBlock = static_cast<int64_t>(kBlockBytes);
// From the page cache: little enough that the second-level cache still has it when it is copied on.
constexpr int64_t kCachedWindowBytes = int64_t{256} << 10;
// Past the page cache: the device is asked for much at once.
constexpr int64_t kDirectWindowBytes = int64_t{8} << 20;
constexpr size_t kHugePageBytes = size_t{2} << 20;

int64_t RoundDown(int64_t value, int64_t step) { return value / step * step; }
int64_t RoundUp(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

uint32_t LoadCrc(const uint8_t* bytes) {
  return static_cast<uint32_t>(bytes[0]) | static_cast<uint32_t>(bytes[1]) << 8 |
         static_cast<uint32_t>(bytes[2]) << 16 | static_cast<uint32_t>(bytes[3]) << 24;
}

// One per thread, kept until the thread ends. Aligned to huge pages, and never shared with a child:
// a fork while the device writes into it could leave the device the child's copy.
class Bounce {
 public:
  Bounce() = default;
  ~Bounce() { Release(); }
  Bounce(const Bounce&) = delete;
  Bounce& operator=(const Bounce&) = delete;

  // Null where the system has no memory left.
  uint8_t* Reserve(size_t size_bytes) {
    if (size_bytes <= size_bytes_) return data_;
    Release();
    const size_t wanted = (size_bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    void* mapped = mmap(nullptr, wanted + kHugePageBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    mapped_ = mapped;
    mapped_bytes_ = wanted + kHugePageBytes;
    const auto address = reinterpret_cast<uintptr_t>(mapped);
    data_ = static_cast<uint8_t*>(mapped) + (kHugePageBytes - address % kHugePageBytes);
    size_bytes_ = wanted;
    // Both only advice: without them reads are slower, or a fork meanwhile fails a checksum.
    madvise(data_, wanted, MADV_HUGEPAGE);
    madvise(data_, wanted, MADV_DONTFORK);
    return data_;
  }

 private:
  void Release() {
    if (mapped_ != nullptr) munmap(mapped_, mapped_bytes_);
    mapped_ = nullptr;
    data_ = nullptr;
    size_bytes_ = 0;
  }

  void* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
  uint8_t* data_ = nullptr;
  size_t size_bytes_ = 0;
};

thread_local Bounce bounce;

Status NoMemory(size_t size_bytes) {
  return Status::Io(ENOMEM, "read_chunks: no " + std::to_string(size_bytes) +
                                " bytes of memory left for a bounce buffer; free some.");
}

// Hands out the bytes of a range, in file order or any other: a part of it is in memory at a time.
class Window {
 public:
  // Of bytes that are all in memory.
  Window(const uint8_t* bytes, const ChunkRange& range)
      : range_(range), data_(bytes), start_(range.start_bytes), stop_(range.stop_bytes) {}

  // Of a file; nothing is read yet.
  Window(const ChunkSource& source, const ChunkRange& range)
      : range_(range), source_(&source), start_(range.start_bytes), stop_(range.start_bytes) {
    is_direct_ = source.direct_fd >= 0 &&
                 !IsCached(source.fd, range.start_bytes,
                           static_cast<size_t>(range.stop_bytes - range.start_bytes));
  }

  bool is_direct() const { return is_direct_; }

  // Points `data` at bytes [offset, offset + size), valid until the next call; null where the file
  // ends before, which `end` then tells.
  Status At(int64_t offset, int64_t size, const uint8_t** data) {
    if (offset < start_ || offset + size > stop_) {
      // Copy rows may take bytes of the whole range at once.
      const bool is_whole = !range_.rows.empty();
      const int64_t start = is_whole ? range_.start_bytes : offset;
      const int64_t window_bytes = is_direct_ ? kDirectWindowBytes : kCachedWindowBytes;
      const int64_t length =
          is_whole ? range_.stop_bytes - range_.start_bytes
                   : std::min(std::max(size, window_bytes), range_.stop_bytes - start);
      if (Status status = Load(start, start + length); !status.ok()) return status;
    }
    *data = offset + size <= stop_ ? data_ + (offset - start_) : nullptr;
    return Status::Ok();
  }

  // Fills [offset, offset + size) at `address` past the page cache, all aligned; `is_done` stays
  // false where the file system does not take it.
  Status Straight(int64_t offset, int64_t size, uint8_t* address, bool* is_done) {
    const auto wanted = static_cast<size_t>(size);
    size_t got = 0;
    Status status =
        ReadBlocks(*source_->ops, source_->direct_fd, address, wanted, wanted, offset, &got);
    if (status.code() == StatusCode::kIo && status.system_errno() == EINVAL) {
      is_direct_ = false;
      return Status::Ok();
    }
    *is_done = true;
    if (status.ok() && got < wanted) end_ = offset + static_cast<int64_t>(got);
    return status;
  }

  // Whether bytes come from the page cache, or through it.
  bool is_buffered() const { return source_ != nullptr && !is_direct_; }

  // Fills [offset, offset + size) at `address` through the page cache.
  Status Fill(int64_t offset, int64_t size, uint8_t* address) {
    size_t got = 0;
    Status status =
        ReadFull(*source_->ops, source_->fd, address, static_cast<size_t>(size), offset, &got);
    if (status.ok() && got < static_cast<size_t>(size)) end_ = offset + static_cast<int64_t>(got);
    return status;
  }

  // Where the file ended; -1 as long as it did not.
  int64_t end() const { return end_; }

 private:
  Status Load(int64_t start, int64_t stop) {
    start_ = stop_ = start;
    const int64_t first = RoundDown(start, kBlock);
    const auto size = static_cast<size_t>(RoundUp(stop, kBlock) - first);
    const auto needed = static_cast<size_t>(stop - first);
    uint8_t* memory = bounce.Reserve(size);
    if (memory == nullptr) return NoMemory(size);
    size_t got = 0;
    bool is_done = false;
    if (is_direct_) {
      const Status status =
          ReadBlocks(*source_->ops, source_->direct_fd, memory, size, needed, first, &got);
      if (status.ok()) {
        is_done = true;
      } else if (status.system_errno() != EINVAL) {
        return status;
      } else {
        is_direct_ = false;  // It wants larger blocks than ours: through the page cache.
      }
    }
    if (!is_done) {
      const auto lead = static_cast<size_t>(start - first);
      if (Status status =
              ReadFull(*source_->ops, source_->fd, memory + lead, needed - lead, start, &got);
          !status.ok()) {
        return status;
      }
      got += lead;
    }
    if (got < needed) end_ = first + static_cast<int64_t>(got);
    data_ = memory + (start - first);
    stop_ = std::min(stop, std::max(start, first + static_cast<int64_t>(got)));
    return Status::Ok();
  }

  const ChunkRange& range_;
  const ChunkSource* source_ = nullptr;
  bool is_direct_ = false;
  const uint8_t* data_ = nullptr;
  int64_t start_;  // Bytes [start_, stop_) of the file are at data_.
  int64_t stop_;
  int64_t end_ = -1;
};

Status CheckRange(const ChunkRange& range) {
  const auto invalid = [](const std::string& problem) {
    return Status::Invalid("read_chunks: " + problem);
  };
  if (range.start_bytes < 0 || range.stop_bytes < range.start_bytes || range.chunk_bytes < 1 ||
      range.stop_bytes - range.start_bytes > kMaxRangeBytes) {
    return invalid("bytes " + std::to_string(range.start_bytes) + " to " +
                   std::to_string(range.stop_bytes) + " in chunks of " +
                   std::to_string(range.chunk_bytes) + " are no range of at most " +
                   std::to_string(kMaxRangeBytes) + " bytes.");
  }
  const auto num_crcs = static_cast<int64_t>(range.crcs.size() / 4);
  for (size_t i = 0; i < range.pieces.size(); ++i) {
    const ChunkPiece& piece = range.pieces[i];
    if (piece.offset_bytes < range.start_bytes || piece.size_bytes < 0 ||
        piece.size_bytes > range.stop_bytes - piece.offset_bytes) {
      return invalid("piece " + std::to_string(i) + ", " + std::to_string(piece.size_bytes) +
                     " bytes at " + std::to_string(piece.offset_bytes) + ", is not inside bytes " +
                     std::to_string(range.start_bytes) + " to " + std::to_string(range.stop_bytes) +
                     ".");
    }
    const int64_t num_chunks = RoundUp(piece.size_bytes, range.chunk_bytes) / range.chunk_bytes;
    if (piece.first_chunk < 0 || piece.first_chunk > num_crcs - num_chunks) {
      return invalid("piece " + std::to_string(i) + " has " + std::to_string(num_chunks) +
                     " chunks from " + std::to_string(piece.first_chunk) + ", there are " +
                     std::to_string(num_crcs) + " checksums.");
    }
  }
  return Status::Ok();
}

bool Matches(const ChunkRange& range, int64_t chunk, int64_t offset, uint32_t crc,
             ChunkOutcome* outcome) {
  const uint32_t found = crc ^ PlaceCrc(range.seed, static_cast<uint64_t>(offset));
  if (found == LoadCrc(range.crcs.data() + 4 * chunk)) return true;
  outcome->bad_offset_bytes = offset;
  outcome->found_crc = found;
  return false;
}

// Reads a piece through the page cache straight to its place, and takes the checksums while the
// second-level cache still has it: one copy less than by way of a bounce buffer.
Status PlaceBuffered(const ChunkRange& range, const ChunkPiece& piece, Window* window,
                     ChunkOutcome* outcome) {
  auto* address = reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(piece.address));
  const int64_t step = RoundUp(kCachedWindowBytes, range.chunk_bytes);
  for (int64_t at = 0; at < piece.size_bytes; at += step) {
    const int64_t stop = std::min(piece.size_bytes, at + step);
    Status status = window->Fill(piece.offset_bytes + at, stop - at, address + at);
    if (!status.ok() || window->end() >= 0) return status;
    for (int64_t start = at; start < stop; start += range.chunk_bytes) {
      const int64_t size = std::min(range.chunk_bytes, stop - start);
      const uint32_t crc = Crc32c(0, address + start, static_cast<size_t>(size));
      if (!Matches(range, piece.first_chunk + start / range.chunk_bytes, piece.offset_bytes + start,
                   crc, outcome)) {
        return Status::Ok();
      }
    }
  }
  return Status::Ok();
}

// Reads the chunks of a piece that are whole blocks in file and memory alike straight to their
// place; `placed_bytes` says how far that went.
Status PlaceStraight(const ChunkRange& range, const ChunkPiece& piece, Window* window,
                     int64_t* placed_bytes, ChunkOutcome* outcome) {
  *placed_bytes = 0;
  const int64_t size = RoundDown(piece.size_bytes, range.chunk_bytes);
  if (size == 0 || piece.address == 0 || !window->is_direct() || !range.rows.empty() ||
      piece.address % kBlock != 0 || piece.offset_bytes % kBlock != 0 ||
      range.chunk_bytes % kBlock != 0) {
    return Status::Ok();
  }
  auto* address = reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(piece.address));
  bool is_done = false;
  Status status = window->Straight(piece.offset_bytes, size, address, &is_done);
  if (!status.ok() || !is_done || window->end() >= 0) return status;
  *placed_bytes = size;
  for (int64_t start = 0; start < size; start += range.chunk_bytes) {
    const uint32_t crc = Crc32c(0, address + start, static_cast<size_t>(range.chunk_bytes));
    if (!Matches(range, piece.first_chunk + start / range.chunk_bytes, piece.offset_bytes + start,
                 crc, outcome)) {
      break;
    }
  }
  return status;
}

Status Place(const ChunkRange& range, Window* window, ChunkOutcome* outcome) {
  *outcome = ChunkOutcome{range.stop_bytes, -1, 0};
  for (const ChunkPiece& piece : range.pieces) {
    int64_t start = 0;
    Status status;
    if (window->is_buffered() && piece.address != 0 && range.rows.empty()) {
      status = PlaceBuffered(range, piece, window, outcome);
      start = piece.size_bytes;
    } else {
      status = PlaceStraight(range, piece, window, &start, outcome);
    }
    if (!status.ok()) return status;
    if (window->end() >= 0) outcome->end_bytes = window->end();
    if (window->end() >= 0 || outcome->bad_offset_bytes >= 0) return Status::Ok();
    for (; start < piece.size_bytes; start += range.chunk_bytes) {
      const int64_t size = std::min(range.chunk_bytes, piece.size_bytes - start);
      const int64_t offset = piece.offset_bytes + start;
      const uint8_t* data = nullptr;
      if (Status status = window->At(offset, size, &data); !status.ok()) return status;
      if (data == nullptr) {
        outcome->end_bytes = window->end();
        return Status::Ok();
      }
      const auto num_bytes = static_cast<size_t>(size);
      const uint32_t crc =
          piece.address == 0
              ? Crc32c(0, data, num_bytes)
              : CopyAndCrc(0,
                           reinterpret_cast<void*>(static_cast<uintptr_t>(piece.address + start)),
                           data, num_bytes);
      if (!Matches(range, piece.first_chunk + start / range.chunk_bytes, offset, crc, outcome)) {
        return Status::Ok();
      }
    }
  }
  if (range.rows.empty()) return Status::Ok();
  const uint8_t* data = nullptr;
  if (Status status = window->At(range.start_bytes, range.stop_bytes - range.start_bytes, &data);
      !status.ok()) {
    return status;
  }
  if (data == nullptr) {
    outcome->end_bytes = window->end();
    return Status::Ok();
  }
  return CopyRows(range.rows, 1, static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)));
}

}  // namespace

Status ReadChunks(const ChunkSource& source, const ChunkRange& range, ChunkOutcome* outcome) {
  if (Status status = CheckRange(range); !status.ok()) return status;
  Window window(source, range);
  return Place(range, &window, outcome);
}

Status PlaceChunks(const uint8_t* bytes, const ChunkRange& range, ChunkOutcome* outcome) {
  if (Status status = CheckRange(range); !status.ok()) return status;
  if (bytes == nullptr && range.stop_bytes > range.start_bytes) {
    return Status::Invalid("place_chunks: a null address with bytes; pass memory that exists.");
  }
  Window window(bytes, range);
  return Place(range, &window, outcome);
}

}  // namespace shardckpt
