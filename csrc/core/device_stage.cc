#include "core/device_stage.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <ctime>
#include <iterator>
#include <string>
#include <utility>

#include "core/seeded_mistakes.h"

namespace shardckpt {
namespace {

// Bounds of a piece beside its bytes: a copy and a row cost time of their own on the device.
constexpr int kMaxPieceCopies = 64;
constexpr int64_t kMaxPieceRows = 16384;

// Rows that touch are one row.
void Join(DeviceRows* rows) {
  if (rows->num_rows > 1 && rows->src_pitch_bytes == rows->row_bytes) {
    rows->row_bytes *= rows->num_rows;
    rows->num_rows = 1;
  }
}

// What comes after the first `done_bytes` of packed rows, at most `left_bytes`: whole rows, or part
// of one.
DeviceRows NextPart(const DeviceRows& rows, int64_t done_bytes, int64_t left_bytes) {
  const int64_t row = done_bytes / rows.row_bytes;
  const int64_t column = done_bytes % rows.row_bytes;
  DeviceRows part = rows;
  part.dst = static_cast<uint8_t*>(rows.dst) + done_bytes;
  const int64_t skipped = SEEDED(kWrongOffset) ? 0 : row * rows.src_pitch_bytes + column;
  part.src = rows.src + static_cast<uint64_t>(skipped);
  part.num_rows = std::min({rows.num_rows - row, left_bytes / rows.row_bytes, kMaxPieceRows});
  if (column != 0 || part.num_rows == 0) {
    part.num_rows = 1;
    part.row_bytes = std::min(rows.row_bytes - column, left_bytes);
  }
  return part;
}

uint64_t Begin(const DeviceRows& rows) { return reinterpret_cast<uint64_t>(rows.dst); }

uint64_t End(const DeviceRows& rows) {
  return Begin(rows) + static_cast<uint64_t>(rows.size_bytes());
}

}  // namespace

DeviceStage::DeviceStage(std::shared_ptr<Device> device, const DeviceStageOptions& options)
    : device_(std::move(device)), pid_(getpid()), options_(options) {}

DeviceStage::~DeviceStage() = default;

Status DeviceStage::Open(std::shared_ptr<Device> device, const DeviceStageOptions& options,
                         std::unique_ptr<DeviceStage>* out) {
  if (options.piece_bytes < 1 || options.num_in_flight < 1 || options.bytes_per_s < 0) {
    return Status::Invalid("device_stage: piece_bytes " + std::to_string(options.piece_bytes) +
                           ", num_in_flight " + std::to_string(options.num_in_flight) +
                           ", bytes_per_s " + std::to_string(options.bytes_per_s) +
                           "; allowed are >= 1, >= 1 and >= 0.");
  }
  auto stage = std::make_unique<DeviceStage>(std::move(device), options);
  // Signals belong to the threads of the program.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int error = pthread_create(&stage->thread_, nullptr, Run, stage.get());
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (error != 0) {
    return Status::Io(error,
                      std::string("starting the thread that copies from CUDA device failed: ") +
                          std::strerror(error));
  }
  stage->is_running_ = true;
  *out = std::move(stage);
  return Status::Ok();
}

bool DeviceStage::Close(int64_t timeout_ms) {
  if (getpid() != pid_) return false;  // The thread was never this process's.
  {
    const Lock lock(mutex_);
    is_closing_ = true;
    work_.notify_all();
  }
  timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += timeout_ms / 1000;
  until.tv_nsec += timeout_ms % 1000 * 1'000'000;
  if (until.tv_nsec >= 1'000'000'000) {
    until.tv_sec += 1;
    until.tv_nsec -= 1'000'000'000;
  }
  if (is_running_ && pthread_timedjoin_np(thread_, nullptr, &until) != 0) return false;
  is_running_ = false;
  return true;
}

// Stores what it made busy, for the caller to undo when it refuses.
Status DeviceStage::MakeBusy(const std::vector<DeviceBatch>& batches,
                             std::vector<uint64_t>* made_busy) {
  for (const DeviceBatch& batch : batches) {
    for (const DeviceRows& rows : batch.copies) {
      int64_t size_bytes = 0;
      if (rows.row_bytes < 0 || rows.num_rows < 0 ||
          (rows.num_rows > 1 && rows.src_pitch_bytes < rows.row_bytes) ||
          __builtin_mul_overflow(rows.row_bytes, rows.num_rows, &size_bytes)) {
        return Status::Invalid("device_stage: " + std::to_string(rows.num_rows) + " rows of " +
                               std::to_string(rows.row_bytes) + " bytes, pitch " +
                               std::to_string(rows.src_pitch_bytes) +
                               ", are no array; sizes must be >= 0, a pitch no less than its row.");
      }
      if (size_bytes == 0) continue;
      int ordinal = -1;
      if (Status status = Device::OrdinalOf(rows.src, &ordinal); !status.ok()) return status;
      if (ordinal != device_->ordinal()) {
        return Status::Invalid("device_stage: an array of CUDA device " + std::to_string(ordinal) +
                               " was given to the stage of device " +
                               std::to_string(device_->ordinal()) + "; every device has its own.");
      }
      const auto next = busy_.lower_bound(End(rows));
      if (next != busy_.begin() && std::prev(next)->second > Begin(rows)) {
        return Status::Invalid(
            "device_stage: a destination of " + std::to_string(size_bytes) +
            " bytes overlaps one of a batch that is not done; wait for its `done` first.");
      }
      busy_.emplace(Begin(rows), End(rows));
      made_busy->push_back(Begin(rows));
    }
  }
  return Status::Ok();
}

Status DeviceStage::Add(std::vector<DeviceBatch> batches) {
  const Lock lock(mutex_);
  if (!error_.ok()) return error_;
  if (is_closing_) return Status::Invalid("device_stage: it was closed; open another one.");
  std::vector<uint64_t> made_busy;
  if (Status status = MakeBusy(batches, &made_busy); !status.ok()) {
    for (const uint64_t begin : made_busy) busy_.erase(begin);
    return status;
  }
  num_added_ += batches.size();
  for (DeviceBatch& batch : batches) {
    for (DeviceRows& rows : batch.copies) Join(&rows);
    auto made = std::make_unique<Batch>();
    made->told = std::move(batch);
    queue_.push_back(std::move(made));
  }
  work_.notify_one();
  return Status::Ok();
}

Status DeviceStage::Fence(uint64_t compute_stream) {
  const Lock lock(mutex_);
  if (SEEDED(kHoldBackFirst) && !in_flight_.empty()) {
    if (Status status = device_->HoldBack(compute_stream, in_flight_.back().ticket); !status.ok()) {
      return status;
    }
  }
  const Clock::time_point next_submit = next_submit_;
  while (!queue_.empty() && error_.ok()) {
    if (SEEDED(kForgetLastPiece) && queue_.size() == 1) break;
    SubmitPiece();
  }
  next_submit_ = next_submit;  // The rate is of the background alone.
  work_.notify_one();
  if (!error_.ok()) return error_;
  if (in_flight_.empty() || SEEDED(kHoldBackFirst)) return Status::Ok();
  return device_->HoldBack(compute_stream, in_flight_.back().ticket);
}

Status DeviceStage::Wait(int64_t timeout_ms) {
  Lock lock(mutex_);
  const uint64_t target = num_added_;
  if (changed_.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                        [&] { return num_done_ >= target; })) {
    return error_;
  }
  return Status::Of(StatusCode::kTimeout,
                    "copies of CUDA device " + std::to_string(device_->ordinal()) +
                        " to the host did not end in " + std::to_string(timeout_ms) + " ms.");
}

