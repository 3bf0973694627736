// Mistakes that the CUDA scenarios must notice, one at a time. Only the test program
// core_mistakes is built with SHARDCKPT_SEEDED_MISTAKES; everywhere else SEEDED is false.
#ifndef SHARDCKPT_CORE_SEEDED_MISTAKES_H_
#define SHARDCKPT_CORE_SEEDED_MISTAKES_H_

#ifdef SHARDCKPT_SEEDED_MISTAKES

#include <atomic>

namespace shardckpt {

enum class Mistake {
  kNone,
  kNoReadyWait,      // Copies do not wait for the stream that writes the arrays.
  kNoHoldBack,       // The compute stream does not wait for the copies.
  kHoldBackFirst,    // It waits for what was submitted before the burst.
  kNeverRecorded,    // A ticket's event is made but not recorded.
  kEarlyReuse,       // One finished piece hands out the slots of all that are in flight.
  kDoneAtSubmit,     // A batch is reported when it is submitted.
  kWrongContext,     // Threads other than the one that opened the device set no context.
  kLegacyStream,     // Copies go to the legacy default stream.
  kForgetLastPiece,  // The burst leaves the last piece in the queue.
  kDropPieceError,   // The error of a piece in flight is taken for success.
  kLeakEvents,       // Events are neither reused nor destroyed.
  kUnpinInFlight,    // Memory is unregistered while copies write to it.
  kIgnoreCapture,    // A capturing stream is not refused.
  kBreakCapture,     // Threads poll in a mode that ends other threads' captures.
  kNoGap,            // All pieces are submitted at once.
  kWrongOffset,      // Later parts of a split array are read from its beginning.
  kEnd,
};

inline std::atomic<Mistake> seeded_mistake{Mistake::kNone};

}  // namespace shardckpt

#define SEEDED(name) (::shardckpt::seeded_mistake == ::shardckpt::Mistake::name)
#else
#define SEEDED(name) false
#endif

#endif  // SHARDCKPT_CORE_SEEDED_MISTAKES_H_
