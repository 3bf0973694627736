#include "core/engine.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/check.h"
#include "tests/reference.h"
#include "tests/saves.h"

namespace shardckpt {
namespace {

using testing::Encode;
using testing::Expect;
using testing::kMiB;
using testing::kSeed;
using testing::RandomBytes;
using testing::RandomSave;
using testing::Row;
using testing::Save;

constexpr int64_t kLongMs = 60000;  // For what must happen; no test waits so long.
constexpr int64_t kShortMs = 50;    // For what must not.

// Holds threads until it is opened.
class Gate {
 public:
  void Pass() {
    std::unique_lock<std::mutex> lock(mutex_);
    ++num_reached_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return is_open_; });
  }
  void WaitReached(int count) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return num_reached_ >= count; });
  }
  void Open() {
    std::unique_lock<std::mutex> lock(mutex_);
    is_open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int num_reached_ = 0;
  bool is_open_ = false;
};

// Files in memory, by descriptor. `answer` is asked before each write: 0 "do it all", n > 0 "at
// most n bytes", < 0 "fail with that errno".
struct Disk {
  std::mutex mutex;
  std::map<int, std::vector<uint8_t>> files;
  std::vector<std::pair<int, int64_t>> writes;  // Descriptor and offset.
  std::function<int64_t(int fd, int64_t size_bytes, int64_t offset_bytes)> answer;
};

Disk* the_disk = nullptr;

ssize_t DiskPwrite(int fd, const void* data, size_t size_bytes, off_t offset_bytes) {
  int64_t most = 0;
  if (the_disk->answer) most = the_disk->answer(fd, static_cast<int64_t>(size_bytes), offset_bytes);
  if (most < 0) {
    errno = static_cast<int>(-most);
    return -1;
  }
  const size_t count = most == 0 ? size_bytes : std::min(size_bytes, static_cast<size_t>(most));
  const std::lock_guard<std::mutex> lock(the_disk->mutex);
  the_disk->writes.emplace_back(fd, offset_bytes);
  std::vector<uint8_t>& file = the_disk->files[fd];
  const size_t end = static_cast<size_t>(offset_bytes) + count;
  if (file.size() < end) file.resize(end);
  std::memcpy(file.data() + offset_bytes, data, count);
  return static_cast<ssize_t>(count);
}

constexpr FileOps kDiskOps{DiskPwrite, nullptr, [](int, int) {}, nullptr, nullptr};

// An engine with its disk; at the end all slots must be free and all threads must stop.
class Rig {
 public:
  explicit Rig(int64_t num_slots, int64_t num_copy_threads = 2, int64_t num_flush_threads = 2) {
    the_disk = &disk_;
    Status status = Engine::Create({num_copy_threads, num_flush_threads, {}}, &engine_);
    EXPECT(status.ok(), status.message());
    status = engine_->Reserve(num_slots * kSlotBytes);
    EXPECT(status.ok(), status.message());
  }
  ~Rig() {
    const EngineStats stats = engine_->Stats();
    EXPECT(stats.num_free_slots == stats.num_slots, std::to_string(stats.num_free_slots));
    EXPECT(engine_->Close(kLongMs), "a thread did not stop");
  }
  Engine* operator->() { return engine_.get(); }
  Disk& disk() { return disk_; }

  int64_t Begin(const Save& save, bool check_all = false) {
    int64_t ticket = -1;
    const Status status = engine_->Begin(Encode(save.rows), save.file_bytes, check_all, &ticket);
    EXPECT(status.ok(), status.message());
    return ticket;
  }
  // File i of a ticket gets descriptor 100 * ticket + i.
  void Attach(int64_t ticket, const Save& save) {
    for (size_t file = 0; file < save.file_bytes.size(); ++file) AttachOne(ticket, file);
  }
  void AttachOne(int64_t ticket, size_t file) {
    const auto index = static_cast<int64_t>(file);
    const Status status = engine_->Attach(ticket, index, Fd(ticket, file), -1, &kDiskOps);
    EXPECT(status.ok(), status.message());
  }
  static int Fd(int64_t ticket, size_t file) { return static_cast<int>(100 * ticket + file); }

