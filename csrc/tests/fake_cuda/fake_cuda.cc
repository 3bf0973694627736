// A driver without a device; see fake_cuda.h. Handles are numbers that are never used twice.
#include "tests/fake_cuda/fake_cuda.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <utility>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace shardckpt::fake_cuda {
namespace {

using namespace shardckpt::cuda;  // NOLINT: this file is that driver.

constexpr auto kDeadline = std::chrono::seconds(10);
constexpr uint8_t kPoison = 0xDB;     // A destination between submission and copy.
constexpr uint8_t kUnwritten = 0xA5;  // New device memory.
constexpr int kHost = 0;              // The host's place in a vector clock.

// Entry i counts what is known of agent i: the host, or a stream.
struct VectorClock {
  std::vector<uint64_t> ticks;

  uint64_t& operator[](int agent) {
    if (ticks.size() <= static_cast<size_t>(agent)) ticks.resize(static_cast<size_t>(agent) + 1);
    return ticks[static_cast<size_t>(agent)];
  }
  void Join(const VectorClock& other) {
    for (size_t i = 0; i < other.ticks.size(); ++i) {
      uint64_t& tick = (*this)[static_cast<int>(i)];
      tick = std::max(tick, other.ticks[i]);
    }
  }
};

struct Access {
  uint64_t begin;
  uint64_t end;
  bool is_write;
  int agent = kHost;
  uint64_t tick = 0;
  std::string what = {};
};

struct FakeEvent {
  int device;
  uint64_t recorded = 0;  // Records submitted, and run.
  uint64_t done = 0;
  VectorClock clock = {};
};

struct Op {
  uint64_t id;
  OpKind kind;
  size_t size_bytes;
  std::function<void()> run;
  std::shared_ptr<FakeEvent> event;  // Of kWait.
  uint64_t generation;
};

struct FakeStream {
  Stream handle;
  int agent;
  int device;
  bool is_legacy;
  bool is_blocking;
  bool is_held = false;
  bool is_capturing = false;
  bool was_capture_broken = false;
  VectorClock clock = {};
  std::deque<Op> ops = {};
};

struct FakeDevice {
  int num_retains = 0;
  Result sticky = kSuccess;
  std::shared_ptr<FakeStream> legacy;
  FakeStream* engine_streams[2] = {nullptr, nullptr};  // Served last, to host and to device.
};

struct Allocation {
  uint64_t size_bytes;
  int device;
  std::unique_ptr<uint8_t[]> shadow;
};

struct Injected {
  int nth;
  int times;
  Result error;
};

struct Thread {
  uint64_t generation = 0;
  std::vector<int> contexts;
  int capture_mode = kCaptureModeGlobal;
};
thread_local Thread this_thread;

class Fake final : public Control {
 public:
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<FakeDevice> devices;
  std::map<Stream, std::shared_ptr<FakeStream>> streams;
  std::map<Event, std::shared_ptr<FakeEvent>> events;
  std::map<uint64_t, Allocation> allocations;
  std::map<uint64_t, uint64_t> registrations;  // Begin to end.
  VectorClock host_clock;
  int version = 12040;
  int num_synchronous_copies = 0;
  int num_legacy_copies = 0;

  using Lock = std::unique_lock<std::mutex>;

  void Reset(int num_devices, bool is_manual, uint64_t seed) override {
    const Lock lock(mutex);
    ++generation_;
    for (const auto& [address, allocation] : allocations) {
      munmap(reinterpret_cast<void*>(address), allocation.size_bytes);
    }
    streams.clear();
    events.clear();
    allocations.clear();
    registrations.clear();
    accesses_.clear();
    violations_.clear();
    injected_.clear();
    calls_.clear();
    host_clock = {};
    num_agents_ = 1;
    num_synchronous_copies = num_legacy_copies = break_copy_ = 0;
    is_manual_ = is_manual;
    random_.seed(seed);
    version = 12040;
    devices.clear();
    devices.resize(static_cast<size_t>(num_devices));
    for (int i = 0; i < num_devices; ++i) {
      devices[static_cast<size_t>(i)].legacy = MakeStream(nullptr, i, true, true);
    }
  }

