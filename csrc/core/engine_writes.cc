// The engine's way to the disk: flush threads, what callers write themselves, checksums of files.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <utility>

#include "core/crc32c.h"
#include "core/engine.h"

namespace shardckpt {
namespace {

constexpr int kIoPriorityBestEffort = 2;
constexpr int kIoPriorityLowest = 7;
constexpr auto kRateSlice = std::chrono::milliseconds(50);

void StoreLittleEndian(uint64_t value, int num_bytes, uint8_t* out) {
  for (int i = 0; i < num_bytes; ++i) out[i] = static_cast<uint8_t>(value >> (8 * i));
}

Failure WriteFailure(int64_t file, const Status& status) {
  return {FailureKind::kWrite, -1, file, status.system_errno(), status.message()};
}

}  // namespace

Status Engine::Attach(int64_t id, int64_t file, int fd, int direct_fd, const FileOps* ops) {
  if (Status status = CheckProcess(); !status.ok()) return status;
  Lock lock(mutex_);
  const std::shared_ptr<Ticket> ticket = Find(id);
  if (ticket == nullptr || file < 0 || file >= static_cast<int64_t>(ticket->files.size())) {
    return Status::Invalid("attach: ticket " + std::to_string(id) + " has no file " +
                           std::to_string(file) + ".");
  }
  File& attached = ticket->files[static_cast<size_t>(file)];
  attached.ops = ops;
  attached.target.fd = fd;
  attached.target.direct_fd = direct_fd;
  attached.is_attached = true;
  write_ready_.notify_all();
  return Status::Ok();
}

bool Engine::IsFlushed(const Ticket& ticket, int64_t file) const {
  const File& wanted = ticket.files[static_cast<size_t>(file)];
  if (wanted.num_writing != 0) return false;
  // A counter that moved is found by whoever looks last, which may be after the last write.
  return ticket.failure.kind != FailureKind::kNone ||
         (wanted.num_left == 0 &&
          std::all_of(ticket.groups.begin(), ticket.groups.end(),
                      [](const auto& entry) { return entry.second.is_checked; }));
}

bool Engine::WaitFlushed(int64_t id, int64_t file, int64_t timeout_ms) {
  if (!CheckProcess().ok()) return true;
  Lock lock(mutex_);
  const std::shared_ptr<Ticket> ticket = Find(id);
  if (ticket == nullptr || file < 0 || file >= static_cast<int64_t>(ticket->files.size())) {
    return true;
  }
  return changed_.wait_until(lock, Deadline(timeout_ms), [&] { return IsFlushed(*ticket, file); });
}

bool Engine::TakeWrite(Work* out) {
  for (auto& [id, ticket] : tickets_) {
    if (ticket->failure.kind != FailureKind::kNone) continue;
    for (File& file : ticket->files) {
      if (!file.is_attached || file.staged.empty()) continue;
      *out = {ticket, file.staged.front()};
      file.staged.pop_front();
      ticket->table.extents[out->extent].state = ExtentState::kWriting;
      ++file.num_writing;
      ++ticket->num_writing;
      return true;
    }
  }
  return false;
}

void Engine::Write(Lock* lock, const Work& work) {
  Ticket& ticket = *work.ticket;
  Extent& extent = ticket.table.extents[work.extent];
  File& file = ticket.files[static_cast<size_t>(extent.file)];
  WaitForRate(lock, ticket, extent.size_bytes);
  if (ticket.failure.kind == FailureKind::kNone) {
    const uint8_t* data = arena_.slot(extent.slot);
    lock->unlock();
    std::vector<ChunkTail> tails;
    if (extent.on_device) {
      ChecksumExtent(ticket.table, extent, data, ticket.crcs.data(), &tails);
    }
    const Status status = WriteExtent(*file.ops, &file.target, data,
                                      static_cast<size_t>(extent.size_bytes), extent.offset_bytes);
    lock->lock();
    ticket.tails.insert(ticket.tails.end(), tails.begin(), tails.end());
    if (!status.ok()) Fail(&ticket, WriteFailure(extent.file, status));
    written_bytes_ += extent.size_bytes;
  }
  --file.num_writing;
  --ticket.num_writing;
  --file.num_left;
  FreeSlot(&extent);
  changed_.notify_all();
}

void Engine::WaitForRate(Lock* lock, const Ticket& ticket, int64_t size_bytes) {
  // Looked at again in slices, so that another rate and a failure take effect at once. What is owed
  // is the time of the write before, whatever the size of the one that waits.
  while (bytes_per_s_ > 0 && !is_closing_ && ticket.failure.kind == FailureKind::kNone) {
    const auto next =
        last_write_ +
        std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(
            static_cast<double>(last_write_bytes_) / static_cast<double>(bytes_per_s_)));
    const auto now = Clock::now();
    if (next <= now) {
      last_write_ = now;
      last_write_bytes_ = size_bytes;
      return;
    }
    write_ready_.wait_until(*lock, std::min(next, now + kRateSlice));
  }
}

void* Engine::RunWrites(void* opaque) {
  Engine& engine = *static_cast<Engine*>(opaque);
  engine.LowerPriority();
  // It acts on direct I/O; refused, the thread writes as any other.
  syscall(SYS_ioprio_set, 1, 0, kIoPriorityBestEffort << 13 | kIoPriorityLowest);
  Lock lock(engine.mutex_);
  while (!engine.is_closing_) {
    Work work;
    if (engine.TakeWrite(&work)) {
      engine.Write(&lock, work);
    } else {
      engine.write_ready_.wait(lock);
    }
  }
  return nullptr;
}

