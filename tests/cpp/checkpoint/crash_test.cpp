// A selection of tests/crash/enumerate.cpp, and what shows that it can fail.
#include <gtest/gtest.h>

#include "../../crash/scenarios.hpp"
#include "io/temporary_directory.hpp"

namespace ng {
namespace {

TEST(CheckpointCrashTest, NoFaultLosesACommittedStep) {
  const TemporaryDirectory directory;
  crash::Tally tally;
  for (const crash::Scenario& scenario : crash::kScenarios) {
    if (!scenario.large) crash::run(scenario, directory.path(), 150, 1, tally);
  }
  EXPECT_GT(tally.faults, 600u);
  for (size_t i = 0; i < tally.violations.size() && i < 5; ++i) ADD_FAILURE() << tally.violations[i];
}

// What a careless saver would leave must be called a violation.
TEST(CheckpointCrashTest, TheJudgeSeesDamage) {
  const TemporaryDirectory directory;
  const crash::Scenario& scenario = crash::kScenarios[0];
  crash::Run run(scenario);
  ASSERT_TRUE(run.go());
  const auto state = run.files().state();
  const std::filesystem::path run_directory = directory.path().string() + crash::kDirectory;
  const auto judged = [&](const std::function<void()>& damage) {
    state.write_to(directory.path());
    damage();
    return crash::judge(scenario, run_directory, true, true);
  };
  const auto step = [&](int number) { return run_directory / checkpoint_name(number); };
  const char* shard = "model-00000-of-00001.safetensors";
  EXPECT_EQ(judged([] {}), "");
  EXPECT_NE(judged([&] { std::filesystem::remove_all(step(2)); }), "");
  EXPECT_NE(judged([&] { std::filesystem::remove_all(step(1)); }), "");
  EXPECT_NE(judged([&] { std::filesystem::resize_file(step(2) / shard, 100); }), "");
  EXPECT_NE(judged([&] {
              std::filesystem::remove_all(step(2));
              std::filesystem::copy(step(1), step(2));  // the content of another step
            }),
            "");
}

}  // namespace
}  // namespace ng