  bool WaitAllFlushed(int64_t ticket, const Save& save) {
    for (size_t file = 0; file < save.file_bytes.size(); ++file) {
      if (!engine_->WaitFlushed(ticket, static_cast<int64_t>(file), kLongMs)) return false;
    }
    return true;
  }
  // Waits for a ticket, compares its files and checksums, and releases it.
  void ExpectSaved(int64_t ticket, const Save& save) {
    EXPECT(WaitAllFlushed(ticket, save), "not written");
    const Failure failure = engine_->FailureOf(ticket);
    EXPECT(failure.kind == FailureKind::kNone, failure.message);
    for (size_t file = 0; file < save.file_bytes.size(); ++file) {
      const std::string name = "file " + std::to_string(file) + " of " + std::to_string(ticket);
      std::vector<uint8_t> crcs;
      const Status status = engine_->ChunkCrcsOf(ticket, static_cast<int64_t>(file), kSeed, &crcs);
      EXPECT(status.ok() && crcs == save.crcs[file], name + ": checksums: " + status.message());
      const std::lock_guard<std::mutex> lock(disk_.mutex);
      // A file of a header alone is never written to.
      std::vector<uint8_t>& found = disk_.files[Fd(ticket, file)];
      found.resize(std::max<size_t>(found.size(), kHeaderBytes));
      EXPECT(found == save.images[file], name + ": bytes");
    }
    EXPECT(engine_->Release(ticket, kLongMs), "");
  }
  void ExpectFailed(int64_t ticket, FailureKind kind, int64_t payload) {
    const Failure failure = engine_->FailureOf(ticket);
    EXPECT(failure.kind == kind, std::to_string(static_cast<int>(failure.kind)));
    EXPECT(failure.payload == payload, std::to_string(failure.payload));
    EXPECT(engine_->WaitStaged(ticket, kEveryGroup, kLongMs), "copies go on after a failure");
    EXPECT(engine_->WaitFlushed(ticket, 0, kLongMs), "writes go on after a failure");
    EXPECT(engine_->Release(ticket, kLongMs), "");
  }
  int64_t NumHeld() {
    const EngineStats stats = engine_->Stats();
    return stats.num_slots - stats.num_free_slots;
  }

 private:
  Disk disk_;
  std::unique_ptr<Engine> engine_;
};

std::vector<uint8_t> Memory(int64_t size_bytes) {
  std::mt19937 random(11);
  return RandomBytes(static_cast<size_t>(size_bytes), &random);
}

// One file of payloads of whole extents: `groups[i]` is the group of extent i.
Save WholeExtents(const std::vector<uint8_t>& memory, const std::vector<int64_t>& groups) {
  Save save;
  int64_t at = 0;
  for (const int64_t group : groups) {
    save.rows.push_back({memory.data() + at, kSlotBytes, 0, kHeaderBytes + at, group});
    at += kSlotBytes;
  }
  save.file_bytes = {kHeaderBytes + at};
  Expect(&save);
  return save;
}

TEST(RandomSavesInFlightTogetherAreWrittenByteForByte) {
  std::mt19937 random(2);
  const std::vector<uint8_t> memory = RandomBytes(40 * kMiB, &random);
  Rig rig(4);
  for (int round = 0; round < 4; ++round) {
    std::vector<Save> saves;
    std::vector<int64_t> tickets;
    for (int i = 0; i < 3; ++i) {
      saves.push_back(RandomSave(memory, 10 * kMiB, 1 + 2 * round + i, 3, &random));
      tickets.push_back(rig.Begin(saves.back(), round % 2 == 1));
    }
    for (size_t i = 0; i < saves.size(); ++i) rig.Attach(tickets[i], saves[i]);
    for (int i = 0; i < 6; ++i) {
      const int64_t group = static_cast<int64_t>(random() % 5) - 1;
      EXPECT(rig->WaitStaged(tickets[random() % 3], group, kLongMs), "");
    }
    for (size_t i = 0; i < saves.size(); ++i) rig.ExpectSaved(tickets[i], saves[i]);
  }
}

TEST(ARingOfTwoSlotsTakesAStateOfThirty) {
  const std::vector<uint8_t> memory = Memory(30 * kSlotBytes);
  Rig rig(2);
  const Save save = WholeExtents(memory, std::vector<int64_t>(30, kEager));
  const int64_t ticket = rig.Begin(save);
  EXPECT(!rig->WaitStaged(ticket, kEager, kShortMs),
         "nothing frees a slot before the file is there");
  EXPECT(rig.NumHeld() == 2, std::to_string(rig.NumHeld()));
  rig.Attach(ticket, save);
  EXPECT(rig->WaitStaged(ticket, kEager, kLongMs), "");
  rig.ExpectSaved(ticket, save);
  EXPECT(rig->Stats().written_bytes == 30 * kSlotBytes, "");
}

TEST(WithoutMemoryASaveIsRefusedUnlessItIsEmpty) {
  const std::vector<uint8_t> memory = Memory(100);
  Rig rig(0);
  int64_t ticket = -1;
  const std::vector<int64_t> rows = Encode({{memory.data(), 100}});
  const Status status = rig->Begin(rows, std::vector<int64_t>{8192}, false, &ticket);
  EXPECT(status.code() == StatusCode::kInvalid, status.message());
  Save empty;
  empty.file_bytes = {4096};
  Expect(&empty);
  ticket = rig.Begin(empty);
  rig.Attach(ticket, empty);
  rig.ExpectSaved(ticket, empty);
}

