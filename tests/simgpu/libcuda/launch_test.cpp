// Modules, launches, counters.
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "simulated_gpu.hpp"

namespace ng::cuda {
namespace {

TEST_F(SimulatedGpu, LoadsOnlyPtxForIt) {
  start({{"SIMGPU_DRIVER_VERSION", "12040"}});
  Module module = nullptr;
  const auto load = [&](const std::string& image, std::string* log = nullptr) {
    char text[512] = "";
    JitOption options[] = {JitOption::error_log, JitOption::error_log_bytes};
    void* values[] = {text, reinterpret_cast<void*>(sizeof text)};
    const Result result = cuda->cuModuleLoadDataEx(&module, image.c_str(), 2, options, values);
    if (log != nullptr) *log = text;
    return result;
  };
  const auto with = [](std::string text, const std::string& from, const std::string& to) {
    return text.replace(text.find(from), from.size(), to);
  };
  std::string log;
  EXPECT_EQ(load("\x7f"
                 "ELF\x02\x01"),
            Result::no_binary_for_gpu);
  EXPECT_EQ(load("\x50\xed\x55\xba\x01"), Result::no_binary_for_gpu);
  EXPECT_EQ(load("hello"), Result::invalid_image);
  EXPECT_EQ(load(with(kAxpy, "sm_80", "sm_90"), &log), Result::invalid_ptx);
  EXPECT_NE(log.find("sm_90 does not run on sm_80"), std::string::npos) << log;
  EXPECT_EQ(load(with(kAxpy, "sm_80", "sm_70a")), Result::invalid_ptx);
  EXPECT_EQ(load(with(kAxpy, ".version 7.0", ".version 8.5")), Result::unsupported_ptx_version);
  EXPECT_EQ(load(with(kAxpy, "bra DONE", "bra GONE"), &log), Result::invalid_ptx);
  EXPECT_NE(log.find("GONE"), std::string::npos) << log;
  NG_OK(load(with(kAxpy, ".version 7.0", ".version 8.4")));
}

TEST_F(SimulatedGpu, RunsAKernel) {
  start();
  const Function kernel = function(kAxpy, "axpy");
  const DevicePtr x = allocate(), y = allocate();
  std::vector<float> values(1001);
  std::iota(values.begin(), values.end(), 0.f);
  upload(x, values);
  upload(y, std::vector<float>(1001, 1.f));
  NG_OK(axpy(kernel, 2.5f, x, y, 1001));
  const std::vector<float> out = download(y, 1001);
  for (size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], 1.f + 2.5f * values[i]) << i;
  EXPECT_EQ(report(), "");

  int value = 0;
  NG_OK(cuda->cuFuncGetAttribute(&value, FunctionAttribute::ptx_version, kernel));
  EXPECT_EQ(value, 70);
  EXPECT_EQ(cuda->cuLaunchKernel(kernel, 1, 1, 1, 1025, 1, 1, 0, nullptr, nullptr, nullptr), Result::invalid_value);
  float a = 0;
  void* parameters[] = {&a, &a, &a, &a};
  EXPECT_EQ(cuda->cuLaunchKernel(kernel, 1, 1, 1, 32, 1, 1, 50 << 10, nullptr, parameters, nullptr),
            Result::invalid_value);
  NG_OK(cuda->cuFuncSetAttribute(kernel, FunctionAttribute::max_dynamic_shared_bytes, 163 << 10));
  EXPECT_EQ(cuda->cuFuncSetAttribute(kernel, FunctionAttribute::max_dynamic_shared_bytes, 164 << 10),
            Result::invalid_value);
}

TEST_F(SimulatedGpu, VariablesOfAModule) {
  start();
  Module module = nullptr;
  NG_OK(cuda->cuModuleLoadDataEx(&module, kCounter, 0, nullptr, nullptr));
  Function kernel = nullptr;
  NG_OK(cuda->cuModuleGetFunction(&kernel, module, "count"));
  DevicePtr calls = 0;
  size_t bytes = 0;
  NG_OK(cuda->cuModuleGetGlobal_v2(&calls, &bytes, module, "calls"));
  EXPECT_EQ(bytes, 4u);
  DevicePtr out = allocate();
  unsigned step = 2, result = 0;
  NG_OK(launch(kernel, 1, 1, nullptr, {&step, &out}));
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&result, out, 4, nullptr));
  EXPECT_EQ(result, 420u);
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&result, calls, 4, nullptr));
  EXPECT_EQ(result, 42u);
  EXPECT_EQ(cuda->cuModuleGetFunction(&kernel, module, "missing"), Result::not_found);
  EXPECT_EQ(cuda->cuModuleGetGlobal_v2(&calls, &bytes, module, "missing"), Result::not_found);
  NG_OK(cuda->cuModuleUnload(module));
  EXPECT_EQ(launch(kernel, 1, 1, nullptr, {&step, &out}), Result::invalid_handle);
  EXPECT_EQ(cuda->cuModuleUnload(module), Result::invalid_handle);
}

TEST_F(SimulatedGpu, CountersOfLaunches) {
  const std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("simgpu-counters-" + std::to_string(getpid()));
  start({{"SIMGPU_COUNTERS", path.c_str()}});
  const Function kernel = function(kAxpy, "axpy");
  const DevicePtr x = allocate();
  upload(x, std::vector<float>(1000));
  NG_OK(axpy(kernel, 1.f, x, x, 1000));
  NG_OK(axpy(kernel, 1.f, x, x, 512));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  std::filesystem::remove(path);
  ASSERT_EQ(lines.size(), 2u);
  for (const char* part : {R"("kernel": "axpy")", R"("grid": [8, 1, 1])", R"("block": [128, 1, 1])",
                           R"("load": {"requests": 64, "sectors": 250, "bytes": 8000)"}) {
    EXPECT_NE(lines[0].find(part), std::string::npos) << part << " in " << lines[0];
  }
}

}  // namespace
}  // namespace ng::cuda