Status Engine::Take(int64_t id, int64_t file, int64_t timeout_ms, Taken* out) {
  if (Status status = CheckProcess(); !status.ok()) return status;
  const auto deadline = Deadline(timeout_ms);
  Lock lock(mutex_);
  const std::shared_ptr<Ticket> ticket = Find(id);
  if (ticket == nullptr || file < 0 || file >= static_cast<int64_t>(ticket->files.size())) {
    return Status::Invalid("take: ticket " + std::to_string(id) + " has no file " +
                           std::to_string(file) + ".");
  }
  File& wanted = ticket->files[static_cast<size_t>(file)];
  *out = Taken();
  while (ticket->failure.kind == FailureKind::kNone && wanted.num_left > wanted.num_writing) {
    out->more = true;
    if (!wanted.staged.empty()) {
      const uint32_t index = wanted.staged.front();
      wanted.staged.pop_front();
      Extent& extent = ticket->table.extents[index];
      extent.state = ExtentState::kWriting;
      ++wanted.num_writing;
      ++ticket->num_writing;
      *out = {true, index, arena_.slot(extent.slot), extent.size_bytes, extent.offset_bytes};
      if (extent.on_device) {
        lock.unlock();
        std::vector<ChunkTail> tails;
        ChecksumExtent(ticket->table, extent, out->data, ticket->crcs.data(), &tails);
        lock.lock();
        ticket->tails.insert(ticket->tails.end(), tails.begin(), tails.end());
      }
      return Status::Ok();
    }
    if (changed_.wait_until(lock, deadline) == std::cv_status::timeout) return Status::Ok();
  }
  out->more = false;
  return Status::Ok();
}

Status Engine::Give(int64_t id, int64_t index) {
  if (Status status = CheckProcess(); !status.ok()) return status;
  Lock lock(mutex_);
  const std::shared_ptr<Ticket> ticket = Find(id);
  if (ticket == nullptr || index < 0 ||
      index >= static_cast<int64_t>(ticket->table.extents.size()) ||
      ticket->table.extents[static_cast<size_t>(index)].state != ExtentState::kWriting) {
    return Status::Invalid("give: extent " + std::to_string(index) + " of ticket " +
                           std::to_string(id) + " was not taken.");
  }
  Extent& extent = ticket->table.extents[static_cast<size_t>(index)];
  File& file = ticket->files[static_cast<size_t>(extent.file)];
  --file.num_writing;
  --ticket->num_writing;
  --file.num_left;
  FreeSlot(&extent);
  changed_.notify_all();
  return Status::Ok();
}

Status Engine::ChunkCrcsOf(int64_t id, int64_t file, uint32_t seed, std::vector<uint8_t>* out) {
  if (Status status = CheckProcess(); !status.ok()) return status;
  Lock lock(mutex_);
  const std::shared_ptr<Ticket> ticket = Find(id);
  if (ticket == nullptr || file < 0 || file >= static_cast<int64_t>(ticket->files.size()) ||
      ticket->failure.kind != FailureKind::kNone ||
      ticket->files[static_cast<size_t>(file)].num_left != 0) {
    return Status::Invalid("chunk_crcs_of: file " + std::to_string(file) + " of ticket " +
                           std::to_string(id) + " is not written yet.");
  }
  // The file's chunks are whole once all its extents are copied; no thread touches them any more,
  // unlike those of other files.
  const SaveTable& table = ticket->table;
  const auto first = std::partition_point(table.payloads.begin(), table.payloads.end(),
                                          [&](const Payload& p) { return p.file < file; });
  const auto last = std::partition_point(first, table.payloads.end(),
                                         [&](const Payload& p) { return p.file == file; });
  if (first == last) return Status::Ok();
  const int64_t first_chunk = first->first_chunk;
  const int64_t last_chunk = last == table.payloads.end() ? table.num_chunks : last->first_chunk;
  std::vector<uint32_t> crcs(ticket->crcs.begin() + first_chunk, ticket->crcs.begin() + last_chunk);
  for (const ChunkTail& tail : ticket->tails) {
    if (tail.chunk < first_chunk || tail.chunk >= last_chunk) continue;
    uint32_t& crc = crcs[static_cast<size_t>(tail.chunk - first_chunk)];
    crc = Crc32cCombine(crc, tail.crc, static_cast<uint64_t>(tail.size_bytes));
  }
  lock.unlock();
  for (auto payload = first; payload != last; ++payload) {
    for (int64_t at = 0; at < payload->size_bytes; at += kChunkBytes) {
      const int64_t chunk = payload->first_chunk + at / kChunkBytes;
      const uint32_t crc = crcs[static_cast<size_t>(chunk - first_chunk)];
      if (!ticket->expected_crcs.empty() && payload->is_lazy() && payload->device < 0 &&
          ticket->expected_crcs[static_cast<size_t>(chunk)] != crc) {
        lock.lock();
        Fail(ticket.get(), {FailureKind::kTorn, payload - table.payloads.begin(), -1, 0, ""});
        return Status::Invalid("a copy differs from its array as it was when the save began.");
      }
      std::array<uint8_t, 8> place;
      StoreLittleEndian(static_cast<uint64_t>(payload->offset_bytes + at), 8, place.data());
      std::array<uint8_t, 4> stored;
      StoreLittleEndian(crc ^ Crc32c(seed, place.data(), place.size()), 4, stored.data());
      out->insert(out->end(), stored.begin(), stored.end());
    }
  }
  return Status::Ok();
}

}  // namespace shardckpt
