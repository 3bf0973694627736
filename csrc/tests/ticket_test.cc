#include "core/ticket.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/crc32c.h"
#include "tests/check.h"
#include "tests/reference.h"
#include "tests/saves.h"

namespace shardckpt {
namespace {

using testing::Encode;
using testing::kMiB;
using testing::RandomBytes;
using testing::RandomSave;
using testing::Row;
using testing::Save;

constexpr int64_t kFar = std::numeric_limits<int64_t>::max();

Save OneArray(const uint8_t* src, int64_t size_bytes, int64_t offset_bytes, int64_t file_bytes) {
  Save save;
  save.rows = {{src, size_bytes, 0, offset_bytes, 2}};
  save.file_bytes = {file_bytes};
  return save;
}

std::vector<uint8_t> Some(size_t size_bytes) {
  std::mt19937 random(5);
  return RandomBytes(size_bytes, &random);
}

TEST(EveryMalformedFieldOfATableIsRefusedAndItsPayloadNamed) {
  const std::vector<uint8_t> memory = Some(4096);
  // The second one is 4 x 3 items of 8 bytes, of which it stores 2 to 12.
  const std::vector<Row> rows = {
      {memory.data(), 100},
      {memory.data(), 80, 0, 4296, 0, 16, 8, {4, 3}, {24, 8}},
      {memory.data(), 50, 1, 5000, 3},
  };
  const std::vector<int64_t> good = Encode(rows);
  const std::vector<int64_t> files = {8192, 8192};
  SaveTable table;
  EXPECT(ParseSaveTable(good, files, &table).ok(), "");
  struct Case {
    size_t field;
    int64_t value;
    const char* what;
  };
  constexpr size_t kSecond = 9;
  constexpr size_t kThird = 22;
  const std::vector<Case> cases = {
      {0, 0, "payload 0"},
      {1, 0, "payload 0"},
      {1, -1, "payload 0"},
      {1, 4097, "payload 0"},
      {1, kFar, "payload 0"},
      {1, 201, "payload 1"},  // Overlaps the next.
      {2, -1, "payload 0"},
      {2, 2, "payload 0"},
      {2, 1, "payload 1"},  // The next one's file comes before.
      {3, 0, "payload 0"},
      {3, 4095, "payload 0"},
      {3, -4096, "payload 0"},
      {3, kFar, "payload 0"},
      {4, -1, "payload 0"},
      {5, -2, "payload 0"},
      {6, -1, "payload 0"},
      {7, 0, "payload 0"},
      {8, -1, "payload 0"},
      {8, 65, "payload 0"},
      {8, kFar, "payload 0"},
      {kSecond + 1, 88, "payload 1"},  // Past the array's end.
      {kSecond + 1, 79, "payload 1"},  // Half an item.
      {kSecond + 6, 17, "payload 1"},
      {kSecond + 6, 24, "payload 1"},
      {kSecond + 6, kFar, "payload 1"},
      {kSecond + 7, kFar, "payload 1"},
      {kSecond + 9, 0, "payload 1"},
      {kSecond + 9, -4, "payload 1"},
      {kSecond + 9, kFar / 8, "payload 1"},
      {kThird + 2, 2, "payload 2"},
      {kThird + 3, 8143, "payload 2"},
      {kThird + 8, 1, "payload 2"},  // The table ends.
  };
  for (const Case& c : cases) {
    std::vector<int64_t> numbers = good;
    numbers[c.field] = c.value;
    SaveTable refused;
    const Status status = ParseSaveTable(numbers, files, &refused);
    const std::string tried =
        "field " + std::to_string(c.field) + " = " + std::to_string(c.value) + ": ";
    EXPECT(status.code() == StatusCode::kInvalid, tried + "accepted");
    EXPECT(status.message().find(c.what) != std::string::npos, tried + status.message());
  }
  for (size_t cut = 1; cut < good.size(); ++cut) {
    if (cut == kSecond || cut == kThird) continue;
    SaveTable refused;
    EXPECT(!ParseSaveTable(std::span(good).first(cut), files, &refused).ok(), std::to_string(cut));
  }
}

TEST(FilesMustHoldWholePagesAndTheHeader) {
  for (const int64_t size : {int64_t{0}, int64_t{-4096}, int64_t{4095}, int64_t{4097}}) {
    SaveTable table;
    const Status status = ParseSaveTable({}, std::vector<int64_t>{4096, size}, &table);
    EXPECT(status.code() == StatusCode::kInvalid, std::to_string(size));
    EXPECT(status.message().find("file 1") != std::string::npos, status.message());
  }
  SaveTable table;
  EXPECT(ParseSaveTable({}, {}, &table).ok() && table.extents.empty(), "nothing to save is fine");
}

// Copies every extent of a save into images, and combines the checksums.
struct Copies {
  SaveTable table;
  std::vector<std::vector<uint8_t>> images;
  std::vector<uint32_t> crcs;
  std::vector<ChunkTail> tails;
  Copied last;
};

Copies CopyAll(const Save& save) {
  Copies copies;
  const Status status = ParseSaveTable(Encode(save.rows), save.file_bytes, &copies.table);
  EXPECT(status.ok(), status.message());
  for (const int64_t size : save.file_bytes) copies.images.emplace_back(size, uint8_t{0xAA});
  copies.crcs.resize(static_cast<size_t>(copies.table.num_chunks));
  return copies;
}

void CopyExtents(Copies* copies) {
  Scratch scratch;
  for (const Extent& extent : copies->table.extents) {
    uint8_t* dst = copies->images[static_cast<size_t>(extent.file)].data() + extent.offset_bytes;
    Copied copied;
    CopyExtent(copies->table, extent, dst, copies->crcs.data(), &scratch, &copied);
    copies->tails.insert(copies->tails.end(), copied.tails.begin(), copied.tails.end());
    if (copied.torn_payload >= 0) copies->last = copied;
  }
}

TEST(RandomTablesAreCopiedByteForByteWithTheChecksumsOfTheirChunks) {
  std::mt19937 random(1);
  const std::vector<uint8_t> memory = RandomBytes(48 * kMiB, &random);
  size_t num_tails = 0;
  for (int round = 0; round < 12; ++round) {
    const Save save = RandomSave(memory, 12 * kMiB, 1 + round, 3, &random);
    Copies copies = CopyAll(save);
    CopyExtents(&copies);
    EXPECT(copies.last.torn_payload == -1, std::to_string(copies.last.torn_payload));
    std::vector<uint32_t> again(copies.crcs.size());
    std::vector<ChunkTail> tails;
    for (const Extent& extent : copies.table.extents) {
      EXPECT(extent.size_bytes <= kSlotBytes && extent.offset_bytes % 4096 == 0, "");
      const auto& image = copies.images[static_cast<size_t>(extent.file)];
      ChecksumExtent(copies.table, extent, image.data() + extent.offset_bytes, again.data(),
                     &tails);
    }
    EXPECT(again == copies.crcs && tails.size() == copies.tails.size(), "ChecksumExtent differs");
    for (size_t file = 0; file < save.images.size(); ++file) {
      const auto& image = copies.images[file];
      EXPECT(std::equal(image.begin() + kHeaderBytes, image.end(),
                        save.images[file].begin() + kHeaderBytes),
             "file " + std::to_string(file) + " of round " + std::to_string(round));
    }
    num_tails += copies.tails.size();
    for (const ChunkTail& tail : copies.tails) {
      uint32_t& crc = copies.crcs[static_cast<size_t>(tail.chunk)];
      crc = Crc32cCombine(crc, tail.crc, static_cast<uint64_t>(tail.size_bytes));
    }
    for (size_t i = 0; i < save.rows.size(); ++i) {
      const Payload& payload = copies.table.payloads[i];
      const std::vector<uint8_t> bytes = testing::BytesOf(save.rows[i]);
      for (int64_t at = 0; at < payload.size_bytes; at += kChunkBytes) {
        const auto size = static_cast<size_t>(std::min(kChunkBytes, payload.size_bytes - at));
        const auto chunk = static_cast<size_t>(payload.first_chunk + at / kChunkBytes);
        EXPECT(copies.crcs[chunk] == Crc32c(0, bytes.data() + at, size), std::to_string(chunk));
      }
    }
  }
  EXPECT(num_tails > 10, "too few chunks that two extents share");
}

TEST(AnArrayThatChangedAtTheEdgeOfAnyBlockIsTorn) {
  // Offsets that make extents end inside of blocks, and sizes that end inside of witnesses.
  std::vector<uint8_t> memory = Some(20 * kMiB);
  for (const int64_t offset : {int64_t{4096}, int64_t{4096 + 64}, kSlotBytes - 48}) {
    for (const int64_t size : {int64_t{1}, int64_t{16}, int64_t{17}, kMiB - 1, kMiB, kMiB + 1,
                               kSlotBytes - 5, 2 * kSlotBytes + 7 * kMiB / 2}) {
      const Save save = OneArray(memory.data(), size, offset, (offset + size + 4096) / 4096 * 4096);
      std::vector<int64_t> places = {0, size - 1};
      for (int64_t edge = kMiB; edge < size; edge += kMiB) {
        places.insert(places.end(), {edge - 1, edge});
      }
      for (const int64_t place : places) {
        Copies copies = CopyAll(save);
        memory[static_cast<size_t>(place)] ^= 1;
        EXPECT(!StillHolds(copies.table, copies.table.payloads[0]), std::to_string(place));
        CopyExtents(&copies);
        memory[static_cast<size_t>(place)] ^= 1;
        EXPECT(copies.last.torn_payload == 0 && !copies.last.is_gone,
               "offset " + std::to_string(offset) + ", size " + std::to_string(size) + ", byte " +
                   std::to_string(place));
        EXPECT(StillHolds(copies.table, copies.table.payloads[0]), "changed back");
      }
    }
  }
}

TEST(WitnessesAscendAndNoneLiesAcrossTheEdgeOfAnExtent) {
  const std::vector<uint8_t> memory = Some(20 * kMiB);
  for (const int64_t offset : {int64_t{4096}, int64_t{4096 + 48}, kSlotBytes - 16}) {
    const Save save = OneArray(memory.data(), 19 * kMiB + 5, offset, 40 * kMiB);
    SaveTable table;
    EXPECT(ParseSaveTable(Encode(save.rows), save.file_bytes, &table).ok(), "");
    EXPECT(table.witnesses.size() == 3 * 19 + 1, std::to_string(table.witnesses.size()));
    int64_t before = -1;
    for (const Witness& witness : table.witnesses) {
      EXPECT(witness.at > before, std::to_string(witness.at));
      before = witness.at;
      const int64_t first = offset + witness.at - kHeaderBytes;
      EXPECT(first / kSlotBytes == (first + witness.size_bytes - 1) / kSlotBytes,
             std::to_string(witness.at));
    }
  }
}

TEST(MemoryThatWentAwayIsGoneAndNoCrash) {
  constexpr size_t kPage = 4096;
  constexpr size_t kPages = 300;
  // The whole array, its first page, one in the middle, its last one.
  for (const auto& [first, count] :
       std::vector<std::pair<size_t, size_t>>{{0, kPages}, {0, 1}, {150, 1}, {kPages - 1, 1}}) {
    auto* memory = static_cast<uint8_t*>(
        mmap(nullptr, kPages * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    const int64_t size = kPages * kPage;
    Copies copies = CopyAll(OneArray(memory, size, 4096, size + 4096));
    munmap(memory + first * kPage, count * kPage);
    CopyExtents(&copies);
    EXPECT(copies.last.torn_payload == 0 && copies.last.is_gone, std::to_string(first));
    if (first != 150) EXPECT(!StillHolds(copies.table, copies.table.payloads[0]), "");
    munmap(memory, kPages * kPage);
  }
}

TEST(AStridedArrayIsEagerWhateverItsGroup) {
  const std::vector<uint8_t> memory = Some(64);
  SaveTable table;
  const std::vector<Row> rows = {{memory.data(), 8, 0, 4096, 9, 0, 1, {8}, {2}}};
  EXPECT(ParseSaveTable(Encode(rows), std::vector<int64_t>{8192}, &table).ok(), "");
  EXPECT(!table.payloads[0].is_lazy() && table.extents[0].is_eager && table.witnesses.empty(), "");
}

}  // namespace
}  // namespace shardckpt
