// One CUDA device as the staging engine sees it: a copy stream, and tickets for what was submitted.
//
// Every method sets the device's primary context for the time of the call and gives the calling
// thread its own back. Threads never break another thread's graph capture.
#ifndef SHARDCKPT_CORE_DEVICE_H_
#define SHARDCKPT_CORE_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/cuda_driver.h"
#include "core/status.h"

namespace shardckpt {

// Rows of equal size: row i lies at src + i * src_pitch_bytes, and packed in dst.
struct DeviceRows {
  void* dst = nullptr;
  uint64_t src = 0;
  int64_t row_bytes = 0;
  int64_t num_rows = 1;
  int64_t src_pitch_bytes = 0;  // Of no matter where there is one row.

  int64_t size_bytes() const { return row_bytes * num_rows; }
};

// Thread-safe. Copies run on one stream of its own, in the order in which they were submitted.
// Memory handed to a copy stays the caller's and must live until a ticket behind the copy is done.
// Of the process that opened it: a forked child must not touch it, nor destroy it.
// kDevice from any call: the driver's error; after some of them (700) every later call fails, too.
class Device {
 public:
  // Loads the driver if need be and retains the device's primary context, the one that frameworks
  // use. kUnavailable: see CudaDriver. kInvalid: there is no such device.
  static Status Open(int ordinal, std::shared_ptr<Device>* out);
  // Without a context or a stream: Open makes them.
  Device(const CudaDriver* driver, int ordinal) : driver_(driver), ordinal_(ordinal) {}

  // The device that memory belongs to. kInvalid: it is no memory that CUDA knows. Makes no context.
  static Status OrdinalOf(uint64_t address, int* ordinal);

  // Waits for submitted copies and gives everything back, registrations too. What the driver says
  // at the end of a process is ignored.
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int ordinal() const { return ordinal_; }

  // Locks host memory in place, for every device: copies to other memory are slow and block their
  // caller. A copy must lie in one pinned range or in none. kNoMemory: not allowed or no room;
  // unpinned memory works as well.
  Status Pin(void* address, int64_t size_bytes);
  // Waits for submitted copies first. kInvalid: the address was not given to Pin.
  Status Unpin(void* address);

  // Copies submitted from now on run after all that is queued on `compute_stream` now. To be
  // called by the thread that uses the stream. kInvalid: the stream is capturing a graph.
  Status After(uint64_t compute_stream);
  Status CopyToHost(const DeviceRows& rows);
  Status CopyToDevice(uint64_t dst, const void* src, int64_t size_bytes);

  // A ticket for all copies submitted so far; tickets count up from 1.
  Status Mark(uint64_t* ticket);
  // Both may return an error of the copies themselves. Wait blocks without bound where timeout_ms
  // is negative. kTimeout: not yet.
  Status Done(uint64_t ticket, bool* is_done);
  Status Wait(uint64_t ticket, int64_t timeout_ms);
  // Waits for all copies submitted so far, whatever becomes of them.
  Status Drain();

  // What is queued on `compute_stream` from now on runs after the ticket's copies; the caller does
  // not wait. To be called by the thread that uses the stream. kInvalid: no such ticket, or the
  // stream is capturing a graph.
  Status HoldBack(uint64_t compute_stream, uint64_t ticket);

 private:
  struct Marked {
    cuda::Event event;
    int num_waiting = 0;  // Threads that use the event without the lock.
  };
  class Current;

  Status Check(cuda::Result result, const std::string& what) const;
  Status RefuseCapture(uint64_t compute_stream, const std::string& what) const;
  Status CheckTicket(uint64_t ticket) const;
  Marked* Find(uint64_t ticket);  // Null: done.
  Status TakeEvent(cuda::Event* out);
  void GiveEvent(cuda::Event event);
  void Finish(uint64_t ticket);

  const CudaDriver* const driver_;
  const int ordinal_;
  cuda::DeviceId id_ = 0;
  cuda::Context context_ = nullptr;
  cuda::Stream stream_ = nullptr;
  std::mutex mutex_;
  std::map<void*, int64_t> pinned_;
  std::vector<cuda::Event> free_events_;
  std::deque<Marked> marked_;  // Tickets first_marked_, first_marked_ + 1, ...
  uint64_t first_marked_ = 1;
  uint64_t done_ticket_ = 0;  // It and all before it are done.
};

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_DEVICE_H_
