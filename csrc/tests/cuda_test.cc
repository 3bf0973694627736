// The CUDA scenarios as they are, and what the driver's loader and the fake itself must do.
#include <fcntl.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "core/cuda_driver.h"
#include "core/device.h"
#include "tests/check.h"
#include "tests/cuda_scenarios.h"
#include "tests/cuda_world.h"

namespace shardckpt {
namespace {

using testing::CudaScenarios;
using testing::FakeControl;
using testing::IsRealCuda;
using testing::Scenario;
using testing::World;

int NumDevices() {
  const CudaDriver* driver = nullptr;
  int count = 0;
  if (!CudaDriver::Get(&driver).ok() || driver->cuDeviceGetCount(&count) != 0) return 0;
  return count;
}

TEST(CudaScenariosHold) {
  static_cast<void>(FakeControl());
  for (const Scenario& scenario : CudaScenarios()) {
    const std::string claim = scenario.claim;
    if (IsRealCuda() &&
        (scenario.needs_fake || (claim == "TwoDevicesDoNotMix" && NumDevices() < 2))) {
      std::printf("  left out on a real driver: %s\n", scenario.claim);
      continue;
    }
    for (int seed = 0; seed < scenario.num_seeds; ++seed) {
      for (const std::string& problem : scenario.run(static_cast<uint64_t>(seed))) {
        EXPECT(problem.empty(), claim + ", seed " + std::to_string(seed) + ": " + problem);
      }
    }
  }
}

TEST(CudaDriverThatIsMissingOrOldIsToldApart) {
  if (FakeControl() == nullptr) return;
  CudaDriver driver;
  const Status missing = CudaDriver::Load("/nowhere/libcuda.so.1", &driver);
  EXPECT(missing.code() == StatusCode::kUnavailable, missing.message());
  EXPECT(missing.message().find("cannot be loaded") != std::string::npos, missing.message());
  const Status other = CudaDriver::Load("libm.so.6", &driver);
  EXPECT(other.code() == StatusCode::kUnavailable, other.message());
  EXPECT(other.message().find("has no function cuInit") != std::string::npos, other.message());
  FakeControl()->Reset(1, false, 1);
  FakeControl()->SetVersion(11070);
  const Status old = CudaDriver::Load(SHARDCKPT_FAKE_CUDA, &driver);
  EXPECT(old.code() == StatusCode::kUnavailable, old.message());
  EXPECT(old.message().find("for CUDA 11.7, needed is 11.8") != std::string::npos, old.message());
  FakeControl()->Reset(1, false, 1);
  FakeControl()->FailCall("cuInit", 1, 100, 1);
  const Status none = CudaDriver::Load(SHARDCKPT_FAKE_CUDA, &driver);
  EXPECT(none.code() == StatusCode::kUnavailable, none.message());
  EXPECT(none.message().find("finds no device") != std::string::npos, none.message());
  EXPECT(CudaDriver::Load(SHARDCKPT_FAKE_CUDA, &driver).ok() && driver.version == 12040, "");
}

TEST(CudaContextsAreMadeByTheFirstDeviceOnly) {
  if (FakeControl() == nullptr) return;
  FakeControl()->Reset(2, false, 1);
  const CudaDriver* driver = nullptr;
  int ordinal = -1;
  EXPECT(CudaDriver::Get(&driver).ok(), "");
  const Status status = Device::OrdinalOf(reinterpret_cast<uint64_t>(&ordinal), &ordinal);
  EXPECT(status.code() == StatusCode::kInvalid, "host memory has a device: " + status.message());
  std::shared_ptr<Device> device;
  EXPECT(Device::Open(2, &device).message().find("this process sees 2") != std::string::npos, "");
  EXPECT(Device::Open(-1, &device).code() == StatusCode::kInvalid, "");
  EXPECT(FakeControl()->NumCalls("cuDevicePrimaryCtxRetain") == 0, "a context was made");
  FakeControl()->FailCall("cuStreamCreate", 1, cuda::kOutOfMemory, 1);
  EXPECT(Device::Open(1, &device).code() == StatusCode::kNoMemory, "");
  EXPECT(FakeControl()->Count().num_contexts == 0, "a failed open keeps the context");
  EXPECT(Device::Open(1, &device).ok(), "");
  EXPECT(FakeControl()->Count().num_contexts == 1, "");
  // At the end of a process the driver may be gone first; nothing is called on after that.
  FakeControl()->FailCall("cuCtxPushCurrent", 1, cuda::kDeinitialized, 1);
  device.reset();
  EXPECT(FakeControl()->NumCalls("cuStreamSynchronize") == 0, "");
}

TEST(CudaFakeFaultsOnAHostReadAndRunsAHostFunctionInOrder) {
  if (FakeControl() == nullptr) return;
  World world(1, true, 1);
  const uint64_t stream = world.NewStream(true);
  const uint64_t array = world.NewArray(4096, stream);
  int ends[2];
  EXPECT(pipe(ends) == 0, "");
  EXPECT(write(ends[1], reinterpret_cast<void*>(array), 1) == -1, "device memory can be read");
  close(ends[0]);
  close(ends[1]);
  // A kernel that changes device memory, between two memsets.
  static uint8_t* shadow;
  static uint8_t seen;
  shadow = FakeControl()->Shadow(array);
  const auto handle = reinterpret_cast<cuda::Stream>(stream);
  world.Step(array, stream);
  world.Check(world.cuda().cuLaunchHostFunc(
                  handle, [](void*) { seen = std::exchange(shadow[0], uint8_t{7}); }, nullptr),
              "launch");
  FakeControl()->RunAll();
  EXPECT(seen == 0xEE && shadow[0] == 7, "the kernel ran out of order");
  for (const std::string& problem : world.Finish()) EXPECT(problem.empty(), problem);
}

TEST(CudaFakeReportsWhatIsUnorderedWhateverTheTiming) {
  if (FakeControl() == nullptr) return;
  for (const bool is_ordered : {false, true}) {
    World world(1, true, 1);
    const uint64_t first = world.NewStream(false);
    const uint64_t second = world.NewStream(false);
    const uint64_t array = world.NewArray(4096, first);
    // Everything has run, so the bytes are right: only the missing edge can tell.
    FakeControl()->RunAll();
    if (is_ordered) {
      world.Check(world.cuda().cuStreamSynchronize(reinterpret_cast<cuda::Stream>(first)), "");
    }
    world.Step(array, second);
    FakeControl()->RunAll();
    const size_t num_violations = FakeControl()->Violations().size();
    EXPECT(num_violations == (is_ordered ? 0 : 1), std::to_string(num_violations));
    world.Finish();
  }
}

}  // namespace
}  // namespace shardckpt