  void SetManual(bool is_manual) override {
    const Lock lock(mutex);
    is_manual_ = is_manual;
    changed.notify_all();
  }

  void SetVersion(int told) override {
    const Lock lock(mutex);
    version = told;
  }

  std::vector<PendingOp> Pending() override {
    const Lock lock(mutex);
    std::vector<PendingOp> out;
    for (const auto& stream : AllStreams()) {
      for (const Op& op : stream->ops) {
        const bool may_run = &op == &stream->ops.front() && MayRun(*stream);
        out.push_back({op.id, op.kind, stream->handle, op.size_bytes, may_run});
      }
    }
    std::sort(out.begin(), out.end(),
              [](const PendingOp& a, const PendingOp& b) { return a.id < b.id; });
    return out;
  }

  bool RunOp(uint64_t id) override {
    const Lock lock(mutex);
    for (const auto& stream : AllStreams()) {
      if (!stream->ops.empty() && stream->ops.front().id == id && MayRun(*stream)) {
        RunFront(stream.get());
        return true;
      }
    }
    return false;
  }

  bool WaitPending(size_t count) override {
    Lock lock(mutex);
    return changed.wait_for(lock, kDeadline, [&] {
      size_t num_pending = 0;
      for (const auto& stream : AllStreams()) num_pending += stream->ops.size();
      return num_pending >= count;
    });
  }

  void RunAll() override {
    const Lock lock(mutex);
    while (RunOne()) continue;
  }

  void Hold(Stream handle, bool is_held) override {
    const Lock lock(mutex);
    Find(handle, 0)->is_held = is_held;
    changed.notify_all();
  }

  void HostRead(const void* address, size_t size_bytes) override {
    const Lock lock(mutex);
    HostAccess(reinterpret_cast<uint64_t>(address), size_bytes, false, "a host thread reads");
  }

  void HostWrite(void* address, size_t size_bytes) override {
    const Lock lock(mutex);
    HostAccess(reinterpret_cast<uint64_t>(address), size_bytes, true, "a host thread writes");
  }

  void FailCall(const std::string& symbol, int nth, Result error, int times) override {
    const Lock lock(mutex);
    injected_[symbol] = {nth, times, error};
  }

  void BreakCopy(int nth) override {
    const Lock lock(mutex);
    break_copy_ = nth;
  }

  void BeginCapture(Stream stream) override {
    const Lock lock(mutex);
    Find(stream, 0)->is_capturing = true;
  }

  bool EndCapture(Stream handle) override {
    const Lock lock(mutex);
    FakeStream* stream = Find(handle, 0);
    stream->is_capturing = false;
    return !std::exchange(stream->was_capture_broken, false);
  }

  uint8_t* Shadow(DevicePtr address) override {
    const Lock lock(mutex);
    return ShadowOf(address, 1);
  }

  int NumCalls(const std::string& symbol) override {
    const Lock lock(mutex);
    return calls_[symbol];
  }

  Counts Count() override {
    const Lock lock(mutex);
    CheckThread();
    Counts out{};
    out.num_streams = static_cast<int>(streams.size());
    out.num_events = static_cast<int>(events.size());
    out.num_registrations = static_cast<int>(registrations.size());
    for (const FakeDevice& device : devices) out.num_contexts += device.num_retains;
    out.num_synchronous_copies = num_synchronous_copies;
    out.num_legacy_copies = num_legacy_copies;
    out.context_depth = static_cast<int>(this_thread.contexts.size());
    out.capture_mode = this_thread.capture_mode;
    return out;
  }

  std::vector<std::string> Violations() override {
    const Lock lock(mutex);
    return violations_;
  }

  // The rest is for the driver's functions, under the lock.

  void CheckThread() {
    if (this_thread.generation != generation_) this_thread = {generation_, {}, kCaptureModeGlobal};
  }

