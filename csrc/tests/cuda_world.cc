#include "tests/cuda_world.h"

#include <dlfcn.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace shardckpt::testing {
namespace {

using fake_cuda::Control;

cuda::Stream Handle(uint64_t stream) { return reinterpret_cast<cuda::Stream>(stream); }

// Different for neighbours, rows and arrays.
uint8_t PatternAt(uint64_t array, int64_t i) {
  return static_cast<uint8_t>(static_cast<uint64_t>(i) * 7 + static_cast<uint64_t>(i / 251) +
                              (array >> 8) * 31);
}

const char* LibraryPath() {
  // Before the driver is first looked for: the fake, unless the real one is asked for.
  static const char* const path = [] {
    if (IsRealCuda()) return "libcuda.so.1";
    setenv("SHARDCKPT_LIBCUDA", SHARDCKPT_FAKE_CUDA, 1);
    return SHARDCKPT_FAKE_CUDA;
  }();
  return path;
}

const World::Functions& TrainerFunctions() {
  static const World::Functions functions = [] {
    World::Functions out;
    void* library = dlopen(LibraryPath(), RTLD_NOW);
    if (library == nullptr || !CudaDriver::Load(LibraryPath(), &out).ok()) std::abort();
#define SHARDCKPT_CUDA_FIND(name, symbol, parameters) \
  out.name = reinterpret_cast<decltype(out.name)>(dlsym(library, symbol));
    SHARDCKPT_CUDA_TRAINER_SYMBOLS(SHARDCKPT_CUDA_FIND)
#undef SHARDCKPT_CUDA_FIND
    return out;
  }();
  return functions;
}

}  // namespace

bool IsRealCuda() {
  const char* told = std::getenv("SHARDCKPT_TEST_CUDA");
  return told != nullptr && std::string(told) == "real";
}

Control* FakeControl() {
  static Control* const control = []() -> Control* {
    if (IsRealCuda()) return nullptr;
    void* library = dlopen(LibraryPath(), RTLD_NOW);
    if (library == nullptr) std::abort();
    return reinterpret_cast<fake_cuda::GetControl>(dlsym(library, fake_cuda::kGetControl))();
  }();
  return control;
}

World::World(int num_devices, bool is_manual, uint64_t seed) : fake_(FakeControl()) {
  if (fake_ != nullptr) fake_->Reset(num_devices, is_manual, seed);
  cuda_ = &TrainerFunctions();
  for (int i = 0; i < num_devices; ++i) {
    cuda::Context context = nullptr;
    Check(cuda_->cuDevicePrimaryCtxRetain(&context, i), "retain");
    contexts_.push_back(context);
  }
  Check(cuda_->cuCtxPushCurrent(contexts_[0]), "push");
}

std::vector<std::string> World::Finish() {
  if (fake_ != nullptr) fake_->SetManual(false);
  for (const auto& [stream, device] : streams_) Release(stream);
  Release(0);
  for (const auto& [stream, device] : streams_) {
    UseDevice(device);
    cuda_->cuStreamSynchronize(Handle(stream));
    cuda_->cuStreamDestroy(Handle(stream));
  }
  for (size_t i = 0; i < contexts_.size(); ++i) {
    UseDevice(static_cast<int>(i));
    cuda_->cuStreamSynchronize(nullptr);
    for (const auto& [array, device] : array_devices_) {
      if (device == static_cast<int>(i)) cuda_->cuMemFree(array);
    }
  }
  for (uint8_t* address : registered_) cuda_->cuMemHostUnregister(address);
  cuda::Context context = nullptr;
  cuda_->cuCtxPopCurrent(&context);
  for (size_t i = 0; i < contexts_.size(); ++i) {
    cuda_->cuDevicePrimaryCtxRelease(static_cast<int>(i));
  }
  if (fake_ != nullptr) {
    for (const std::string& violation : fake_->Violations()) problems_.push_back(violation);
    const fake_cuda::Counts counts = fake_->Count();
    Expect(counts.num_streams == 0, "leaked streams: " + std::to_string(counts.num_streams));
    Expect(counts.num_events == 0, "leaked events: " + std::to_string(counts.num_events));
    Expect(counts.num_contexts == 0, "leaked contexts: " + std::to_string(counts.num_contexts));
    Expect(counts.num_registrations == 0,
           "leaked registrations: " + std::to_string(counts.num_registrations));
    Expect(counts.num_legacy_copies == 0, "copies on the legacy default stream");
    Expect(counts.context_depth == 0 && counts.capture_mode == cuda::kCaptureModeGlobal,
           "the calling thread got back another context or capture mode");
  }
  return problems_;
}

