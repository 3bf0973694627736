// Every seeded mistake must make a scenario complain; without one, none does.
#include <string>
#include <vector>

#include "core/seeded_mistakes.h"
#include "tests/check.h"
#include "tests/cuda_scenarios.h"

namespace shardckpt {
namespace {

using testing::CudaScenarios;
using testing::Scenario;

// The first complaint, and whose.
std::string FirstComplaint() {
  for (const Scenario& scenario : CudaScenarios()) {
    for (int seed = 0; seed < scenario.num_seeds; ++seed) {
      for (const std::string& problem : scenario.run(static_cast<uint64_t>(seed))) {
        return std::string(scenario.claim) + ": " + problem;
      }
    }
  }
  return "";
}

TEST(EverySeededMistakeIsNoticed) {
  for (int i = 0; i < static_cast<int>(Mistake::kEnd); ++i) {
    seeded_mistake = static_cast<Mistake>(i);
    const std::string complaint = FirstComplaint();
    std::printf("  mistake %2d: %s\n", i, complaint.c_str());
    if (seeded_mistake == Mistake::kNone) {
      EXPECT(complaint.empty(), complaint);
    } else {
      EXPECT(!complaint.empty(), "mistake " + std::to_string(i) + " went unnoticed");
    }
  }
}

}  // namespace
}  // namespace shardckpt
