#include "core/stream_copy.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
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

constexpr size_t kMargin = 4096;  // Around each copy; also where unaligned starts come from.
constexpr uint8_t kGuard = 0xA5;

// Holds `dst` against what a copy of `size_bytes` to `start` must leave: guards all around.
bool HoldsOnly(const std::vector<uint8_t>& dst, size_t start, const uint8_t* src,
               size_t size_bytes) {
  const auto is_guard = [](uint8_t byte) { return byte == kGuard; };
  const auto first = dst.begin() + static_cast<ptrdiff_t>(start);
  const auto last = first + static_cast<ptrdiff_t>(size_bytes);
  return std::all_of(dst.begin(), first, is_guard) && std::equal(first, last, src) &&
         std::all_of(last, dst.end(), is_guard);
}

void CheckEveryPath(size_t size_bytes, size_t src_start, size_t dst_start, std::mt19937* random,
                    const std::vector<uint8_t>& src, std::vector<uint8_t>* dst) {
  const auto initial = static_cast<uint32_t>((*random)());
  const uint8_t* from = src.data() + src_start;
  const uint32_t expected = BitwiseCrc(initial, from, size_bytes);
  for (const StreamCopyPath& path : StreamCopyPaths()) {
    if (!path.is_supported()) continue;
    const std::string what = std::string(path.name) + ", " + std::to_string(size_bytes) +
                             " bytes from " + std::to_string(src_start) + " to " +
                             std::to_string(dst_start);
    std::fill(dst->begin(), dst->end(), kGuard);
    path.copy(dst->data() + dst_start, from, size_bytes);
    EXPECT(HoldsOnly(*dst, dst_start, from, size_bytes), "copy: " + what);
    std::fill(dst->begin(), dst->end(), kGuard);
    const uint32_t crc = path.copy_and_crc(initial, dst->data() + dst_start, from, size_bytes);
    EXPECT(crc == expected, "crc: " + what);
    EXPECT(HoldsOnly(*dst, dst_start, from, size_bytes), "copy_and_crc: " + what);
  }
}

TEST(EveryCopyPathCopiesEverySmallSizeAtAnyAlignment) {
  std::mt19937 random(11);
  const std::vector<uint8_t> src = RandomBytes(2048, &random);
  std::vector<uint8_t> dst(2048);
  for (size_t size = 0; size <= 1200; size += 1 + size / 200) {
    CheckEveryPath(size, random() % 64, 128 + random() % 64, &random, src, &dst);
    CheckEveryPath(size, 0, 0, &random, src, &dst);
  }
}

TEST(EveryCopyPathCopiesRandomLargeSizesAtAnyAlignment) {
  std::mt19937 random(12);
  constexpr size_t kMaxBytes = size_t{1} << 20;
  const std::vector<uint8_t> src = RandomBytes(kMaxBytes + kMargin, &random);
  std::vector<uint8_t> dst(kMaxBytes + 2 * kMargin);
  for (int round = 0; round < 30; ++round) {
    const size_t size = round < 3 ? kMaxBytes - static_cast<size_t>(round) : random() % kMaxBytes;
    CheckEveryPath(size, random() % kMargin, random() % kMargin, &random, src, &dst);
  }
}

TEST(TheMemcpyPathIsThereOnEveryProcessor) {
  const std::span<const StreamCopyPath> paths = StreamCopyPaths();
  EXPECT(!paths.empty(), "no path at all");
  EXPECT(std::strcmp(paths.back().name, "memcpy") == 0, paths.back().name);
  EXPECT(paths.back().is_supported(), "memcpy");
}

TEST(TheEnvironmentChoosesTheCopyPath) {
  const char* wanted = std::getenv("SHARDCKPT_COPY");
  const StreamCopyPath* expected = nullptr;
  for (const StreamCopyPath& path : StreamCopyPaths()) {
    if (!path.is_supported()) continue;
    if (expected == nullptr) expected = &path;  // The fastest, unless one is asked for.
    if (wanted != nullptr && std::strcmp(path.name, wanted) == 0) expected = &path;
  }
  EXPECT(std::strcmp(StreamCopyPathName(), expected->name) == 0,
         std::string(StreamCopyPathName()) + " instead of " + expected->name);
}

TEST(NothingMayBeCopiedFromNowhere) {
  for (const StreamCopyPath& path : StreamCopyPaths()) {
    if (!path.is_supported()) continue;
    path.copy(nullptr, nullptr, 0);
    EXPECT(path.copy_and_crc(77, nullptr, nullptr, 0) == 77, path.name);
  }
}

TEST(ACopiedCrcContinuesOverAnyCut) {
  std::mt19937 random(13);
  const std::vector<uint8_t> src = RandomBytes(100'000, &random);
  std::vector<uint8_t> dst(src.size());
  const uint32_t whole = BitwiseCrc(0, src.data(), src.size());
  for (int round = 0; round < 20; ++round) {
    const size_t cut = random() % (src.size() + 1);
    std::fill(dst.begin(), dst.end(), kGuard);
    const uint32_t front = CopyAndCrc(0, dst.data(), src.data(), cut);
    const uint32_t crc = CopyAndCrc(front, dst.data() + cut, src.data() + cut, src.size() - cut);
    EXPECT(crc == whole, std::string(StreamCopyPathName()) + ", cut at " + std::to_string(cut));
    EXPECT(dst == src, std::string(StreamCopyPathName()) + ", cut at " + std::to_string(cut));
  }
}

}  // namespace
}  // namespace shardckpt