  // What every function does first; may_end_capture: the driver refuses it while any thread
  // captures, unless the calling thread's mode is relaxed, and ends the capture.
  Result Enter(const char* symbol, bool needs_context, bool may_end_capture) {
    CheckThread();
    ++calls_[symbol];
    if (!is_manual_) {
      for (uint64_t i = random_() % 3; i > 0; --i) RunOne();
    }
    if (const auto found = injected_.find(symbol); found != injected_.end()) {
      Injected& injected = found->second;
      if (--injected.nth < 1 && injected.times > 0) {
        --injected.times;
        return injected.error;
      }
    }
    if (may_end_capture && this_thread.capture_mode != kCaptureModeRelaxed) {
      for (const auto& stream : AllStreams()) {
        if (!stream->is_capturing) continue;
        stream->was_capture_broken = true;
        return kCaptureUnsupported;
      }
    }
    if (!needs_context) return kSuccess;
    if (this_thread.contexts.empty()) return kInvalidContext;
    return Current().sticky;
  }

  int CurrentOrdinal() const { return this_thread.contexts.back(); }
  FakeDevice& Current() { return devices[static_cast<size_t>(CurrentOrdinal())]; }

  std::shared_ptr<FakeStream> MakeStream(Stream handle, int device, bool is_legacy,
                                         bool is_blocking) {
    return std::make_shared<FakeStream>(
        FakeStream{handle, num_agents_++, device, is_legacy, is_blocking});
  }

  uint64_t NextHandle() { return next_handle_ += 16; }

  // Null: no such stream. Handles 0 and 1 are the legacy default stream of the device.
  FakeStream* Find(Stream handle, int device) {
    if (reinterpret_cast<uint64_t>(handle) <= 1) {
      return devices[static_cast<size_t>(device)].legacy.get();
    }
    const auto found = streams.find(handle);
    return found == streams.end() ? nullptr : found->second.get();
  }

  // Queues work; `accesses` are judged against all before them.
  Result Submit(FakeStream* stream, OpKind kind, size_t size_bytes, std::vector<Access> accesses,
                std::function<void()> run, std::shared_ptr<FakeEvent> event = nullptr) {
    if (stream == nullptr || stream->device != CurrentOrdinal()) return kInvalidHandle;
    if (stream->is_capturing) {
      stream->was_capture_broken = true;
      violations_.push_back("work was queued on a capturing stream");
      return kCaptureUnsupported;
    }
    for (const auto& other : AllStreams()) {
      if (other->device != stream->device || other->is_legacy == stream->is_legacy) continue;
      if (stream->is_blocking && other->is_blocking) stream->clock.Join(other->clock);
    }
    stream->clock.Join(host_clock);
    ++stream->clock[stream->agent];
    if (kind == OpKind::kWait) stream->clock.Join(event->clock);
    if (kind == OpKind::kRecord) event->clock = stream->clock;
    const uint64_t id = next_op_++;
    for (Access& access : accesses) {
      access.agent = stream->agent;
      access.tick = stream->clock[stream->agent];
      access.what = "operation " + std::to_string(id) + " of stream " +
                    std::to_string(stream->agent) + (access.is_write ? " writes" : " reads");
      Judge(std::move(access), stream->clock);
    }
    const uint64_t generation = event == nullptr ? 0 : event->recorded;
    stream->ops.push_back({id, kind, size_bytes, std::move(run), std::move(event), generation});
    changed.notify_all();
    return kSuccess;
  }

  void HostAccess(uint64_t begin, size_t size_bytes, bool is_write, const char* what) {
    Access access{begin, begin + size_bytes, is_write};
    access.tick = ++host_clock[kHost];
    access.what = what;
    Judge(std::move(access), host_clock);
  }

  // Blocks the calling thread, with the lock given up, until `is_done`, its device is broken, or
  // the deadline, which is a violation.
  template <typename Condition>
  void Block(Lock* lock, Condition is_done) {
    const auto deadline = std::chrono::steady_clock::now() + kDeadline;
    while (!is_done() && Current().sticky == kSuccess) {
      if (!is_manual_ && RunOne()) continue;
      if (changed.wait_until(*lock, deadline) == std::cv_status::timeout) {
        violations_.push_back("a host thread waited ten seconds for what nothing lets happen");
        return;
      }
    }
  }