TEST(WhoeverWaitsForAGroupCopiesThatGroupAndNoOther) {
  std::vector<uint8_t> memory = Memory(6 * kSlotBytes);
  const Save save = WholeExtents(memory, {1, 2, 3, 1, 2, 3});
  Rig rig(8);
  rig->SetPaused(true);
  const int64_t ticket = rig.Begin(save);
  EXPECT(rig->WaitStaged(ticket, kEager, 0), "there is nothing to copy");
  EXPECT(!rig->WaitStaged(ticket, 2, 0), "a timeout of 0 only asks");
  EXPECT(rig.NumHeld() == 0, "a timeout of 0 copies nothing");
  EXPECT(rig->WaitStaged(ticket, 2, kLongMs), "the waiter copies by itself");
  EXPECT(rig.NumHeld() == 2, std::to_string(rig.NumHeld()));
  // Group 2 may change now.
  std::memset(memory.data() + kSlotBytes, 0, kSlotBytes);
  EXPECT(!rig->WaitStaged(ticket, kEveryGroup, 0), "");
  EXPECT(rig->WaitStaged(ticket, 9, 0), "no array belongs to it");
  EXPECT(rig->WaitStaged(ticket, kEveryGroup, kLongMs), "");
  EXPECT(rig.NumHeld() == 6, "");
  rig->SetPaused(false);
  rig.Attach(ticket, save);
  rig.ExpectSaved(ticket, save);
}

TEST(WhoeverWaitsAddsASlotRatherThanWaitForTheDisk) {
  const std::vector<uint8_t> memory = Memory(5 * kSlotBytes);
  const Save save = WholeExtents(memory, {kEager, kEager, kEager, kEager, 1});
  Rig rig(2);
  EXPECT(rig->Reserve(kSlotBytes, 4 * kSlotBytes).ok(), "");
  EXPECT(rig->Stats().num_slots == 4 && rig->Stats().num_free_slots == 4, "");
  const int64_t ticket = rig.Begin(save);
  EXPECT(rig->WaitStaged(ticket, kEager, kLongMs), "nothing is written, and there may be slots");
  EXPECT(rig.NumHeld() == 4, std::to_string(rig.NumHeld()));
  EXPECT(!rig->WaitStaged(ticket, kEveryGroup, 50), "a fifth slot");
  EXPECT(rig->Stats().num_slots == 4 && rig.NumHeld() == 4, "");
  rig.Attach(ticket, save);
  rig.ExpectSaved(ticket, save);
}

TEST(CopyThreadsAddNoSlots) {
  const std::vector<uint8_t> memory = Memory(3 * kSlotBytes);
  const Save save = WholeExtents(memory, {1, 1, 1});
  Rig rig(1);
  EXPECT(rig->Reserve(0, 3 * kSlotBytes).ok(), "");
  const int64_t ticket = rig.Begin(save);
  EXPECT(!rig->WaitFlushed(ticket, 0, 100), "the disk is late");
  EXPECT(rig.NumHeld() == 1, std::to_string(rig.NumHeld()));
  EXPECT(rig->WaitStaged(ticket, 1, kLongMs) && rig.NumHeld() == 3, "");
  rig.Attach(ticket, save);
  rig.ExpectSaved(ticket, save);
}

TEST(AFenceServesEarlierSavesFirst) {
  const std::vector<uint8_t> memory = Memory(3 * kSlotBytes);
  const Save first = WholeExtents(memory, {1, 2});
  const Save second = WholeExtents(memory, {1, 2, 3});
  Rig rig(8);
  rig->SetPaused(true);
  const int64_t tickets[] = {rig.Begin(first), rig.Begin(second)};
  EXPECT(rig->WaitStaged(tickets[1], 3, kLongMs), "");
  EXPECT(rig->WaitStaged(tickets[0], kEveryGroup, 0), "the first save was overtaken");
  EXPECT(!rig->WaitStaged(tickets[1], 1, 0) && rig.NumHeld() == 3, std::to_string(rig.NumHeld()));
  rig->SetPaused(false);
  rig.Attach(tickets[0], first);
  rig.Attach(tickets[1], second);
  rig.ExpectSaved(tickets[0], first);
  rig.ExpectSaved(tickets[1], second);
}

TEST(EagerArraysAreCopiedBeforeLazyOnes) {
  const std::vector<uint8_t> memory = Memory(6 * kSlotBytes);
  const Save save = WholeExtents(memory, {1, kEager, 2, 1, kEager, 2});
  Rig rig(6, 1, 1);
  rig->SetPaused(true);
  const int64_t ticket = rig.Begin(save);
  rig.Attach(ticket, save);
  rig->SetPaused(false);
  rig.ExpectSaved(ticket, save);
  std::vector<int64_t> extents;
  for (const auto& [fd, offset] : rig.disk().writes) extents.push_back(offset / kSlotBytes);
  EXPECT((extents == std::vector<int64_t>{1, 4, 0, 2, 3, 5}), "another order");
  const int64_t again = rig.Begin(save);
  EXPECT(rig->WaitStaged(again, kEager, kLongMs), "");
  rig.Attach(again, save);
  rig.ExpectSaved(again, save);
}

