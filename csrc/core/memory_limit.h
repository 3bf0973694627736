// How much memory this process may use.
#ifndef SHARDCKPT_CORE_MEMORY_LIMIT_H_
#define SHARDCKPT_CORE_MEMORY_LIMIT_H_

#include <cstdint>
#include <string>

namespace shardckpt {

// Returns the smallest limit of the process's control groups (v2 and v1) and the machine's memory,
// in bytes. `root` stands before /proc and /sys, for tests.
int64_t MemoryLimitBytes(const std::string& root = "");

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_MEMORY_LIMIT_H_
