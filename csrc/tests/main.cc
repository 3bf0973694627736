// Runs every TEST; exits 1 if an EXPECT was false, or if there was nothing to run.
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

int RunAll() {
  for (const Test& test : Tests()) {
    const int failures_before = num_failures;
    test.run();
    std::printf("%s %s\n", num_failures == failures_before ? "ok    " : "FAILED", test.name);
  }
  std::printf("%zu tests, %d failures\n", Tests().size(), num_failures);
  return num_failures == 0 && !Tests().empty() ? 0 : 1;
}

}  // namespace shardckpt::testing

int main() { return shardckpt::testing::RunAll(); }