TEST(ACopyThatIsTornNamesItsPayloadAndGivesAllSlotsBack) {
  constexpr int64_t kSize = 3 * kSlotBytes + 1000;
  std::vector<uint8_t> memory = Memory(kSize + 100);
  Save save;
  save.rows = {{memory.data(), 100}, {memory.data() + 100, kSize, 0, 8192, 4}};
  save.file_bytes = {8192 + 4 * kSlotBytes};
  Expect(&save);
  Rig rig(5);
  struct Case {
    const char* name;
    int64_t first;
    int64_t size;
  };
  for (const Case& c : {Case{"all of it", 100, kSize}, Case{"its last bytes", kSize + 98, 2},
                        Case{"one byte at the edge of a block", 100 + kSlotBytes, 1}}) {
    rig->SetPaused(true);
    const int64_t ticket = rig.Begin(save);
    EXPECT(rig->WaitStaged(ticket, kEager, kLongMs), "");
    for (int64_t at = 0; at < c.size; ++at) memory[static_cast<size_t>(c.first + at)] ^= 0x55;
    EXPECT(rig->WaitStaged(ticket, 4, kLongMs), "");
    for (int64_t at = 0; at < c.size; ++at) memory[static_cast<size_t>(c.first + at)] ^= 0x55;
    rig.ExpectFailed(ticket, FailureKind::kTorn, 1);
    EXPECT(rig.NumHeld() == 0, c.name);
    rig->SetPaused(false);
  }
  const int64_t ticket = rig.Begin(save);
  rig.Attach(ticket, save);
  rig.ExpectSaved(ticket, save);
}

TEST(ACounterThatMovedAloneAfterItWasCopiedIsFound) {
  std::vector<uint8_t> memory = Memory(2 * kSlotBytes);
  std::vector<uint8_t> counter = {7, 0, 0, 0};
  Save save;
  // The counter's extent is the first of two.
  save.rows = {{counter.data(), 4, 0, 4096, 1}, {memory.data(), 2 * kSlotBytes - 4096, 0, 8192, 1}};
  save.file_bytes = {4096 + 2 * kSlotBytes};
  Expect(&save);
  Rig rig(1);
  rig->SetPaused(true);
  int64_t ticket = rig.Begin(save);
  EXPECT(!rig->WaitStaged(ticket, 1, kShortMs), "there is one slot for two extents");
  EXPECT(rig.NumHeld() == 1, "");
  ++counter[0];
  rig.Attach(ticket, save);
  EXPECT(rig->WaitStaged(ticket, 1, kLongMs), "");
  rig.ExpectFailed(ticket, FailureKind::kTorn, 0);
  --counter[0];
  ticket = rig.Begin(save);
  rig.Attach(ticket, save);
  EXPECT(rig->WaitStaged(ticket, 1, kLongMs), "");
  ++counter[0];  // After the fence it may move.
  rig.ExpectSaved(ticket, save);
  rig->SetPaused(false);
}

TEST(AnArrayThatWasFreedFailsTheSaveAndNotTheProcess) {
  constexpr int64_t kSize = 3 * kSlotBytes;
  void* memory = mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  Save save;
  save.rows = {{static_cast<uint8_t*>(memory), kSize, 0, 4096, 1}};
  save.file_bytes = {4096 + kSize};
  Rig rig(4);
  rig->SetPaused(true);
  const int64_t ticket = rig.Begin(save);
  munmap(memory, kSize);
  rig->SetPaused(false);
  EXPECT(rig->WaitStaged(ticket, 1, kLongMs), "");
  rig.ExpectFailed(ticket, FailureKind::kGone, 0);
}

TEST(CheckAllFindsAChangeThatNoWitnessSees) {
  std::vector<uint8_t> memory = Memory(2 * kMiB);
  Save save;
  save.rows = {{memory.data(), 100, 0, 4096, 1}, {memory.data() + 100, kMiB, 0, 8192, 1}};
  save.file_bytes = {8192 + kMiB};
  Rig rig(2);
  for (const bool check_all : {false, true}) {
    rig->SetPaused(true);
    const int64_t ticket = rig.Begin(save, check_all);
    memory[100 + kMiB / 2 + 999] ^= 1;
    rig->SetPaused(false);
    rig.Attach(ticket, save);
    EXPECT(rig.WaitAllFlushed(ticket, save), "");
    EXPECT(rig->FailureOf(ticket).kind == FailureKind::kNone, "a witness saw it");
    std::vector<uint8_t> crcs;
    const Status status = rig->ChunkCrcsOf(ticket, 0, kSeed, &crcs);
    EXPECT(status.ok() == !check_all, status.message());
    rig.ExpectFailed(ticket, check_all ? FailureKind::kTorn : FailureKind::kNone,
                     check_all ? 1 : -1);
  }
}

