// The engine's devices: opened at the first save of their arrays, handed their part of each extent.
#include <algorithm>
#include <utility>

#include "core/engine.h"

namespace shardckpt {
namespace {

constexpr int64_t kCloseStageMs = 10'000;

}  // namespace

void Engine::PinArena() {
  const std::lock_guard<std::mutex> opening(devices_mutex_);
  if (pinner_ == nullptr) return;
  std::vector<Arena::Region> regions;
  {
    const Lock lock(mutex_);
    regions = arena_.regions();
  }
  for (; num_pinned_ < regions.size(); ++num_pinned_) {
    const Arena::Region& region = regions[num_pinned_];
    const Status status = pinner_->Pin(region.address, static_cast<int64_t>(region.size_bytes));
    if (!status.ok()) pin_problem_ = status.message();  // Slower, and as good.
  }
}

std::shared_ptr<DeviceStage> Engine::StageOf(int64_t device) {
  const Lock lock(mutex_);
  const auto found = stages_.find(device);
  return found == stages_.end() ? nullptr : found->second;
}

Status Engine::OpenStage(int64_t device, std::shared_ptr<DeviceStage>* out) {
  const std::lock_guard<std::mutex> opening(devices_mutex_);
  *out = StageOf(device);
  if (*out != nullptr && !(*out)->HasFailed()) return Status::Ok();
  // One that failed answers nothing but its error; its copies are over once it is closed.
  if (*out != nullptr && !(*out)->Close(kCloseStageMs)) {
    return Status::Of(StatusCode::kDevice, "CUDA device " + std::to_string(device) +
                                               " failed before and still hangs; restart the job.");
  }
  std::shared_ptr<Device> opened;
  if (Status s = Device::Open(static_cast<int>(device), &opened); !s.ok()) return s;
  std::unique_ptr<DeviceStage> made;
  if (Status s = DeviceStage::Open(opened, DeviceStageOptions(), &made); !s.ok()) return s;
  if (pinner_ == nullptr) pinner_ = opened;
  *out = std::move(made);
  const Lock lock(mutex_);
  stages_[device] = *out;
  return Status::Ok();
}

Status Engine::PrepareDevices(const std::vector<int64_t>& devices,
                              std::span<const DeviceStream> streams) {
  for (const int64_t device : devices) {
    const auto stream = std::find_if(streams.begin(), streams.end(),
                                     [&](const DeviceStream& s) { return s.device == device; });
    if (stream == streams.end()) {
      return Status::Invalid("no stream of CUDA device " + std::to_string(device) +
                             " was given, but it holds arrays; this is an error of the caller.");
    }
    std::shared_ptr<DeviceStage> stage;
    if (Status s = OpenStage(device, &stage); !s.ok()) return s;
    if (Status s = stage->After(static_cast<uint64_t>(stream->stream)); !s.ok()) return s;
  }
  if (!devices.empty()) PinArena();
  return Status::Ok();
}

void Engine::HandToDevices(const std::shared_ptr<Ticket>& ticket, uint32_t index, uint8_t* dst) {
  const Extent& extent = ticket->table.extents[index];
  const std::vector<int64_t> devices = DevicesOf(ticket->table, extent);
  auto arrived = [this, ticket, index](const Status& status) {
    const Lock lock(mutex_);
    if (!status.ok()) {
      Fail(ticket.get(), {FailureKind::kDevice, -1, -1, 0, status.message()});
    }
    if (--ticket->table.extents[index].num_pending == 0) FinishCopy(ticket.get(), index);
  };
  {
    const Lock lock(mutex_);
    // The copying thread counts, too: it looks at the guards before the extent is done.
    ticket->table.extents[index].num_pending = 1 + static_cast<int>(devices.size());
  }
  Status status;
  for (const int64_t device : devices) {
    std::vector<DeviceBatch> batches;
    batches.push_back({DeviceCopies(ticket->table, extent, device, dst), arrived});
    if (status.ok()) status = StageOf(device)->Add(std::move(batches));
    // What was handed over before still arrives, and the last to arrive frees the slot.
    if (!status.ok()) arrived(status);
  }
}

std::string Engine::PinProblem() {
  if (!CheckProcess().ok()) return "";
  const std::lock_guard<std::mutex> opening(devices_mutex_);
  return pin_problem_;
}

}  // namespace shardckpt