  // 1: all in one registration; 0: none; -1: part of it.
  int IsRegistered(const void* address, size_t size_bytes) const {
    const auto begin = reinterpret_cast<uint64_t>(address);
    const uint64_t end = begin + size_bytes;
    const auto next = registrations.lower_bound(end);
    if (next == registrations.begin()) return 0;
    const auto& [first, last] = *std::prev(next);
    if (last <= begin) return 0;
    return first <= begin && end <= last ? 1 : -1;
  }

  // Null: no allocation holds these bytes.
  uint8_t* ShadowOf(DevicePtr address, size_t size_bytes) {
    const Allocation* allocation = AllocationOf(address, size_bytes);
    if (allocation == nullptr) return nullptr;
    const auto next = allocations.upper_bound(address);
    return allocation->shadow.get() + (address - std::prev(next)->first);
  }

  const Allocation* AllocationOf(DevicePtr address, size_t size_bytes) {
    const auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) return nullptr;
    const auto& [begin, allocation] = *std::prev(next);
    return address + size_bytes <= begin + allocation.size_bytes ? &allocation : nullptr;
  }

  // A copy of rows in either direction; the pitches are both sides' distances between rows.
  Result Copy(Lock* lock, Stream handle, bool to_host, uint8_t* host, size_t host_pitch,
              DevicePtr device, size_t device_pitch, size_t row_bytes, size_t num_rows) {
    FakeStream* stream = Find(handle, CurrentOrdinal());
    const size_t device_span = (num_rows - 1) * device_pitch + row_bytes;
    const size_t host_span = (num_rows - 1) * host_pitch + row_bytes;
    const Allocation* allocation = AllocationOf(device, device_span);
    const int is_registered = IsRegistered(host, host_span);
    if (allocation == nullptr || allocation->device != CurrentOrdinal() || is_registered < 0) {
      return kInvalidValue;
    }
    uint8_t* shadow = ShadowOf(device, device_span);
    std::vector<Access> accesses;
    for (size_t row = 0; row < num_rows; ++row) {
      const uint64_t there = device + row * device_pitch;
      const auto here = reinterpret_cast<uint64_t>(host + row * host_pitch);
      accesses.push_back({there, there + row_bytes, !to_host});
      accesses.push_back({here, here + row_bytes, to_host});
    }
    const auto run = [=] {
      for (size_t row = 0; row < num_rows; ++row) {
        uint8_t* here = host + row * host_pitch;
        uint8_t* there = shadow + row * device_pitch;
        std::memcpy(to_host ? here : there, to_host ? there : here, row_bytes);
      }
    };
    if (const Result result = Submit(stream, to_host ? OpKind::kToHost : OpKind::kToDevice,
                                     row_bytes * num_rows, std::move(accesses), run);
        result != kSuccess) {
      return result;
    }
    if (to_host && stream->is_legacy) ++num_legacy_copies;
    if (to_host) {
      for (size_t row = 0; row < num_rows; ++row) {
        std::memset(host + row * host_pitch, kPoison, row_bytes);
      }
    }
    if (is_registered == 1) return kSuccess;
    ++num_synchronous_copies;
    return Drain(lock, stream);
  }

  // Waits for all that is queued on a stream now.
  Result Drain(Lock* lock, FakeStream* stream) {
    const uint64_t id = next_op_ - 1;
    const VectorClock clock = stream->clock;
    Block(lock, [&] { return stream->ops.empty() || stream->ops.front().id > id; });
    if (Current().sticky != kSuccess) return Current().sticky;
    host_clock.Join(clock);
    return kSuccess;
  }

  void AddViolation(std::string what) { violations_.push_back(std::move(what)); }

 private:
  std::vector<std::shared_ptr<FakeStream>> AllStreams() const {
    std::vector<std::shared_ptr<FakeStream>> out;
    for (const FakeDevice& device : devices) out.push_back(device.legacy);
    for (const auto& [handle, stream] : streams) out.push_back(stream);
    return out;
  }

