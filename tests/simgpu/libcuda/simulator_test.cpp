// Simulator processes that end, or do not start.
#include <signal.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "simulated_gpu.hpp"

namespace ng::cuda {
namespace {

// The processes that this one has started.
std::vector<pid_t> children() {
  std::vector<pid_t> out;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::ifstream file(task.path() / "children");
    for (pid_t pid; file >> pid;) out.push_back(pid);
  }
  return out;
}

TEST_F(SimulatedGpu, ADeadSimulatorIsAnError) {
  start();
  const Function kernel = function(kAxpy, "axpy");
  const DevicePtr x = allocate();
  upload(x, std::vector<float>(10));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  const std::vector<pid_t> simulators = children();
  ASSERT_EQ(simulators.size(), 1u);
  ASSERT_EQ(kill(simulators[0], SIGKILL), 0);
  NG_OK(axpy(kernel, 1.f, x, x, 10));
  EXPECT_EQ(cuda->cuStreamSynchronize(nullptr), Result::launch_failed);
  EXPECT_EQ(cuda->cuMemsetD8Async(x, 0, 1, nullptr), Result::launch_failed);
  EXPECT_NE(report().find("ended by signal 9"), std::string::npos) << report();
}

TEST_F(SimulatedGpu, ASimulatorThatDoesNotStartIsAnError) {
  start({{"SIMGPU_PYTHON", "/bin/false"}});
  Module module = nullptr;
  EXPECT_EQ(cuda->cuModuleLoadDataEx(&module, kAxpy, 0, nullptr, nullptr), Result::launch_failed);
  EXPECT_EQ(cuda->cuCtxSynchronize(), Result::launch_failed);
  EXPECT_NE(report().find("ended with status 1"), std::string::npos) << report();
}

}  // namespace
}  // namespace ng::cuda
