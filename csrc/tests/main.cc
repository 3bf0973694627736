// Runs every TEST, or those whose name holds any of the arguments; exits 1 if an EXPECT was false,
// or if there was nothing to run.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "tests/check.h"

namespace shardckpt::testing {
namespace {

int num_failures = 0;

}  // namespace

std::vector<Test>& Tests() {
  static std::vector<Test> tests;
  return tests;
}

void RecordFailure(const char* file, int line, const std::string& what) {
  ++num_failures;
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

// Runs the tests whose name holds any of `parts`; all of them where there are none.
int RunAll(const std::vector<std::string>& parts) {
  size_t num_tests = 0;
  for (const Test& test : Tests()) {
    const std::string name = test.name;
    if (!parts.empty() && std::none_of(parts.begin(), parts.end(), [&](const std::string& part) {
          return name.find(part) != std::string::npos;
        })) {
      continue;
    }
    ++num_tests;
    const int failures_before = num_failures;
    test.run();
    std::printf("%s %s\n", num_failures == failures_before ? "ok    " : "FAILED", test.name);
  }
  std::printf("%zu tests, %d failures\n", num_tests, num_failures);
  return num_failures == 0 && num_tests > 0 ? 0 : 1;
}

}  // namespace shardckpt::testing

int main(int argc, char** argv) { return shardckpt::testing::RunAll({argv + 1, argv + argc}); }