TEST(TheFirstErrorOfAWriteStaysAndOtherSavesGoOn) {
  const std::vector<uint8_t> memory = Memory(6 * kSlotBytes);
  for (const int first : {ENOSPC, EIO}) {
    const Save save = WholeExtents(memory, {kEager, kEager, 1, 1, 1, 1});
    Rig rig(3);
    std::atomic<int> num_failed{0};
    const int failing = Rig::Fd(1, 0);
    rig.disk().answer = [&, first](int fd, int64_t, int64_t) -> int64_t {
      if (fd != failing) return 0;
      return num_failed++ == 0 ? -first : -EROFS;
    };
    const int64_t ticket = rig.Begin(save);
    const int64_t other = rig.Begin(save);
    rig.Attach(ticket, save);
    rig.Attach(other, save);
    EXPECT(rig->WaitStaged(ticket, kEveryGroup, kLongMs), "");
    EXPECT(rig->WaitFlushed(ticket, 0, kLongMs), "");
    const Failure failure = rig->FailureOf(ticket);
    EXPECT(failure.kind == FailureKind::kWrite && failure.file == 0, failure.message);
    EXPECT(failure.system_errno == first || num_failed > 1, std::to_string(failure.system_errno));
    EXPECT(failure.message.find("write_full of") != std::string::npos, failure.message);
    std::vector<uint8_t> crcs;
    EXPECT(!rig->ChunkCrcsOf(ticket, 0, kSeed, &crcs).ok(), "a failed save has no checksums");
    rig->Cancel(ticket, "later");
    EXPECT(rig->FailureOf(ticket).system_errno == failure.system_errno, "the first failure stays");
    EXPECT(rig->Release(ticket, kLongMs), "");
    rig.ExpectSaved(other, save);
  }
}

TEST(ShortWritesAndInterruptionsOfFlushThreadsAreCarriedOnFrom) {
  const std::vector<uint8_t> memory = Memory(2 * kSlotBytes);
  const Save save = WholeExtents(memory, {kEager, 1});
  Rig rig(2);
  std::atomic<int> num_calls{0};
  rig.disk().answer = [&](int, int64_t size_bytes, int64_t) -> int64_t {
    const int call = num_calls++;
    if (call % 3 == 1) return -EINTR;
    return call % 3 == 0 ? std::max<int64_t>(1, size_bytes / 3) : 0;
  };
  const int64_t ticket = rig.Begin(save);
  rig.Attach(ticket, save);
  rig.ExpectSaved(ticket, save);
}

TEST(AWriteThatHangsHoldsNobodyElseAndItsSlotComesBackAtTheEnd) {
  const std::vector<uint8_t> memory = Memory(3 * kSlotBytes);
  const Save save = WholeExtents(memory, {kEager, 1, 1});
  Gate gate;
  Rig rig(4);
  const int hanging = Rig::Fd(1, 0);
  std::atomic<bool> is_first{true};
  rig.disk().answer = [&](int fd, int64_t, int64_t) -> int64_t {
    if (fd == hanging && is_first.exchange(false)) gate.Pass();
    return 0;
  };
  const int64_t ticket = rig.Begin(save);
  rig.Attach(ticket, save);
  gate.WaitReached(1);
  EXPECT(!rig->WaitFlushed(ticket, 0, kShortMs), "");
  rig->Cancel(ticket, "the disk hangs");
  EXPECT(!rig->WaitFlushed(ticket, 0, kShortMs), "a write of it still runs");
  EXPECT(!rig->Release(ticket, kShortMs), "a write of it still runs");
  EXPECT(rig->WaitStaged(ticket, kEveryGroup, kLongMs), "nothing reads its arrays");
  const int64_t other = rig.Begin(save);
  rig.Attach(other, save);
  rig.ExpectSaved(other, save);
  EXPECT(rig.NumHeld() == 1, std::to_string(rig.NumHeld()));
  gate.Open();
  EXPECT(rig->WaitFlushed(ticket, 0, kLongMs) && rig->Release(ticket, kLongMs), "");
}

TEST(ClosingDoesNotWaitForAWriteThatHangs) {
  const std::vector<uint8_t> memory = Memory(kSlotBytes);
  const Save save = WholeExtents(memory, {kEager});
  Gate gate;
  Rig rig(1, 1, 1);
  rig.disk().answer = [&](int, int64_t, int64_t) -> int64_t {
    gate.Pass();
    return 0;
  };
  const int64_t ticket = rig.Begin(save);
  rig.Attach(ticket, save);
  gate.WaitReached(1);
  EXPECT(!rig->Close(kShortMs), "");
  EXPECT(rig->FailureOf(ticket).kind == FailureKind::kCancelled, "");
  gate.Open();
  EXPECT(rig->Release(ticket, kLongMs), "");
}

