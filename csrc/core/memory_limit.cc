#include "core/memory_limit.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>

namespace shardckpt {
namespace {

// "max" and files that are not there leave `limit` as it is.
void LowerTo(const std::string& path, int64_t* limit) {
  std::ifstream file(path);
  int64_t value = 0;
  if (file >> value && value > 0) *limit = std::min(*limit, value);
}

// Every group above counts, too; inside a container the path may be one of the host's.
void LowerToGroups(const std::string& mount, std::string group, const char* name, int64_t* limit) {
  while (true) {
    LowerTo(mount + group + "/" + name, limit);
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos) return;
    group.erase(slash);
  }
}

}  // namespace

int64_t MemoryLimitBytes(const std::string& root) {
  int64_t limit = int64_t{sysconf(_SC_PAGE_SIZE)} * int64_t{sysconf(_SC_PHYS_PAGES)};
  std::ifstream groups(root + "/proc/self/cgroup");
  // Lines are `id:controllers:path`; version 2 names no controllers.
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (controllers.empty()) {
      LowerToGroups(root + "/sys/fs/cgroup", path, "memory.max", &limit);
    } else if (("," + controllers + ",").find(",memory,") != std::string::npos) {
      LowerToGroups(root + "/sys/fs/cgroup/memory", path, "memory.limit_in_bytes", &limit);
    }
  }
  return limit;
}

}  // namespace shardckpt
