#include "core/file.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "tests/check.h"

namespace shardckpt {
namespace {

// A file in memory that follows a script: one entry per call, 0 "do it all", n > 0 "at most n
// bytes", < 0 "fail with that errno". After the script every call does it all.
struct Fake {
  std::vector<uint8_t> bytes = {};
  std::vector<int> script = {};
  size_t num_calls = 0;
  int num_waits = 0;
  bool takes_nothing = false;
};

Fake fake;

ssize_t NextCount(size_t size_bytes) {
  const int entry = fake.num_calls < fake.script.size() ? fake.script[fake.num_calls] : 0;
  ++fake.num_calls;
  if (entry < 0) {
    errno = -entry;
    return -1;
  }
  const size_t most = entry == 0 ? size_bytes : static_cast<size_t>(entry);
  return static_cast<ssize_t>(std::min(size_bytes, most));
}

ssize_t FakePwrite(int, const void* data, size_t size_bytes, off_t offset_bytes) {
  if (fake.takes_nothing) return 0;
  const ssize_t count = NextCount(size_bytes);
  if (count <= 0) return count;
  const size_t start = static_cast<size_t>(offset_bytes);
  const size_t stop = start + static_cast<size_t>(count);
  if (fake.bytes.size() < stop) fake.bytes.resize(stop);
  std::memcpy(fake.bytes.data() + start, data, static_cast<size_t>(count));
  return count;
}

ssize_t FakePread(int, void* data, size_t size_bytes, off_t offset_bytes) {
  const size_t start = std::min(static_cast<size_t>(offset_bytes), fake.bytes.size());
  const ssize_t count = NextCount(std::min(size_bytes, fake.bytes.size() - start));
  if (count > 0) std::memcpy(data, fake.bytes.data() + start, static_cast<size_t>(count));
  return count;
}

constexpr FileOps kFakeOps{FakePwrite, FakePread, [](int, int) { ++fake.num_waits; }, nullptr,
                           nullptr};

std::vector<uint8_t> Pattern(size_t size_bytes) {
  std::vector<uint8_t> bytes(size_bytes);
  for (size_t i = 0; i < size_bytes; ++i) bytes[i] = static_cast<uint8_t>(i * 7 + 1);
  return bytes;
}

TEST(ShortWritesAndInterruptionsAreCarriedOnFrom) {
  const std::vector<uint8_t> data = Pattern(1000);
  fake = Fake{.script = {1, -EINTR, 10, -EAGAIN, -EINTR, 500}};
  const Status status = WriteFull(kFakeOps, 3, data.data(), data.size(), 24);
  EXPECT(status.ok(), status.message());
  EXPECT(fake.bytes.size() == 1024, std::to_string(fake.bytes.size()));
  EXPECT(std::equal(data.begin(), data.end(), fake.bytes.begin() + 24), "bytes differ");
  EXPECT(fake.num_waits == 1, "EAGAIN waits, EINTR does not");
}

TEST(ShortReadsAndInterruptionsAreCarriedOnFrom) {
  fake = Fake{.bytes = Pattern(1000), .script = {1, -EINTR, 10, -EAGAIN, 3}};
  std::vector<uint8_t> data(900);
  size_t num_read = 0;
  EXPECT(ReadFull(kFakeOps, 3, data.data(), data.size(), 50, &num_read).ok(), "");
  EXPECT(num_read == 900, std::to_string(num_read));
  EXPECT(std::equal(data.begin(), data.end(), fake.bytes.begin() + 50), "bytes differ");
}

TEST(AReadEndsWithTheFile) {
  fake = Fake{.bytes = Pattern(100)};
  std::vector<uint8_t> data(80, 0xEE);
  size_t num_read = 0;
  EXPECT(ReadFull(kFakeOps, 3, data.data(), data.size(), 60, &num_read).ok(), "");
  EXPECT(num_read == 40, std::to_string(num_read));
  EXPECT(data[39] == fake.bytes[99] && data[40] == 0xEE, "wrote past what was read");
  EXPECT(ReadFull(kFakeOps, 3, data.data(), data.size(), 500, &num_read).ok() && num_read == 0, "");
}

TEST(AnErrorAfterAShortWriteIsReportedWithItsErrnoAndPlace) {
  const std::vector<uint8_t> data = Pattern(1000);
  fake = Fake{.script = {600, -ENOSPC}};
  const Status status = WriteFull(kFakeOps, 3, data.data(), data.size(), 4096);
  EXPECT(status.code() == StatusCode::kIo, "");
  EXPECT(status.system_errno() == ENOSPC, std::to_string(status.system_errno()));
  for (const char* part : {"write_full", "1000", "4096", "600", "No space"}) {
    EXPECT(status.message().find(part) != std::string::npos, status.message());
  }
  EXPECT(fake.num_calls == 2, "an error must not be retried");
}

TEST(BlocksAreCarriedOnFromTheLastWholeOne) {
  fake = Fake{.bytes = Pattern(3 * kBlockBytes + 100), .script = {5000, -EINTR, 4096, 4096}};
  alignas(kBlockBytes) static uint8_t data[4 * kBlockBytes];
  size_t num_read = 0;
  // 5000 bytes, then from 4096 again, from 8192 and from 12288 to the end of the file.
  const size_t needed = 3 * kBlockBytes + 100;
  EXPECT(ReadBlocks(kFakeOps, 3, data, sizeof(data), needed, 0, &num_read).ok(), "");
  EXPECT(num_read == needed, std::to_string(num_read));
  EXPECT(std::equal(fake.bytes.begin(), fake.bytes.end(), data), "bytes differ");
  EXPECT(fake.num_calls == 5, std::to_string(fake.num_calls));
}

TEST(BlocksEndWithTheFile) {
  alignas(kBlockBytes) static uint8_t data[2 * kBlockBytes];
  size_t num_read = 0;
  fake = Fake{.bytes = Pattern(kBlockBytes + 10)};
  EXPECT(ReadBlocks(kFakeOps, 3, data, sizeof(data), sizeof(data), 0, &num_read).ok(), "");
  EXPECT(num_read == kBlockBytes + 10, std::to_string(num_read));
  fake = Fake{.bytes = Pattern(kBlockBytes + 10)};
  EXPECT(ReadBlocks(kFakeOps, 3, data, sizeof(data), 100, kBlockBytes, &num_read).ok(), "");
  EXPECT(num_read == 10, std::to_string(num_read));
}

TEST(WhatIsNoBlockIsRefusedBeforeAnyCall) {
  alignas(kBlockBytes) static uint8_t data[2 * kBlockBytes];
  size_t num_read = 0;
  fake = Fake{.bytes = Pattern(100)};
  const auto is_refused = [&](uint8_t* to, size_t size, size_t needed, int64_t offset) {
    return ReadBlocks(kFakeOps, 3, to, size, needed, offset, &num_read).code() ==
           StatusCode::kInvalid;
  };
  EXPECT(is_refused(data + 1, kBlockBytes, 1, 0), "");
  EXPECT(is_refused(data, kBlockBytes + 1, 1, 0), "");
  EXPECT(is_refused(data, kBlockBytes, 1, 512), "");
  EXPECT(is_refused(data, kBlockBytes, kBlockBytes + 1, 0), "");
  EXPECT(is_refused(data, kBlockBytes, 1, -4096), "");
  EXPECT(fake.num_calls == 0, std::to_string(fake.num_calls));
}

TEST(AReadErrorIsReportedWithItsErrno) {
  fake = Fake{.bytes = Pattern(100), .script = {10, -EIO}};
  std::vector<uint8_t> data(80);
  size_t num_read = 0;
  const Status status = ReadFull(kFakeOps, 3, data.data(), data.size(), 0, &num_read);
  EXPECT(status.code() == StatusCode::kIo && status.system_errno() == EIO, status.message());
}

TEST(AFileThatNeverTakesAByteGivesUp) {
  const std::vector<uint8_t> data = Pattern(10);
  for (const int error : {EINTR, EAGAIN}) {
    fake = Fake{.script = std::vector<int>(10 * kMaxStalls, -error)};
    const Status status = WriteFull(kFakeOps, 3, data.data(), data.size(), 0);
    EXPECT(status.system_errno() == error, status.message());
    EXPECT(fake.num_calls == size_t{kMaxStalls}, std::to_string(fake.num_calls));
  }
  fake = Fake{.takes_nothing = true};
  EXPECT(WriteFull(kFakeOps, 3, data.data(), data.size(), 0).system_errno() == EIO, "");
}

TEST(RangesThatAreNoneAreRefusedBeforeAnyCall) {
  uint8_t byte = 0;
  size_t num_read = 0;
  fake = Fake{};
  EXPECT(WriteFull(kFakeOps, 3, &byte, 1, -1).code() == StatusCode::kInvalid, "");
  EXPECT(WriteFull(kFakeOps, 3, nullptr, 1, 0).code() == StatusCode::kInvalid, "");
  EXPECT(ReadFull(kFakeOps, 3, &byte, SIZE_MAX, 1, &num_read).code() == StatusCode::kInvalid, "");
  EXPECT(ReadFull(kFakeOps, 3, nullptr, 1, 0, &num_read).code() == StatusCode::kInvalid, "");
  EXPECT(fake.num_calls == 0, std::to_string(fake.num_calls));
  EXPECT(WriteFull(kFakeOps, 3, nullptr, 0, 0).ok(), "nothing to write is fine");
}

constexpr int kPlainFd = 3;
constexpr int kDirectFd = 4;

// What each way of writing answers, 0 or an errno, and how often it was asked.
struct Ways {
  int direct = 0;
  int uncached = 0;
  int plain = 0;
  int num_direct = 0;
  int num_uncached = 0;
  int num_plain = 0;
  int num_writeouts = 0;
};

Ways ways;

ssize_t Answer(int error, int* count, const void* data, size_t size_bytes, off_t offset_bytes) {
  ++*count;
  // Half arrives before the error shows.
  if (error != 0 && *count % 2 == 1 && size_bytes > 4096) {
    return FakePwrite(0, data, 4096, offset_bytes);
  }
  errno = error;
  return error != 0 ? -1 : FakePwrite(0, data, size_bytes, offset_bytes);
}

constexpr FileOps kWays{
    [](int fd, const void* data, size_t size_bytes, off_t offset_bytes) {
      return fd == kDirectFd ? Answer(ways.direct, &ways.num_direct, data, size_bytes, offset_bytes)
                             : Answer(ways.plain, &ways.num_plain, data, size_bytes, offset_bytes);
    },
    FakePread,
    [](int, int) {},
    [](int, const void* data, size_t size_bytes, off_t offset_bytes) {
      return Answer(ways.uncached, &ways.num_uncached, data, size_bytes, offset_bytes);
    },
    [](int, off_t, off_t) {
      ++ways.num_writeouts;
      errno = EINVAL;
      return -1;  // Only a hint.
    },
};

TEST(AWayThatIsRefusedIsTriedOnceAndTheNextOneWritesAll) {
  const std::vector<uint8_t> data = Pattern(3 * 4096);
  for (const int uncached : {0, EOPNOTSUPP, EINVAL, ENOSYS}) {
    fake = Fake{};
    ways = Ways{.direct = EINVAL, .uncached = uncached};
    WriteTarget target;
    target.fd = kPlainFd;
    target.direct_fd = kDirectFd;
    for (int64_t extent = 0; extent < 3; ++extent) {
      const int64_t offset = extent * static_cast<int64_t>(data.size());
      const Status status = WriteExtent(kWays, &target, data.data(), data.size(), offset);
      EXPECT(status.ok(), status.message());
      EXPECT(std::equal(data.begin(), data.end(), fake.bytes.begin() + offset), "bytes differ");
    }
    // One call that was cut short, one that was refused.
    EXPECT(ways.num_direct == 2, std::to_string(ways.num_direct));
    EXPECT(ways.num_uncached == (uncached == 0 ? 3 : 2), std::to_string(ways.num_uncached));
    EXPECT(ways.num_plain == (uncached == 0 ? 0 : 3), std::to_string(ways.num_plain));
    EXPECT(ways.num_writeouts == ways.num_plain, std::to_string(ways.num_writeouts));
  }
}

TEST(AWayMayBeRefusedLaterThanAtTheFirstWrite) {
  const std::vector<uint8_t> data = Pattern(2 * 4096);
  fake = Fake{};
  ways = Ways{};
  WriteTarget target;
  target.fd = kPlainFd;
  target.direct_fd = kDirectFd;
  EXPECT(WriteExtent(kWays, &target, data.data(), data.size(), 0).ok() && ways.num_direct == 1, "");
  EXPECT(ways.num_uncached == 0 && ways.num_plain == 0, "");
  ways.direct = EINVAL;
  EXPECT(WriteExtent(kWays, &target, data.data(), data.size(), 8192).ok(), "");
  EXPECT(target.direct_fd == -1 && ways.num_uncached == 1, "");
  ways.uncached = EOPNOTSUPP;
  EXPECT(WriteExtent(kWays, &target, data.data(), data.size(), 16384).ok(), "");
  EXPECT(!target.takes_uncached && ways.num_plain == 1, "");
  for (int64_t extent = 0; extent < 3; ++extent) {
    EXPECT(std::equal(data.begin(), data.end(), fake.bytes.begin() + 8192 * extent), "");
  }
}

TEST(AnErrorOfTheDiskIsNoReasonToTryAnotherWay) {
  const std::vector<uint8_t> data = Pattern(4096);
  for (const int error : {ENOSPC, EIO, EDQUOT}) {
    WriteTarget target;
    target.fd = kPlainFd;
    target.direct_fd = kDirectFd;
    ways = Ways{.direct = error};
    EXPECT(WriteExtent(kWays, &target, data.data(), data.size(), 0).system_errno() == error, "");
    EXPECT(target.direct_fd == kDirectFd && ways.num_uncached == 0 && ways.num_plain == 0, "");
    target.direct_fd = -1;
    ways = Ways{.uncached = error};
    EXPECT(WriteExtent(kWays, &target, data.data(), data.size(), 0).system_errno() == error, "");
    EXPECT(ways.num_direct == 0 && ways.num_plain == 0, "");
    target.takes_uncached = false;
    ways = Ways{.plain = error};
    EXPECT(WriteExtent(kWays, &target, data.data(), data.size(), 0).system_errno() == error, "");
    EXPECT(ways.num_writeouts == 0, "");
  }
}

}  // namespace
}  // namespace shardckpt