TEST(ASaveIsGivenUpInWhateverStateItIs) {
  const std::vector<uint8_t> memory = Memory(4 * kSlotBytes);
  const Save save = WholeExtents(memory, {1, 2, 3, 4});
  Gate gate;
  Rig rig(4);
  rig.disk().answer = [&](int, int64_t, int64_t) -> int64_t {
    gate.Pass();
    return 0;
  };
  for (const bool is_released : {false, true}) {
    const auto give_up = [&](int64_t ticket) {
      if (!is_released) rig->Cancel(ticket, "given up");
      EXPECT(rig->Release(ticket, kLongMs), "");
      EXPECT(rig.NumHeld() == 0, std::to_string(rig.NumHeld()));
      // What is gone holds nobody up.
      EXPECT(rig->WaitStaged(ticket, 1, 0) && rig->WaitFlushed(ticket, 0, 0), "");
      EXPECT(rig->Release(ticket, 0) && rig->FailureOf(ticket).kind == FailureKind::kNone, "");
      EXPECT(!rig->Attach(ticket, 0, 5, -1, &kDiskOps).ok(), "");
    };
    rig->SetPaused(true);
    give_up(rig.Begin(save));  // Queued.
    int64_t ticket = rig.Begin(save);
    EXPECT(rig->WaitStaged(ticket, 2, kLongMs), "");
    give_up(ticket);  // Some of it staged.
    rig->SetPaused(false);
    ticket = rig.Begin(save);
    EXPECT(rig->WaitStaged(ticket, kEveryGroup, kLongMs), "");
    give_up(ticket);           // All of it staged.
    give_up(rig.Begin(save));  // Perhaps being copied.
    ticket = rig.Begin(save);
    rig.Attach(ticket, save);
    if (!is_released) {
      gate.WaitReached(2);
      rig->Cancel(ticket, "given up while two extents are written");
      EXPECT(rig.NumHeld() <= 4 && !rig->Release(ticket, kShortMs), "");
      gate.Open();
    } else {
      EXPECT(rig->WaitFlushed(ticket, 0, kLongMs), "");
    }
    give_up(ticket);
  }
}

TEST(ExtentsThatAreTakenAndGivenMakeTheSameFile) {
  std::mt19937 random(3);
  const std::vector<uint8_t> memory = RandomBytes(40 * kMiB, &random);
  const Save save = RandomSave(memory, 10 * kMiB, 12, 2, &random);
  Rig rig(2);
  rig->SetPaused(true);
  const int64_t ticket = rig.Begin(save);
  std::vector<std::vector<uint8_t>> files;
  for (const int64_t size : save.file_bytes) files.emplace_back(size, uint8_t{0});
  Engine::Taken taken;
  EXPECT(rig->Take(ticket, 0, 0, &taken).ok() && taken.more && taken.size_bytes == 0,
         "none is ready");
  EXPECT(!rig->Give(ticket, 0).ok(), "it was not taken");
  EXPECT(!rig->Take(ticket, 99, 0, &taken).ok() && !rig->Take(99, 0, 0, &taken).ok(), "");
  rig->SetPaused(false);
  for (size_t left = save.file_bytes.size(); left > 0;) {
    left = 0;
    for (size_t file = 0; file < save.file_bytes.size(); ++file) {
      const Status status = rig->Take(ticket, static_cast<int64_t>(file), 1, &taken);
      EXPECT(status.ok(), status.message());
      if (!taken.more) continue;
      ++left;
      if (taken.size_bytes == 0) continue;
      std::memcpy(files[file].data() + taken.offset_bytes, taken.data,
                  static_cast<size_t>(taken.size_bytes));
      EXPECT(rig->Give(ticket, taken.extent).ok(), "");
      EXPECT(!rig->Give(ticket, taken.extent).ok(), "given twice");
    }
  }
  EXPECT(files == save.images, "bytes");
  for (size_t file = 0; file < save.file_bytes.size(); ++file) {
    std::vector<uint8_t> crcs;
    EXPECT(rig->ChunkCrcsOf(ticket, static_cast<int64_t>(file), kSeed, &crcs).ok(), "");
    EXPECT(crcs == save.crcs[file], "checksums");
  }
  EXPECT(rig->Release(ticket, 0), "");
}

