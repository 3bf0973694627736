// What tests ask of the fake driver beside the driver's own functions.
//
// The fake executes nothing by itself. Work queues up per stream; in manual mode the test runs one
// operation after the other, in any legal order, and in seeded mode whoever calls the driver runs a
// few that the seed chooses, or waits by running them. No clock and no thread of its own.
//
// Whether two accesses to memory are ordered is judged when they are submitted, by vector clocks,
// so the verdict depends on no timing. Host threads share one clock: what they do among themselves
// is the thread sanitizer's business.
#ifndef SHARDCKPT_TESTS_FAKE_CUDA_FAKE_CUDA_H_
#define SHARDCKPT_TESTS_FAKE_CUDA_FAKE_CUDA_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/cuda_min.h"

namespace shardckpt::fake_cuda {

enum class OpKind { kToHost, kToDevice, kSet, kHostFunction, kRecord, kWait };

struct PendingOp {
  uint64_t id;
  OpKind kind;
  cuda::Stream stream;
  size_t size_bytes;
  bool may_run;  // It is legal now.
};

struct Counts {
  int num_streams;  // Of this and the next three: made and not given back.
  int num_events;
  int num_registrations;
  int num_contexts;
  int num_synchronous_copies;  // To or from memory that is not registered.
  int num_legacy_copies;       // On the legacy default stream.
  int context_depth;           // Of the calling thread's stack.
  int capture_mode;            // Of the calling thread.
};

// Thread-safe. Lives as long as the library.
class Control {
 public:
  // Forgets everything; no handle from before may be used.
  virtual void Reset(int num_devices, bool is_manual, uint64_t seed) = 0;
  virtual void SetManual(bool is_manual) = 0;
  virtual void SetVersion(int version) = 0;

  virtual std::vector<PendingOp> Pending() = 0;
  // Runs an operation; false where that is not legal now.
  virtual bool RunOp(uint64_t id) = 0;
  // Waits until so many operations are pending; false after ten seconds.
  virtual bool WaitPending(size_t count) = 0;
  // Runs what is pending, in an order that the seed chooses, until nothing may run.
  virtual void RunAll() = 0;
  // A stream on hold runs nothing: a long kernel.
  virtual void Hold(cuda::Stream stream, bool is_held) = 0;

  // What a host thread does to memory that copies use, for the order to be judged.
  virtual void HostRead(const void* address, size_t size_bytes) = 0;
  virtual void HostWrite(void* address, size_t size_bytes) = 0;

  // From the nth call on from now (1: the next) the function fails, `times` times.
  virtual void FailCall(const std::string& symbol, int nth, cuda::Result error, int times) = 0;
  // The nth copy to the host from now breaks its device when it runs: error 700 from then on.
  virtual void BreakCopy(int nth) = 0;

  virtual void BeginCapture(cuda::Stream stream) = 0;  // In global mode.
  virtual bool EndCapture(cuda::Stream stream) = 0;    // False: something ended it before.

  virtual uint8_t* Shadow(cuda::DevicePtr address) = 0;  // What device memory holds.
  virtual int NumCalls(const std::string& symbol) = 0;
  virtual Counts Count() = 0;
  // Unordered accesses and misuse, in words.
  virtual std::vector<std::string> Violations() = 0;

 protected:
  ~Control() = default;
};

using GetControl = Control* (*)();
inline constexpr const char* kGetControl = "shardckpt_fake_cuda_control";

}  // namespace shardckpt::fake_cuda

#endif  // SHARDCKPT_TESTS_FAKE_CUDA_FAKE_CUDA_H_