  // Overlapping accesses, one of them a write, must be ordered. Accesses of one operation count as
  // ordered; a later write hides what it covers.
  void Judge(Access access, VectorClock clock) {
    std::erase_if(accesses_, [&](const Access& before) {
      const bool overlaps = before.begin < access.end && access.begin < before.end;
      if (!overlaps) return false;
      const bool is_ordered = clock[before.agent] >= before.tick;
      if (!is_ordered && (before.is_write || access.is_write)) {
        violations_.push_back(access.what + " what " + before.what + ", in no order");
      }
      return is_ordered && access.is_write && access.begin <= before.begin &&
             before.end <= access.end;
    });
    accesses_.push_back(std::move(access));
  }

  static bool IsCopy(OpKind kind) { return kind == OpKind::kToHost || kind == OpKind::kToDevice; }

  // Whether the front operation of a stream may run, the copy engines aside.
  bool IsReady(const FakeStream& stream) const {
    const Op& op = stream.ops.front();
    if (stream.is_held) return false;
    if (op.kind == OpKind::kWait && op.event->done < op.generation) return false;
    if (!stream.is_blocking) return true;
    for (const auto& other : AllStreams()) {
      if (other->device != stream.device || other->is_legacy == stream.is_legacy) continue;
      if (other->is_blocking && !other->ops.empty() && other->ops.front().id < op.id) return false;
    }
    return true;
  }

  // A copy engine stays with the stream that it served last while that one has more for it; what is
  // recorded in between does not count.
  bool MayRun(const FakeStream& stream) const {
    if (!IsReady(stream)) return false;
    const OpKind kind = stream.ops.front().kind;
    if (!IsCopy(kind)) return true;
    const FakeStream* served =
        devices[static_cast<size_t>(stream.device)].engine_streams[kind == OpKind::kToDevice];
    if (served == nullptr || served == &stream || served->ops.empty() || !IsReady(*served)) {
      return true;
    }
    for (const Op& op : served->ops) {
      if (op.kind == kind) return false;
      if (op.kind != OpKind::kRecord) break;
    }
    return true;
  }

  bool RunOne() {
    std::vector<FakeStream*> ready;
    for (const auto& stream : AllStreams()) {
      if (!stream->ops.empty() && MayRun(*stream)) ready.push_back(stream.get());
    }
    if (ready.empty()) return false;
    RunFront(ready[random_() % ready.size()]);
    return true;
  }

  void RunFront(FakeStream* stream) {
    Op op = std::move(stream->ops.front());
    stream->ops.pop_front();
    FakeDevice& device = devices[static_cast<size_t>(stream->device)];
    if (IsCopy(op.kind)) device.engine_streams[op.kind == OpKind::kToDevice] = stream;
    if (op.kind == OpKind::kToHost && break_copy_ > 0 && --break_copy_ == 0) {
      device.sticky = kIllegalAddress;
      for (const auto& other : AllStreams()) {
        if (other->device != stream->device) continue;
        other->ops.clear();
        host_clock.Join(other->clock);  // Nothing of it can happen any more.
      }
    } else if (op.run) {
      op.run();
    }
    if (op.kind == OpKind::kRecord) op.event->done = std::max(op.event->done, op.generation);
    changed.notify_all();
  }

  uint64_t generation_ = 0;
  bool is_manual_ = false;
  std::mt19937_64 random_;
  int num_agents_ = 1;
  uint64_t next_op_ = 1;
  uint64_t next_handle_ = 0x1000;
  int break_copy_ = 0;
  std::vector<Access> accesses_;
  std::vector<std::string> violations_;
  std::map<std::string, Injected> injected_;
  std::map<std::string, int> calls_;
};

Fake& TheFake() {
  static Fake fake;
  return fake;
}

// Opens a driver function: the lock, and what Enter says.
#define ENTER(symbol, needs_context, may_end_capture)                            \
  Fake& fake = TheFake();                                                        \
  [[maybe_unused]] Fake::Lock lock(fake.mutex);                                  \
  if (const Result entered = fake.Enter(symbol, needs_context, may_end_capture); \
      entered != kSuccess) {                                                     \
    return entered;                                                              \
  }

