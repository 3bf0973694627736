#include "core/device.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <limits>
#include <utility>

#include "core/seeded_mistakes.h"

namespace shardckpt {
namespace {

// Every driver takes pitches up to this.
constexpr int64_t kMaxPitchBytes = std::numeric_limits<int32_t>::max();
constexpr int64_t kMinPollNs = 20'000;
constexpr int64_t kMaxPollNs = 1'000'000;

cuda::Stream Handle(uint64_t stream) { return reinterpret_cast<cuda::Stream>(stream); }

std::string Hex(uint64_t value) {
  std::string digits;
  do {
    digits.insert(digits.begin(), "0123456789abcdef"[value % 16]);
    value /= 16;
  } while (value != 0);
  return "0x" + digits;
}

std::string Range(int64_t size_bytes, uint64_t address) {
  return std::to_string(size_bytes) + " bytes at " + Hex(address);
}

uint64_t Address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

}  // namespace

// Makes the device's context current in this thread, for its lifetime, and lets the thread poll and
// register memory while another thread captures a graph: in the default mode, either would end that
// capture.
class Device::Current {
 public:
  explicit Current(const Device& device) : driver_(*device.driver_) {
    if (!SEEDED(kWrongContext)) {
      status_ = device.Check(driver_.cuCtxPushCurrent(device.context_), "cuCtxPushCurrent");
      if (!status_.ok()) return;
      is_pushed_ = true;
    }
    if (!SEEDED(kBreakCapture)) driver_.cuThreadExchangeStreamCaptureMode(&capture_mode_);
  }
  ~Current() {
    if (!status_.ok()) return;
    if (!SEEDED(kBreakCapture)) driver_.cuThreadExchangeStreamCaptureMode(&capture_mode_);
    cuda::Context context;
    if (is_pushed_) driver_.cuCtxPopCurrent(&context);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  const Status& status() const { return status_; }

 private:
  const CudaDriver& driver_;
  Status status_;
  bool is_pushed_ = false;
  int capture_mode_ = cuda::kCaptureModeRelaxed;
};

Status Device::Check(cuda::Result result, const std::string& what) const {
  if (result == cuda::kSuccess) return Status::Ok();
  return driver_->Check(result, what + " on CUDA device " + std::to_string(ordinal_));
}

Status Device::Open(int ordinal, std::shared_ptr<Device>* out) {
  const CudaDriver* driver = nullptr;
  if (Status status = CudaDriver::Get(&driver); !status.ok()) return status;
  int num_devices = 0;
  if (Status status = driver->Check(driver->cuDeviceGetCount(&num_devices), "cuDeviceGetCount");
      !status.ok()) {
    return status;
  }
  if (ordinal < 0 || ordinal >= num_devices) {
    return Status::Invalid("there is no CUDA device " + std::to_string(ordinal) +
                           "; this process sees " + std::to_string(num_devices) +
                           " (CUDA_VISIBLE_DEVICES).");
  }
  auto device = std::make_shared<Device>(driver, ordinal);
  if (Status status = device->Check(driver->cuDeviceGet(&device->id_, ordinal), "cuDeviceGet");
      !status.ok()) {
    return status;
  }
  cuda::Context context = nullptr;
  if (Status status = device->Check(driver->cuDevicePrimaryCtxRetain(&context, device->id_),
                                    "cuDevicePrimaryCtxRetain");
      !status.ok()) {
    return status;
  }
  device->context_ = context;
  const Current current(*device);
  if (!current.status().ok()) return current.status();
  if (Status status = device->Check(
          driver->cuStreamCreate(&device->stream_, cuda::kStreamNonBlocking), "cuStreamCreate");
      !status.ok()) {
    return status;
  }
  *out = std::move(device);
  return Status::Ok();
}

Status Device::OrdinalOf(uint64_t address, int* ordinal) {
  const CudaDriver* driver = nullptr;
  if (Status status = CudaDriver::Get(&driver); !status.ok()) return status;
  // Not by context: memory of a pool or of mapped pages (expandable segments) has none.
  const cuda::Result result =
      driver->cuPointerGetAttribute(ordinal, cuda::kPointerDeviceOrdinal, address);
  if (result == cuda::kInvalidValue) {
    return Status::Invalid("the address " + Hex(address) +
                           " is no memory of a CUDA device; pass the data pointer of a CUDA array "
                           "that still exists.");
  }
  return driver->Check(result, "cuPointerGetAttribute of " + Hex(address));
}

Device::~Device() {
  if (context_ == nullptr) return;
  // At the end of a process the driver may be gone before us; there is nothing to be done then, nor
  // about any error below.
  {
    const Current current(*this);
    if (current.status().ok()) {
      if (stream_ != nullptr) driver_->cuStreamSynchronize(stream_);
      for (const auto& [address, size_bytes] : pinned_) driver_->cuMemHostUnregister(address);
      for (const Marked& marked : marked_) GiveEvent(marked.event);
      for (cuda::Event event : free_events_) driver_->cuEventDestroy(event);
      if (stream_ != nullptr) driver_->cuStreamDestroy(stream_);
    }
  }
  driver_->cuDevicePrimaryCtxRelease(id_);
}

Status Device::Pin(void* address, int64_t size_bytes) {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  Status status = Check(driver_->cuMemHostRegister(address, static_cast<size_t>(size_bytes),
                                                   cuda::kHostRegisterPortable),
                        "pinning " + Range(size_bytes, Address(address)) + " (cuMemHostRegister)");
  if (status.code() == StatusCode::kNoMemory) {
    return Status::Of(status.code(), status.message() +
                                         ". Raise the limit of locked memory (ulimit -l), or go on "
                                         "unpinned, with slower copies.");
  }
  if (status.ok()) {
    const std::lock_guard lock(mutex_);
    pinned_[address] = size_bytes;
  }
  return status;
}

Status Device::Unpin(void* address) {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  {
    const std::lock_guard lock(mutex_);
    if (pinned_.erase(address) == 0) {
      return Status::Invalid("unpinning " + Hex(Address(address)) + " on CUDA device " +
                             std::to_string(ordinal_) +
                             ": nothing was pinned there; pass an address that Pin got.");
    }
  }
  // Whether a copy failed is for those who wait for it; the memory only has to be left alone.
  if (!SEEDED(kUnpinInFlight)) driver_->cuStreamSynchronize(stream_);
  return Check(driver_->cuMemHostUnregister(address),
               "unpinning " + Hex(Address(address)) + " (cuMemHostUnregister)");
}

// Recording or waiting on a capturing stream would make our copies part of the graph, or end the
// capture. The question asked of stream 0 while another stream captures is answered with an error.
Status Device::RefuseCapture(uint64_t compute_stream, const std::string& what) const {
  if (SEEDED(kIgnoreCapture)) return Status::Ok();
  int capture = cuda::kCaptureNone;
  const cuda::Result result = driver_->cuStreamIsCapturing(Handle(compute_stream), &capture);
  if (result == cuda::kCaptureImplicit ||
      (result == cuda::kSuccess && capture != cuda::kCaptureNone)) {
    return Status::Invalid(what + " on CUDA device " + std::to_string(ordinal_) + ": stream " +
                           Hex(compute_stream) +
                           " is capturing a graph. Save outside of the capture, or stage in "
                           "blocking mode before it.");
  }
  return Check(result, "cuStreamIsCapturing of stream " + Hex(compute_stream));
}

Status Device::After(uint64_t compute_stream) {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  if (Status status = RefuseCapture(compute_stream, "waiting for the compute stream");
      !status.ok()) {
    return status;
  }
  const std::lock_guard lock(mutex_);
  cuda::Event ready = nullptr;
  if (Status status = TakeEvent(&ready); !status.ok()) return status;
  Status status = Check(driver_->cuEventRecord(ready, Handle(compute_stream)),
                        "cuEventRecord on stream " + Hex(compute_stream));
  if (status.ok() && !SEEDED(kNoReadyWait)) {
    status = Check(driver_->cuStreamWaitEvent(stream_, ready, 0), "cuStreamWaitEvent");
  }
  // The wait keeps what was recorded, so the event may be recorded again at once.
  GiveEvent(ready);
  return status;
}

Status Device::CopyToHost(const DeviceRows& rows) {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  const cuda::Stream stream = SEEDED(kLegacyStream) ? nullptr : stream_;
  const auto row_bytes = static_cast<size_t>(rows.row_bytes);
  const std::string what = "copying " + Range(rows.size_bytes(), rows.src) + " to the host";
  if (rows.size_bytes() == 0) return Status::Ok();
  if (rows.num_rows == 1 || rows.src_pitch_bytes == rows.row_bytes) {
    return Check(driver_->cuMemcpyDtoHAsync(rows.dst, rows.src,
                                            static_cast<size_t>(rows.size_bytes()), stream),
                 what);
  }
  if (rows.src_pitch_bytes > kMaxPitchBytes) {
    for (int64_t row = 0; row < rows.num_rows; ++row) {
      Status status = Check(
          driver_->cuMemcpyDtoHAsync(static_cast<uint8_t*>(rows.dst) + row * rows.row_bytes,
                                     rows.src + static_cast<uint64_t>(row * rows.src_pitch_bytes),
                                     row_bytes, stream),
          what);
      if (!status.ok()) return status;
    }
    return Status::Ok();
  }
  cuda::Memcpy2D copy{};
  copy.src_memory_type = cuda::kMemoryDevice;
  copy.src_device = rows.src;
  copy.src_pitch = static_cast<size_t>(rows.src_pitch_bytes);
  copy.dst_memory_type = cuda::kMemoryHost;
  copy.dst_host = rows.dst;
  copy.dst_pitch = row_bytes;
  copy.width_bytes = row_bytes;
  copy.height = static_cast<size_t>(rows.num_rows);
  return Check(driver_->cuMemcpy2DAsync(&copy, stream), what);
}

Status Device::CopyToDevice(uint64_t dst, const void* src, int64_t size_bytes) {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  if (size_bytes == 0) return Status::Ok();
  return Check(driver_->cuMemcpyHtoDAsync(dst, src, static_cast<size_t>(size_bytes), stream_),
               "copying " + Range(size_bytes, dst) + " to the device");
}

Status Device::Mark(uint64_t* ticket) {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  const std::lock_guard lock(mutex_);
  cuda::Event event = nullptr;
  if (Status status = TakeEvent(&event); !status.ok()) return status;
  if (!SEEDED(kNeverRecorded)) {
    Status status = Check(driver_->cuEventRecord(event, stream_), "cuEventRecord");
    if (!status.ok()) {
      GiveEvent(event);
      return status;
    }
  }
  marked_.push_back({event});
  *ticket = first_marked_ + marked_.size() - 1;
  return Status::Ok();
}

Status Device::CheckTicket(uint64_t ticket) const {
  const uint64_t last = first_marked_ + marked_.size() - 1;
  if (ticket >= 1 && ticket <= last) return Status::Ok();
  return Status::Invalid("CUDA device " + std::to_string(ordinal_) + " has no ticket " +
                         std::to_string(ticket) + "; the last one is " + std::to_string(last) +
                         ".");
}

Device::Marked* Device::Find(uint64_t ticket) {
  return ticket <= done_ticket_ ? nullptr : &marked_[ticket - first_marked_];
}

Status Device::Done(uint64_t ticket, bool* is_done) {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  const std::lock_guard lock(mutex_);
  if (Status status = CheckTicket(ticket); !status.ok()) return status;
  const Marked* marked = Find(ticket);
  *is_done = marked == nullptr;
  if (*is_done) return Status::Ok();
  const cuda::Result result = driver_->cuEventQuery(marked->event);
  if (result == cuda::kNotReady) return Status::Ok();
  if (Status status = Check(result, "a copy to the host"); !status.ok()) return status;
  *is_done = true;
  Finish(ticket);
  return Status::Ok();
}

Status Device::Wait(uint64_t ticket, int64_t timeout_ms) {
  if (timeout_ms >= 0) {
    // The driver's own wait has no bound.
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
    for (int64_t poll_ns = kMinPollNs;; poll_ns = std::min(2 * poll_ns, kMaxPollNs)) {
      bool is_done = false;
      if (Status status = Done(ticket, &is_done); !status.ok() || is_done) return status;
      if (std::chrono::steady_clock::now() >= deadline) {
        return Status::Of(StatusCode::kTimeout, "copies of CUDA device " +
                                                    std::to_string(ordinal_) + " did not end in " +
                                                    std::to_string(timeout_ms) + " ms.");
      }
      const timespec pause{0, poll_ns};
      nanosleep(&pause, nullptr);
    }
  }
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  Marked* marked = nullptr;
  {
    const std::lock_guard lock(mutex_);
    if (Status status = CheckTicket(ticket); !status.ok()) return status;
    marked = Find(ticket);
    if (marked == nullptr) return Status::Ok();
    ++marked->num_waiting;  // A deque's elements stay where they are.
  }
  Status status = Check(driver_->cuEventSynchronize(marked->event), "a copy to the host");
  const std::lock_guard lock(mutex_);
  --marked->num_waiting;
  if (status.ok()) Finish(ticket);
  return status;
}

Status Device::Drain() {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  return Check(driver_->cuStreamSynchronize(stream_), "cuStreamSynchronize");
}

Status Device::HoldBack(uint64_t compute_stream, uint64_t ticket) {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  if (Status status = RefuseCapture(compute_stream, "holding the compute stream back");
      !status.ok()) {
    return status;
  }
  const std::lock_guard lock(mutex_);
  if (Status status = CheckTicket(ticket); !status.ok()) return status;
  const Marked* marked = Find(ticket);
  if (marked == nullptr || SEEDED(kNoHoldBack)) return Status::Ok();
  return Check(driver_->cuStreamWaitEvent(Handle(compute_stream), marked->event, 0),
               "cuStreamWaitEvent on stream " + Hex(compute_stream));
}

Status Device::TakeEvent(cuda::Event* out) {
  if (!free_events_.empty()) {
    *out = free_events_.back();
    free_events_.pop_back();
    return Status::Ok();
  }
  // Without timing an event is cheap; a blocking wait for it leaves the processor to others.
  return Check(driver_->cuEventCreate(out, cuda::kEventDisableTiming | cuda::kEventBlockingSync),
               "cuEventCreate");
}

void Device::GiveEvent(cuda::Event event) {
  if (!SEEDED(kLeakEvents)) free_events_.push_back(event);
}

void Device::Finish(uint64_t ticket) {
  done_ticket_ = std::max(done_ticket_, ticket);
  while (!marked_.empty() && first_marked_ <= done_ticket_ && marked_.front().num_waiting == 0) {
    GiveEvent(marked_.front().event);
    marked_.pop_front();
    ++first_marked_;
  }
}

}  // namespace shardckpt
