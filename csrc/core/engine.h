// The staging engine: copies arrays into slots, writes the slots to files, in threads of its own.
//
// A save is a ticket. Its files are cut into extents; an extent waits, is copied into a slot, is
// written, and gives the slot back. Everything else follows from that: a small arena is a ring with
// back-pressure, and several saves are in flight when there is room. Tickets are served in order.
//
// Threads: copy threads, flush threads and one for each device, all native, none ever touches
// Python. Whoever waits for a fence copies too. One mutex guards all state; no copy, checksum or
// write is made under it, and no device is called.
//
// Arrays on a device are copied by its DeviceStage; the flush threads take their checksums.
#ifndef SHARDCKPT_CORE_ENGINE_H_
#define SHARDCKPT_CORE_ENGINE_H_

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/device_stage.h"
#include "core/file.h"
#include "core/status.h"
#include "core/ticket.h"

namespace shardckpt {

inline constexpr int64_t kEveryGroup = -1;

enum class FailureKind : uint8_t {
  kNone,
  kTorn,       // An array changed while it was copied, without a fence.
  kGone,       // The memory of an array was freed while it was copied.
  kWrite,      // The system refused a write.
  kDevice,     // A device failed.
  kCancelled,  // The caller gave the save up.
};

// A stream on which arrays of a device are used: their values are those of what is queued on it.
struct DeviceStream {
  int64_t device;
  int64_t stream;
};

// Why a ticket ended early. The first failure of any thread stays.
struct Failure {
  FailureKind kind = FailureKind::kNone;
  int64_t payload = -1;  // Of kTorn and kGone.
  int64_t file = -1;     // Of kWrite.
  int system_errno = 0;
  std::string message;
};

struct EngineOptions {
  int64_t num_copy_threads = 1;
  int64_t num_flush_threads = 2;
  std::vector<int> cpus;  // Where the engine's threads may run; empty: anywhere.
};

struct EngineStats {
  int64_t num_slots;       // That the arena may have.
  int64_t num_free_slots;  // Of those, the ones that nothing lies in.
  int64_t written_bytes;   // By the flush threads, since the engine began.
};

// Thread-safe. Of the process that made it: in a forked child no call takes a lock, waits return at
// once, and whatever can say so says kInvalid.
class Engine {
 public:
  static Status Create(const EngineOptions& options, std::unique_ptr<Engine>* out);
  explicit Engine(const EngineOptions& options);  // Without threads: Create starts them.
  ~Engine();                                      // Only after Close() returned true.
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Stops the threads; running copies and writes end first. False: one did not within timeout_ms
  // (a disk hangs), and the engine must be leaked.
  bool Close(int64_t timeout_ms);

  // Grows the arena to hold `size_bytes`, and lets it grow up to `most_bytes`: whoever waits for
  // copies adds slots rather than wait for the disk for longer than a moment.
  // kIo: the system has no room; what was there stays.
  Status Reserve(int64_t size_bytes, int64_t most_bytes = 0);

  // Queues a save and returns; see ParseSaveTable. With `check_all`, checksums of the sources are
  // taken now and compared with those of the copies, which costs a pass over the memory.
  // `streams`: one for every device that holds arrays.
  // kInvalid: no such table, or the arena has no slot at all. kUnavailable, kDevice: see Device.
  Status Begin(std::span<const int64_t> numbers, std::span<const int64_t> file_bytes,
               bool check_all, int64_t* ticket, std::span<const DeviceStream> streams = {});

  // Waits until nothing reads arrays of `group` any more, copying itself. False after timeout_ms;
  // 0 only asks, and copies nothing. With `streams` the host does not wait for devices: what is
  // queued on those streams from now on waits for the copies instead, if there is one for each
  // device of the save.
  bool WaitStaged(int64_t ticket, int64_t group, int64_t timeout_ms,
                  std::span<const DeviceStream> streams = {});

  // Lets the flush threads write a file's extents. The descriptors and `ops` stay the caller's and
  // open until the file is idle. direct_fd: -1 or a descriptor with O_DIRECT.
  Status Attach(int64_t ticket, int64_t file, int fd, int direct_fd, const FileOps* ops);
  // Waits until all extents of a file are written, or the ticket failed and no write of it runs
  // any more. False after timeout_ms.
  bool WaitFlushed(int64_t ticket, int64_t file, int64_t timeout_ms);

  // For files that no descriptor leads to: the caller writes. `more` false: all were taken, or the
  // ticket failed. An extent with size 0 says that none was ready within timeout_ms.
  struct Taken {
    bool more = false;
    int64_t extent = -1;
    const uint8_t* data = nullptr;
    int64_t size_bytes = 0;
    int64_t offset_bytes = 0;
  };
  Status Take(int64_t ticket, int64_t file, int64_t timeout_ms, Taken* out);
  Status Give(int64_t ticket, int64_t extent);

  // Stores the checksums of a staged and written file, in order of its chunks, each XOR
  // Crc32c(seed, file offset). kInvalid: it is not yet.
  Status ChunkCrcsOf(int64_t ticket, int64_t file, uint32_t seed, std::vector<uint8_t>* out);

