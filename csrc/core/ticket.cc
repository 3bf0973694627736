#include "core/ticket.h"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>

#include "core/arena.h"
#include "core/crc32c.h"
#include "core/guarded.h"
#include "core/stream_copy.h"

namespace shardckpt {
namespace {

constexpr int64_t kRowFields = 9;
// One block has three witnesses; a copy that was overtaken inside it differs in the last one.
constexpr int64_t kBlockBytes = int64_t{1} << 20;
constexpr int64_t kWitnessBytes = 16;

Status Bad(size_t payload, const std::string& what) {
  return Status::Invalid("payload " + std::to_string(payload) + " of the save: " + what +
                         "; this is an error of the caller.");
}

const uint8_t* Pointer(int64_t address) {
  return reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(address));
}

Status ParsePayload(size_t index, const int64_t* row, int64_t num_left, Payload* out) {
  if (num_left < kRowFields) return Bad(index, "the table ends inside its row");
  Payload& p = *out;
  p = Payload{Pointer(row[0]), row[1], row[2],  row[3],  row[4], row[5], row[6],
              row[7],          row[8], nullptr, nullptr, 0,      0,      0};
  if (p.num_dims < 0 || p.num_dims > kMaxPayloadDims || num_left < kRowFields + 2 * p.num_dims) {
    return Bad(index, "ndim is " + std::to_string(p.num_dims) + " and the table ends");
  }
  if (p.src == nullptr || p.size_bytes < 1 || p.group < 0 || p.device < -1 || p.start < 0 ||
      p.itemsize_bytes < 1) {
    return Bad(index, "null memory or a negative size");
  }
  if (p.num_dims == 0) return Status::Ok();
  p.shape = row + kRowFields;
  p.strides_bytes = p.shape + p.num_dims;
  int64_t size = p.itemsize_bytes;
  for (int64_t dim = 0; dim < p.num_dims; ++dim) {
    if (p.shape[dim] < 1 || __builtin_mul_overflow(size, p.shape[dim], &size)) {
      return Bad(index, "dim " + std::to_string(dim) + " has size " + std::to_string(p.shape[dim]));
    }
  }
  if (p.start > size || p.size_bytes > size - p.start || p.start % p.itemsize_bytes != 0 ||
      p.size_bytes % p.itemsize_bytes != 0) {
    return Bad(index, "bytes [" + std::to_string(p.start) + ", +" + std::to_string(p.size_bytes) +
                          ") of an array of " + std::to_string(size) + " bytes");
  }
  if (p.device < 0) {
    // Witnesses and the kernel's reads know contiguous memory only.
    p.group = kEager;
  } else if (p.num_dims != 2 || p.strides_bytes[1] != p.itemsize_bytes ||
             p.strides_bytes[0] < p.shape[1] * p.itemsize_bytes) {
    return Bad(index, "an array on a device is neither contiguous nor rows of a pitch");
  }
  return Status::Ok();
}

void TakeWitness(Payload* payload, int64_t at, SaveTable* table) {
  Witness witness{at, 0, {}};
  witness.size_bytes = static_cast<uint8_t>(std::min(kWitnessBytes, payload->size_bytes - at));
  std::memcpy(witness.bytes.data(), payload->src + at, witness.size_bytes);
  table->witnesses.push_back(witness);
  ++payload->num_witnesses;
}

// Positions are multiples of 16, so that no witness lies across the edge of an extent.
void TakeWitnesses(Payload* payload, SaveTable* table) {
  payload->first_witness = static_cast<uint32_t>(table->witnesses.size());
  for (int64_t block = 0; block < payload->size_bytes; block += kBlockBytes) {
    const int64_t size = std::min(kBlockBytes, payload->size_bytes - block);
    const int64_t last = (size - 1) / kWitnessBytes * kWitnessBytes;
    const int64_t middle = last == 0 ? 0 : (block / kBlockBytes + 1) * 7919 * kWitnessBytes % last;
    TakeWitness(payload, block, table);
    if (middle > 0) TakeWitness(payload, block + middle, table);
    if (last > middle) TakeWitness(payload, block + last, table);
  }
}

// Cuts the files into extents and the payloads, which are in file order, into pieces of them.
Status CutExtents(std::span<const int64_t> file_bytes, SaveTable* table) {
  size_t next = 0;
  int64_t within = 0;  // Bytes of payload `next` that earlier extents hold.
  for (size_t file = 0; file < file_bytes.size(); ++file) {
    for (int64_t at = kHeaderBytes; at < file_bytes[file]; at += kSlotBytes) {
      Extent extent{};
      extent.file = static_cast<int64_t>(file);
      extent.offset_bytes = at;
      extent.size_bytes = std::min(kSlotBytes, file_bytes[file] - at);
      extent.first_piece = static_cast<uint32_t>(table->pieces.size());
      const int64_t end = at + extent.size_bytes;
      while (next < table->payloads.size()) {
        const Payload& p = table->payloads[next];
        if (p.file != extent.file || p.offset_bytes >= end) break;
        const int64_t last = std::min(p.size_bytes, end - p.offset_bytes);
        table->pieces.push_back({static_cast<uint32_t>(next), within, last});
        extent.is_eager = extent.is_eager || !p.is_lazy();
        extent.on_device = extent.on_device || p.device >= 0;
        if (last < p.size_bytes) {
          within = last;
          break;
        }
        within = 0;
        ++next;
      }
      extent.last_piece = static_cast<uint32_t>(table->pieces.size());
      table->extents.push_back(extent);
    }
  }
  if (next < table->payloads.size()) return Bad(next, "lies in no file, or past its end");
  return Status::Ok();
}

enum class ReadResult { kOk, kGone, kRefused };

// Reads this process's own memory through the kernel, which reports a page that is gone.
ReadResult ReadSafely(void* dst, const void* src, size_t size_bytes) {
  static std::atomic<bool> is_refused{false};
  if (is_refused.load(std::memory_order_relaxed)) return ReadResult::kRefused;
  const iovec local{dst, size_bytes};
  const iovec remote{const_cast<void*>(src), size_bytes};
  const ssize_t got = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
  if (got == static_cast<ssize_t>(size_bytes)) return ReadResult::kOk;
  if (got < 0 && (errno == EPERM || errno == ENOSYS)) {
    is_refused = true;
    return ReadResult::kRefused;
  }
  return ReadResult::kGone;
}

bool Matches(const SaveTable& table, const Payload& payload, int64_t first, int64_t last,
             const uint8_t* data) {
  const Witness* begin = table.witnesses.data() + payload.first_witness;
  const Witness* end = begin + payload.num_witnesses;
  const Witness* w = std::lower_bound(
      begin, end, first, [](const Witness& witness, int64_t at) { return witness.at < at; });
  for (; w != end && w->at + w->size_bytes <= last; ++w) {
    if (std::memcmp(data + (w->at - first), w->bytes.data(), w->size_bytes) != 0) return false;
  }
  return true;
}

// Copies bytes `[first, last)` of a strided array in C order.
void CopyStrided(const Payload& payload, int64_t first, int64_t last, uint8_t* dst) {
  int64_t run = payload.itemsize_bytes;  // Contiguous bytes of the innermost dims.
  int64_t dims = payload.num_dims;
  while (dims > 0 && (payload.shape[dims - 1] == 1 || payload.strides_bytes[dims - 1] == run)) {
    run *= payload.shape[--dims];
  }
  for (int64_t at = payload.start + first; at < payload.start + last;) {
    int64_t rest = at / run;
    const int64_t inside = at % run;
    const uint8_t* src = payload.src + inside;
    for (int64_t dim = dims - 1; dim >= 0; --dim) {
      src += rest % payload.shape[dim] * payload.strides_bytes[dim];
      rest /= payload.shape[dim];
    }
    const int64_t size = std::min(run - inside, payload.start + last - at);
    std::memcpy(dst, src, static_cast<size_t>(size));
    dst += size;
    at += size;
  }
}

void StoreCrc(const Payload& payload, int64_t at, int64_t size, uint32_t crc, uint32_t* crcs,
              std::vector<ChunkTail>* tails) {
  const int64_t chunk = payload.first_chunk + at / kChunkBytes;
  if (at % kChunkBytes == 0) {
    crcs[chunk] = crc;
  } else {
    tails->push_back({chunk, crc, size});
  }
}

// Calls use(at, size) for every part of `[first, last)` that lies in one chunk.
template <typename Use>
void ForEachChunk(int64_t first, int64_t last, Use use) {
  for (int64_t at = first; at < last;) {
    const int64_t end = std::min(last, (at / kChunkBytes + 1) * kChunkBytes);
    use(at, end - at);
    at = end;
  }
}

struct Chunk {
  uint8_t* dst;
  const uint8_t* src;
  size_t size_bytes;
  uint32_t crc;
};

void CopyChunk(void* told) {
  Chunk& chunk = *static_cast<Chunk*>(told);
  chunk.crc = CopyAndCrc(0, chunk.dst, chunk.src, chunk.size_bytes);
}

// Copies a chunk of which any byte may go away or change meanwhile; the checksum is that of what
// was stored. False where it went away.
bool CopyLateChunk(Chunk* chunk, bool may_fault, Scratch* scratch) {
  const bool is_whole =
      chunk->size_bytes % kHeaderBytes == 0 && reinterpret_cast<uintptr_t>(chunk->dst) % 64 == 0;
  if (may_fault && is_whole) {
    return ReadGuarded(chunk->src, chunk->size_bytes, CopyChunk, chunk);
  }
  const ReadResult result = ReadSafely(scratch->data(), chunk->src, chunk->size_bytes);
  if (result == ReadResult::kGone) return false;
  if (result == ReadResult::kRefused) {
    // Neither way is there: the caller's promise of a fence is all that is left.
    std::memcpy(scratch->data(), chunk->src, chunk->size_bytes);
  }
  chunk->src = scratch->data();
  CopyChunk(chunk);
  return true;
}

// Returns whether the piece was copied whole and unchanged.
bool CopyLazy(const SaveTable& table, const Piece& piece, uint8_t* dst, uint32_t* crcs,
              Scratch* scratch, Copied* out) {
  const Payload& payload = table.payloads[piece.payload];
  const bool may_fault = CopyAndCrcReadsOnce() && CanCatchFaults();
  // In runs: one call of the kernel for each chunk is cheap, one look at the witnesses is not.
  for (int64_t block = piece.first; block < piece.last;) {
    const int64_t end = std::min(piece.last, (block / kBlockBytes + 1) * kBlockBytes);
    ForEachChunk(block, end, [&](int64_t at, int64_t size) {
      if (out->is_gone) return;
      Chunk chunk{dst + (at - piece.first), payload.src + at, static_cast<size_t>(size), 0};
      out->is_gone = !CopyLateChunk(&chunk, may_fault, scratch);
      StoreCrc(payload, at, size, chunk.crc, crcs, &out->tails);
    });
    // Of what was stored, which nobody else writes.
    if (out->is_gone || !Matches(table, payload, block, end, dst + (block - piece.first))) {
      out->torn_payload = piece.payload;
      return false;
    }
    block = end;
  }
  return true;
}

}  // namespace

