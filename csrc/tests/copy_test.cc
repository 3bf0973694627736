#include "core/copy.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/check.h"

namespace shardckpt {
namespace {

int64_t Address(const void* data) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
}

struct Array {
  std::vector<uint8_t> bytes;
  int64_t start_bytes = 0;  // Of element 0; not 0 where a stride is negative.
  std::vector<int64_t> strides_bytes;
};

// Lays the dims out in a random order, with gaps and reversed dims, inside memory just large
// enough.
Array RandomArray(const std::vector<int64_t>& shape, int64_t itemsize, std::mt19937* random) {
  Array array;
  array.strides_bytes.resize(shape.size());
  std::vector<size_t> order(shape.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), *random);
  int64_t stride = itemsize;
  for (const size_t dim : order) {
    if ((*random)() % 3 == 0) stride += itemsize * static_cast<int64_t>((*random)() % 3);
    array.strides_bytes[dim] = stride;
    stride *= std::max<int64_t>(shape[dim], 1);
    if ((*random)() % 4 == 0 && shape[dim] > 0) {
      array.start_bytes += array.strides_bytes[dim] * (shape[dim] - 1);
      array.strides_bytes[dim] *= -1;
    }
  }
  array.bytes.resize(static_cast<size_t>(stride + itemsize));
  for (uint8_t& byte : array.bytes) byte = static_cast<uint8_t>((*random)());
  return array;
}

void AppendRow(Array* dst, const Array& src, const std::vector<int64_t>& shape, int64_t itemsize,
               std::vector<int64_t>* table) {
  table->insert(table->end(), {Address(dst->bytes.data() + dst->start_bytes),
                               Address(src.bytes.data() + src.start_bytes), itemsize,
                               static_cast<int64_t>(shape.size())});
  table->insert(table->end(), shape.begin(), shape.end());
  table->insert(table->end(), dst->strides_bytes.begin(), dst->strides_bytes.end());
  table->insert(table->end(), src.strides_bytes.begin(), src.strides_bytes.end());
}

// The definition: element by element, in C order.
void CopyByElement(Array* dst, const Array& src, const std::vector<int64_t>& shape,
                   int64_t itemsize) {
  int64_t num_elements = 1;
  for (const int64_t size : shape) num_elements *= size;
  for (int64_t element = 0; element < num_elements; ++element) {
    int64_t rest = element;
    int64_t dst_at = dst->start_bytes;
    int64_t src_at = src.start_bytes;
    for (size_t dim = shape.size(); dim-- > 0;) {
      dst_at += rest % shape[dim] * dst->strides_bytes[dim];
      src_at += rest % shape[dim] * src.strides_bytes[dim];
      rest /= shape[dim];
    }
    std::memcpy(dst->bytes.data() + dst_at, src.bytes.data() + src_at,
                static_cast<size_t>(itemsize));
  }
}

TEST(AnyStridesCopyAsElementByElementAndTouchNothingElse) {
  std::mt19937 random(5);
  for (int round = 0; round < 400; ++round) {
    const int64_t itemsize = std::vector<int64_t>{1, 2, 3, 4, 8, 16}[random() % 6];
    std::vector<int64_t> shape(random() % 5);
    for (int64_t& size : shape) size = static_cast<int64_t>(random() % 6);
    Array dst = RandomArray(shape, itemsize, &random);
    const Array src = RandomArray(shape, itemsize, &random);
    Array expected = dst;
    CopyByElement(&expected, src, shape, itemsize);
    std::vector<int64_t> table;
    AppendRow(&dst, src, shape, itemsize, &table);
    const Status status = CopyRows(table, 1 + random() % 3);
    EXPECT(status.ok(), status.message());
    EXPECT(dst.bytes == expected.bytes, "round " + std::to_string(round));
  }
}

