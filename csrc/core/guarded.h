// Reads of memory that its owner may give back at any moment.
//
// A handler of SIGSEGV and SIGBUS ends such a read where it faults; every other fault goes to the
// handler that was there before, or ends the process as ever.
#ifndef SHARDCKPT_CORE_GUARDED_H_
#define SHARDCKPT_CORE_GUARDED_H_

#include <cstddef>

namespace shardckpt {

// Returns whether faults can be caught now: installs the handler once, and notices when somebody
// else's has taken its place since.
bool CanCatchFaults();

// Calls use(told), which reads `size_bytes` at `src`; false where a read of them faulted, which
// leaves `use` in the middle: it must own nothing. Ask CanCatchFaults first.
bool ReadGuarded(const void* src, size_t size_bytes, void (*use)(void* told), void* told);

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_GUARDED_H_
