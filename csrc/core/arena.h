// Host memory for saves: a pool of equal slots, touched once and reused for ever.
//
// Fresh pages cost up to seconds per GiB on virtual machines, so a slot is faulted in when the pool
// grows, never during a copy.
#ifndef SHARDCKPT_CORE_ARENA_H_
#define SHARDCKPT_CORE_ARENA_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/status.h"

namespace shardckpt {

inline constexpr int64_t kSlotBytes = int64_t{8} << 20;

// Owns its mappings. Not thread-safe: the engine's lock guards it.
class Arena {
 public:
  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Adds slots until there are `num_slots`, faulted in by up to `num_threads` threads.
  // kIo: the system has no room; the slots that were there stay.
  Status Grow(int64_t num_slots, int64_t num_threads);

  int64_t num_slots() const { return static_cast<int64_t>(slots_.size()); }
  // Address of a slot, 2 MiB-aligned; it never moves.
  uint8_t* slot(int64_t index) const { return slots_[static_cast<size_t>(index)]; }

  struct Region {
    uint8_t* address;
    size_t size_bytes;
  };
  const std::vector<Region>& regions() const { return regions_; }

 private:
  std::vector<Region> regions_;  // Aligned to 2 MiB; not what mmap gave, whose edges are unmapped.
  std::vector<uint8_t*> slots_;
};

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_ARENA_H_
