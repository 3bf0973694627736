// Strided copies of many arrays at once, split over threads by bytes.
#ifndef SHARDCKPT_CORE_COPY_H_
#define SHARDCKPT_CORE_COPY_H_

#include <cstdint>
#include <span>

#include "core/status.h"

namespace shardckpt {

inline constexpr int64_t kMaxCopyDims = 32;
inline constexpr int64_t kMaxCopyThreads = 64;

// Copies a table of arrays. `table` holds one row after another, each of 4 + 3 * ndim integers:
//   dst_address, src_address, itemsize_bytes, ndim, shape[ndim], dst_strides_bytes[ndim],
//   src_strides_bytes[ndim]
// ndim 0 is one item; a dim of size 0 makes the row empty; strides may be negative, and 0 in the
// source.
//
// `src_base` is added to every src_address, for tables made before the source had its place.
//
// Returns when all bytes are in place; stretches of 4 KiB and more go there past the caches. The
// calling thread works too; fewer threads than asked for run where there is little to copy or the
// system gives none. Destinations must not overlap anything. kInvalid: the table is no such
// encoding; nothing was copied.
Status CopyRows(std::span<const int64_t> table, int64_t num_threads, int64_t src_base = 0);

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_COPY_H_
