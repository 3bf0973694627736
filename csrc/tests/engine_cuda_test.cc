// The engine with arrays on devices: what a save holds, whom a fence keeps waiting, what a failing
// device leaves behind. On the fake driver, whose order checker judges every access.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/engine.h"
#include "tests/check.h"
#include "tests/cuda_world.h"
#include "tests/saves.h"

namespace shardckpt {
namespace {

using testing::kMiB;
using testing::kSeed;
using testing::World;

constexpr int64_t kLongMs = 60'000;
constexpr bool kSeeded = false;

// A save of device and host arrays, in one file, and the file's bytes as they were written.
class DeviceSave {
 public:
  explicit DeviceSave(World* world) : world_(world) {}

  void AddDevice(uint64_t array, int64_t size_bytes, int64_t group, int64_t device = 0) {
    Place(size_bytes);
    numbers_.insert(numbers_.end(),
                    {static_cast<int64_t>(array), size_bytes, 0, offset_, group, device, 0, 1, 0});
    rows_.push_back({{nullptr, array, size_bytes}, offset_});
  }
  void AddMatrix(uint64_t array, int64_t num_rows, int64_t row_bytes, int64_t pitch_bytes,
                 int64_t group) {
    Place(num_rows * row_bytes);
    numbers_.insert(numbers_.end(), {static_cast<int64_t>(array), num_rows * row_bytes, 0, offset_,
                                     group, 0, 0, 4, 2, num_rows, row_bytes / 4, pitch_bytes, 4});
    rows_.push_back({{nullptr, array, row_bytes, num_rows, pitch_bytes}, offset_});
  }
  void AddHost(const std::vector<uint8_t>& bytes, int64_t group) {
    Place(static_cast<int64_t>(bytes.size()));
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(bytes.data()));
    numbers_.insert(numbers_.end(),
                    {address, static_cast<int64_t>(bytes.size()), 0, offset_, group, -1, 0, 1, 0});
    host_.push_back({bytes, offset_});
  }

  Status Begin(Engine* engine, std::vector<DeviceStream> streams) {
    const int64_t end = (offset_ + size_ + kHeaderBytes - 1) / kHeaderBytes * kHeaderBytes;
    image_.assign(static_cast<size_t>(end), 0);
    return engine->Begin(numbers_, std::vector<int64_t>{end}, false, &ticket_, streams);
  }
  int64_t ticket() const { return ticket_; }

  // Takes every extent as a storage without descriptors does.
  void TakeAll(Engine* engine) {
    Engine::Taken taken;
    while (true) {
      world_->ExpectOk(engine->Take(ticket_, 0, kLongMs, &taken), "take");
      if (!taken.more) return;
      world_->Expect(taken.size_bytes > 0, "no extent came");
      if (taken.size_bytes == 0) return;
      world_->fake()->HostRead(taken.data, static_cast<size_t>(taken.size_bytes));
      std::memcpy(image_.data() + taken.offset_bytes, taken.data,
                  static_cast<size_t>(taken.size_bytes));
      world_->ExpectOk(engine->Give(ticket_, taken.extent), "give");
    }
  }

  // The file holds every array as it was filled, and the checksums are those of its bytes.
  void ExpectWhole(Engine* engine) {
    for (auto [rows, offset] : rows_) {
      rows.dst = image_.data() + offset;
      world_->Expect(world_->Holds(rows), "the array at byte " + std::to_string(offset));
    }
    for (const auto& [bytes, offset] : host_) {
      world_->Expect(std::equal(bytes.begin(), bytes.end(), image_.begin() + offset),
                     "the host array at byte " + std::to_string(offset));
    }
    testing::Save expected;
    for (size_t at = 0; at < numbers_.size(); at += 9 + 2 * static_cast<size_t>(numbers_[at + 8])) {
      const int64_t offset = numbers_[at + 3];
      expected.rows.push_back({image_.data() + offset, numbers_[at + 1], 0, offset});
    }
    expected.file_bytes = {static_cast<int64_t>(image_.size())};
    testing::Expect(&expected);
    std::vector<uint8_t> crcs;
    world_->ExpectOk(engine->ChunkCrcsOf(ticket_, 0, kSeed, &crcs), "checksums");
    world_->Expect(crcs == expected.crcs[0], "checksums differ");
  }

 private:
  void Place(int64_t size_bytes) {
    offset_ += size_;
    const int64_t align = size_bytes >= kMiB ? kHeaderBytes : 64;
    offset_ = (offset_ + align - 1) / align * align;
    size_ = size_bytes;
  }

