#include "core/crc32c.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/crc32c_paths.h"

namespace shardckpt {
namespace {

constexpr Crc32cPath kPaths[] = {
#if defined(__x86_64__)
    {"vpclmul", crc::HasVpclmul, crc::Vpclmul},
    {"sse42", crc::HasThreeWay, crc::ThreeWay},
#elif defined(__aarch64__)
    {"armv8", crc::HasThreeWay, crc::ThreeWay},
#endif
    {"table", [] { return true; }, crc::Table},
};

const Crc32cPath& ChoosePath() {
  // An unknown or unsupported name falls through to the fastest path: the values are the same.
  const char* wanted = std::getenv("SHARDCKPT_CRC");
  if (wanted != nullptr) {
    for (const Crc32cPath& path : kPaths) {
      if (std::strcmp(path.name, wanted) == 0 && path.is_supported()) return path;
    }
  }
  for (const Crc32cPath& path : kPaths) {
    if (path.is_supported()) return path;
  }
  return kPaths[std::size(kPaths) - 1];
}

const Crc32cPath& ChosenPath() {
  static const Crc32cPath& path = ChoosePath();
  return path;
}

// Entry k is x^(8 * 2^k): what 2^k further bytes multiply a CRC by.
consteval std::array<uint32_t, 64> MakeBytePowers() {
  std::array<uint32_t, 64> powers{crc::PowerOfX(8)};
  for (size_t k = 1; k < powers.size(); ++k) {
    powers[k] = crc::Multiply(powers[k - 1], powers[k - 1]);
  }
  return powers;
}

constexpr std::array<uint32_t, 64> kBytePowers = MakeBytePowers();

void StoreLittleEndian(uint64_t value, int num_bytes, uint8_t* out) {
  for (int i = 0; i < num_bytes; ++i) out[i] = static_cast<uint8_t>(value >> (8 * i));
}

}  // namespace

uint32_t Crc32c(uint32_t initial, const void* data, size_t size_bytes) {
  return ChosenPath().compute(initial, data, size_bytes);
}

uint32_t Crc32cCombine(uint32_t first, uint32_t second, uint64_t second_size_bytes) {
  for (size_t k = 0; second_size_bytes != 0; ++k, second_size_bytes >>= 1) {
    if ((second_size_bytes & 1u) != 0) first = crc::Multiply(first, kBytePowers[k]);
  }
  return first ^ second;
}

const char* Crc32cPathName() { return ChosenPath().name; }

std::span<const Crc32cPath> Crc32cPaths() { return kPaths; }

uint32_t PlaceCrc(uint32_t seed, uint64_t file_offset_bytes) {
  std::array<uint8_t, 8> place;
  StoreLittleEndian(file_offset_bytes, 8, place.data());
  return Crc32c(seed, place.data(), place.size());
}

Status CountChunks(std::span<const ChunkRow> rows, int64_t chunk_bytes, size_t* num_chunks) {
  if (chunk_bytes < 1) {
    return Status::Invalid("chunk_crcs: chunk_bytes is " + std::to_string(chunk_bytes) +
                           "; it must be at least 1.");
  }
  size_t count = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const ChunkRow& row = rows[i];
    int64_t end = 0;
    if (row.size_bytes < 0 || row.file_offset_bytes < 0 ||
        (row.address == 0 && row.size_bytes > 0) ||
        __builtin_add_overflow(row.file_offset_bytes, row.size_bytes, &end)) {
      return Status::Invalid("chunk_crcs: row " + std::to_string(i) + " is [address " +
                             std::to_string(row.address) + ", nbytes " +
                             std::to_string(row.size_bytes) + ", file_offset " +
                             std::to_string(row.file_offset_bytes) +
                             "]; pass memory that exists and a place in a file.");
    }
    count +=
        static_cast<size_t>(row.size_bytes / chunk_bytes + (row.size_bytes % chunk_bytes != 0));
  }
  *num_chunks = count;
  return Status::Ok();
}

void ChunkCrcs(std::span<const ChunkRow> rows, uint32_t seed, int64_t chunk_bytes, uint8_t* out) {
  for (const ChunkRow& row : rows) {
    const auto* data = reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(row.address));
    for (int64_t start = 0; start < row.size_bytes;) {
      const int64_t size = std::min(chunk_bytes, row.size_bytes - start);
      const uint32_t value = Crc32c(0, data + start, static_cast<size_t>(size)) ^
                             PlaceCrc(seed, static_cast<uint64_t>(row.file_offset_bytes + start));
      StoreLittleEndian(value, 4, out);
      out += 4;
      start += size;
    }
  }
}

}  // namespace shardckpt
