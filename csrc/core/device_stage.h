// Paced copies from one CUDA device into host memory, for the staging engine.
//
// A copy engine serves one stream until it has nothing left, whatever the priorities: a queue of
// large copies would hold up the trainer's own small ones. So copies go out in pieces, one in
// flight, the next when it is done. A fence sends the rest at once and makes the compute stream
// wait for it; the host does not wait.
#ifndef SHARDCKPT_CORE_DEVICE_STAGE_H_
#define SHARDCKPT_CORE_DEVICE_STAGE_H_

#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core/device.h"
#include "core/status.h"

namespace shardckpt {

struct DeviceStageOptions {
  int64_t piece_bytes = int64_t{32} << 20;  // 0.6 ms at 53 GB/s; the trainer waits that long.
  int64_t num_in_flight = 1;                // Pieces; more leave no gap.
  int64_t bytes_per_s = 0;                  // 0: no limit. A fence does not keep to it.
};

// Copies that are handed on together, such as those of one slot.
struct DeviceBatch {
  std::vector<DeviceRows> copies;
  // Called once, by the stage's thread, when no copy of the batch is under way any more: only then
  // may the destinations be used again. Not ok: their content is undefined. May call Add, nothing
  // else of the stage.
  std::function<void(const Status&)> done;
};

// Thread-safe; has one thread of its own. Destinations belong to the stage from Add until `done`
// begins; sources must not change before the compute stream passes a fence, nor go away before
// `done`. Batches are done in the order in which they were added.
//
// The first error stays: batches that are not done end with it, Add and Fence return it from then
// on. Its message names device, piece and copy. A device that still works takes a new stage.
class DeviceStage {
 public:
  static Status Open(std::shared_ptr<Device> device, const DeviceStageOptions& options,
                     std::unique_ptr<DeviceStage>* out);
  // Without its thread: Open starts it.
  DeviceStage(std::shared_ptr<Device> device, const DeviceStageOptions& options);
  ~DeviceStage();  // Only after Close() returned true.
  DeviceStage(const DeviceStage&) = delete;
  DeviceStage& operator=(const DeviceStage&) = delete;

  // Ends what is queued with an error, waits for what is in flight, stops the thread. False: it did
  // not stop within timeout_ms (the device hangs), or this is a forked child; the stage and the
  // memory that it copies to must be leaked.
  bool Close(int64_t timeout_ms);

  // Copies added from now on run after all that is queued on `compute_stream` now; see
  // Device::After.
  Status After(uint64_t compute_stream) { return device_->After(compute_stream); }

  // Queues batches. All or none: kInvalid: a source is not of this device, rows are none, or
  // a destination belongs to a batch that is not done.
  Status Add(std::vector<DeviceBatch> batches);

  // Submits all that was added and holds `compute_stream` back until it is copied; see
  // Device::HoldBack. Returns without waiting, except that copies to unpinned memory block.
  Status Fence(uint64_t compute_stream);

  // Waits until every batch added so far is done. kTimeout: not within timeout_ms. Else the first
  // error.
  Status Wait(int64_t timeout_ms);

  // Whether the first error came: then only Close helps.
  bool HasFailed();

  void SetRate(int64_t bytes_per_s);

 private:
  using Lock = std::unique_lock<std::mutex>;
  using Clock = std::chrono::steady_clock;
  struct Batch {
    DeviceBatch told;
    size_t copy = 0;         // The first that is not wholly submitted,
    int64_t done_bytes = 0;  // and how many packed bytes of it are.
  };
  using Batches = std::vector<std::unique_ptr<Batch>>;
  struct Piece {
    uint64_t number = 0;
    uint64_t ticket = 0;
    Batches ends;  // Batches whose last bytes are in it.
  };

  static void* Run(void* stage);
  void Loop();
  Status MakeBusy(const std::vector<DeviceBatch>& batches, std::vector<uint64_t>* made_busy);
  void SubmitPiece();
  void SubmitBatch(uint64_t piece, Batch* batch, int64_t* left_bytes, int* num_left);
  void WaitForPiece(Lock* lock);
  void EndAll(Lock* lock);
  void Deliver(Lock* lock, Batches batches, const Status& status);
  void Fail(const Status& status, const std::string& where);

  const std::shared_ptr<Device> device_;
  const pid_t pid_;
  pthread_t thread_{};
  std::mutex mutex_;
  std::condition_variable work_;     // For the thread.
  std::condition_variable changed_;  // For Wait.
  DeviceStageOptions options_;
  std::deque<std::unique_ptr<Batch>> queue_;
  std::deque<Piece> in_flight_;
  std::map<uint64_t, uint64_t> busy_;  // Destinations: begin to end.
  uint64_t num_added_ = 0;
  uint64_t num_done_ = 0;
  uint64_t next_piece_ = 0;
  Clock::time_point next_submit_{};
  Status error_;
  bool is_closing_ = false;
  bool is_running_ = false;
};

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_DEVICE_STAGE_H_