void World::Expect(bool is_true, const std::string& what) {
  const std::lock_guard lock(mutex_);
  if (!is_true) problems_.push_back(what);
}

void World::ExpectOk(const Status& status, const std::string& what) {
  Expect(status.ok(), what + ": " + status.message());
}

void World::ExpectInvalid(const Status& status, const std::string& in_message) {
  Expect(status.code() == StatusCode::kInvalid &&
             status.message().find(in_message) != std::string::npos,
         "not refused with '" + in_message + "': " + status.message());
}

void World::Check(cuda::Result result, const std::string& what) {
  Expect(result == cuda::kSuccess, "trainer: " + what + " gave " + std::to_string(result));
}

void World::UseDevice(int ordinal) {
  cuda::Context context = nullptr;
  cuda_->cuCtxPopCurrent(&context);
  Check(cuda_->cuCtxPushCurrent(contexts_[static_cast<size_t>(ordinal)]), "push");
  current_ = ordinal;
}

uint64_t World::NewStream(bool is_blocking, int device) {
  UseDevice(device);
  cuda::Stream stream = nullptr;
  Check(cuda_->cuStreamCreate(&stream, is_blocking ? 0 : cuda::kStreamNonBlocking), "stream");
  streams_.emplace_back(reinterpret_cast<uint64_t>(stream), device);
  return streams_.back().first;
}

uint64_t World::NewArray(int64_t size_bytes, uint64_t stream, int device) {
  UseDevice(device);
  cuda::DevicePtr array = 0;
  const auto allocated_bytes = static_cast<size_t>(size_bytes > 0 ? size_bytes : 1);
  Check(cuda_->cuMemAlloc(&array, allocated_bytes), "alloc");
  arrays_[array] = size_bytes;
  array_devices_[array] = device;
  if (size_bytes == 0) return array;
  uint8_t* initial = NewHostMemory(size_bytes, true);
  for (int64_t i = 0; i < size_bytes; ++i) initial[i] = PatternAt(array, i);
  initial_[array] = initial;
  Check(cuda_->cuMemcpyHtoDAsync(array, initial, static_cast<size_t>(size_bytes), Handle(stream)),
        "copy");
  return array;
}

void World::Refill(uint64_t stream) {
  for (const auto& [array, initial] : initial_) {
    Check(cuda_->cuMemcpyHtoDAsync(array, initial, static_cast<size_t>(arrays_[array]),
                                   Handle(stream)),
          "copy");
  }
}

void World::Step(uint64_t stream) {
  for (const auto& [array, size_bytes] : arrays_) Step(array, stream);
}

void World::Step(uint64_t array, uint64_t stream) {
  if (arrays_[array] == 0) return;
  Check(cuda_->cuMemsetD8Async(array, 0xEE, static_cast<size_t>(arrays_[array]), Handle(stream)),
        "set");
}

void World::Hold(uint64_t stream) {
  if (fake_ != nullptr) return fake_->Hold(Handle(stream), true);
  gates_[stream] = std::make_unique<Gate>();
  const auto wait = [](void* told) {
    auto* gate = static_cast<Gate*>(told);
    std::unique_lock lock(gate->mutex);
    gate->opened.wait(lock, [&] { return gate->is_open; });
  };
  Check(cuda_->cuLaunchHostFunc(Handle(stream), wait, gates_[stream].get()), "hold");
}

