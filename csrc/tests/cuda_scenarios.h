// What must hold of staging from a CUDA device, each as a function that returns what went wrong.
// core_tests expects nothing; core_mistakes expects that every seeded mistake makes one complain.
#ifndef SHARDCKPT_TESTS_CUDA_SCENARIOS_H_
#define SHARDCKPT_TESTS_CUDA_SCENARIOS_H_

#include <cstdint>
#include <string>
#include <vector>

namespace shardckpt::testing {

struct Scenario {
  const char* claim;
  std::vector<std::string> (*run)(uint64_t seed);
  bool needs_fake;  // Left out on a real driver.
  int num_seeds;    // With different schedules.
};

const std::vector<Scenario>& CudaScenarios();

}  // namespace shardckpt::testing

#endif  // SHARDCKPT_TESTS_CUDA_SCENARIOS_H_