bool DeviceStage::HasFailed() {
  const Lock lock(mutex_);
  return !error_.ok();
}

void DeviceStage::SetRate(int64_t bytes_per_s) {
  const Lock lock(mutex_);
  options_.bytes_per_s = bytes_per_s;
  next_submit_ = {};
  work_.notify_one();
}

void* DeviceStage::Run(void* stage) {
  static_cast<DeviceStage*>(stage)->Loop();
  return nullptr;
}

void DeviceStage::Loop() {
  Lock lock(mutex_);
  for (;;) {
    if (is_closing_ && !queue_.empty() && error_.ok()) {
      error_ = Status::Invalid("device_stage: closed before the arrays were copied.");
    }
    if (!error_.ok() && !(queue_.empty() && in_flight_.empty())) {
      EndAll(&lock);
      continue;
    }
    const bool has_room =
        SEEDED(kNoGap) || static_cast<int64_t>(in_flight_.size()) < options_.num_in_flight;
    const bool may_submit = options_.bytes_per_s == 0 || Clock::now() >= next_submit_;
    if (!queue_.empty() && has_room && may_submit) {
      SubmitPiece();
    } else if (!in_flight_.empty()) {
      WaitForPiece(&lock);
    } else if (!queue_.empty()) {
      work_.wait_until(lock, next_submit_);
    } else if (is_closing_) {
      return;
    } else {
      work_.wait(lock);
    }
  }
}