void World::Release(uint64_t stream) {
  if (fake_ != nullptr) return fake_->Hold(Handle(stream), false);
  const auto found = gates_.find(stream);
  if (found == gates_.end()) return;
  const std::lock_guard lock(found->second->mutex);
  found->second->is_open = true;
  found->second->opened.notify_all();
}

void World::FreeHostMemory::operator()(uint8_t* address) const { std::free(address); }

uint8_t* World::NewHostMemory(int64_t size_bytes, bool is_pinned) {
  const size_t allocated_bytes = (static_cast<size_t>(size_bytes) / 4096 + 1) * 4096;
  host_memory_.emplace_back(static_cast<uint8_t*>(std::aligned_alloc(4096, allocated_bytes)));
  uint8_t* address = host_memory_.back().get();
  std::memset(address, 0, allocated_bytes);
  if (is_pinned) {
    Check(cuda_->cuMemHostRegister(address, static_cast<size_t>(size_bytes), 1), "register");
    registered_.push_back(address);
  }
  return address;
}

bool World::Holds(const DeviceRows& rows) {
  const auto* bytes = static_cast<const uint8_t*>(rows.dst);
  const auto array = std::prev(arrays_.upper_bound(rows.src))->first;
  const auto first = static_cast<int64_t>(rows.src - array);
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    for (int64_t i = 0; i < rows.row_bytes; ++i) {
      const int64_t at = first + row * rows.src_pitch_bytes + i;
      if (bytes[row * rows.row_bytes + i] != PatternAt(array, at)) return false;
    }
  }
  return true;
}

std::shared_ptr<Device> World::Open(int ordinal) {
  std::shared_ptr<Device> device;
  ExpectOk(Device::Open(ordinal, &device), "open");
  return device;
}

std::unique_ptr<DeviceStage> World::OpenStage(std::shared_ptr<Device> device,
                                              const DeviceStageOptions& options) {
  std::unique_ptr<DeviceStage> stage;
  ExpectOk(DeviceStage::Open(std::move(device), options, &stage), "open stage");
  return stage;
}

void World::Close(std::unique_ptr<DeviceStage> stage) {
  const bool has_stopped = stage->Close(kTimeoutMs);
  Expect(has_stopped, "the stage did not stop");
  if (!has_stopped) static_cast<void>(stage.release());
}

DeviceBatch World::Batch(std::vector<DeviceRows> copies) {
  auto judge = [this, copies](const Status& status) {
    bool is_good = status.ok();
    for (const DeviceRows& rows : copies) {
      const auto size_bytes = static_cast<size_t>(rows.size_bytes());
      if (size_bytes == 0) continue;
      if (fake_ != nullptr) fake_->HostRead(rows.dst, size_bytes);
      if (is_good && !Holds(rows)) {
        Expect(false, "a batch that was done holds other bytes than the array did");
        is_good = false;
      }
    }
    const std::lock_guard lock(mutex_);
    ++(is_good ? num_good_ : num_failed_);
    if (!status.ok() && first_failure_.empty()) first_failure_ = status.message();
    changed_.notify_all();
  };
  return {std::move(copies), std::move(judge)};
}

bool World::WaitBatches(int count) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::milliseconds(kTimeoutMs),
                           [&] { return num_good_ + num_failed_ >= count; });
}

int World::num_good() const {
  const std::lock_guard lock(mutex_);
  return num_good_;
}

int World::num_failed() const {
  const std::lock_guard lock(mutex_);
  return num_failed_;
}

std::string World::first_failure() const {
  const std::lock_guard lock(mutex_);
  return first_failure_;
}

}  // namespace shardckpt::testing
