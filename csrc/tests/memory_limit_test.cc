#include "core/memory_limit.h"

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "tests/check.h"

namespace shardckpt {
namespace {

// A root directory with these files.
class Root {
 public:
  explicit Root(const std::vector<std::pair<std::string, std::string>>& files) {
    std::string pattern = std::filesystem::temp_directory_path() / "limit-XXXXXX";
    path_ = mkdtemp(pattern.data());
    for (const auto& [name, text] : files) {
      const std::filesystem::path path = path_ + name;
      std::filesystem::create_directories(path.parent_path());
      std::ofstream(path) << text;
    }
  }
  ~Root() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

TEST(TheMemoryLimitIsTheSmallestOfTheGroupsAndTheMachine) {
  const int64_t machine = int64_t{sysconf(_SC_PAGE_SIZE)} * int64_t{sysconf(_SC_PHYS_PAGES)};
  const std::string v2 = "/sys/fs/cgroup";
  const std::string v1 = "/sys/fs/cgroup/memory";
  struct Case {
    const char* name;
    std::vector<std::pair<std::string, std::string>> files;
    int64_t limit;
  };
  const std::vector<Case> cases = {
      {"no groups at all", {}, machine},
      {"version 2", {{"/proc/self/cgroup", "0::/a/b\n"}, {v2 + "/a/b/memory.max", "4096\n"}}, 4096},
      {"the parent's is smaller",
       {{"/proc/self/cgroup", "0::/a/b\n"},
        {v2 + "/a/b/memory.max", "max\n"},
        {v2 + "/a/memory.max", "7000\n"}},
       7000},
      {"in a container the group is the root",
       {{"/proc/self/cgroup", "0::/\n"}, {v2 + "/memory.max", "123456\n"}},
       123456},
      {"a path of the host",
       {{"/proc/self/cgroup", "0::/docker/0123\n"}, {v2 + "/memory.max", "5000\n"}},
       5000},
      {"no limit", {{"/proc/self/cgroup", "0::/a\n"}, {v2 + "/a/memory.max", "max\n"}}, machine},
      {"version 1 among others",
       {{"/proc/self/cgroup", "3:cpu,cpuacct:/x\n2:hugetlb,memory:/job\n1:name=systemd:/job\n"},
        {v1 + "/job/memory.limit_in_bytes", "9000\n"},
        {v1 + "/x/memory.limit_in_bytes", "1\n"}},
       9000},
      {"version 1 without a limit",
       {{"/proc/self/cgroup", "2:memory:/job\n"},
        {v1 + "/job/memory.limit_in_bytes", "9223372036854771712\n"}},
       machine},
      {"both versions",
       {{"/proc/self/cgroup", "2:memory:/job\n0::/a\n"},
        {v1 + "/job/memory.limit_in_bytes", "9000\n"},
        {v2 + "/a/memory.max", "8000\n"}},
       8000},
      {"nonsense", {{"/proc/self/cgroup", "\n:\nx\n0::"}, {v2 + "/memory.max", "-5\n"}}, machine},
  };
  for (const Case& c : cases) {
    const Root root(c.files);
    const int64_t limit = MemoryLimitBytes(root.path());
    EXPECT(limit == c.limit, std::string(c.name) + ": " + std::to_string(limit));
  }
  EXPECT(MemoryLimitBytes() > 0 && MemoryLimitBytes() <= machine, "of this process");
}

}  // namespace
}  // namespace shardckpt