int OrdinalOfContext(Context context) {
  return static_cast<int>(reinterpret_cast<uint64_t>(context)) - 0x100;
}

}  // namespace

EXPORTED Control* shardckpt_fake_cuda_control() { return &TheFake(); }

EXPORTED Result cuInit(unsigned) {
  ENTER("cuInit", false, false);
  return kSuccess;
}

EXPORTED Result cuDriverGetVersion(int* version) {
  ENTER("cuDriverGetVersion", false, false);
  *version = fake.version;
  return kSuccess;
}

EXPORTED Result cuGetErrorName(Result error, const char** out) {
  switch (error) {
    case kOutOfMemory:
      *out = "CUDA_ERROR_OUT_OF_MEMORY";
      return kSuccess;
    case kIllegalAddress:
      *out = "CUDA_ERROR_ILLEGAL_ADDRESS";
      return kSuccess;
    case kInvalidContext:
      *out = "CUDA_ERROR_INVALID_CONTEXT";
      return kSuccess;
    default:
      *out = nullptr;
      return kInvalidValue;
  }
}

EXPORTED Result cuGetErrorString(Result error, const char** out) {
  *out = error == kIllegalAddress ? "an illegal memory access was encountered" : nullptr;
  return *out == nullptr ? kInvalidValue : kSuccess;
}

EXPORTED Result cuDeviceGetCount(int* count) {
  ENTER("cuDeviceGetCount", false, false);
  *count = static_cast<int>(fake.devices.size());
  return kSuccess;
}

EXPORTED Result cuDeviceGet(DeviceId* device, int ordinal) {
  ENTER("cuDeviceGet", false, false);
  *device = ordinal;
  return kSuccess;
}

EXPORTED Result cuDevicePrimaryCtxRetain(Context* out, DeviceId device) {
  ENTER("cuDevicePrimaryCtxRetain", false, false);
  ++fake.devices[static_cast<size_t>(device)].num_retains;
  *out = reinterpret_cast<Context>(static_cast<uint64_t>(0x100 + device));
  return kSuccess;
}

EXPORTED Result cuDevicePrimaryCtxRelease_v2(DeviceId device) {
  ENTER("cuDevicePrimaryCtxRelease", false, false);
  --fake.devices[static_cast<size_t>(device)].num_retains;
  return kSuccess;
}

EXPORTED Result cuCtxPushCurrent_v2(Context context) {
  ENTER("cuCtxPushCurrent", false, false);
  const int ordinal = OrdinalOfContext(context);
  if (fake.devices[static_cast<size_t>(ordinal)].num_retains < 1) return kInvalidContext;
  this_thread.contexts.push_back(ordinal);
  return kSuccess;
}

EXPORTED Result cuCtxPopCurrent_v2(Context* out) {
  ENTER("cuCtxPopCurrent", false, false);
  if (this_thread.contexts.empty()) return kInvalidContext;
  *out = reinterpret_cast<Context>(static_cast<uint64_t>(0x100 + this_thread.contexts.back()));
  this_thread.contexts.pop_back();
  return kSuccess;
}

EXPORTED Result cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER("cuThreadExchangeStreamCaptureMode", false, false);
  std::swap(*mode, this_thread.capture_mode);
  return kSuccess;
}

EXPORTED Result cuMemHostRegister_v2(void* address, size_t size_bytes, unsigned) {
  ENTER("cuMemHostRegister", true, true);
  if (fake.IsRegistered(address, size_bytes) != 0) return kAlreadyRegistered;
  const auto begin = reinterpret_cast<uint64_t>(address);
  fake.registrations[begin] = begin + size_bytes;
  return kSuccess;
}

EXPORTED Result cuMemHostUnregister(void* address) {
  ENTER("cuMemHostUnregister", true, true);
  const auto found = fake.registrations.find(reinterpret_cast<uint64_t>(address));
  if (found == fake.registrations.end()) return kNotRegistered;
  fake.HostAccess(found->first, found->second - found->first, true, "a host thread unregisters");
  fake.registrations.erase(found);
  return kSuccess;
}