TEST(ATakenExtentIsHeldUntilItIsGivenThoughTheSaveFailed) {
  const std::vector<uint8_t> memory = Memory(2 * kSlotBytes);
  const Save save = WholeExtents(memory, {kEager, kEager});
  Rig rig(2);
  const int64_t ticket = rig.Begin(save);
  Engine::Taken taken;
  EXPECT(rig->Take(ticket, 0, kLongMs, &taken).ok() && taken.size_bytes == kSlotBytes, "");
  rig->Cancel(ticket, "");
  EXPECT(!rig->Release(ticket, kShortMs), "somebody reads the slot");
  EXPECT(std::memcmp(taken.data, save.images[0].data() + taken.offset_bytes, kSlotBytes) == 0, "");
  EXPECT(rig->Give(ticket, taken.extent).ok() && rig->Release(ticket, kLongMs), "");
}

TEST(TheRateHoldsWhateverTheSizesAndAnotherOneTakesEffectAtOnce) {
  const std::vector<uint8_t> memory = Memory(kSlotBytes);
  // Per file a whole extent and a small one.
  Save save;
  for (int64_t file = 0; file < 3; ++file) {
    save.rows.push_back({memory.data(), kSlotBytes, file, 4096, 1});
    save.rows.push_back({memory.data(), 100, file, 4096 + kSlotBytes, 1});
    save.file_bytes.push_back(8192 + kSlotBytes);
  }
  Expect(&save);
  Rig rig(8);
  // Three hours for a whole extent: only what is due before any other is written.
  rig->SetRate(800);
  const int64_t ticket = rig.Begin(save);
  rig.Attach(ticket, save);
  EXPECT(rig->WaitStaged(ticket, 1, kLongMs), "");
  EXPECT(!rig->WaitFlushed(ticket, 0, 200), "");
  EXPECT(!rig->WaitFlushed(ticket, 1, kShortMs), "");
  const int64_t written = rig->Stats().written_bytes;
  EXPECT(written <= kSlotBytes, std::to_string(written));
  rig->SetRate(1000);
  EXPECT(!rig->WaitFlushed(ticket, 1, kShortMs), "");
  EXPECT(rig->Stats().written_bytes == written, "a new rate is no gift");
  rig->SetRate(0);
  rig.ExpectSaved(ticket, save);

  // A save that is given up while it waits for the rate does not wait it out.
  rig->SetRate(800);
  const int64_t other = rig.Begin(save);
  rig.Attach(other, save);
  EXPECT(rig->WaitStaged(other, 1, kLongMs) && !rig->WaitFlushed(other, 2, kShortMs), "");
  EXPECT(rig->Release(other, kLongMs), "");
}

