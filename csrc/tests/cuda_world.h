// A trainer for the CUDA scenarios: streams, arrays with known content, an optimizer, host memory.
// Runs on the fake driver, or on the machine's own where SHARDCKPT_TEST_CUDA=real asks for it.
#ifndef SHARDCKPT_TESTS_CUDA_WORLD_H_
#define SHARDCKPT_TESTS_CUDA_WORLD_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/cuda_driver.h"
#include "core/device.h"
#include "core/device_stage.h"
#include "tests/fake_cuda/fake_cuda.h"

namespace shardckpt::testing {

inline constexpr int64_t kTimeoutMs = 20'000;

// The driver that the tests use, and its control; null on a real driver.
fake_cuda::Control* FakeControl();
bool IsRealCuda();

class World {
 public:
  World(int num_devices, bool is_manual, uint64_t seed);
  // Lets everything run, gives all back, and returns what went wrong in words: failed Expects,
  // unordered accesses, leaks. After it nothing else may be called.
  std::vector<std::string> Finish();

  fake_cuda::Control* fake() const { return fake_; }
  void Expect(bool is_true, const std::string& what);
  void ExpectOk(const Status& status, const std::string& what);
  void ExpectInvalid(const Status& status, const std::string& in_message);

  uint64_t NewStream(bool is_blocking, int device = 0);
  // Device memory that `stream` fills with a pattern of its own.
  uint64_t NewArray(int64_t size_bytes, uint64_t stream, int device = 0);
  // Fills all arrays again. Nothing is allocated, so the stream may be held.
  void Refill(uint64_t stream);
  // What the optimizer does: overwrites all arrays.
  void Step(uint64_t stream);
  void Step(uint64_t array, uint64_t stream);
  // A long kernel: what is queued on the stream later does not run until Release.
  void Hold(uint64_t stream);
  void Release(uint64_t stream);

  // Page-aligned; lives until Finish. Pinned: by the trainer, not by a Device.
  uint8_t* NewHostMemory(int64_t size_bytes, bool is_pinned = false);
  // Whether packed memory holds `rows` of an array as NewArray filled it.
  bool Holds(const DeviceRows& rows);

  std::shared_ptr<Device> Open(int ordinal = 0);
  std::unique_ptr<DeviceStage> OpenStage(std::shared_ptr<Device> device,
                                         const DeviceStageOptions& options);
  void Close(std::unique_ptr<DeviceStage> stage);

  // A batch whose end is counted, judged, and told to the order checker.
  DeviceBatch Batch(std::vector<DeviceRows> copies);
  // Waits until so many batches of this world are done.
  bool WaitBatches(int count);
  int num_good() const;
  int num_failed() const;
  std::string first_failure() const;

  void UseDevice(int ordinal);  // As the trainer's current device.
  void Check(cuda::Result result, const std::string& what);

  struct Functions : CudaDriver, cuda::TrainerFunctions {};
  const Functions& cuda() const { return *cuda_; }

 private:
  struct Gate {
    std::mutex mutex;
    std::condition_variable opened;
    bool is_open = false;
  };
  struct FreeHostMemory {
    void operator()(uint8_t* address) const;
  };

  const Functions* cuda_;
  fake_cuda::Control* const fake_;
  std::vector<std::string> problems_;
  std::vector<cuda::Context> contexts_;
  int current_ = 0;
  std::vector<std::pair<uint64_t, int>> streams_;  // With their devices.
  std::map<uint64_t, int64_t> arrays_;             // Address to bytes.
  std::map<uint64_t, int> array_devices_;
  std::map<uint64_t, uint8_t*> initial_;
  std::vector<uint8_t*> registered_;
  std::deque<std::unique_ptr<uint8_t[], FreeHostMemory>> host_memory_;
  std::map<uint64_t, std::unique_ptr<Gate>> gates_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int num_good_ = 0;
  int num_failed_ = 0;
  std::string first_failure_;
};

}  // namespace shardckpt::testing

#endif  // SHARDCKPT_TESTS_CUDA_WORLD_H_