EXPORTED Result cuPointerGetAttribute(void* out, int attribute, DevicePtr address) {
  ENTER("cuPointerGetAttribute", false, false);
  const Allocation* allocation = fake.AllocationOf(address, 1);
  if (allocation == nullptr) return kInvalidValue;
  if (attribute == kPointerContext) {
    *static_cast<Context*>(out) = nullptr;  // As for memory of expandable segments.
  } else if (attribute == kPointerDeviceOrdinal) {
    *static_cast<int*>(out) = allocation->device;
  } else {
    return kInvalidValue;
  }
  return kSuccess;
}

EXPORTED Result cuStreamCreate(Stream* out, unsigned flags) {
  ENTER("cuStreamCreate", true, false);
  *out = reinterpret_cast<Stream>(fake.NextHandle());
  fake.streams[*out] =
      fake.MakeStream(*out, fake.CurrentOrdinal(), false, flags != kStreamNonBlocking);
  return kSuccess;
}

EXPORTED Result cuStreamDestroy_v2(Stream stream) {
  ENTER("cuStreamDestroy", false, false);
  const auto found = fake.streams.find(stream);
  if (found == fake.streams.end()) return kInvalidHandle;
  if (!found->second->ops.empty()) fake.AddViolation("a stream with work left was destroyed");
  for (FakeDevice& device : fake.devices) {
    for (FakeStream*& served : device.engine_streams) {
      if (served == found->second.get()) served = nullptr;
    }
  }
  fake.streams.erase(found);
  return kSuccess;
}

EXPORTED Result cuStreamSynchronize(Stream stream) {
  ENTER("cuStreamSynchronize", true, true);
  FakeStream* found = fake.Find(stream, fake.CurrentOrdinal());
  return found == nullptr ? kInvalidHandle : fake.Drain(&lock, found);
}

EXPORTED Result cuStreamIsCapturing(Stream stream, int* status) {
  ENTER("cuStreamIsCapturing", true, false);
  const FakeStream* found = fake.Find(stream, fake.CurrentOrdinal());
  if (found == nullptr) return kInvalidHandle;
  for (const auto& [handle, other] : fake.streams) {
    if (found->is_legacy && other->is_blocking && other->is_capturing) return kCaptureImplicit;
  }
  *status = found->is_capturing ? kCaptureActive : kCaptureNone;
  return kSuccess;
}

EXPORTED Result cuStreamWaitEvent(Stream stream, Event event, unsigned) {
  ENTER("cuStreamWaitEvent", true, false);
  const auto found = fake.events.find(event);
  if (found == fake.events.end()) return kInvalidHandle;
  // Of an event that was never recorded: no wait at all.
  return fake.Submit(fake.Find(stream, fake.CurrentOrdinal()), OpKind::kWait, 0, {}, nullptr,
                     found->second);
}

EXPORTED Result cuEventCreate(Event* out, unsigned) {
  ENTER("cuEventCreate", true, false);
  *out = reinterpret_cast<Event>(fake.NextHandle());
  fake.events[*out] = std::make_shared<FakeEvent>(FakeEvent{fake.CurrentOrdinal()});
  return kSuccess;
}

EXPORTED Result cuEventDestroy_v2(Event event) {
  ENTER("cuEventDestroy", false, false);
  return fake.events.erase(event) == 1 ? kSuccess : kInvalidHandle;
}

EXPORTED Result cuEventRecord(Event event, Stream stream) {
  ENTER("cuEventRecord", true, false);
  const auto found = fake.events.find(event);
  if (found == fake.events.end() || found->second->device != fake.CurrentOrdinal()) {
    return kInvalidHandle;
  }
  ++found->second->recorded;
  return fake.Submit(fake.Find(stream, fake.CurrentOrdinal()), OpKind::kRecord, 0, {}, nullptr,
                     found->second);
}

EXPORTED Result cuEventQuery(Event event) {
  ENTER("cuEventQuery", true, true);
  const auto found = fake.events.find(event);
  if (found == fake.events.end()) return kInvalidHandle;
  if (found->second->done < found->second->recorded) return kNotReady;
  fake.host_clock.Join(found->second->clock);
  return kSuccess;
}

