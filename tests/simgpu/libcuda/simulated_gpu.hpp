// The stand-in driver, through the table that the library uses, and shorthands of its calls for tests.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "core/shim/cuda.hpp"

namespace ng::cuda {

inline constexpr size_t kGranule = size_t{2} << 20;
inline constexpr Result kOk = Result::success;
#define NG_OK(call) ASSERT_EQ(call, kOk)

using Environment = std::vector<std::pair<const char*, const char*>>;

class SimulatedGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    static bool used = false;
    if (std::exchange(used, true)) GTEST_SKIP() << "each test needs a process of its own: run them by ctest";
    report_path_ = std::filesystem::temp_directory_path() / ("simgpu-report-" + std::to_string(getpid()));
  }
  void TearDown() override {
    std::error_code ignored;
    if (!report_path_.empty()) std::filesystem::remove(report_path_, ignored);
  }

  // The driver with an environment, its first device's context current.
  void start(const Environment& environment = {}) {
    setenv("SIMGPU_REPORT", report_path_.c_str(), 1);
    for (const auto& [name, value] : environment) setenv(name, value, 1);
    cuda = driver();
    ASSERT_NE(cuda, nullptr) << why_unavailable();
    NG_OK(cuda->cuDevicePrimaryCtxRetain(&context, 0));
    NG_OK(cuda->cuCtxPushCurrent_v2(context));
  }

  std::string report() const {
    std::ostringstream text;
    text << std::ifstream(report_path_).rdbuf();
    return text.str();
  }

  // Mapped and accessible memory, whose handle is released: unmapping frees it.
  DevicePtr allocate(size_t bytes = kGranule, DeviceId device = 0) {
    DevicePtr pointer = 0;
    MemoryHandle handle = 0;
    AllocationProperties properties{};
    properties.type = 1;
    properties.location = {1, device};
    const AccessDescriptor access{{1, device}, 3};
    EXPECT_EQ(cuda->cuMemAddressReserve(&pointer, bytes, 0, 0, 0), kOk);
    EXPECT_EQ(cuda->cuMemCreate(&handle, bytes, &properties, 0), kOk);
    EXPECT_EQ(cuda->cuMemMap(pointer, bytes, 0, handle, 0), kOk);
    EXPECT_EQ(cuda->cuMemSetAccess(pointer, bytes, &access, 1), kOk);
    EXPECT_EQ(cuda->cuMemRelease(handle), kOk);
    return pointer;
  }

  template <typename T>
  T* pinned(size_t count) {
    void* pointer = nullptr;
    EXPECT_EQ(cuda->cuMemHostAlloc(&pointer, count * sizeof(T), 0), kOk);
    std::fill_n(static_cast<T*>(pointer), count, T{});
    return static_cast<T*>(pointer);
  }

  StreamHandle stream(unsigned flags = kStreamNonBlocking) {
    StreamHandle out = nullptr;
    EXPECT_EQ(cuda->cuStreamCreate(&out, flags), kOk);
    return out;
  }

  EventHandle event() {
    EventHandle out = nullptr;
    EXPECT_EQ(cuda->cuEventCreate(&out, kEventDisableTiming), kOk);
    return out;
  }

  Function function(const char* ptx, const char* name) {
    Function out = nullptr;
    Module module = nullptr;
    EXPECT_EQ(cuda->cuModuleLoadDataEx(&module, ptx, 0, nullptr, nullptr), kOk);
    EXPECT_EQ(cuda->cuModuleGetFunction(&out, module, name), kOk);
    return out;
  }

  Result launch(Function kernel, unsigned grid, unsigned block, StreamHandle on, std::vector<void*> parameters) {
    return cuda->cuLaunchKernel(kernel, grid, 1, 1, block, 1, 1, 0, on, parameters.data(), nullptr);
  }

  Result axpy(Function kernel, float a, DevicePtr x, DevicePtr y, unsigned n, StreamHandle on = nullptr) {
    return launch(kernel, (n + 127) / 128, 128, on, {&a, &x, &y, &n});
  }

  void upload(DevicePtr to, const std::vector<float>& values) {
    NG_OK(cuda->cuMemcpyHtoDAsync_v2(to, values.data(), values.size() * sizeof(float), nullptr));
  }

  std::vector<float> download(DevicePtr from, size_t count) {
    std::vector<float> out(count);
    EXPECT_EQ(cuda->cuMemcpyDtoHAsync_v2(out.data(), from, count * sizeof(float), nullptr), kOk);
    return out;
  }

  DevicePtr address(const void* host) { return reinterpret_cast<DevicePtr>(host); }

  const Driver* cuda = nullptr;
  Context context = nullptr;

 private:
  std::filesystem::path report_path_;
};

}  // namespace ng::cuda