Scratch::Scratch() : bytes_(static_cast<size_t>(kBytes)) {}

Status ParseSaveTable(std::span<const int64_t> numbers, std::span<const int64_t> file_bytes,
                      SaveTable* out) {
  out->numbers.assign(numbers.begin(), numbers.end());
  for (size_t file = 0; file < file_bytes.size(); ++file) {
    if (file_bytes[file] < kHeaderBytes || file_bytes[file] % kHeaderBytes != 0) {
      return Status::Invalid("file " + std::to_string(file) + " of the save has " +
                             std::to_string(file_bytes[file]) +
                             " bytes; it must be a positive multiple of 4096.");
    }
  }
  const int64_t* row = out->numbers.data();
  auto num_left = static_cast<int64_t>(out->numbers.size());
  int64_t file = 0;
  int64_t end = kHeaderBytes;
  while (num_left > 0) {
    Payload payload;
    const size_t index = out->payloads.size();
    if (Status status = ParsePayload(index, row, num_left, &payload); !status.ok()) return status;
    if (payload.file != file) end = kHeaderBytes;
    if (payload.file < file || payload.file >= static_cast<int64_t>(file_bytes.size()) ||
        payload.offset_bytes < end ||
        payload.size_bytes > file_bytes[static_cast<size_t>(payload.file)] - payload.offset_bytes) {
      return Bad(index, "bytes [" + std::to_string(payload.offset_bytes) + ", +" +
                            std::to_string(payload.size_bytes) + ") of file " +
                            std::to_string(payload.file) + " overlap others or lie outside");
    }
    file = payload.file;
    end = payload.offset_bytes + payload.size_bytes;
    payload.first_chunk = out->num_chunks;
    out->num_chunks += (payload.size_bytes + kChunkBytes - 1) / kChunkBytes;
    if (payload.is_lazy() && payload.device < 0) TakeWitnesses(&payload, out);
    out->payloads.push_back(payload);
    const int64_t fields = kRowFields + 2 * payload.num_dims;
    row += fields;
    num_left -= fields;
  }
  if (Status status = CutExtents(file_bytes, out); !status.ok()) return status;
  for (const bool is_eager : {true, false}) {
    for (size_t i = 0; i < out->extents.size(); ++i) {
      if (out->extents[i].is_eager == is_eager) out->order.push_back(static_cast<uint32_t>(i));
    }
  }
  return Status::Ok();
}

