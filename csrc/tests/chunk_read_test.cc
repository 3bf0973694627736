#include "core/chunk_read.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "core/crc32c.h"
#include "tests/check.h"

namespace shardckpt {
namespace {

constexpr int64_t kChunk = 8192;
constexpr uint32_t kSeed = 77;
constexpr int kFd = 1001;  // No open files: nothing of them is in the page cache.
constexpr int kDirectFd = 1002;

// A file in memory under both descriptors. The direct one refuses what is not aligned, as the
// kernel does.
struct Fake {
  std::vector<uint8_t> bytes = {};
  size_t most_bytes = SIZE_MAX;        // Of one call.
  bool refuses_direct = false;         // EINVAL, whatever is asked.
  std::atomic<int> num_interrupts{0};  // So many calls fail with EINTR first.
  int error = 0;                       // Every call fails with it.
  std::atomic<int> num_buffered{0};
  std::atomic<int> num_direct{0};

  void Reset(std::vector<uint8_t> content) {
    bytes = std::move(content);
    most_bytes = SIZE_MAX;
    refuses_direct = false;
    num_interrupts = num_buffered = num_direct = error = 0;
  }
};

Fake fake;

ssize_t FakePread(int fd, void* data, size_t size_bytes, off_t offset_bytes) {
  const auto fail = [](int error) {
    errno = error;
    return ssize_t{-1};
  };
  ++(fd == kDirectFd ? fake.num_direct : fake.num_buffered);
  if (fake.error != 0) return fail(fake.error);
  if (fake.num_interrupts.fetch_sub(1) > 0) return fail(EINTR);
  fake.num_interrupts = 0;
  const auto start = static_cast<size_t>(offset_bytes);
  const bool is_aligned =
      (start | size_bytes | reinterpret_cast<uintptr_t>(data)) % kBlockBytes == 0;
  if (fd == kDirectFd && (fake.refuses_direct || !is_aligned)) return fail(EINVAL);
  if (start >= fake.bytes.size()) return 0;
  const size_t count = std::min({size_bytes, fake.most_bytes, fake.bytes.size() - start});
  std::memcpy(data, fake.bytes.data() + start, count);
  return static_cast<ssize_t>(count);
}

constexpr FileOps kFakeOps{nullptr, FakePread, [](int, int) {}, nullptr, nullptr};

// A file of payloads: where each lies, its checksums, and where it is to be placed.
struct Scene {
  std::vector<ChunkPiece> pieces = {};
  std::vector<uint8_t> crcs = {};
  std::vector<int64_t> rows = {};
  int64_t start = INT64_MAX;
  int64_t stop = 0;

  void Add(int64_t offset, int64_t size, const void* target) {
    const auto first = static_cast<int64_t>(crcs.size() / 4);
    pieces.push_back(
        {offset, size, first, static_cast<int64_t>(reinterpret_cast<uintptr_t>(target))});
    const ChunkRow row{
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(fake.bytes.data() + offset)), size,
        offset};
    crcs.resize(crcs.size() + static_cast<size_t>(4 * ((size + kChunk - 1) / kChunk)));
    ChunkCrcs({&row, 1}, kSeed, kChunk, crcs.data() + 4 * first);
    start = std::min(start, offset);
    stop = std::max(stop, offset + size);
  }