TEST(ManyThreadsShareLargeRowsWithoutAGap) {
  std::mt19937 random(6);
  const std::vector<std::vector<int64_t>> shapes{{9'000'001}, {3001, 1201}, {0, 7}, {}, {1, 5, 1}};
  std::vector<Array> dsts;
  std::vector<Array> srcs;
  for (const auto& shape : shapes) {
    dsts.push_back(RandomArray(shape, 2, &random));
    srcs.push_back(RandomArray(shape, 2, &random));
  }
  std::vector<Array> expected = dsts;
  std::vector<int64_t> table;
  for (size_t i = 0; i < shapes.size(); ++i) {
    CopyByElement(&expected[i], srcs[i], shapes[i], 2);
    AppendRow(&dsts[i], srcs[i], shapes[i], 2, &table);
  }
  const Status status = CopyRows(table, 4);
  EXPECT(status.ok(), status.message());
  for (size_t i = 0; i < shapes.size(); ++i) {
    EXPECT(dsts[i].bytes == expected[i].bytes, "row " + std::to_string(i));
  }
}

TEST(ASourceMayRepeatItself) {
  const uint32_t one = 0xABCD1234u;
  std::vector<uint32_t> many(1000, 0);
  const std::vector<int64_t> table{Address(many.data()), Address(&one), 4, 1, 1000, 4, 0};
  EXPECT(CopyRows(table, 2).ok(), "");
  EXPECT(std::count(many.begin(), many.end(), one) == 1000, "");
}

TEST(ATableThatIsNoEncodingCopiesNothing) {
  uint64_t dst = 1;
  const uint64_t src = 2;
  const std::vector<int64_t> good{Address(&dst), Address(&src), 8, 0};
  const std::vector<std::vector<int64_t>> bad{
      {Address(&dst)},                                         // Cut off in the head.
      {Address(&dst), Address(&src), 8, 1, 1, 8},              // Cut off in the strides.
      {Address(&dst), Address(&src), 0, 0},                    // No itemsize.
      {Address(&dst), Address(&src), -8, 0},                   // Negative itemsize.
      {Address(&dst), Address(&src), 8, -1},                   // Negative ndim.
      {Address(&dst), Address(&src), 8, 33},                   // Too many dims.
      {Address(&dst), Address(&src), 8, 1, -1, 8, 8},          // Negative size.
      {Address(&dst), Address(&src), 8, 1, 2, 0, 8},           // Overwrites itself.
      {0, Address(&src), 8, 0},                                // Null destination.
      {Address(&dst), 0, 8, 0},                                // Null source.
      {Address(&dst), Address(&src), 8, 1, INT64_MAX, 8, 8},   // Strides overflow.
      {Address(&dst), Address(&src), INT64_MAX, 1, 2, 1, 1}};  // Bytes overflow.
  for (size_t i = 0; i < bad.size(); ++i) {
    std::vector<int64_t> table = good;
    table.insert(table.end(), bad[i].begin(), bad[i].end());
    EXPECT(CopyRows(table, 1).code() == StatusCode::kInvalid, "table " + std::to_string(i));
    EXPECT(dst == 1, "table " + std::to_string(i) + " was copied in part");
  }
  EXPECT(CopyRows(good, 0).code() == StatusCode::kInvalid, "0 threads");
  EXPECT(CopyRows(good, kMaxCopyThreads + 1).code() == StatusCode::kInvalid, "too many threads");
  const std::vector<int64_t> empty{Address(&dst), 0, 8, 3, INT64_MAX, 2, 0, 1, 0, 0, 1, 0, 0};
  EXPECT(CopyRows(empty, 1).ok() && dst == 1, "an empty array may have any strides and no memory");
  EXPECT(CopyRows({}, 1).ok(), "nothing to copy is fine");
  EXPECT(CopyRows(good, 1).ok() && dst == 2, "ndim 0 is one item");
}

TEST(SourcesMayCountFromABase) {
  const std::vector<uint8_t> src{1, 2, 3, 4, 5, 6};
  std::vector<uint8_t> dst(2);
  const std::vector<int64_t> table{Address(dst.data()), 4, 1, 1, 2, 1, 1};
  EXPECT(CopyRows(table, 1, Address(src.data())).ok(), "");
  EXPECT(dst == (std::vector<uint8_t>{5, 6}), "bytes differ");
  EXPECT(CopyRows(table, 1, INT64_MAX).code() == StatusCode::kInvalid, "no such address");
  EXPECT(CopyRows(table, 1, -4).code() == StatusCode::kInvalid, "a null address");
}

}  // namespace
}  // namespace shardckpt