void CopyExtent(const SaveTable& table, const Extent& extent, uint8_t* dst, uint32_t* crcs,
                Scratch* scratch, Copied* out) {
  int64_t filled = 0;
  for (uint32_t i = extent.first_piece; i < extent.last_piece; ++i) {
    const Piece& piece = table.pieces[i];
    const Payload& payload = table.payloads[piece.payload];
    const int64_t at = payload.offset_bytes + piece.first - extent.offset_bytes;
    std::memset(dst + filled, 0, static_cast<size_t>(at - filled));
    filled = at + piece.last - piece.first;
    if (payload.device >= 0) continue;
    if (payload.is_lazy()) {
      if (!CopyLazy(table, piece, dst + at, crcs, scratch, out)) return;
      continue;
    }
    ForEachChunk(piece.first, piece.last, [&](int64_t start, int64_t size) {
      uint8_t* to = dst + at + (start - piece.first);
      uint32_t crc = 0;
      if (payload.num_dims == 0) {
        crc = CopyAndCrc(0, to, payload.src + start, static_cast<size_t>(size));
      } else {
        CopyStrided(payload, start, start + size, to);
        crc = Crc32c(0, to, static_cast<size_t>(size));
      }
      StoreCrc(payload, start, size, crc, crcs, &out->tails);
    });
  }
  std::memset(dst + filled, 0, static_cast<size_t>(extent.size_bytes - filled));
}

