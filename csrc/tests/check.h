// The smallest harness that names what failed: TEST registers a function, EXPECT records a failure.
#ifndef SHARDCKPT_TESTS_CHECK_H_
#define SHARDCKPT_TESTS_CHECK_H_

#include <cstdio>
#include <string>
#include <vector>

namespace shardckpt::testing {

struct Test {
  const char* name;
  void (*run)();
};

// Owned by main.cc; filled before main starts, read by one thread.
std::vector<Test>& Tests();
void RecordFailure(const char* file, int line, const std::string& what);

struct Registered {
  Registered(const char* name, void (*run)()) { Tests().push_back({name, run}); }
};

}  // namespace shardckpt::testing

#define TEST(name)                                                    \
  static void name();                                                 \
  static const ::shardckpt::testing::Registered name##_(#name, name); \
  static void name()

#define EXPECT(condition, what)                                                              \
  do {                                                                                       \
    if (!(condition)) {                                                                      \
      ::shardckpt::testing::RecordFailure(__FILE__, __LINE__,                                \
                                          std::string(#condition) + " is false: " + (what)); \
    }                                                                                        \
  } while (false)

#endif  // SHARDCKPT_TESTS_CHECK_H_
