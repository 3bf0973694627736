#include "core/engine.h"

#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <utility>

namespace shardckpt {
namespace {

constexpr int kNice = 10;
constexpr int64_t kGuardBytes = 64;  // A payload this small is a counter.
// A slot that is about to come back costs less than a new one.
constexpr auto kPatience = std::chrono::milliseconds(10);

int64_t NumSlots(int64_t size_bytes) { return (size_bytes + kSlotBytes - 1) / kSlotBytes; }

}  // namespace

Engine::Engine(const EngineOptions& options) : options_(options), pid_(getpid()) {}

Engine::~Engine() = default;

Status Engine::Create(const EngineOptions& options, std::unique_ptr<Engine>* out) {
  auto engine = std::make_unique<Engine>(options);
  // Signals belong to the threads of the program.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  // But for faults: a blocked one ends the process, whatever handler there is.
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = 0;
  for (int64_t i = 0; i < options.num_copy_threads + options.num_flush_threads; ++i) {
    pthread_t thread;
    auto* run = i < options.num_copy_threads ? RunCopies : RunWrites;
    error = pthread_create(&thread, nullptr, run, engine.get());
    if (error != 0) break;
    engine->threads_.push_back(thread);
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (error != 0) {
    engine->Close(1000);
    return Status::Io(error,
                      std::string("starting the staging threads failed: ") + std::strerror(error));
  }
  *out = std::move(engine);
  return Status::Ok();
}

bool Engine::Close(int64_t timeout_ms) {
  if (getpid() != pid_) return false;  // The threads were never this process's.
  {
    Lock lock(mutex_);
    is_closing_ = true;
    for (auto& [id, ticket] : tickets_) {
      Fail(ticket.get(), {FailureKind::kCancelled, -1, -1, 0, "the engine was closed"});
    }
    copy_ready_.notify_all();
    write_ready_.notify_all();
  }
  timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += timeout_ms / 1000;
  until.tv_nsec += timeout_ms % 1000 * 1000000;
  if (until.tv_nsec >= 1000000000) {
    until.tv_sec += 1;
    until.tv_nsec -= 1000000000;
  }
  while (!threads_.empty()) {
    if (pthread_timedjoin_np(threads_.back(), nullptr, &until) != 0) return false;
    threads_.pop_back();
  }
  std::map<int64_t, std::shared_ptr<DeviceStage>> stages;
  {
    const Lock lock(mutex_);
    stages = stages_;
  }
  for (auto& [device, stage] : stages) {
    if (!stage->Close(timeout_ms)) return false;
  }
  const std::lock_guard<std::mutex> opening(devices_mutex_);
  pinner_.reset();
  const Lock lock(mutex_);
  stages_.clear();
  return true;
}

Status Engine::CheckProcess() const {
  if (getpid() == pid_) return Status::Ok();
  return Status::Invalid(
      "the staging engine belongs to the process that made it; a forked child cannot save. Open a "
      "checkpointer of its own there.");
}

Status Engine::Reserve(int64_t size_bytes, int64_t most_bytes) {
  if (Status status = CheckProcess(); !status.ok()) return status;
  Lock lock(mutex_);
  Status status = GrowArena(NumSlots(size_bytes));
  if (status.ok()) max_slots_ = std::max(max_slots_, NumSlots(most_bytes));
  copy_ready_.notify_all();
  changed_.notify_all();
  lock.unlock();
  PinArena();
  return status;
}

Status Engine::GrowArena(int64_t num_slots) {
  const int64_t before = arena_.num_slots();
  Status status = arena_.Grow(num_slots, options_.num_copy_threads);
  for (int64_t slot = before; slot < arena_.num_slots(); ++slot) free_slots_.push_back(slot);
  max_slots_ = std::max(max_slots_, arena_.num_slots());
  return status;
}

Status Engine::Begin(std::span<const int64_t> numbers, std::span<const int64_t> file_bytes,
                     bool check_all, int64_t* ticket, std::span<const DeviceStream> streams) {
  if (Status status = CheckProcess(); !status.ok()) return status;
  auto made = std::make_shared<Ticket>();
  if (Status status = ParseSaveTable(numbers, file_bytes, &made->table); !status.ok()) {
    return status;
  }
  SaveTable& table = made->table;
  for (const Payload& payload : table.payloads) {
    if (payload.device >= 0) made->devices.push_back(payload.device);
  }
  std::sort(made->devices.begin(), made->devices.end());
  made->devices.erase(std::unique(made->devices.begin(), made->devices.end()), made->devices.end());
  if (Status status = PrepareDevices(made->devices, streams); !status.ok()) return status;
  made->crcs.resize(static_cast<size_t>(table.num_chunks));
  made->files.resize(file_bytes.size());
  made->groups_of.resize(table.extents.size());
  made->groups[kEager];
  for (size_t i = 0; i < table.extents.size(); ++i) {
    const Extent& extent = table.extents[i];
    ++made->files[static_cast<size_t>(extent.file)].num_left;
    std::vector<int64_t>& groups = made->groups_of[i];
    for (uint32_t piece = extent.first_piece; piece < extent.last_piece; ++piece) {
      groups.push_back(table.payloads[table.pieces[piece].payload].group);
    }
    std::sort(groups.begin(), groups.end());
    groups.erase(std::unique(groups.begin(), groups.end()), groups.end());
    for (const int64_t group : groups) {
      ++made->groups[group].num_extents;
      ++made->groups[group].num_blocking;
    }
  }
  for (size_t i = 0; i < table.payloads.size(); ++i) {
    const Payload& payload = table.payloads[i];
    if (payload.is_lazy() && payload.device < 0 && payload.size_bytes <= kGuardBytes) {
      made->groups[payload.group].guards.push_back(static_cast<uint32_t>(i));
    }
  }
  for (auto& [id, group] : made->groups) group.is_checked = group.num_blocking == 0;
  if (check_all) ChecksumSources(table, &made->expected_crcs);
  Lock lock(mutex_);
  if (arena_.num_slots() == 0 && !table.extents.empty()) {
    return Status::Invalid("the staging engine has no memory yet; reserve some first.");
  }
  *ticket = next_ticket_++;
  tickets_[*ticket] = std::move(made);
  copy_ready_.notify_all();
  return Status::Ok();
}

bool Engine::IsStaged(const Ticket& ticket, int64_t group, bool may_be_queued) const {
  if (ticket.failure.kind != FailureKind::kNone) return ticket.num_copying == 0;
  const auto is_staged = [&](const Group& wanted) {
    return wanted.is_checked && (may_be_queued || wanted.num_extents == 0);
  };
  if (group != kEveryGroup) {
    const auto found = ticket.groups.find(group);
    return found == ticket.groups.end() || is_staged(found->second);
  }
  return std::all_of(ticket.groups.begin(), ticket.groups.end(),
                     [&](const auto& entry) { return is_staged(entry.second); });
}

bool Engine::WaitStaged(int64_t id, int64_t group, int64_t timeout_ms,
                        std::span<const DeviceStream> streams) {
  if (!CheckProcess().ok()) return true;
  const auto deadline = Deadline(timeout_ms);
  std::optional<Clock::time_point> grows_from;  // Since there was first nothing to take.
  std::unique_ptr<Scratch> scratch;
  Lock lock(mutex_);
  const std::shared_ptr<Ticket> ticket = Find(id);
  if (ticket == nullptr) return true;
  bool holds_back =
      !ticket->devices.empty() &&
      std::all_of(ticket->devices.begin(), ticket->devices.end(), [&](int64_t device) {
        return std::any_of(streams.begin(), streams.end(),
                           [&](const DeviceStream& s) { return s.device == device; });
      });
  while (true) {
    if (IsStaged(*ticket, group, holds_back)) {
      // Where a device fails, its copies are waited for, as those of any failed save.
      if (!holds_back || IsStaged(*ticket, group, false)) return true;
      lock.unlock();
      Status status;
      for (const DeviceStream& stream : streams) {
        const std::shared_ptr<DeviceStage> stage = StageOf(stream.device);
        if (stage != nullptr && status.ok()) {
          status = stage->Fence(static_cast<uint64_t>(stream.stream));
        }
      }
      lock.lock();
      if (status.ok()) return true;
      Fail(ticket.get(), {FailureKind::kDevice, -1, -1, 0, status.message()});
      holds_back = false;
    }
    // Looked at before each copy, so that a timeout of 0 only asks.
    const auto now = Clock::now();
    if (now >= deadline) return false;
    const bool may_grow = grows_from.has_value() && now >= *grows_from;
    Work work;
    if (TakeCopy(ticket.get(), group, may_grow, &work)) {
      if (scratch == nullptr) scratch = std::make_unique<Scratch>();
      Copy(&lock, work, scratch.get());
    } else {
      if (!grows_from.has_value()) grows_from = now + kPatience;
      changed_.wait_until(lock, may_grow ? deadline : std::min(deadline, *grows_from));
    }
  }
}

bool Engine::TakeCopy(const Ticket* only, int64_t group, bool may_grow, Work* out) {
  for (auto& [id, ticket] : tickets_) {
    const std::vector<uint32_t>& order = ticket->table.order;
    std::vector<Extent>& extents = ticket->table.extents;
    while (ticket->next < order.size() &&
           extents[order[ticket->next]].state != ExtentState::kQueued) {
      ++ticket->next;
    }
    for (size_t i = ticket->next; i < order.size(); ++i) {
      Extent& extent = extents[order[i]];
      if (extent.state != ExtentState::kQueued) continue;
      if (ticket.get() == only && group != kEveryGroup) {
        const std::vector<int64_t>& groups = ticket->groups_of[order[i]];
        if (!std::binary_search(groups.begin(), groups.end(), group)) continue;
      }
      if (free_slots_.empty() && may_grow && arena_.num_slots() < max_slots_ &&
          !GrowArena(arena_.num_slots() + 1).ok()) {
        max_slots_ = arena_.num_slots();
      }
      if (free_slots_.empty()) return false;
      extent.state = ExtentState::kCopying;
      extent.slot = free_slots_.back();
      free_slots_.pop_back();
      ++ticket->num_copying;
      *out = {ticket, order[i]};
      return true;
    }
    if (ticket.get() == only) return false;
  }
  return false;
}

void Engine::Copy(Lock* lock, const Work& work, Scratch* scratch) {
  Ticket& ticket = *work.ticket;
  Extent& extent = ticket.table.extents[work.extent];
  uint8_t* dst = arena_.slot(extent.slot);
  const bool on_device = extent.on_device;
  lock->unlock();
  Copied copied;
  CopyExtent(ticket.table, extent, dst, ticket.crcs.data(), scratch, &copied);
  const bool is_whole = copied.torn_payload < 0;
  if (on_device && is_whole) HandToDevices(work.ticket, work.extent, dst);
  lock->lock();
  // Where a device has a part, the checksums of the whole are taken when it is here.
  if (!on_device) {
    ticket.tails.insert(ticket.tails.end(), copied.tails.begin(), copied.tails.end());
  }
  if (!is_whole) {
    Fail(&ticket, {copied.is_gone ? FailureKind::kGone : FailureKind::kTorn, copied.torn_payload,
                   -1, 0, ""});
  }
  Unblock(lock, &ticket, work.extent);
  if (!on_device || !is_whole || --extent.num_pending == 0) FinishCopy(&ticket, work.extent);
}

// What this extent kept a fence waiting for is over.
void Engine::Unblock(Lock* lock, Ticket* ticket, uint32_t index) {
  for (const int64_t id : ticket->groups_of[index]) {
    Group& group = ticket->groups[id];
    if (--group.num_blocking != 0 || ticket->failure.kind != FailureKind::kNone) continue;
    // The last one looks at the counters again: a step that changed nothing else moved them.
    lock->unlock();
    int64_t moved = -1;
    for (const uint32_t guard : group.guards) {
      if (!StillHolds(ticket->table, ticket->table.payloads[guard])) moved = guard;
    }
    lock->lock();
    if (moved >= 0) Fail(ticket, {FailureKind::kTorn, moved, -1, 0, ""});
    group.is_checked = true;
    changed_.notify_all();
  }
}

void Engine::FinishCopy(Ticket* ticket, uint32_t index) {
  Extent& extent = ticket->table.extents[index];
  for (const int64_t id : ticket->groups_of[index]) --ticket->groups[id].num_extents;
  --ticket->num_copying;
  if (ticket->failure.kind == FailureKind::kNone) {
    extent.state = ExtentState::kStaged;
    ticket->files[static_cast<size_t>(extent.file)].staged.push_back(index);
    write_ready_.notify_all();  // One might wake a thread that only waits for the rate.
  } else {
    FreeSlot(&extent);
  }
  changed_.notify_all();
}

void* Engine::RunCopies(void* opaque) {
  Engine& engine = *static_cast<Engine*>(opaque);
  engine.LowerPriority();
  Scratch scratch;
  Lock lock(engine.mutex_);
  while (!engine.is_closing_) {
    Work work;
    if (!engine.is_paused_ && engine.TakeCopy(nullptr, kEveryGroup, false, &work)) {
      engine.Copy(&lock, work, &scratch);
    } else {
      engine.copy_ready_.wait(lock);
    }
  }
  return nullptr;
}

// The training's own threads go first; at a fence they copy what is left themselves.
void Engine::LowerPriority() const {
  // A batch thread that wakes takes the processor from nobody: the save that woke it is not over.
  const sched_param none{};
  sched_setscheduler(0, SCHED_BATCH, &none);
  setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kNice);
  if (options_.cpus.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : options_.cpus) {
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(static_cast<size_t>(cpu), &set);
  }
  sched_setaffinity(0, sizeof(set), &set);
}

Failure Engine::FailureOf(int64_t id) {
  if (Status status = CheckProcess(); !status.ok()) {
    return {FailureKind::kCancelled, -1, -1, 0, status.message()};
  }
  Lock lock(mutex_);
  const std::shared_ptr<Ticket> ticket = Find(id);
  return ticket == nullptr ? Failure() : ticket->failure;
}

void Engine::Cancel(int64_t id, const std::string& why) {
  if (!CheckProcess().ok()) return;
  Lock lock(mutex_);
  const std::shared_ptr<Ticket> ticket = Find(id);
  if (ticket != nullptr) Fail(ticket.get(), {FailureKind::kCancelled, -1, -1, 0, why});
}

bool Engine::Release(int64_t id, int64_t timeout_ms) {
  if (!CheckProcess().ok()) return true;
  Lock lock(mutex_);
  const std::shared_ptr<Ticket> ticket = Find(id);
  if (ticket == nullptr) return true;
  const bool is_done =
      std::all_of(ticket->files.begin(), ticket->files.end(),
                  [](const File& file) { return file.num_left == 0 && file.num_writing == 0; });
  if (!is_done) Fail(ticket.get(), {FailureKind::kCancelled, -1, -1, 0, "the save was given up"});
  const bool is_idle = changed_.wait_until(lock, Deadline(timeout_ms), [&] {
    return ticket->num_copying == 0 && ticket->num_writing == 0;
  });
  if (is_idle) tickets_.erase(id);
  return is_idle;
}

void Engine::Fail(Ticket* ticket, Failure failure) {
  if (ticket->failure.kind != FailureKind::kNone) return;
  ticket->failure = std::move(failure);
  for (Extent& extent : ticket->table.extents) {
    if (extent.state == ExtentState::kStaged) FreeSlot(&extent);
    if (extent.state == ExtentState::kQueued) extent.state = ExtentState::kDone;
  }
  for (File& file : ticket->files) file.staged.clear();
  changed_.notify_all();
}

void Engine::FreeSlot(Extent* extent) {
  extent->state = ExtentState::kDone;
  free_slots_.push_back(extent->slot);
  extent->slot = -1;
  copy_ready_.notify_one();
  changed_.notify_all();  // Whoever waits for a fence copies too, and may have waited for a slot.
}

std::shared_ptr<Engine::Ticket> Engine::Find(int64_t id) {
  const auto found = tickets_.find(id);
  return found == tickets_.end() ? nullptr : found->second;
}

void Engine::SetRate(int64_t bytes_per_s) {
  if (!CheckProcess().ok()) return;
  Lock lock(mutex_);
  bytes_per_s_ = bytes_per_s;
  write_ready_.notify_all();
}

void Engine::SetPaused(bool is_paused) {
  if (!CheckProcess().ok()) return;
  Lock lock(mutex_);
  is_paused_ = is_paused;
  copy_ready_.notify_all();
}

EngineStats Engine::Stats() {
  if (!CheckProcess().ok()) return {};
  Lock lock(mutex_);
  const int64_t num_held = arena_.num_slots() - static_cast<int64_t>(free_slots_.size());
  return {max_slots_, max_slots_ - num_held, written_bytes_};
}

}  // namespace shardckpt