std::vector<DeviceRows> DeviceCopies(const SaveTable& table, const Extent& extent, int64_t device,
                                     uint8_t* dst) {
  std::vector<DeviceRows> copies;
  for (uint32_t i = extent.first_piece; i < extent.last_piece; ++i) {
    const Piece& piece = table.pieces[i];
    const Payload& payload = table.payloads[piece.payload];
    if (payload.device != device) continue;
    uint8_t* to = dst + (payload.offset_bytes + piece.first - extent.offset_bytes);
    const auto src = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(payload.src));
    if (payload.num_dims == 0) {
      copies.push_back({to, src + static_cast<uint64_t>(piece.first), piece.last - piece.first});
      continue;
    }
    const int64_t row = payload.shape[1] * payload.itemsize_bytes;
    const int64_t pitch = payload.strides_bytes[0];
    // At most three: the rest of a row, whole rows, the start of a row.
    for (int64_t at = payload.start + piece.first; at < payload.start + piece.last;) {
      const int64_t left = payload.start + piece.last - at;
      const int64_t inside = at % row;
      const int64_t num_rows = inside == 0 && left >= row ? left / row : 1;
      const int64_t size =
          num_rows > 1 || inside == 0 ? std::min(row, left) : std::min(row - inside, left);
      copies.push_back(
          {to, src + static_cast<uint64_t>(at / row * pitch + inside), size, num_rows, pitch});
      to += size * num_rows;
      at += size * num_rows;
    }
  }
  return copies;
}

std::vector<int64_t> DevicesOf(const SaveTable& table, const Extent& extent) {
  std::vector<int64_t> devices;
  for (uint32_t i = extent.first_piece; i < extent.last_piece; ++i) {
    const int64_t device = table.payloads[table.pieces[i].payload].device;
    if (device >= 0) devices.push_back(device);
  }
  std::sort(devices.begin(), devices.end());
  devices.erase(std::unique(devices.begin(), devices.end()), devices.end());
  return devices;
}

void ChecksumExtent(const SaveTable& table, const Extent& extent, const uint8_t* data,
                    uint32_t* crcs, std::vector<ChunkTail>* tails) {
  for (uint32_t i = extent.first_piece; i < extent.last_piece; ++i) {
    const Piece& piece = table.pieces[i];
    const Payload& payload = table.payloads[piece.payload];
    const uint8_t* from = data + (payload.offset_bytes + piece.first - extent.offset_bytes);
    ForEachChunk(piece.first, piece.last, [&](int64_t at, int64_t size) {
      const uint32_t crc = Crc32c(0, from + (at - piece.first), static_cast<size_t>(size));
      StoreCrc(payload, at, size, crc, crcs, tails);
    });
  }
}

bool StillHolds(const SaveTable& table, const Payload& payload) {
  const Witness* w = table.witnesses.data() + payload.first_witness;
  for (uint32_t i = 0; i < payload.num_witnesses; ++i, ++w) {
    std::array<uint8_t, 16> now;
    const ReadResult result = ReadSafely(now.data(), payload.src + w->at, w->size_bytes);
    if (result == ReadResult::kGone) return false;
    if (result == ReadResult::kRefused) {
      std::memcpy(now.data(), payload.src + w->at, w->size_bytes);
    }
    if (std::memcmp(now.data(), w->bytes.data(), w->size_bytes) != 0) return false;
  }
  return true;
}

void ChecksumSources(const SaveTable& table, std::vector<uint32_t>* crcs) {
  crcs->assign(static_cast<size_t>(table.num_chunks), 0);
  for (const Payload& payload : table.payloads) {
    if (!payload.is_lazy() || payload.device >= 0) continue;
    ForEachChunk(0, payload.size_bytes, [&](int64_t at, int64_t size) {
      (*crcs)[static_cast<size_t>(payload.first_chunk + at / kChunkBytes)] =
          Crc32c(0, payload.src + at, static_cast<size_t>(size));
    });
  }
}

}  // namespace shardckpt
