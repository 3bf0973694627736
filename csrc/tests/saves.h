// Tables of saves for the tests, and what their files must hold.
#ifndef SHARDCKPT_TESTS_SAVES_H_
#define SHARDCKPT_TESTS_SAVES_H_

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "core/crc32c.h"
#include "core/ticket.h"
#include "tests/reference.h"

namespace shardckpt::testing {

inline constexpr int64_t kMiB = int64_t{1} << 20;

struct Row {
  const uint8_t* src;
  int64_t size_bytes;
  int64_t file = 0;
  int64_t offset_bytes = kHeaderBytes;
  int64_t group = kEager;
  int64_t start = 0;
  int64_t itemsize_bytes = 1;
  std::vector<int64_t> shape = {};
  std::vector<int64_t> strides_bytes = {};
};

inline std::vector<int64_t> Encode(const std::vector<Row>& rows) {
  std::vector<int64_t> numbers;
  for (const Row& row : rows) {
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row.src));
    numbers.insert(numbers.end(),
                   {address, row.size_bytes, row.file, row.offset_bytes, row.group, -1, row.start,
                    row.itemsize_bytes, static_cast<int64_t>(row.shape.size())});
    numbers.insert(numbers.end(), row.shape.begin(), row.shape.end());
    numbers.insert(numbers.end(), row.strides_bytes.begin(), row.strides_bytes.end());
  }
  return numbers;
}

// The bytes of a row, one element after another.
inline std::vector<uint8_t> BytesOf(const Row& row) {
  if (row.shape.empty()) return {row.src, row.src + row.size_bytes};
  std::vector<uint8_t> bytes;
  std::vector<int64_t> index(row.shape.size(), 0);
  while (static_cast<int64_t>(bytes.size()) < row.start + row.size_bytes) {
    const uint8_t* item = row.src;
    for (size_t dim = 0; dim < index.size(); ++dim) item += index[dim] * row.strides_bytes[dim];
    bytes.insert(bytes.end(), item, item + row.itemsize_bytes);
    for (size_t dim = index.size(); dim-- > 0 && ++index[dim] == row.shape[dim];) index[dim] = 0;
  }
  return {bytes.begin() + row.start, bytes.begin() + row.start + row.size_bytes};
}

// A save and what it must give: per file the bytes after the header's page, and the checksums.
struct Save {
  std::vector<Row> rows;
  std::vector<int64_t> file_bytes;
  std::vector<std::vector<uint8_t>> images;  // Zeroes in the header's page.
  std::vector<std::vector<uint8_t>> crcs;
};

inline constexpr uint32_t kSeed = 77;

inline void Expect(Save* save) {
  save->images.clear();
  save->crcs.assign(save->file_bytes.size(), {});
  for (const int64_t size : save->file_bytes) save->images.emplace_back(size, uint8_t{0});
  for (const Row& row : save->rows) {
    const std::vector<uint8_t> bytes = BytesOf(row);
    std::copy(bytes.begin(), bytes.end(),
              save->images[static_cast<size_t>(row.file)].begin() + row.offset_bytes);
    for (int64_t at = 0; at < row.size_bytes; at += kChunkBytes) {
      const auto size = static_cast<size_t>(std::min(kChunkBytes, row.size_bytes - at));
      const auto place = static_cast<uint64_t>(row.offset_bytes + at);
      uint8_t encoded[8];
      for (int i = 0; i < 8; ++i) encoded[i] = static_cast<uint8_t>(place >> (8 * i));
      const uint32_t crc = Crc32c(0, bytes.data() + at, size) ^ BitwiseCrc(kSeed, encoded, 8);
      auto& out = save->crcs[static_cast<size_t>(row.file)];
      for (int i = 0; i < 4; ++i) out.push_back(static_cast<uint8_t>(crc >> (8 * i)));
    }
  }
}

// A save of random payloads, gaps and files over `memory`, with groups 0 to `num_groups`.
inline Save RandomSave(const std::vector<uint8_t>& memory, int64_t max_payload_bytes,
                       int64_t num_payloads, int64_t num_groups, std::mt19937* random) {
  const auto below = [&](int64_t end) {
    return static_cast<int64_t>((*random)() % static_cast<uint64_t>(end));
  };
  Save save;
  int64_t file = 0;
  int64_t end = kHeaderBytes;
  const auto close = [&] {
    save.file_bytes.push_back((end + kHeaderBytes - 1) / kHeaderBytes * kHeaderBytes);
    end = kHeaderBytes;
  };
  for (int64_t i = 0; i < num_payloads; ++i) {
    if (i > 0 && below(6) == 0) {
      close();
      ++file;
    }
    Row row{memory.data(), 0, file, end + below(3) * below(5000), below(num_groups + 1)};
    const auto most = std::min(max_payload_bytes, static_cast<int64_t>(memory.size()) / 4);
    // Small ones of every magnitude, and large ones that several extents hold.
    const int64_t end_of_size =
        below(2) == 0 ? most : int64_t{1} << below(std::bit_width(static_cast<uint64_t>(most)));
    const int64_t size = 1 + below(end_of_size);
    if (below(4) != 0) {
      row.size_bytes = size;
      row.src += below(static_cast<int64_t>(memory.size()) - size);
    } else {
      row.itemsize_bytes = int64_t{1} << below(4);
      const int64_t columns = 1 + below(40);
      const int64_t num_rows = 1 + size / 8 / (columns * row.itemsize_bytes);
      row.shape = {num_rows, 1, columns};
      // Read backwards, transposed, or with gaps between the rows.
      const int64_t item = row.itemsize_bytes;
      const int64_t kind = below(3);
      if (kind == 0) {
        row.strides_bytes = {-columns * item, 12345, item};
        row.src += (num_rows - 1) * columns * item;
      } else if (kind == 1) {
        row.strides_bytes = {item, 0, num_rows * item};
      } else {
        row.strides_bytes = {(columns + 1) * item, 8, item};
      }
      const int64_t num_items = num_rows * columns;
      const int64_t skipped = below(num_items);
      row.start = skipped * item;
      row.size_bytes = (num_items - skipped) * item;
    }
    end = row.offset_bytes + row.size_bytes;
    save.rows.push_back(row);
  }
  close();
  Expect(&save);
  return save;
}

}  // namespace shardckpt::testing

#endif  // SHARDCKPT_TESTS_SAVES_H_