// The lock stays with the caller, so that pieces of the thread and of a fence do not mix.
void DeviceStage::SubmitPiece() {
  Piece& piece = in_flight_.emplace_back();
  piece.number = next_piece_++;
  int64_t left_bytes = options_.piece_bytes;
  int num_left = kMaxPieceCopies;
  while (!queue_.empty()) {
    Batch& batch = *queue_.front();
    SubmitBatch(piece.number, &batch, &left_bytes, &num_left);
    if (!error_.ok()) return;
    if (batch.copy < batch.told.copies.size()) break;
    piece.ends.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
  if (Status status = device_->Mark(&piece.ticket); !status.ok()) {
    return Fail(status, "piece " + std::to_string(piece.number));
  }
  if (options_.bytes_per_s > 0) {
    const std::chrono::duration<double> share(
        static_cast<double>(options_.piece_bytes - left_bytes) /
        static_cast<double>(options_.bytes_per_s));
    next_submit_ =
        std::max(next_submit_, Clock::now()) + std::chrono::duration_cast<Clock::duration>(share);
  }
}

void DeviceStage::SubmitBatch(uint64_t piece, Batch* batch, int64_t* left_bytes, int* num_left) {
  const std::vector<DeviceRows>& copies = batch->told.copies;
  while (batch->copy < copies.size()) {
    const DeviceRows& rows = copies[batch->copy];
    if (batch->done_bytes == rows.size_bytes()) {
      ++batch->copy;
      batch->done_bytes = 0;
      continue;
    }
    if (*left_bytes == 0 || *num_left == 0) return;
    const DeviceRows part = NextPart(rows, batch->done_bytes, *left_bytes);
    if (Status status = device_->CopyToHost(part); !status.ok()) {
      return Fail(status, "piece " + std::to_string(piece) + ", copy " +
                              std::to_string(batch->copy) + " of its batch");
    }
    batch->done_bytes += part.size_bytes();
    *left_bytes -= part.size_bytes();
    --*num_left;
  }
}

void DeviceStage::WaitForPiece(Lock* lock) {
  const uint64_t ticket = in_flight_.front().ticket;
  lock->unlock();
  Status status;
  if (!SEEDED(kDoneAtSubmit)) status = device_->Wait(ticket, -1);
  if (SEEDED(kDropPieceError)) status = Status::Ok();
  lock->lock();
  if (!status.ok()) return Fail(status, "piece " + std::to_string(in_flight_.front().number));
  Batches batches = std::move(in_flight_.front().ends);
  in_flight_.pop_front();
  if (SEEDED(kEarlyReuse)) {
    for (Piece& piece : in_flight_) {
      std::move(piece.ends.begin(), piece.ends.end(), std::back_inserter(batches));
      piece.ends.clear();
    }
  }
  Deliver(lock, std::move(batches), Status::Ok());
}

// After an error, copies that were submitted may still write: only when the stream is empty, or the
// device beyond use, may the destinations go back. Which of the two does not matter.
void DeviceStage::EndAll(Lock* lock) {
  lock->unlock();
  static_cast<void>(device_->Drain());
  lock->lock();
  Batches batches;
  for (Piece& piece : in_flight_) {
    std::move(piece.ends.begin(), piece.ends.end(), std::back_inserter(batches));
  }
  std::move(queue_.begin(), queue_.end(), std::back_inserter(batches));
  in_flight_.clear();
  queue_.clear();
  Deliver(lock, std::move(batches), error_);
}

void DeviceStage::Deliver(Lock* lock, Batches batches, const Status& status) {
  for (const auto& batch : batches) {
    for (const DeviceRows& rows : batch->told.copies) {
      if (rows.size_bytes() > 0) busy_.erase(Begin(rows));
    }
  }
  lock->unlock();
  for (auto& batch : batches) {
    if (batch->told.done) batch->told.done(status);
    batch.reset();  // What the callback holds on to goes before anyone hears of the end.
  }
  lock->lock();
  num_done_ += batches.size();
  changed_.notify_all();
}

void DeviceStage::Fail(const Status& status, const std::string& where) {
  if (!error_.ok()) return;
  error_ =
      Status::Of(status.code(), "staging from CUDA device " + std::to_string(device_->ordinal()) +
                                    ", " + where + ": " + status.message());
  work_.notify_one();
}

}  // namespace shardckpt