  World* world_;
  std::vector<int64_t> numbers_;
  std::vector<std::pair<DeviceRows, int64_t>> rows_;
  std::vector<std::pair<std::vector<uint8_t>, int64_t>> host_;
  int64_t offset_ = kHeaderBytes;
  int64_t size_ = 0;
  int64_t ticket_ = 0;
  std::vector<uint8_t> image_;
};

std::unique_ptr<Engine> MakeEngine(World* world, int64_t memory_bytes) {
  std::unique_ptr<Engine> engine;
  world->ExpectOk(Engine::Create({1, 1, {}}, &engine), "create");
  world->ExpectOk(engine->Reserve(memory_bytes), "reserve");
  return engine;
}

void Finish(World* world, std::unique_ptr<Engine> engine) {
  const EngineStats stats = engine->Stats();
  world->Expect(stats.num_free_slots == stats.num_slots, "slots were lost");
  world->Expect(engine->Close(kLongMs), "close");
  engine.reset();
  for (const std::string& problem : world->Finish()) EXPECT(false, problem);
}

DeviceStream On(uint64_t stream, int64_t device = 0) {
  return {device, static_cast<int64_t>(stream)};
}

// The optimizer overwrites all arrays right after the fence.
TEST(EngineSavesDeviceArraysAsTheyWereAtTheSaveWhateverTheOrder) {
  if (testing::IsRealCuda()) return;
  for (uint64_t seed = 0; seed < 4; ++seed) {
    World world(2, kSeeded, seed);
    const uint64_t compute = world.NewStream(seed % 2 == 0);
    const uint64_t other = world.NewStream(false, 1);
    const std::vector<uint8_t> counter{1, 2, 3, 4};
    const std::vector<uint8_t> buffer(70'000, 9);
    auto engine = MakeEngine(&world, 64 * kMiB);
    DeviceSave save(&world);
    const std::vector<uint64_t> here{world.NewArray(9 * kMiB + 12'345, compute),
                                     world.NewArray(700 * 256, compute),
                                     world.NewArray(100, compute)};
    const std::vector<uint64_t> there{world.NewArray(2 * kMiB, other, 1),
                                      world.NewArray(4096, other, 1)};
    save.AddDevice(here[0], 9 * kMiB + 12'345, 1);
    save.AddDevice(there[0], 2 * kMiB, 2, 1);
    save.AddMatrix(here[1], 700, 100, 256, 1);
    save.AddDevice(here[2], 100, kEager);
    save.AddHost(counter, 1);
    save.AddHost(buffer, kEager);
    save.AddDevice(there[1], 4096, 1, 1);
    const std::vector<DeviceStream> streams{On(compute), On(other, 1)};
    world.ExpectOk(save.Begin(engine.get(), streams), "begin");
    world.Expect(engine->WaitStaged(save.ticket(), kEager, kLongMs, streams), "eager");
    world.Expect(engine->WaitStaged(save.ticket(), 1, kLongMs, streams), "fence of group 1");
    world.Expect(engine->WaitStaged(save.ticket(), 2, kLongMs, streams), "fence of group 2");
    world.UseDevice(0);
    for (const uint64_t array : here) world.Step(array, compute);
    world.UseDevice(1);
    for (const uint64_t array : there) world.Step(array, other);
    save.TakeAll(engine.get());
    save.ExpectWhole(engine.get());
    world.Expect(engine->PinProblem().empty(), "pinning: " + engine->PinProblem());
    world.Expect(engine->Release(save.ticket(), kLongMs), "release");
    Finish(&world, std::move(engine));
  }
}

TEST(EngineFenceHoldsTheStreamBackAndNotTheHost) {
  if (testing::IsRealCuda()) return;
  World world(1, kSeeded, 3);
  const uint64_t compute = world.NewStream(false);
  auto engine = MakeEngine(&world, 32 * kMiB);
  DeviceSave save(&world);
  save.AddDevice(world.NewArray(3 * kMiB, compute), 3 * kMiB, 1);
  world.Hold(compute);
  world.Refill(compute);
  const std::vector<DeviceStream> streams{On(compute)};
  world.ExpectOk(save.Begin(engine.get(), streams), "begin");
  world.Expect(engine->WaitStaged(save.ticket(), 1, kLongMs, streams), "fence");
  world.Expect(!engine->WaitStaged(save.ticket(), kEveryGroup, 0), "nothing can be copied yet");
  world.Step(compute);
  world.Release(compute);
  save.TakeAll(engine.get());
  save.ExpectWhole(engine.get());
  world.Expect(engine->Release(save.ticket(), kLongMs), "release");
  Finish(&world, std::move(engine));
}

TEST(EngineRingSmallerThanTheDeviceStateWaitsForSlots) {
  if (testing::IsRealCuda()) return;
  for (uint64_t seed = 0; seed < 2; ++seed) {
    World world(1, kSeeded, seed);
    const uint64_t compute = world.NewStream(false);
    auto engine = MakeEngine(&world, 2 * kSlotBytes);
    DeviceSave save(&world);
    for (int i = 0; i < 4; ++i) {
      save.AddDevice(world.NewArray(8 * kMiB, compute), 8 * kMiB, 1);
    }
    const std::vector<DeviceStream> streams{On(compute)};
    world.ExpectOk(save.Begin(engine.get(), streams), "begin");
    std::thread storage([&] { save.TakeAll(engine.get()); });
    world.Expect(engine->WaitStaged(save.ticket(), 1, kLongMs, streams), "fence");
    world.Step(compute);
    storage.join();
    save.ExpectWhole(engine.get());
    world.Expect(engine->Release(save.ticket(), kLongMs), "release");
    Finish(&world, std::move(engine));
  }
}

TEST(EngineSurvivesADeviceThatFails) {
  if (testing::IsRealCuda()) return;
  for (int nth = 1; nth <= 3; ++nth) {
    World world(1, kSeeded, static_cast<uint64_t>(nth));
    const uint64_t compute = world.NewStream(false);
    auto engine = MakeEngine(&world, 64 * kMiB);
    DeviceSave save(&world);
    for (int i = 0; i < 3; ++i) {
      save.AddDevice(world.NewArray(kMiB, compute), kMiB, 1);
    }
    world.fake()->FailCall("cuMemcpyDtoHAsync", nth, cuda::Result{1}, 1);
    world.ExpectOk(save.Begin(engine.get(), {On(compute)}), "begin");
    world.Expect(engine->WaitStaged(save.ticket(), kEveryGroup, kLongMs), "the end of the copies");
    world.Expect(engine->FailureOf(save.ticket()).kind == FailureKind::kDevice,
                 "copy " + std::to_string(nth) + " failed and the save did not");
    world.Expect(engine->Release(save.ticket(), kLongMs), "release");
    // The device works again, and so do its saves.
    DeviceSave again(&world);
    again.AddDevice(world.NewArray(kMiB, compute), kMiB, 1);
    world.ExpectOk(again.Begin(engine.get(), {On(compute)}), "begin after the failure");
    again.TakeAll(engine.get());
    again.ExpectWhole(engine.get());
    world.Expect(engine->Release(again.ticket(), kLongMs), "release");
    // Saves of host arrays go on.
    DeviceSave host(&world);
    const std::vector<uint8_t> bytes(100'000, 7);
    host.AddHost(bytes, kEager);
    world.ExpectOk(host.Begin(engine.get(), {}), "begin of host arrays");
    host.TakeAll(engine.get());
    host.ExpectWhole(engine.get());
    world.Expect(engine->Release(host.ticket(), kLongMs), "release");
    Finish(&world, std::move(engine));
  }
}

// A stream is missing for one of two devices: nobody holds it back, so the host waits for both.
TEST(EngineWaitsItselfForADeviceWithoutAStream) {
  if (testing::IsRealCuda()) return;
  World world(2, kSeeded, 7);
  const uint64_t compute = world.NewStream(false);
  const uint64_t other = world.NewStream(false, 1);
  auto engine = MakeEngine(&world, 32 * kMiB);
  DeviceSave save(&world);
  save.AddDevice(world.NewArray(kMiB, compute), kMiB, 1);
  save.AddDevice(world.NewArray(kMiB, other, 1), kMiB, 1, 1);
  world.ExpectOk(save.Begin(engine.get(), {On(compute), On(other, 1)}), "begin");
  const std::vector<DeviceStream> one{On(compute)};
  world.Expect(engine->WaitStaged(save.ticket(), 1, kLongMs, one), "fence");
  world.Expect(engine->WaitStaged(save.ticket(), 1, 0), "the host did not wait");
  save.TakeAll(engine.get());
  save.ExpectWhole(engine.get());
  world.Expect(engine->Release(save.ticket(), kLongMs), "release");
  Finish(&world, std::move(engine));
}

TEST(EngineGoesOnUnpinnedAndWantsAStream) {
  if (testing::IsRealCuda()) return;
  World world(1, kSeeded, 5);
  const uint64_t compute = world.NewStream(false);
  auto engine = MakeEngine(&world, 32 * kMiB);
  const uint64_t array = world.NewArray(2 * kMiB, compute);
  DeviceSave refused(&world);
  refused.AddDevice(array, 2 * kMiB, 1);
  world.ExpectInvalid(refused.Begin(engine.get(), {}), "no stream of CUDA device 0");
  world.fake()->FailCall("cuMemHostRegister", 1, cuda::Result{2}, 1);
  DeviceSave save(&world);
  save.AddDevice(array, 2 * kMiB, 1);
  world.ExpectOk(save.Begin(engine.get(), {On(compute)}), "begin");
  world.Expect(!engine->PinProblem().empty(), "nobody was told that pinning failed");
  save.TakeAll(engine.get());
  save.ExpectWhole(engine.get());
  world.Expect(engine->Release(save.ticket(), kLongMs), "release");
  Finish(&world, std::move(engine));
}

}  // namespace
}  // namespace shardckpt
