#include "tests/cuda_scenarios.h"

#include <atomic>
#include <memory>
#include <utility>

#include "tests/cuda_world.h"

namespace shardckpt::testing {
namespace {

using fake_cuda::OpKind;
using Problems = std::vector<std::string>;

constexpr int64_t kPieceBytes = 64 * 1024;
constexpr bool kSeeded = false;
constexpr bool kManual = true;

DeviceStageOptions SmallPieces() {
  DeviceStageOptions options;
  options.piece_bytes = kPieceBytes;
  return options;
}

// Arrays of one size with a batch each, in pinned memory.
struct Staged {
  std::vector<uint64_t> arrays;
  std::vector<DeviceBatch> batches;
};

Staged MakeArrays(World* world, Device* device, uint64_t stream, int count, int64_t size_bytes) {
  Staged out;
  uint8_t* memory = world->NewHostMemory(count * size_bytes);
  world->ExpectOk(device->Pin(memory, count * size_bytes), "pin");
  for (int i = 0; i < count; ++i) {
    out.arrays.push_back(world->NewArray(size_bytes, stream, device->ordinal()));
    out.batches.push_back(world->Batch({{memory + i * size_bytes, out.arrays.back(), size_bytes}}));
  }
  return out;
}

std::vector<fake_cuda::PendingOp> PendingOf(World* world, OpKind kind) {
  auto pending = world->fake()->Pending();
  std::erase_if(pending, [&](const fake_cuda::PendingOp& op) { return op.kind != kind; });
  return pending;
}

// A save in overlap mode: a trainer whose stream still computes the arrays, a fence in the middle
// of the copies, and an optimizer that overwrites them at once.
Problems Overlap(uint64_t seed) {
  World world(1, kSeeded, seed);
  // Stream 0 is what torch computes on unless told otherwise.
  const uint64_t compute = seed % 3 == 0 ? 0 : world.NewStream(seed % 3 == 1);
  auto device = world.Open();
  auto stage = world.OpenStage(device, SmallPieces());
  const std::vector<int64_t> sizes{1, 100, 0, 4096, 70'000, 262'157, 65'536};
  constexpr int64_t kRows = 700;
  constexpr int64_t kRowBytes = 100;
  constexpr int64_t kPitchBytes = 256;
  uint8_t* memory = world.NewHostMemory(1 << 20);
  world.ExpectOk(device->Pin(memory, 1 << 20), "pin");
  std::vector<DeviceBatch> batches;
  for (const int64_t size_bytes : sizes) {
    batches.push_back(world.Batch({{memory, world.NewArray(size_bytes, compute), size_bytes}}));
    memory += size_bytes;
  }
  const uint64_t matrix = world.NewArray(kRows * kPitchBytes, compute);
  batches.push_back(world.Batch({{memory, matrix + 8, kRowBytes, kRows, kPitchBytes},
                                 {memory + kRows * kRowBytes, matrix, kPieceBytes + 1},
                                 {memory + (1 << 19), matrix, 64, 4, 64}}));
  const int num_batches = static_cast<int>(batches.size());
  // What a copy that does not wait would see is another step's.
  world.Step(compute);
  world.Hold(compute);
  world.Refill(compute);
  world.ExpectOk(stage->After(compute), "after");
  world.ExpectOk(stage->Add(std::move(batches)), "add");
  world.Release(compute);
  if (seed % 2 == 0) world.Expect(world.WaitBatches(3), "no batch was done without a fence");
  world.ExpectOk(stage->Fence(compute), "fence");
  world.Step(compute);
  world.ExpectOk(stage->Wait(kTimeoutMs), "wait");
  world.Expect(world.num_good() == num_batches, "good: " + std::to_string(world.num_good()));
  world.Close(std::move(stage));
  device.reset();
  return world.Finish();
}

// The state is larger than the memory: a slot takes the next array when its last one is done.
Problems Ring(uint64_t seed) {
  constexpr int kArrays = 12;
  constexpr int kSlots = 3;
  constexpr int64_t kBytes = 48 * 1024;
  World world(1, kSeeded, seed);
  const uint64_t compute = world.NewStream(true);
  auto device = world.Open();
  auto stage = world.OpenStage(device, SmallPieces());
  uint8_t* memory = world.NewHostMemory(kSlots * kBytes);
  world.ExpectOk(device->Pin(memory, kSlots * kBytes), "pin");
  std::vector<uint64_t> arrays;
  for (int i = 0; i < kArrays; ++i) arrays.push_back(world.NewArray(kBytes, compute));
  std::atomic<int> next{kSlots};
  std::function<DeviceBatch(int, int)> batch_of = [&](int array, int slot) {
    DeviceBatch batch =
        world.Batch({{memory + slot * kBytes, arrays[static_cast<size_t>(array)], kBytes}});
    batch.done = [&, slot, judge = std::move(batch.done)](const Status& status) {
      const int following = next++;
      if (following < kArrays) {
        // The slot is busy no more, though its content is still to be judged.
        std::vector<DeviceBatch> more;
        judge(status);
        more.push_back(batch_of(following, slot));
        world.ExpectOk(stage->Add(std::move(more)), "add from done");
      } else {
        judge(status);
      }
    };
    return batch;
  };
  world.ExpectOk(stage->After(compute), "after");
  std::vector<DeviceBatch> first;
  for (int i = 0; i < kSlots; ++i) first.push_back(batch_of(i, i));
  world.ExpectOk(stage->Add(std::move(first)), "add");
  if (seed % 2 == 0) world.ExpectOk(stage->Fence(compute), "fence of what was added");
  world.Expect(world.WaitBatches(kArrays), "the ring stopped");
  world.ExpectOk(stage->Fence(compute), "fence");
  world.Step(compute);
  world.Expect(world.num_good() == kArrays, "good: " + std::to_string(world.num_good()));
  world.Close(std::move(stage));
  device.reset();
  return world.Finish();
}

Problems SmallCopiesOfTheTrainerGetThrough(uint64_t seed) {
  constexpr int kPieces = 8;
  World world(1, kManual, seed);
  const uint64_t compute = world.NewStream(false);
  auto device = world.Open();
  auto stage = world.OpenStage(device, SmallPieces());
  Staged staged = MakeArrays(&world, device.get(), compute, 1, kPieces * kPieceBytes);
  uint8_t* item = world.NewHostMemory(4, true);
  world.ExpectOk(stage->After(compute), "after");
  world.fake()->RunAll();
  world.ExpectOk(stage->Add(std::move(staged.batches)), "add");
  bool has_gap = true;
  for (int i = 0; i < kPieces / 2 && has_gap; ++i) {
    world.Expect(world.fake()->WaitPending(2), "no piece was submitted");
    world.Check(world.cuda().cuMemcpyDtoHAsync(item, staged.arrays[0], 4,
                                               reinterpret_cast<cuda::Stream>(compute)),
                "item");
    const auto copies = PendingOf(&world, OpKind::kToHost);
    has_gap = copies.size() == 2 && copies[0].size_bytes == kPieceBytes;
    world.Expect(has_gap, "in flight beside the item: " + std::to_string(copies.size() - 1));
    // Whichever the copy engine takes first, the item waits for one piece at most.
    world.fake()->RunOp(copies[0].id);
    world.Expect(world.fake()->RunOp(copies.back().id), "the item waits behind the queue");
    for (const auto& op : world.fake()->Pending()) world.fake()->RunOp(op.id);
  }
  // At the fence the rest goes out at once, and then an item has to wait.
  if (has_gap) world.Expect(world.fake()->WaitPending(2), "no piece was submitted");
  world.ExpectOk(stage->Fence(compute), "fence");
  world.Expect(!has_gap || PendingOf(&world, OpKind::kToHost).size() == kPieces / 2,
               "the burst is not all");
  world.fake()->SetManual(false);
  world.ExpectOk(stage->Wait(kTimeoutMs), "wait");
  world.Close(std::move(stage));
  device.reset();
  return world.Finish();
}

Problems TheOptimizerWaitsForTheBurst(uint64_t seed) {
  constexpr int kArrays = 5;
  World world(1, kManual, seed);
  const uint64_t compute = world.NewStream(false);
  auto device = world.Open();
  auto stage = world.OpenStage(device, SmallPieces());
  Staged staged = MakeArrays(&world, device.get(), compute, kArrays, kPieceBytes);
  world.ExpectOk(stage->After(compute), "after");
  world.fake()->RunAll();
  world.ExpectOk(stage->Add(std::move(staged.batches)), "add");
  world.Expect(world.fake()->WaitPending(2), "no piece was submitted");
  world.ExpectOk(stage->Fence(compute), "fence");
  world.Step(staged.arrays.back(), compute);
  // In any order that is legal, the step comes after the last copy.
  bool has_stepped = false;
  while (!has_stepped) {
    auto pending = world.fake()->Pending();
    std::erase_if(pending, [](const fake_cuda::PendingOp& op) { return !op.may_run; });
    if (pending.empty()) break;
    const auto& chosen = pending[seed % pending.size()];
    has_stepped = chosen.kind == OpKind::kSet;
    world.Expect(!has_stepped || PendingOf(&world, OpKind::kToHost).empty(),
                 "the optimizer ran before the copies");
    world.Expect(world.fake()->RunOp(chosen.id), "an operation that may run did not");
  }
  world.Expect(has_stepped, "the optimizer never ran");
  world.fake()->SetManual(false);
  world.ExpectOk(stage->Wait(kTimeoutMs), "wait");
  world.Close(std::move(stage));
  device.reset();
  return world.Finish();
}

struct Injection {
  const char* symbol;  // Null: the copy breaks the device when it runs.
  int nth;
  const char* in_message;
};

// Every batch ends exactly once, an error is never taken for success, names device and piece, and
// stays; a slot comes back only when nothing writes to it any more.
Problems ErrorsStay(uint64_t seed) {
  constexpr int kArrays = 6;
  const std::vector<Injection> injections{{"cuMemcpyDtoHAsync", 1, "piece 0, copy 0"},
                                          {"cuMemcpyDtoHAsync", 4, "piece 1, copy 0"},
                                          {"cuEventRecord", 3, "piece 1"},
                                          {"cuEventSynchronize", 2, "piece 1"},
                                          {nullptr, 3, "CUDA_ERROR_ILLEGAL_ADDRESS (700)"}};
  const Injection& injection = injections[seed % injections.size()];
  World world(1, kSeeded, seed);
  const uint64_t compute = world.NewStream(true);
  auto device = world.Open();
  auto stage = world.OpenStage(device, SmallPieces());
  Staged staged = MakeArrays(&world, device.get(), compute, kArrays, kPieceBytes * 3 / 4);
  if (injection.symbol != nullptr) {
    world.fake()->FailCall(injection.symbol, injection.nth, 999, 1);
  } else {
    world.fake()->BreakCopy(injection.nth);
  }
  const Status after = stage->After(compute);
  if (after.ok()) {
    world.ExpectOk(stage->Add(std::move(staged.batches)), "add");
    if (seed / injections.size() % 2 == 0) static_cast<void>(stage->Fence(compute));
  }
  const Status status = stage->Wait(kTimeoutMs);
  const std::string& message = status.message();
  world.Expect(status.code() == StatusCode::kDevice, "the error was lost: " + message);
  world.Expect(message.find("CUDA device 0") != std::string::npos &&
                   message.find(injection.in_message) != std::string::npos,
               "the message does not say where: " + message);
  world.Expect(world.num_good() + world.num_failed() == kArrays,
               "batches ended: " + std::to_string(world.num_good()) + " + " +
                   std::to_string(world.num_failed()));
  world.Expect(world.num_failed() > 0 && world.first_failure() == message, "no batch was told");
  world.Expect(stage->Add({}).message() == message, "the error did not stay for Add");
  world.Expect(stage->Fence(compute).message() == message, "the error did not stay for Fence");
  world.Close(std::move(stage));
  device.reset();
  Problems problems = world.Finish();
  // A broken device takes nothing back.
  if (injection.symbol == nullptr) {
    std::erase_if(problems, [](const std::string& problem) {
      return problem.starts_with("leaked") || problem.starts_with("trainer");
    });
  }
  return problems;
}

Problems ACapturingStreamIsRefused(uint64_t seed) {
  World world(1, kSeeded, seed);
  const uint64_t compute = world.NewStream(true);
  const uint64_t captured = world.NewStream(true);
  auto device = world.Open();
  auto stage = world.OpenStage(device, SmallPieces());
  Staged staged = MakeArrays(&world, device.get(), compute, 3, kPieceBytes);
  world.ExpectOk(stage->After(compute), "after");
  // The device's own thread polls meanwhile, and must not end the capture either.
  world.fake()->BeginCapture(reinterpret_cast<cuda::Stream>(captured));
  world.ExpectOk(stage->Add(std::move(staged.batches)), "add");
  world.ExpectInvalid(stage->After(captured), "capturing a graph");
  world.ExpectInvalid(stage->After(0), "capturing a graph");
  world.Expect(world.WaitBatches(1), "no batch was done");
  world.ExpectInvalid(device->HoldBack(captured, 1), "capturing a graph");
  uint8_t* memory = world.NewHostMemory(1);
  world.ExpectOk(device->Pin(memory, 1), "pin");
  world.ExpectOk(device->Unpin(memory), "unpin");
  world.ExpectOk(stage->Wait(kTimeoutMs), "wait");
  world.Expect(world.fake()->EndCapture(reinterpret_cast<cuda::Stream>(captured)),
               "the capture was ended by the copies");
  world.Expect(world.num_good() == 3, "good: " + std::to_string(world.num_good()));
  world.Close(std::move(stage));
  device.reset();
  return world.Finish();
}

Problems PinnedMemory(uint64_t seed) {
  World world(1, kSeeded, seed);
  const uint64_t compute = world.NewStream(true);
  auto device = world.Open();
  const uint64_t array = world.NewArray(kPieceBytes, compute);
  uint8_t* memory = world.NewHostMemory(kPieceBytes);
  world.ExpectOk(device->After(compute), "after");
  if (world.fake() != nullptr) {
    world.fake()->FailCall("cuMemHostRegister", 1, cuda::kOutOfMemory, 1);
    const Status status = device->Pin(memory, kPieceBytes);
    world.Expect(status.code() == StatusCode::kNoMemory &&
                     status.message().find("ulimit -l") != std::string::npos,
                 "no room to pin is not told: " + status.message());
  }
  // Unpinned memory works, and blocks the caller.
  world.ExpectOk(device->CopyToHost({memory, array, kPieceBytes}), "copy");
  world.Expect(world.Holds({memory, array, kPieceBytes}), "an unpinned copy is not complete");
  world.ExpectInvalid(device->Unpin(memory), "nothing was pinned there");
  world.ExpectOk(device->Pin(memory, kPieceBytes), "pin");
  world.Expect(!device->Pin(memory, kPieceBytes).ok(), "memory was pinned twice");
  world.ExpectOk(device->CopyToHost({memory, array, kPieceBytes}), "copy");
  world.ExpectOk(device->Unpin(memory), "unpin");
  world.Expect(world.Holds({memory, array, kPieceBytes}), "unpinned before the copy ended");
  if (world.fake() != nullptr) {
    world.Expect(world.fake()->Count().num_synchronous_copies == 1, "synchronous copies");
  }
  world.ExpectOk(device->Pin(memory, kPieceBytes), "pin what the destructor unpins");
  device.reset();
  return world.Finish();
}

Problems TwoDevices(uint64_t seed) {
  World world(2, kSeeded, seed);
  const uint64_t streams[2] = {world.NewStream(true, 0), world.NewStream(false, 1)};
  std::shared_ptr<Device> devices[2] = {world.Open(0), world.Open(1)};
  std::unique_ptr<DeviceStage> stages[2];
  std::vector<uint64_t> arrays;
  for (int i = 0; i < 2; ++i) {
    stages[i] = world.OpenStage(devices[i], SmallPieces());
    Staged staged = MakeArrays(&world, devices[i].get(), streams[i], 4, kPieceBytes);
    arrays.push_back(staged.arrays[0]);
    // Whatever device the trainer is at.
    world.UseDevice(1 - i);
    world.ExpectOk(stages[i]->After(streams[i]), "after");
    world.ExpectOk(stages[i]->Add(std::move(staged.batches)), "add");
  }
  uint8_t* memory = world.NewHostMemory(kPieceBytes);
  std::vector<DeviceBatch> wrong;
  wrong.push_back(world.Batch({{memory, arrays[1], 1}}));
  world.ExpectInvalid(stages[0]->Add(wrong), "of CUDA device 1 was given to the stage of device 0");
  std::vector<DeviceBatch> overlapping;
  overlapping.push_back(world.Batch({{memory, arrays[0], 8, 2, 4}}));
  world.ExpectInvalid(stages[0]->Add(overlapping), "a pitch no less than its row");
  int ordinal = -1;
  world.ExpectOk(Device::OrdinalOf(arrays[1] + 5, &ordinal), "ordinal");
  world.Expect(ordinal == 1, "ordinal: " + std::to_string(ordinal));
  for (int i = 0; i < 2; ++i) world.ExpectOk(stages[i]->Fence(streams[i]), "fence");
  for (int i = 0; i < 2; ++i) {
    world.UseDevice(i);
    world.Step(arrays[static_cast<size_t>(i)], streams[i]);
    world.ExpectOk(stages[i]->Wait(kTimeoutMs), "wait");
    world.Close(std::move(stages[i]));
    devices[i].reset();
  }
  world.Expect(world.num_good() == 8, "good: " + std::to_string(world.num_good()));
  return world.Finish();
}

Problems TicketsTellWhatIsDone(uint64_t seed) {
  World world(1, kSeeded, seed);
  const uint64_t compute = world.NewStream(true);
  auto device = world.Open();
  const uint64_t array = world.NewArray(4096, compute);
  uint8_t* memory = world.NewHostMemory(4096);
  world.ExpectOk(device->Pin(memory, 4096), "pin");
  bool is_done = true;
  uint64_t ticket = 0;
  world.ExpectInvalid(device->Done(1, &is_done), "has no ticket 1");
  world.ExpectInvalid(device->HoldBack(compute, 0), "has no ticket 0");
  world.Hold(compute);
  world.Step(array, compute);
  world.ExpectOk(device->After(compute), "after");
  world.ExpectOk(device->CopyToHost({memory, array, 4096}), "copy");
  world.ExpectOk(device->Mark(&ticket), "mark");
  world.ExpectOk(device->Done(ticket, &is_done), "done");
  world.Expect(!is_done, "done before the copy ran");
  world.Expect(device->Wait(ticket, 0).code() == StatusCode::kTimeout, "a wait without end");
  world.Release(compute);
  world.ExpectOk(device->Wait(ticket, kTimeoutMs), "wait");
  world.Expect(memory[0] == 0xEE && memory[4095] == 0xEE, "the copy was not behind the step");
  for (int i = 0; i < 50; ++i) {
    world.ExpectOk(device->CopyToHost({memory, array, 4096}), "copy");
    world.ExpectOk(device->Mark(&ticket), "mark");
    world.ExpectOk(device->HoldBack(compute, ticket), "hold back");
    world.Step(array, compute);
    world.ExpectOk(device->After(compute), "after");
    world.ExpectOk(device->Wait(ticket, i % 2 == 0 ? -1 : kTimeoutMs), "wait");
  }
  world.Expect(ticket == 51, "tickets do not count up");
  world.ExpectOk(device->Done(1, &is_done), "an old ticket");
  world.Expect(is_done, "an old ticket is not done any more");
  if (world.fake() != nullptr) {
    world.Expect(world.fake()->NumCalls("cuEventCreate") <= 3, "events are not used again");
  }
  device.reset();
  return world.Finish();
}

// Loads: host to device, and what was loaded is what comes back.
Problems CopiesToTheDevice(uint64_t seed) {
  World world(1, kSeeded, seed);
  const uint64_t compute = world.NewStream(true);
  auto device = world.Open();
  const uint64_t source = world.NewArray(kPieceBytes, compute);
  const uint64_t target = world.NewArray(kPieceBytes, compute);
  uint8_t* memory = world.NewHostMemory(2 * kPieceBytes);
  world.ExpectOk(device->Pin(memory, 2 * kPieceBytes), "pin");
  uint64_t ticket = 0;
  world.ExpectOk(device->After(compute), "after");
  world.ExpectOk(device->CopyToHost({memory, source, kPieceBytes}), "copy");
  world.ExpectOk(device->CopyToDevice(target, memory, kPieceBytes), "load");
  world.ExpectOk(device->CopyToDevice(target, memory, 0), "load nothing");
  world.ExpectOk(device->Mark(&ticket), "mark");
  world.ExpectOk(device->HoldBack(compute, ticket), "hold back");
  world.Check(world.cuda().cuMemcpyDtoHAsync(memory + kPieceBytes, target, kPieceBytes,
                                             reinterpret_cast<cuda::Stream>(compute)),
              "read back");
  world.Check(world.cuda().cuStreamSynchronize(reinterpret_cast<cuda::Stream>(compute)), "wait");
  world.Expect(world.Holds({memory + kPieceBytes, source, kPieceBytes}), "other bytes came back");
  device.reset();
  return world.Finish();
}

// With a rate of a byte per second only the first piece goes out; a fence does not wait for the
// rate, and closing ends what is left.
Problems ARateHoldsBackOnlyTheBackground(uint64_t seed) {
  World world(1, kSeeded, seed);
  const uint64_t compute = world.NewStream(true);
  auto device = world.Open();
  DeviceStageOptions options = SmallPieces();
  options.bytes_per_s = 1;
  auto stage = world.OpenStage(device, options);
  Staged staged = MakeArrays(&world, device.get(), compute, 4, kPieceBytes);
  Staged later = MakeArrays(&world, device.get(), compute, 3, kPieceBytes);
  world.ExpectOk(stage->After(compute), "after");
  world.ExpectOk(stage->Add(staged.batches), "add");
  world.Expect(world.WaitBatches(1), "no batch was done");
  world.ExpectInvalid(stage->Add({staged.batches[3]}), "overlaps one of a batch that is not done");
  if (world.fake() != nullptr) {
    world.Expect(world.fake()->NumCalls("cuMemcpyDtoHAsync") == 1, "more went out than the rate");
  }
  world.ExpectOk(stage->Fence(compute), "fence");
  world.ExpectOk(stage->Wait(kTimeoutMs), "wait");
  world.ExpectOk(stage->Add(std::move(later.batches)), "add");
  if (seed % 2 == 0) {
    stage->SetRate(0);
    world.ExpectOk(stage->Wait(kTimeoutMs), "wait without a rate");
    world.Expect(world.num_good() == 7, "good: " + std::to_string(world.num_good()));
    world.Close(std::move(stage));
  } else {
    world.Close(std::move(stage));
    world.Expect(world.num_good() == 4 && world.num_failed() == 3,
                 "closing told " + std::to_string(world.num_failed()) + " batches");
    world.Expect(world.first_failure().find("closed before") != std::string::npos,
                 world.first_failure());
  }
  device.reset();
  return world.Finish();
}

// Many small arrays: a piece is bounded in copies, too.
Problems ManySmallArrays(uint64_t seed) {
  constexpr int kArrays = 200;
  constexpr int64_t kBytes = 24;
  World world(1, kManual, seed);
  const uint64_t compute = world.NewStream(true);
  auto device = world.Open();
  auto stage = world.OpenStage(device, SmallPieces());
  const uint64_t array = world.NewArray(kArrays * kBytes, compute);
  uint8_t* memory = world.NewHostMemory(kArrays * kBytes);
  world.ExpectOk(device->Pin(memory, kArrays * kBytes), "pin");
  std::vector<DeviceRows> copies;
  for (int i = 0; i < kArrays; ++i) {
    copies.push_back({memory + i * kBytes, array + static_cast<uint64_t>(i * kBytes), kBytes});
  }
  world.ExpectOk(stage->After(compute), "after");
  world.fake()->RunAll();
  std::vector<DeviceBatch> batches;
  batches.push_back(world.Batch(std::move(copies)));
  world.ExpectOk(stage->Add(std::move(batches)), "add");
  world.Expect(world.fake()->WaitPending(65), "no piece was submitted");
  world.Expect(PendingOf(&world, OpKind::kToHost).size() == 64, "copies of a piece");
  world.fake()->SetManual(false);
  world.ExpectOk(stage->Fence(compute), "fence");
  world.ExpectOk(stage->Wait(kTimeoutMs), "wait");
  world.Expect(world.num_good() == 1, "not good");
  world.Close(std::move(stage));
  device.reset();
  return world.Finish();
}

}  // namespace

const std::vector<Scenario>& CudaScenarios() {
  static const std::vector<Scenario> scenarios{
      {"OverlappedCopiesAreOfOneStep", Overlap, false, 24},
      {"ARingHandsOnSlotsThatAreDone", Ring, false, 12},
      {"SmallCopiesOfTheTrainerGetThrough", SmallCopiesOfTheTrainerGetThrough, true, 4},
      {"TheOptimizerWaitsForTheBurst", TheOptimizerWaitsForTheBurst, true, 8},
      {"ErrorsStayAndSayWhere", ErrorsStay, true, 20},
      {"ACapturingStreamIsRefused", ACapturingStreamIsRefused, true, 8},
      {"PinnedMemoryIsLeftWhenCopiesEnded", PinnedMemory, false, 8},
      {"TwoDevicesDoNotMix", TwoDevices, false, 8},
      {"TicketsTellWhatIsDone", TicketsTellWhatIsDone, false, 6},
      {"CopiesToTheDeviceKeepTheOrder", CopiesToTheDevice, false, 8},
      {"ARateHoldsBackOnlyTheBackground", ARateHoldsBackOnlyTheBackground, false, 4},
      {"ManySmallArraysShareAPiece", ManySmallArrays, true, 2}};
  return scenarios;
}

}  // namespace shardckpt::testing
