#include "core/crc32c.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/check.h"
#include "tests/reference.h"

namespace shardckpt {
namespace {

using testing::BitwiseCrc;
using testing::RandomBytes;

std::string Case(const Crc32cPath& path, size_t size_bytes, size_t start) {
  return std::string(path.name) + ", " + std::to_string(size_bytes) + " bytes from " +
         std::to_string(start);
}

TEST(EveryPathGivesThePublishedVectors) {
  const std::array<uint8_t, 32> zeros{};
  for (const Crc32cPath& path : Crc32cPaths()) {
    if (!path.is_supported()) continue;
    EXPECT(path.compute(0, "123456789", 9) == 0xE3069283u, path.name);
    EXPECT(path.compute(0, zeros.data(), zeros.size()) == 0x8A9136AAu, path.name);
    EXPECT(path.compute(0, nullptr, 0) == 0u, path.name);
    EXPECT(path.compute(0x12345678u, nullptr, 0) == 0x12345678u, path.name);
  }
}

TEST(TheTableIsThereOnEveryProcessor) {
  const std::span<const Crc32cPath> paths = Crc32cPaths();
  EXPECT(!paths.empty(), "no path at all");
  EXPECT(std::strcmp(paths.back().name, "table") == 0, paths.back().name);
  EXPECT(paths.back().is_supported(), "table");
}

TEST(EveryPathEqualsTheBitwiseReferenceAtEverySmallSizeAndAlignment) {
  std::mt19937 random(1);
  // Past 4 * 256 bytes every loop of every path has run and left a rest.
  const std::vector<uint8_t> bytes = RandomBytes(1200, &random);
  for (size_t size = 0; size <= 1100; size += 1 + size / 300) {
    for (const size_t start : {size_t{0}, size_t{1}, size_t{7}, size_t{63}}) {
      const auto initial = static_cast<uint32_t>(random());
      const uint32_t expected = BitwiseCrc(initial, bytes.data() + start, size);
      for (const Crc32cPath& path : Crc32cPaths()) {
        if (!path.is_supported()) continue;
        EXPECT(path.compute(initial, bytes.data() + start, size) == expected,
               Case(path, size, start));
      }
    }
  }
}

TEST(EveryPathEqualsTheBitwiseReferenceAtRandomLargeSizes) {
  std::mt19937 random(2);
  const std::vector<uint8_t> bytes = RandomBytes(200'000, &random);
  for (int round = 0; round < 24; ++round) {
    const size_t start = random() % 128;
    const size_t size = random() % (bytes.size() - start);
    const auto initial = static_cast<uint32_t>(random());
    const uint32_t expected = BitwiseCrc(initial, bytes.data() + start, size);
    for (const Crc32cPath& path : Crc32cPaths()) {
      if (!path.is_supported()) continue;
      EXPECT(path.compute(initial, bytes.data() + start, size) == expected,
             Case(path, size, start));
    }
  }
}

TEST(ACrcContinuesOverAnyCut) {
  std::mt19937 random(3);
  const std::vector<uint8_t> bytes = RandomBytes(20'000, &random);
  const uint32_t whole = Crc32c(0, bytes.data(), bytes.size());
  for (int round = 0; round < 100; ++round) {
    const size_t cut = random() % (bytes.size() + 1);
    const uint32_t front = Crc32c(0, bytes.data(), cut);
    EXPECT(Crc32c(front, bytes.data() + cut, bytes.size() - cut) == whole, std::to_string(cut));
  }
}

TEST(TwoCrcsCombineIntoTheCrcOfTheWhole) {
  std::mt19937 random(6);
  const std::vector<uint8_t> bytes = RandomBytes(70'000, &random);
  for (int round = 0; round < 200; ++round) {
    const size_t size = round == 0 ? 0 : random() % (bytes.size() + 1);
    size_t cut = random() % (size + 1);
    if (round % 10 == 1) cut = 0;
    if (round % 10 == 2) cut = size;
    const uint32_t front = Crc32c(0, bytes.data(), cut);
    const uint32_t back = Crc32c(0, bytes.data() + cut, size - cut);
    EXPECT(Crc32cCombine(front, back, size - cut) == BitwiseCrc(0, bytes.data(), size),
           std::to_string(cut) + " of " + std::to_string(size) + " bytes");
  }
}

TEST(CrcsOfMoreThanMemoryHoldsCombineInAnyOrder) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 100; ++round) {
    const auto first = static_cast<uint32_t>(random());
    const auto second = static_cast<uint32_t>(random());
    const auto third = static_cast<uint32_t>(random());
    const uint64_t second_bytes = random() >> (1 + round % 63);
    const uint64_t third_bytes = random() >> (1 + round % 31);
    const uint32_t front = Crc32cCombine(first, second, second_bytes);
    const uint32_t back = Crc32cCombine(second, third, third_bytes);
    EXPECT(Crc32cCombine(front, third, third_bytes) ==
               Crc32cCombine(first, back, second_bytes + third_bytes),
           std::to_string(second_bytes) + " and " + std::to_string(third_bytes) + " bytes");
  }
}

int64_t Address(const void* data) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
}

TEST(AChunkCrcBindsBytesSeedAndPlace) {
  std::mt19937 random(4);
  const std::vector<uint8_t> bytes = RandomBytes(1000, &random);
  const std::array<ChunkRow, 3> rows{ChunkRow{Address(bytes.data()), 1000, 4096}, ChunkRow{0, 0, 9},
                                     ChunkRow{Address(bytes.data()), 300, 0}};
  size_t num_chunks = 0;
  EXPECT(CountChunks(rows, 300, &num_chunks).ok(), "");
  EXPECT(num_chunks == 5, std::to_string(num_chunks));
  std::vector<uint8_t> out(4 * num_chunks);
  ChunkCrcs(rows, 77, 300, out.data());

  const std::array<std::array<int64_t, 3>, 5> chunks{
      {{0, 300, 4096}, {300, 300, 4396}, {600, 300, 4696}, {900, 100, 4996}, {0, 300, 0}}};
  for (size_t i = 0; i < chunks.size(); ++i) {
    const auto [start, size, offset] = chunks[i];
    std::array<uint8_t, 8> place;
    for (size_t k = 0; k < 8; ++k) place[k] = static_cast<uint8_t>(offset >> (8 * k));
    const uint32_t expected = BitwiseCrc(0, bytes.data() + start, static_cast<size_t>(size)) ^
                              BitwiseCrc(77, place.data(), 8);
    const uint32_t found =
        static_cast<uint32_t>(out[4 * i]) | static_cast<uint32_t>(out[4 * i + 1]) << 8 |
        static_cast<uint32_t>(out[4 * i + 2]) << 16 | static_cast<uint32_t>(out[4 * i + 3]) << 24;
    EXPECT(found == expected, "chunk " + std::to_string(i));
  }
}

TEST(NonsenseRowsAreRefused) {
  const uint8_t byte = 0;
  size_t num_chunks = 0;
  for (const ChunkRow& row : {ChunkRow{Address(&byte), -1, 0}, ChunkRow{Address(&byte), 1, -1},
                              ChunkRow{0, 1, 0}, ChunkRow{Address(&byte), INT64_MAX, INT64_MAX}}) {
    const std::array<ChunkRow, 1> rows{row};
    EXPECT(CountChunks(rows, 64, &num_chunks).code() == StatusCode::kInvalid,
           std::to_string(row.size_bytes));
  }
  EXPECT(CountChunks({}, 0, &num_chunks).code() == StatusCode::kInvalid, "chunk_bytes 0");
}

}  // namespace
}  // namespace shardckpt