// Returns how a child that ran `body` ended: 0 where that returned true. Killed after a minute.
int InChild(const std::function<bool()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    _exit(body() ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

TEST(AForkedChildIsToldSoAndHangsNowhereAndItsParentGoesOn) {
  const std::vector<uint8_t> memory = Memory(8 * kSlotBytes);
  const Save save = WholeExtents(memory, {kEager, 1, 1, 2, 2, 3, 3, 3});
  Rig rig(4);
  // So that some forks happen while the lock is held.
  std::atomic<bool> is_over{false};
  std::thread hammer([&] {
    while (!is_over) rig->Stats();
  });
  for (int round = 0; round < 10; ++round) {
    const int64_t ticket = rig.Begin(save);
    const int status = InChild([&] {
      int64_t begun = 0;
      Engine::Taken taken;
      std::vector<uint8_t> crcs;
      bool is_right = rig->Begin(Encode(save.rows), save.file_bytes, false, &begun).code() ==
                      StatusCode::kInvalid;
      is_right &= !rig->Reserve(kSlotBytes).ok() && !rig->Attach(ticket, 0, 5, -1, &kDiskOps).ok();
      is_right &= !rig->Take(ticket, 0, kLongMs, &taken).ok() && !rig->Give(ticket, 0).ok();
      is_right &= !rig->ChunkCrcsOf(ticket, 0, kSeed, &crcs).ok();
      is_right &= rig->WaitStaged(ticket, kEveryGroup, kLongMs);
      is_right &= rig->WaitFlushed(ticket, 0, kLongMs) && rig->Release(ticket, kLongMs);
      is_right &= rig->FailureOf(ticket).message.find("forked child") != std::string::npos;
      rig->Cancel(ticket, "");
      rig->SetRate(5);
      rig->SetPaused(true);
      return is_right && rig->Stats().num_slots == 0 && !rig->Close(kLongMs);
    });
    EXPECT(status == 0, std::to_string(status));
    rig.Attach(ticket, save);
    rig.ExpectSaved(ticket, save);
  }
  is_over = true;
  hammer.join();
}

TEST(MemoryThatTheSystemHasNotIsAnErrorAndWhatWasThereStays) {
  const std::vector<uint8_t> memory = Memory(kSlotBytes);
  const Save save = WholeExtents(memory, {kEager});
  Rig rig(1);
  Status status = rig->Reserve(int64_t{1} << 60);
  EXPECT(status.code() == StatusCode::kIo && status.system_errno() == ENOMEM, status.message());
  EXPECT(status.message().find("no room for") != std::string::npos, status.message());
  EXPECT(rig->Stats().num_slots == 1 && rig->Stats().num_free_slots == 1, "");
  EXPECT(rig->Reserve(kSlotBytes + 1).ok() && rig->Reserve(100).ok(), "");
  EXPECT(rig->Stats().num_slots == 2, std::to_string(rig->Stats().num_slots));
  const int64_t ticket = rig.Begin(save);
  rig.Attach(ticket, save);
  rig.ExpectSaved(ticket, save);
}

TEST(ALimitOfAddressSpaceIsAnErrorOfTheArenaAlone) {
  const int status = InChild([] {
    Arena arena;
    if (!arena.Grow(2, 2).ok()) return false;
    int64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    rlimit limit{};
    limit.rlim_cur = limit.rlim_max = static_cast<rlim_t>(pages * 4096 + 64 * kMiB);
    if (setrlimit(RLIMIT_AS, &limit) != 0) return false;
    const Status refused = arena.Grow(20, 2);
    arena.slot(1)[kSlotBytes - 1] = 1;
    return refused.code() == StatusCode::kIo && refused.system_errno() == ENOMEM &&
           arena.num_slots() == 2 && arena.Grow(3, 1).ok() && arena.num_slots() == 3;
  });
  EXPECT(status == 0, std::to_string(status));
}

TEST(SlotsAreAlignedDisjointAndNotInherited) {
  Arena arena;
  EXPECT(arena.Grow(2, 1).ok() && arena.Grow(5, 3).ok() && arena.num_slots() == 5, "");
  for (int64_t slot = 0; slot < 5; ++slot) {
    const auto address = reinterpret_cast<uintptr_t>(arena.slot(slot));
    EXPECT(address % (2 * kMiB) == 0, std::to_string(address));
    std::memset(arena.slot(slot), static_cast<int>(slot), kSlotBytes);
  }
  for (int64_t slot = 0; slot < 5; ++slot) {
    EXPECT(arena.slot(slot)[0] == slot && arena.slot(slot)[kSlotBytes - 1] == slot, "");
  }
  const int status = InChild([&] {
    unsigned char pages[1];
    return mincore(arena.slot(0), 4096, pages) != 0 && errno == ENOMEM;
  });
  EXPECT(status == 0, "the child has a copy of the slots");
}

TEST(SavesFencesAndOtherThreadsMixAtRandom) {
  std::mt19937 random(4);
  const std::vector<uint8_t> memory = RandomBytes(24 * kMiB, &random);
  Rig rig(3);
  std::atomic<int64_t> newest{0};
  std::atomic<bool> is_over{false};
  std::vector<std::thread> fencers;
  for (unsigned seed = 0; seed < 2; ++seed) {
    fencers.emplace_back([&, seed] {
      std::mt19937 mine(seed);
      while (!is_over) {
        const int64_t ticket = newest - static_cast<int64_t>(mine() % 3);
        const int64_t group = static_cast<int64_t>(mine() % 5) - 1;
        rig->WaitStaged(ticket, group, static_cast<int64_t>(mine() % 3));
        rig->WaitFlushed(ticket, 0, 0);
        if (mine() % 8 == 0) rig->SetRate(static_cast<int64_t>(mine() % 2) << 40);
        rig->FailureOf(ticket);
      }
    });
  }
  std::vector<std::pair<int64_t, Save>> in_flight;
  const auto finish = [&] {
    auto& [ticket, save] = in_flight.front();
    // Checksums of a file while others of the same save are still copied.
    for (size_t file = 0; file < save.file_bytes.size(); ++file) {
      rig.AttachOne(ticket, file);
      std::vector<uint8_t> crcs;
      EXPECT(rig->WaitFlushed(ticket, static_cast<int64_t>(file), kLongMs), "");
      EXPECT(rig->ChunkCrcsOf(ticket, static_cast<int64_t>(file), kSeed, &crcs).ok(), "");
      EXPECT(crcs == save.crcs[file], "checksums");
    }
    rig.ExpectSaved(ticket, save);
    in_flight.erase(in_flight.begin());
  };
  for (int round = 0; round < 12; ++round) {
    in_flight.emplace_back(0, RandomSave(memory, 3 * kMiB, 5, 3, &random));
    auto& [ticket, save] = in_flight.back();
    ticket = rig.Begin(save, round % 3 == 0);
    newest = ticket;
    if (round % 4 == 3) {
      rig->Cancel(ticket, "at random");
      EXPECT(rig->Release(ticket, kLongMs), "");
      in_flight.pop_back();
    }
    if (in_flight.size() == 3) finish();
  }
  while (!in_flight.empty()) finish();
  is_over = true;
  for (std::thread& fencer : fencers) fencer.join();
}

}  // namespace
}  // namespace shardckpt