  Failure FailureOf(int64_t ticket);
  // Ends a save early; its slots come back as its copies and writes end.
  void Cancel(int64_t ticket, const std::string& why);
  // Forgets a ticket; its arrays and descriptors are not used afterwards. Cancels what is left and
  // waits for running copies and writes. False: a write still ran after timeout_ms.
  bool Release(int64_t ticket, int64_t timeout_ms);

  void SetRate(int64_t bytes_per_s);  // Of all flush threads together; 0: no limit.
  // Stops copy threads from beginning further copies; waiters copy all the same. For tests.
  void SetPaused(bool is_paused);
  EngineStats Stats();
  // Why the arena is not pinned, although a device is in use; "" if it is.
  std::string PinProblem();

 private:
  struct Group {
    int64_t num_extents = 0;       // Not yet copied.
    int64_t num_blocking = 0;      // Of those, the ones a device does not copy by itself.
    bool is_checked = false;       // The guards, once nothing blocks any more.
    std::vector<uint32_t> guards;  // Small payloads, looked at again when the group is copied.
  };
  struct File {
    int fd = -1;
    const FileOps* ops = nullptr;
    WriteTarget target;
    bool is_attached = false;
    std::deque<uint32_t> staged;
    int64_t num_left = 0;  // Extents not yet written.
    int64_t num_writing = 0;
  };
  struct Ticket {
    SaveTable table;
    std::map<int64_t, Group> groups;
    std::vector<std::vector<int64_t>> groups_of;  // By extent.
    std::vector<int64_t> devices;
    std::deque<File> files;
    std::vector<uint32_t> crcs;
    std::vector<uint32_t> expected_crcs;  // With check_all.
    std::vector<ChunkTail> tails;
    Failure failure;
    size_t next = 0;  // Everything before it in table.order has been taken.
    int64_t num_copying = 0;
    int64_t num_writing = 0;
  };
  using Lock = std::unique_lock<std::mutex>;
  using Clock = std::chrono::steady_clock;
  struct Work {
    std::shared_ptr<Ticket> ticket;
    uint32_t extent = 0;
  };

  static Clock::time_point Deadline(int64_t timeout_ms) {
    return Clock::now() + std::chrono::milliseconds(timeout_ms);
  }
  static void* RunCopies(void* engine);
  static void* RunWrites(void* engine);
  void LowerPriority() const;
  Status CheckProcess() const;
  std::shared_ptr<Ticket> Find(int64_t ticket);
  // Takes the next extent that may be copied, with a slot. Of `only` and its group where given,
  // once nothing earlier waits. `may_grow`: With a new slot if need be.
  bool TakeCopy(const Ticket* only, int64_t group, bool may_grow, Work* out);
  Status GrowArena(int64_t num_slots);
  void Copy(Lock* lock, const Work& work, Scratch* scratch);
  void HandToDevices(const std::shared_ptr<Ticket>& ticket, uint32_t extent, uint8_t* dst);
  void Unblock(Lock* lock, Ticket* ticket, uint32_t extent);
  void FinishCopy(Ticket* ticket, uint32_t extent);
  // Opens devices, pins the arena for them, and orders their copies after `streams`.
  Status PrepareDevices(const std::vector<int64_t>& devices, std::span<const DeviceStream> streams);
  void PinArena();
  std::shared_ptr<DeviceStage> StageOf(int64_t device);
  Status OpenStage(int64_t device, std::shared_ptr<DeviceStage>* out);
  bool TakeWrite(Work* out);
  void Write(Lock* lock, const Work& work);
  void WaitForRate(Lock* lock, const Ticket& ticket, int64_t size_bytes);
  void Fail(Ticket* ticket, Failure failure);
  void FreeSlot(Extent* extent);
  // Whether arrays of a group are copied; with `may_be_queued`, on devices only submitted.
  bool IsStaged(const Ticket& ticket, int64_t group, bool may_be_queued) const;
  bool IsFlushed(const Ticket& ticket, int64_t file) const;

  const EngineOptions options_;
  const pid_t pid_;
  std::mutex mutex_;
  std::condition_variable copy_ready_;   // Work or a slot for copy threads.
  std::condition_variable write_ready_;  // Work for flush threads, or another rate.
  std::condition_variable changed_;      // For those who wait for a ticket.
  Arena arena_;
  int64_t max_slots_ = 0;
  std::vector<int64_t> free_slots_;
  std::map<int64_t, std::shared_ptr<Ticket>> tickets_;  // In order of their saves.
  int64_t next_ticket_ = 1;
  bool is_paused_ = false;
  bool is_closing_ = false;
  int64_t bytes_per_s_ = 0;
  Clock::time_point last_write_{};  // When it began.
  int64_t last_write_bytes_ = 0;
  int64_t written_bytes_ = 0;
  std::vector<pthread_t> threads_;
  std::mutex devices_mutex_;  // Of the opening and pinning; taken before mutex_.
  std::map<int64_t, std::shared_ptr<DeviceStage>> stages_;  // Guarded by mutex_.
  std::shared_ptr<Device> pinner_;                          // Guarded by devices_mutex_, as below.
  size_t num_pinned_ = 0;                                   // Regions of the arena.
  std::string pin_problem_;
};

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_ENGINE_H_