  ChunkRange range() const { return {start, stop, pieces, rows, crcs, kSeed, kChunk}; }
};

std::vector<uint8_t> Pattern(size_t size_bytes) {
  std::vector<uint8_t> bytes(size_bytes);
  uint32_t state = 1;
  for (uint8_t& byte : bytes) {
    state = state * 1664525 + 1013904223;
    byte = static_cast<uint8_t>(state >> 24);
  }
  return bytes;
}

// Memory that starts at a multiple of kBlockBytes, plus `shift`.
struct Target {
  explicit Target(size_t size_bytes, size_t shift = 0)
      : memory(size_bytes + kBlockBytes + shift, 0xEE) {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    data = memory.data() + (kBlockBytes - address % kBlockBytes) % kBlockBytes + shift;
  }
  std::vector<uint8_t> memory;
  uint8_t* data;
};

bool Holds(const uint8_t* data, int64_t offset, int64_t size) {
  return std::memcmp(data, fake.bytes.data() + offset, static_cast<size_t>(size)) == 0;
}

enum class Route { kBuffered, kDirect, kRefused, kMemory };
constexpr std::array kRoutes{Route::kBuffered, Route::kDirect, Route::kRefused, Route::kMemory};

Status Run(Route route, const ChunkRange& range, ChunkOutcome* outcome) {
  fake.refuses_direct = route == Route::kRefused;
  if (route == Route::kMemory) {
    return PlaceChunks(fake.bytes.data() + range.start_bytes, range, outcome);
  }
  const int direct_fd = route == Route::kBuffered ? -1 : kDirectFd;
  return ReadChunks({&kFakeOps, kFd, direct_fd}, range, outcome);
}

std::string Name(Route route) { return "route " + std::to_string(static_cast<int>(route)); }

TEST(EveryRouteFillsEveryTargetAndNothingBesideIt) {
  // Small ones, unaligned ones, one longer than a window from the cache, gaps between them.
  const std::vector<std::pair<int64_t, int64_t>> payloads{{4096, 1},         {4160, 8192},
                                                          {12416, 20'000},   {40'960, 700'000},
                                                          {745'472, 65'536}, {811'072, 13}};
  for (const Route route : kRoutes) {
    for (const size_t shift : {0, 8, 64}) {
      for (const size_t most : {SIZE_MAX, size_t{10'000}}) {
        fake.Reset(Pattern(811'085 + (shift == 8 ? 5000 : 0)));
        fake.most_bytes = most;
        fake.num_interrupts = 1;
        Scene scene;
        std::vector<Target> targets;
        targets.reserve(payloads.size());
        for (const auto& [offset, size] : payloads) {
          targets.emplace_back(static_cast<size_t>(size), shift);
          scene.Add(offset, size, targets.back().data);
        }
        ChunkOutcome outcome{};
        const Status status = Run(route, scene.range(), &outcome);
        EXPECT(status.ok(), Name(route) + status.message());
        EXPECT(outcome.bad_offset_bytes == -1 && outcome.end_bytes == scene.stop, Name(route));
        for (size_t i = 0; i < payloads.size(); ++i) {
          const auto& [offset, size] = payloads[i];
          EXPECT(Holds(targets[i].data, offset, size), Name(route) + " " + std::to_string(i));
          const auto used = targets[i].data + size - targets[i].memory.data();
          const bool is_beside_clean =
              std::all_of(targets[i].memory.begin() + used, targets[i].memory.end(),
                          [](uint8_t byte) { return byte == 0xEE; });
          EXPECT(is_beside_clean, Name(route) + " wrote past target " + std::to_string(i));
        }
        EXPECT((fake.num_direct > 0) == (route == Route::kDirect || route == Route::kRefused), "");
        EXPECT((fake.num_buffered > 0) == (route == Route::kBuffered || route == Route::kRefused),
               "");
      }
    }
  }
}

TEST(AnAlignedTargetIsReadStraightIntoPlace) {
  fake.Reset(Pattern(4096 + 5 * kChunk + 100 + 4096));
  Target target(5 * kChunk + 100);
  Scene scene;
  scene.Add(4096, 5 * kChunk + 100, target.data);
  ChunkOutcome outcome{};
  EXPECT(Run(Route::kDirect, scene.range(), &outcome).ok(), "");
  EXPECT(Holds(target.data, 4096, 5 * kChunk + 100), "bytes differ");
  EXPECT(fake.num_direct == 2, "whole chunks in one call, the rest in another");
  EXPECT(outcome.bad_offset_bytes == -1, "");
}

TEST(AChunkThatChangedIsNamedOnEveryRoute) {
  for (const Route route : kRoutes) {
    for (const size_t shift : {0, 8}) {
      for (const int64_t bad : {0, 3, 9}) {
        fake.Reset(Pattern(200'000));
        Target target(10 * kChunk, shift);
        Scene scene;
        scene.Add(8192, 10 * kChunk, target.data);
        fake.bytes[static_cast<size_t>(8192 + bad * kChunk + 5)] ^= 0x10;
        ChunkOutcome outcome{};
        EXPECT(Run(route, scene.range(), &outcome).ok(), Name(route));
        EXPECT(outcome.bad_offset_bytes == 8192 + bad * kChunk,
               Name(route) + " named " + std::to_string(outcome.bad_offset_bytes));
        const uint32_t found =
            Crc32c(0, fake.bytes.data() + outcome.bad_offset_bytes, size_t{kChunk}) ^
            PlaceCrc(kSeed, static_cast<uint64_t>(outcome.bad_offset_bytes));
        EXPECT(outcome.found_crc == found, Name(route));
      }
    }
  }
}

TEST(RowsScatterAfterEveryChunkHasPassed) {
  for (const Route route : kRoutes) {
    for (const bool is_bad : {false, true}) {
      fake.Reset(Pattern(1 << 20));
      // 1000 items of 4 bytes to every second place; a piece that goes as it is lies beside it.
      Target spread(8000, 8);
      Target plain(500'000, 8);
      Scene scene;
      scene.Add(4100, 4000, nullptr);
      scene.Add(8192, 500'000, plain.data);
      const auto to = static_cast<int64_t>(reinterpret_cast<uintptr_t>(spread.data));
      scene.rows = {to, 0, 4, 1, 1000, 8, 4};
      if (is_bad) fake.bytes[8192 + 499'999] ^= 1;
      ChunkOutcome outcome{};
      EXPECT(Run(route, scene.range(), &outcome).ok(), Name(route));
      EXPECT((outcome.bad_offset_bytes >= 0) == is_bad, Name(route));
      for (int64_t i = 0; i < 1000 && !is_bad; ++i) {
        if (!Holds(spread.data + 8 * i, 4100 + 4 * i, 4)) EXPECT(false, Name(route) + " item");
      }
      EXPECT(!is_bad || spread.data[0] == 0xEE, "rows ran though a chunk was bad");
    }
  }
}

TEST(PiecesMayOverlapAndComeInAnyOrder) {
  for (const Route route : kRoutes) {
    fake.Reset(Pattern(2 << 20));
    Target a(600'000);
    Target b(600'000, 8);
    Target c(kChunk, 8);
    Scene scene;
    scene.Add(1'000'000, 600'000, a.data);
    scene.Add(1'000'000, 600'000, b.data);
    scene.Add(16, kChunk, c.data);
    ChunkOutcome outcome{};
    EXPECT(Run(route, scene.range(), &outcome).ok(), Name(route));
    EXPECT(outcome.bad_offset_bytes == -1, Name(route));
    EXPECT(Holds(a.data, 1'000'000, 600'000) && Holds(b.data, 1'000'000, 600'000), Name(route));
    EXPECT(Holds(c.data, 16, kChunk), Name(route));
  }
}

TEST(AFileThatEndsEarlySaysWhere) {
  for (const Route route : {Route::kBuffered, Route::kDirect, Route::kRefused}) {
    for (const int64_t end : {0, 5000, 12'288, 30'000}) {
      for (const size_t shift : {0, 8}) {
        for (const bool has_rows : {false, true}) {
          fake.Reset(Pattern(100'000));
          Target target(5 * kChunk, shift);
          Scene scene;
          scene.Add(4096, 5 * kChunk, target.data);
          uint8_t byte = 0;
          const auto to = static_cast<int64_t>(reinterpret_cast<uintptr_t>(&byte));
          if (has_rows) scene.rows = {to, 0, 1, 0};
          fake.bytes.resize(static_cast<size_t>(end));
          ChunkOutcome outcome{};
          const Status status = Run(route, scene.range(), &outcome);
          EXPECT(status.ok(), Name(route) + status.message());
          const int64_t told = std::max<int64_t>(end, 4096);
          EXPECT(outcome.end_bytes == told && outcome.bad_offset_bytes == -1,
                 Name(route) + " told " + std::to_string(outcome.end_bytes) + " of " +
                     std::to_string(end));
        }
      }
    }
  }
}

TEST(AReadErrorKeepsItsErrno) {
  for (const Route route : {Route::kBuffered, Route::kDirect}) {
    for (const size_t shift : {0, 8}) {
      fake.Reset(Pattern(100'000));
      fake.error = EIO;
      Target target(kChunk, shift);
      Scene scene;
      scene.Add(4096, kChunk, target.data);
      ChunkOutcome outcome{};
      const Status status = Run(route, scene.range(), &outcome);
      EXPECT(status.system_errno() == EIO, Name(route) + status.message());
    }
  }
}

TEST(RangesThatMakeNoSenseAreRefusedBeforeAnyRead) {
  fake.Reset(Pattern(100'000));
  Target target(kChunk);
  Scene good;
  good.Add(4096, kChunk, target.data);
  ChunkOutcome outcome{};
  const auto is_refused = [&](auto change) {
    Scene scene = good;
    change(&scene);
    return Run(Route::kBuffered, scene.range(), &outcome).code() == StatusCode::kInvalid;
  };
  EXPECT(is_refused([](Scene* s) { s->start = -1; }), "");
  EXPECT(is_refused([](Scene* s) { s->stop = 0; }), "");
  EXPECT(is_refused([](Scene* s) { s->stop = s->start + kMaxRangeBytes + 1; }), "");
  EXPECT(is_refused([](Scene* s) { s->stop -= 1; }), "a piece beyond the range");
  EXPECT(is_refused([](Scene* s) { s->start += 1; }), "a piece before the range");
  EXPECT(is_refused([](Scene* s) { s->pieces[0].size_bytes = -1; }), "");
  EXPECT(is_refused([](Scene* s) { s->pieces[0].size_bytes = INT64_MAX; }), "");
  EXPECT(is_refused([](Scene* s) { s->pieces[0].first_chunk = 1; }), "");
  EXPECT(is_refused([](Scene* s) { s->pieces[0].first_chunk = -1; }), "");
  EXPECT(is_refused([](Scene* s) { s->crcs.pop_back(); }), "");
  ChunkRange range = good.range();
  range.chunk_bytes = 0;
  EXPECT(Run(Route::kBuffered, range, &outcome).code() == StatusCode::kInvalid, "");
  EXPECT(PlaceChunks(nullptr, good.range(), &outcome).code() == StatusCode::kInvalid, "");
  EXPECT(fake.num_buffered == 0, "");
}

TEST(ThreadsReadOneFileAtOnce) {
  fake.Reset(Pattern(4 << 20));
  std::array<std::thread, 4> threads;
  std::atomic<int> num_good{0};
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i] = std::thread([i, &num_good] {
      for (int64_t round = 0; round < 4; ++round) {
        Target target(900'000, i % 2 == 0 ? 0 : 8);
        Scene scene;
        const int64_t offset = 4096 * static_cast<int64_t>(i + 1) + 100'000 * round;
        scene.Add(offset, 900'000, target.data);
        ChunkOutcome outcome{};
        const Route route = i < 2 ? Route::kDirect : Route::kBuffered;
        const int direct_fd = route == Route::kDirect ? kDirectFd : -1;
        if (ReadChunks({&kFakeOps, kFd, direct_fd}, scene.range(), &outcome).ok() &&
            outcome.bad_offset_bytes == -1 && Holds(target.data, offset, 900'000)) {
          ++num_good;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(num_good == 16, std::to_string(num_good));
}

// A file on the disk that goes when the test ends.
class DiskFile {
 public:
  explicit DiskFile(const std::vector<uint8_t>& content) {
    char name[] = "core_tests.XXXXXX";
    fd_ = mkstemp(name);
    unlink(name);
    if (!WriteFull(SystemFileOps(), fd_, content.data(), content.size(), 0).ok()) abort();
    fsync(fd_);
  }
  ~DiskFile() { close(fd_); }
  DiskFile(const DiskFile&) = delete;
  DiskFile& operator=(const DiskFile&) = delete;
  int fd() const { return fd_; }
  // Whether the file system let go of the pages: some keep everything in memory.
  bool Forget() const { return posix_fadvise(fd_, 0, 0, POSIX_FADV_DONTNEED) == 0; }

 private:
  int fd_;
};

TEST(BothLooksAtThePageCacheFindAFileThatWasJustWritten) {
  const DiskFile file(Pattern(1'000'001));
  EXPECT(IsCached(file.fd(), 0, 1'000'001), "");
  EXPECT(IsCached(file.fd(), 4095, 2), "");
  EXPECT(IsCachedAtThreeBytes(file.fd(), 0, 1'000'001), "");
  EXPECT(!IsCached(file.fd(), 0, 2'000'000), "bytes past the end are never there");
  EXPECT(!IsCachedAtThreeBytes(file.fd(), 0, 2'000'000), "");
  EXPECT(IsCached(file.fd(), 10, 0) && IsCachedAtThreeBytes(file.fd(), 10, 0), "nothing is there");
  EXPECT(!IsCached(kFd, 0, 1), "no file has no pages");
}

TEST(ADiskFileGivesEqualBytesWarmAndCold) {
  fake.Reset(Pattern(3'000'123));
  const DiskFile file(fake.bytes);
  const std::string path = "/proc/self/fd/" + std::to_string(file.fd());
  const int direct_fd = open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  for (const bool is_warm : {true, false}) {
    for (const int second : {direct_fd, -1}) {
      if (!is_warm) file.Forget();
      Target target(2'900'000, is_warm ? 0 : 8);
      Scene scene;
      scene.Add(4160, 50'000, nullptr);
      scene.Add(100'123, 2'900'000, target.data);
      ChunkOutcome outcome{};
      const Status status =
          ReadChunks({&SystemFileOps(), file.fd(), second}, scene.range(), &outcome);
      EXPECT(status.ok(), status.message());
      EXPECT(outcome.bad_offset_bytes == -1 && outcome.end_bytes == 3'000'123, "");
      EXPECT(Holds(target.data, 100'123, 2'900'000), "bytes differ");
    }
  }
  if (direct_fd >= 0) close(direct_fd);
}

}  // namespace
}  // namespace shardckpt