EXPORTED Result cuEventSynchronize(Event event) {
  ENTER("cuEventSynchronize", true, true);
  const auto found = fake.events.find(event);
  if (found == fake.events.end()) return kInvalidHandle;
  const std::shared_ptr<FakeEvent> waited = found->second;
  const VectorClock clock = waited->clock;
  const uint64_t generation = waited->recorded;
  fake.Block(&lock, [&] { return waited->done >= generation; });
  if (fake.Current().sticky != kSuccess) return fake.Current().sticky;
  fake.host_clock.Join(clock);
  return kSuccess;
}

EXPORTED Result cuMemcpyDtoHAsync_v2(void* dst, DevicePtr src, size_t size_bytes, Stream stream) {
  ENTER("cuMemcpyDtoHAsync", true, false);
  return fake.Copy(&lock, stream, true, static_cast<uint8_t*>(dst), 0, src, 0, size_bytes, 1);
}

EXPORTED Result cuMemcpyHtoDAsync_v2(DevicePtr dst, const void* src, size_t size_bytes,
                                     Stream stream) {
  ENTER("cuMemcpyHtoDAsync", true, false);
  auto* host = const_cast<uint8_t*>(static_cast<const uint8_t*>(src));
  return fake.Copy(&lock, stream, false, host, 0, dst, 0, size_bytes, 1);
}

EXPORTED Result cuMemcpy2DAsync_v2(const Memcpy2D* copy, Stream stream) {
  ENTER("cuMemcpy2DAsync", true, false);
  if (copy->src_memory_type != kMemoryDevice || copy->dst_memory_type != kMemoryHost ||
      copy->width_bytes > copy->src_pitch || copy->width_bytes > copy->dst_pitch) {
    return kInvalidValue;
  }
  return fake.Copy(&lock, stream, true, static_cast<uint8_t*>(copy->dst_host), copy->dst_pitch,
                   copy->src_device, copy->src_pitch, copy->width_bytes, copy->height);
}

EXPORTED Result cuMemAlloc_v2(DevicePtr* out, size_t size_bytes) {
  ENTER("cuMemAlloc", true, true);
  const size_t mapped_bytes = (size_bytes + 4095) / 4096 * 4096;
  // A host thread that dereferences a device address faults.
  void* address =
      mmap(nullptr, mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) return kOutOfMemory;
  auto shadow = std::make_unique<uint8_t[]>(mapped_bytes);
  std::memset(shadow.get(), kUnwritten, mapped_bytes);
  *out = reinterpret_cast<DevicePtr>(address);
  fake.allocations[*out] = {mapped_bytes, fake.CurrentOrdinal(), std::move(shadow)};
  return kSuccess;
}

EXPORTED Result cuMemFree_v2(DevicePtr address) {
  ENTER("cuMemFree", true, true);
  const auto found = fake.allocations.find(address);
  if (found == fake.allocations.end()) return kInvalidValue;
  fake.HostAccess(address, found->second.size_bytes, true, "a host thread frees");
  munmap(reinterpret_cast<void*>(address), found->second.size_bytes);
  fake.allocations.erase(found);
  return kSuccess;
}

EXPORTED Result cuMemsetD8Async(DevicePtr dst, unsigned char value, size_t size_bytes,
                                Stream stream) {
  ENTER("cuMemsetD8Async", true, false);
  uint8_t* shadow = fake.ShadowOf(dst, size_bytes);
  if (shadow == nullptr) return kInvalidValue;
  return fake.Submit(fake.Find(stream, fake.CurrentOrdinal()), OpKind::kSet, size_bytes,
                     {{dst, dst + size_bytes, true}},
                     [=] { std::memset(shadow, value, size_bytes); });
}

EXPORTED Result cuLaunchHostFunc(Stream stream, HostFunction function, void* told) {
  ENTER("cuLaunchHostFunc", true, false);
  return fake.Submit(fake.Find(stream, fake.CurrentOrdinal()), OpKind::kHostFunction, 0, {},
                     [=] { function(told); });
}

}  // namespace shardckpt::fake_cuda
