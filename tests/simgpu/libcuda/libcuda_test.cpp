// The stand-in driver, through the table that the library uses: what a program may rely on, and what it is caught at.
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/shim/cuda.hpp"
#include "kernels.hpp"

namespace ng::cuda {
namespace {

constexpr size_t kGranule = size_t{2} << 20;
constexpr Result kOk = Result::success;
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

  const Driver* cuda = nullptr;
  Context context = nullptr;

 private:
  std::filesystem::path report_path_;
};

TEST_F(SimulatedGpu, SaysWhatItIs) {
  start({{"SIMGPU_CC", "90"}, {"SIMGPU_DRIVER_VERSION", "12040"}, {"SIMGPU_MEMORY", "4194304"}});
  int value = 0;
  NG_OK(cuda->cuDriverGetVersion(&value));
  EXPECT_EQ(value, 12040);
  NG_OK(cuda->cuDeviceGetCount(&value));
  EXPECT_EQ(value, 1);
  NG_OK(cuda->cuDeviceGetAttribute(&value, DeviceAttribute::compute_capability_major, 0));
  EXPECT_EQ(value, 9);
  NG_OK(cuda->cuDeviceGetAttribute(&value, DeviceAttribute::max_shared_bytes_per_block_optin, 0));
  EXPECT_EQ(value, 227 << 10);
  char name[64];
  NG_OK(cuda->cuDeviceGetName(name, sizeof name, 0));
  EXPECT_STREQ(name, "simulated GPU sm_90");
  size_t bytes = 0;
  NG_OK(cuda->cuDeviceTotalMem_v2(&bytes, 0));
  EXPECT_EQ(bytes, 4194304u);
  const char* text = nullptr;
  NG_OK(cuda->cuGetErrorName(Result::illegal_address, &text));
  EXPECT_STREQ(text, "CUDA_ERROR_ILLEGAL_ADDRESS");
  DeviceId device = 0;
  EXPECT_EQ(cuda->cuDeviceGet(&device, 1), Result::invalid_device);
  Context popped = nullptr;
  NG_OK(cuda->cuCtxPopCurrent_v2(&popped));
  EXPECT_EQ(popped, context);
  EXPECT_EQ(cuda->cuCtxSynchronize(), Result::invalid_context);
}

TEST_F(SimulatedGpu, CopiesAndFills) {
  start();
  const DevicePtr device = allocate();
  std::vector<unsigned char> in(5000), out(5000);
  std::iota(in.begin(), in.end(), static_cast<unsigned char>(1));
  NG_OK(cuda->cuMemcpyHtoDAsync_v2(device + 3, in.data(), in.size(), nullptr));
  NG_OK(cuda->cuMemcpyAsync(device + 100'000, device + 3, in.size(), nullptr));
  NG_OK(cuda->cuMemsetD8Async(device + 100'000, 0xab, 10, nullptr));
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(out.data(), device + 100'000, out.size(), nullptr));
  std::fill_n(in.begin(), 10, static_cast<unsigned char>(0xab));
  EXPECT_EQ(in, out);

  unsigned char* const host = pinned<unsigned char>(64);
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(host, device + 100'000, 64, nullptr));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  EXPECT_TRUE(std::equal(host, host + 64, in.begin()));

  MemoryType type{};
  NG_OK(cuda->cuPointerGetAttribute(&type, PointerAttribute::memory_type, device + 7));
  EXPECT_EQ(type, MemoryType::device);
  NG_OK(cuda->cuPointerGetAttribute(&type, PointerAttribute::memory_type, reinterpret_cast<DevicePtr>(host + 7)));
  EXPECT_EQ(type, MemoryType::host);
  EXPECT_EQ(cuda->cuPointerGetAttribute(&type, PointerAttribute::memory_type, reinterpret_cast<DevicePtr>(&type)),
            Result::invalid_value);

  EXPECT_EQ(cuda->cuMemcpyHtoDAsync_v2(device + kGranule - 10, in.data(), 11, nullptr), Result::invalid_value);
  EXPECT_EQ(cuda->cuMemcpyHtoDAsync_v2(reinterpret_cast<DevicePtr>(host), in.data(), 10, nullptr),
            Result::invalid_value);
  EXPECT_EQ(cuda->cuMemcpyDtoHAsync_v2(reinterpret_cast<void*>(device), device, 10, nullptr), Result::invalid_value);
  NG_OK(cuda->cuMemFreeHost(host));
  EXPECT_EQ(cuda->cuMemFreeHost(host), Result::invalid_value);
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

TEST_F(SimulatedGpu, OutOfBoundsIsReportedWithItsPlace) {
  start();
  const Function kernel = function(kAxpy, "axpy");
  const DevicePtr x = allocate(), y = allocate();
  const unsigned n = kGranule / sizeof(float);
  NG_OK(cuda->cuMemsetD8Async(x, 0, kGranule, nullptr));
  NG_OK(cuda->cuMemsetD8Async(y, 0, kGranule, nullptr));
  NG_OK(axpy(kernel, 1.f, x + kGranule - 512, y, 129));
  EXPECT_EQ(cuda->cuCtxSynchronize(), Result::illegal_address);
  EXPECT_EQ(axpy(kernel, 1.f, x, y, n), Result::illegal_address) << "the error stays";
  const std::string text = report();
  for (const char* part : {"axpy", "out-of-bounds global read of 4 bytes", "block (1,0,0) thread (0,0,0)",
                           "PTX line 26", "axpy.cu:9", "1 bytes before it"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " in\n" << text;
  }
  // The last release ends the context with its error.
  NG_OK(cuda->cuDevicePrimaryCtxRelease_v2(0));
  NG_OK(cuda->cuDevicePrimaryCtxRetain(&context, 0));
  NG_OK(cuda->cuCtxSynchronize());
}

TEST_F(SimulatedGpu, MisalignedAccess) {
  start();
  const Function kernel = function(kAxpy, "axpy");
  const DevicePtr x = allocate();
  NG_OK(cuda->cuMemsetD8Async(x, 0, 4096, nullptr));
  NG_OK(axpy(kernel, 1.f, x + 2, x + 1024, 10));
  EXPECT_EQ(cuda->cuStreamSynchronize(nullptr), Result::misaligned_address);
}

TEST_F(SimulatedGpu, UninitialisedMemoryIsNotRead) {
  start();
  const Function kernel = function(kAxpy, "axpy");
  const DevicePtr x = allocate(), y = allocate();
  upload(x, std::vector<float>(100));
  // Uninitialised bytes stay so when they are copied.
  NG_OK(cuda->cuMemcpyAsync(x + 80, y, 4, nullptr));
  NG_OK(axpy(kernel, 1.f, x, x, 20));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  NG_OK(axpy(kernel, 1.f, x, x, 21));
  EXPECT_EQ(cuda->cuStreamSynchronize(nullptr), Result::launch_failed);
  EXPECT_NE(report().find("uninitialised global read"), std::string::npos) << report();
}

TEST_F(SimulatedGpu, MissingBarrier) {
  start();
  const Function kernel = function(kMissingBarrier, "missing_barrier");
  DevicePtr out = allocate();
  NG_OK(launch(kernel, 1, 128, nullptr, {&out}));
  EXPECT_EQ(cuda->cuStreamSynchronize(nullptr), Result::launch_failed);
  EXPECT_NE(report().find("no barrier between warps"), std::string::npos) << report();
}

TEST_F(SimulatedGpu, UseAfterUnmap) {
  start();
  const Function kernel = function(kAxpy, "axpy");
  const DevicePtr x = allocate(), y = allocate();
  upload(x, std::vector<float>(100));
  upload(y, std::vector<float>(100));
  NG_OK(axpy(kernel, 1.f, x, y, 100));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  NG_OK(cuda->cuMemUnmap(x, kGranule));
  float value = 0;
  EXPECT_EQ(cuda->cuMemcpyDtoHAsync_v2(&value, x, 4, nullptr), Result::invalid_value);
  NG_OK(axpy(kernel, 1.f, x, y, 100));
  EXPECT_EQ(cuda->cuStreamSynchronize(nullptr), Result::illegal_address);
}

TEST_F(SimulatedGpu, VirtualMemory) {
  start({{"SIMGPU_MEMORY", "8388608"}});
  AllocationProperties properties{};
  properties.type = 1;
  properties.location = {1, 0};
  const AccessDescriptor access{{1, 0}, 3};
  size_t granularity = 0, free = 0, total = 0;
  NG_OK(cuda->cuMemGetAllocationGranularity(&granularity, &properties, kGranularityMinimum));
  ASSERT_EQ(granularity, kGranule);
  DevicePtr pointer = 0;
  EXPECT_EQ(cuda->cuMemAddressReserve(&pointer, 12345, 0, 0, 0), Result::invalid_value);
  NG_OK(cuda->cuMemAddressReserve(&pointer, 64 * kGranule, 0, 0, 0));  // more than there is memory
  MemoryHandle handles[2] = {};
  for (MemoryHandle& handle : handles) NG_OK(cuda->cuMemCreate(&handle, 2 * kGranule, &properties, 0));
  MemoryHandle more = 0;
  EXPECT_EQ(cuda->cuMemCreate(&more, kGranule, &properties, 0), Result::out_of_memory);
  NG_OK(cuda->cuMemGetInfo_v2(&free, &total));
  EXPECT_EQ(free, 0u);
  EXPECT_EQ(total, 4 * kGranule);

  const DevicePtr end = pointer + 64 * kGranule;
  EXPECT_EQ(cuda->cuMemMap(end - kGranule, 2 * kGranule, 0, handles[0], 0), Result::invalid_value);
  NG_OK(cuda->cuMemMap(pointer, 2 * kGranule, 0, handles[0], 0));
  EXPECT_EQ(cuda->cuMemMap(pointer + kGranule, 2 * kGranule, 0, handles[1], 0), Result::invalid_value);
  EXPECT_EQ(cuda->cuMemsetD8Async(pointer, 1, 1, nullptr), Result::invalid_value) << "no access yet";
  NG_OK(cuda->cuMemMap(pointer + 2 * kGranule, 2 * kGranule, 0, handles[1], 0));
  NG_OK(cuda->cuMemSetAccess(pointer, 4 * kGranule, &access, 1));
  NG_OK(cuda->cuMemsetD8Async(pointer, 7, 4 * kGranule, nullptr));
  NG_OK(cuda->cuCtxSynchronize());

  EXPECT_EQ(cuda->cuMemUnmap(pointer, kGranule), Result::invalid_value) << "half a mapping";
  EXPECT_EQ(cuda->cuMemUnmap(pointer, 3 * kGranule), Result::invalid_value);
  EXPECT_EQ(cuda->cuMemAddressFree(pointer, 64 * kGranule), Result::invalid_value) << "still mapped";
  NG_OK(cuda->cuMemRelease(handles[1]));
  EXPECT_EQ(cuda->cuMemRelease(handles[1]), Result::invalid_value);
  NG_OK(cuda->cuMemUnmap(pointer, 4 * kGranule));
  NG_OK(cuda->cuMemGetInfo_v2(&free, &total));
  EXPECT_EQ(free, 2 * kGranule) << "the second handle was released";

  // The first one keeps its contents, at another address too.
  NG_OK(cuda->cuMemMap(pointer + 10 * kGranule, 2 * kGranule, 0, handles[0], 0));
  NG_OK(cuda->cuMemSetAccess(pointer + 10 * kGranule, 2 * kGranule, &access, 1));
  unsigned char byte = 0;
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&byte, pointer + 12 * kGranule - 1, 1, nullptr));
  EXPECT_EQ(byte, 7);
  NG_OK(cuda->cuMemUnmap(pointer + 10 * kGranule, 2 * kGranule));
  EXPECT_EQ(cuda->cuMemUnmap(pointer + 10 * kGranule, 2 * kGranule), Result::invalid_value);
  NG_OK(cuda->cuMemRelease(handles[0]));
  NG_OK(cuda->cuMemAddressFree(pointer, 64 * kGranule));
  EXPECT_EQ(cuda->cuMemAddressFree(pointer, 64 * kGranule), Result::invalid_value);
}

TEST_F(SimulatedGpu, EventsOrderStreams) {
  start();
  const Function kernel = function(kAxpy, "axpy");
  const DevicePtr x = allocate(), y = allocate();
  upload(x, std::vector<float>(1000, 1.f));
  upload(y, std::vector<float>(1000, 0.f));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  const StreamHandle streams[2] = {stream(), stream()};
  const EventHandle done = event();
  NG_OK(cuda->cuEventQuery(done));
  for (int i = 0; i < 10; ++i) {
    NG_OK(cuda->cuStreamWaitEvent(streams[i % 2], done, 0));
    NG_OK(axpy(kernel, 1.f, x, y, 1000, streams[i % 2]));
    NG_OK(cuda->cuEventRecord(done, streams[i % 2]));
  }
  NG_OK(cuda->cuEventSynchronize(done));
  NG_OK(cuda->cuEventQuery(done));
  EXPECT_EQ(download(y, 1000), std::vector<float>(1000, 10.f));
  NG_OK(cuda->cuEventDestroy_v2(done));
  EXPECT_EQ(cuda->cuEventQuery(done), Result::invalid_handle);
  for (const StreamHandle handle : streams) NG_OK(cuda->cuStreamDestroy_v2(handle));
  EXPECT_EQ(cuda->cuStreamSynchronize(streams[0]), Result::invalid_handle);
}

TEST_F(SimulatedGpu, AdversarialDelayShowsAMissingWait) {
  start({{"SIMGPU_DELAY", "adversarial"}});
  const DevicePtr device = allocate();
  NG_OK(cuda->cuMemsetD8Async(device, 0, 64, nullptr));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  int* const host = pinned<int>(2);
  const StreamHandle writer = stream(), reader = stream();
  host[0] = 42;
  NG_OK(cuda->cuMemcpyHtoDAsync_v2(device, &host[0], 4, writer));
  const EventHandle written = event();
  NG_OK(cuda->cuEventRecord(written, writer));
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&host[1], device, 4, reader));  // does not wait for it
  NG_OK(cuda->cuStreamSynchronize(reader));
  EXPECT_EQ(host[1], 0);
  NG_OK(cuda->cuStreamWaitEvent(reader, written, 0));
  host[0] = 43;  // pinned memory is read when the copy runs
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&host[1], device, 4, reader));
  NG_OK(cuda->cuStreamSynchronize(reader));
  EXPECT_EQ(host[1], 43);

  // Pageable memory has been read when the call returns.
  int pageable = 44;
  NG_OK(cuda->cuMemcpyHtoDAsync_v2(device, &pageable, 4, writer));
  pageable = 45;
  NG_OK(cuda->cuStreamSynchronize(writer));
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&pageable, device, 4, reader));
  EXPECT_EQ(pageable, 44);
}

TEST_F(SimulatedGpu, AdversarialDelayEndsForQueriesAndHostFunctions) {
  start({{"SIMGPU_DELAY", "adversarial"}});
  const StreamHandle queue = stream();
  std::atomic<int> calls{0};
  const auto count = [](void* argument) { ++*static_cast<std::atomic<int>*>(argument); };
  NG_OK(cuda->cuLaunchHostFunc(queue, count, &calls));
  while (calls.load() == 0) std::this_thread::yield();
  const DevicePtr device = allocate();
  NG_OK(cuda->cuMemsetD8Async(device, 1, kGranule, queue));
  EXPECT_EQ(cuda->cuStreamQuery(queue), Result::not_ready);
  while (cuda->cuStreamQuery(queue) == Result::not_ready) std::this_thread::yield();
  NG_OK(cuda->cuStreamQuery(queue));
}

TEST_F(SimulatedGpu, AdversarialDelayShowsMemoryFreedTooEarly) {
  start({{"SIMGPU_DELAY", "adversarial"}});
  const DevicePtr device = allocate();
  int* const host = pinned<int>(1);
  NG_OK(cuda->cuMemcpyHtoDAsync_v2(device, host, 4, nullptr));
  NG_OK(cuda->cuMemFreeHost(host));
  EXPECT_EQ(cuda->cuStreamSynchronize(nullptr), Result::illegal_address);
  EXPECT_NE(report().find("freed before its turn"), std::string::npos) << report();
}

TEST_F(SimulatedGpu, LegacyStreamOrdersBlockingStreamsOnly) {
  start({{"SIMGPU_DELAY", "adversarial"}});
  const DevicePtr device = allocate();
  NG_OK(cuda->cuMemsetD8Async(device, 0, 4, nullptr));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  const StreamHandle blocking = stream(0), free = stream();
  unsigned char* const host = pinned<unsigned char>(3);
  NG_OK(cuda->cuMemsetD8Async(device, 1, 1, nullptr));
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&host[0], device, 1, free));
  NG_OK(cuda->cuStreamSynchronize(free));
  EXPECT_EQ(host[0], 0);
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&host[1], device, 1, blocking));
  NG_OK(cuda->cuStreamSynchronize(blocking));
  EXPECT_EQ(host[1], 1);
  NG_OK(cuda->cuMemsetD8Async(device, 2, 1, blocking));
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&host[2], device, 1, nullptr));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  EXPECT_EQ(host[2], 2);
}

TEST_F(SimulatedGpu, CapturesAndReplays) {
  start();
  const Function kernel = function(kAxpy, "axpy");
  const DevicePtr x = allocate(), y = allocate();
  float* const host = pinned<float>(100);
  std::atomic<int> calls{0};
  const StreamHandle main = stream(), side = stream();
  const EventHandle fork = event(), join = event();
  CaptureStatus status{};
  NG_OK(cuda->cuStreamBeginCapture_v2(main, CaptureMode::thread_local_));
  NG_OK(cuda->cuStreamIsCapturing(main, &status));
  EXPECT_EQ(status, CaptureStatus::active);
  NG_OK(cuda->cuMemcpyHtoDAsync_v2(x, host, 400, main));
  NG_OK(cuda->cuEventRecord(fork, main));
  NG_OK(cuda->cuStreamWaitEvent(side, fork, 0));
  NG_OK(cuda->cuMemsetD8Async(y, 0, 400, side));
  NG_OK(cuda->cuLaunchHostFunc(side, [](void* argument) { ++*static_cast<std::atomic<int>*>(argument); }, &calls));
  NG_OK(cuda->cuEventRecord(join, side));
  NG_OK(cuda->cuStreamWaitEvent(main, join, 0));
  NG_OK(axpy(kernel, 3.f, x, y, 100, main));
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(host, y, 400, main));
  Graph graph = nullptr;
  NG_OK(cuda->cuStreamEndCapture(main, &graph));
  NG_OK(cuda->cuStreamIsCapturing(side, &status));
  EXPECT_EQ(status, CaptureStatus::none);
  GraphExec executable = nullptr;
  NG_OK(cuda->cuGraphInstantiateWithFlags(&executable, graph, 0));
  NG_OK(cuda->cuGraphDestroy(graph));
  EXPECT_EQ(calls.load(), 0) << "capturing runs nothing";
  for (int i = 0; i < 100; ++i) host[i] = static_cast<float>(i);
  NG_OK(cuda->cuGraphLaunch(executable, main));
  NG_OK(cuda->cuGraphLaunch(executable, side));
  NG_OK(cuda->cuGraphExecDestroy(executable));
  NG_OK(cuda->cuCtxSynchronize());
  for (int i = 0; i < 100; ++i) ASSERT_EQ(host[i], 9.f * static_cast<float>(i)) << i;
  EXPECT_EQ(calls.load(), 2);
}

TEST_F(SimulatedGpu, CaptureForbids) {
  start();
  const StreamHandle main = stream(0), side = stream();
  const EventHandle outside = event(), inside = event();
  const DevicePtr device = allocate();
  NG_OK(cuda->cuEventRecord(outside, side));
  Graph graph = nullptr;
  const auto begin = [&] { EXPECT_EQ(cuda->cuStreamBeginCapture_v2(main, CaptureMode::global), kOk); };
  const auto invalidated = [&] {
    EXPECT_EQ(cuda->cuMemsetD8Async(device, 0, 1, main), Result::stream_capture_invalidated);
    EXPECT_EQ(cuda->cuStreamEndCapture(main, &graph), Result::stream_capture_invalidated);
    EXPECT_EQ(graph, nullptr);
  };

  EXPECT_EQ(cuda->cuStreamEndCapture(main, &graph), static_cast<Result>(401));
  EXPECT_EQ(cuda->cuStreamBeginCapture_v2(nullptr, CaptureMode::global), Result::stream_capture_unsupported);
  begin();
  EXPECT_EQ(cuda->cuStreamBeginCapture_v2(main, CaptureMode::global), static_cast<Result>(401));
  EXPECT_EQ(cuda->cuStreamSynchronize(main), Result::stream_capture_unsupported);
  invalidated();
  begin();
  EXPECT_EQ(cuda->cuCtxSynchronize(), Result::stream_capture_unsupported);
  invalidated();
  begin();
  void* pointer = nullptr;
  EXPECT_EQ(cuda->cuMemHostAlloc(&pointer, 16, 0), Result::stream_capture_unsupported);
  invalidated();
  begin();
  EXPECT_EQ(cuda->cuMemsetD8Async(device, 0, 1, nullptr), static_cast<Result>(906));
  invalidated();
  begin();
  EXPECT_EQ(cuda->cuStreamWaitEvent(main, outside, 0), Result::stream_capture_isolation);
  invalidated();
  begin();
  NG_OK(cuda->cuEventRecord(inside, main));
  EXPECT_EQ(cuda->cuEventSynchronize(inside), Result::captured_event);
  invalidated();
  begin();
  int pageable = 0;
  EXPECT_EQ(cuda->cuMemcpyHtoDAsync_v2(device, &pageable, 4, main), Result::stream_capture_unsupported);
  invalidated();
  begin();
  NG_OK(cuda->cuEventRecord(inside, main));
  NG_OK(cuda->cuStreamWaitEvent(side, inside, 0));
  NG_OK(cuda->cuMemsetD8Async(device, 0, 1, side));
  EXPECT_EQ(cuda->cuStreamEndCapture(side, &graph), Result::stream_capture_unmatched);
  EXPECT_EQ(cuda->cuStreamEndCapture(main, &graph), Result::stream_capture_unjoined);
  NG_OK(cuda->cuMemsetD8Async(device, 0, 1, side));
  NG_OK(cuda->cuCtxSynchronize());
}

TEST_F(SimulatedGpu, AThreadMayBeExemptFromOthersCaptures) {
  start();
  const StreamHandle main = stream(0), side = stream();
  const EventHandle outside = event();
  NG_OK(cuda->cuEventRecord(outside, side));
  NG_OK(cuda->cuStreamBeginCapture_v2(main, CaptureMode::global));
  auto mode = CaptureMode::relaxed;
  NG_OK(cuda->cuThreadExchangeStreamCaptureMode(&mode));
  EXPECT_EQ(mode, CaptureMode::global);
  void* pointer = nullptr;
  NG_OK(cuda->cuMemHostAlloc(&pointer, 16, 0));
  NG_OK(cuda->cuMemFreeHost(pointer));
  const Result query = cuda->cuEventQuery(outside);
  EXPECT_TRUE(query == kOk || query == Result::not_ready);
  std::thread([&] {  // the mode is this thread's only
    NG_OK(cuda->cuCtxPushCurrent_v2(context));
    EXPECT_EQ(cuda->cuMemHostAlloc(&pointer, 16, 0), Result::stream_capture_unsupported);
  }).join();
  NG_OK(cuda->cuThreadExchangeStreamCaptureMode(&mode));
  EXPECT_EQ(mode, CaptureMode::relaxed);
  Graph graph = nullptr;
  EXPECT_EQ(cuda->cuStreamEndCapture(main, &graph), Result::stream_capture_invalidated);
}

TEST_F(SimulatedGpu, StreamsHaveIdsOfTheirOwn) {
  start();
  std::vector<unsigned long long> ids;
  for (int i = 0; i < 20; ++i) {
    const StreamHandle made = stream();
    unsigned long long id = 0;
    NG_OK(cuda->cuStreamGetId(made, &id));
    unsigned long long again = 0;
    NG_OK(cuda->cuStreamGetId(made, &again));
    EXPECT_EQ(id, again);
    ids.push_back(id);
    NG_OK(cuda->cuStreamDestroy_v2(made));  // its handle may come again
  }
  ids.emplace_back();
  NG_OK(cuda->cuStreamGetId(nullptr, &ids.back()));
  std::sort(ids.begin(), ids.end());
  EXPECT_EQ(std::adjacent_find(ids.begin(), ids.end()), ids.end());
}

TEST_F(SimulatedGpu, AdversarialReplayShowsAMissingEdge) {
  start({{"SIMGPU_DELAY", "adversarial"}});
  const DevicePtr device = allocate();
  NG_OK(cuda->cuMemsetD8Async(device, 0, 1, nullptr));
  unsigned char* const host = pinned<unsigned char>(1);
  for (const bool edge : {false, true}) {
    const StreamHandle main = stream(), side = stream();
    const EventHandle fork = event(), join = event(), written = event();
    Graph graph = nullptr;
    GraphExec executable = nullptr;
    NG_OK(cuda->cuStreamSynchronize(nullptr));
    NG_OK(cuda->cuStreamBeginCapture_v2(main, CaptureMode::relaxed));
    NG_OK(cuda->cuEventRecord(fork, main));
    NG_OK(cuda->cuStreamWaitEvent(side, fork, 0));
    NG_OK(cuda->cuMemsetD8Async(device, 5, 1, main));
    NG_OK(cuda->cuEventRecord(written, main));
    if (edge) {
      NG_OK(cuda->cuStreamWaitEvent(side, written, 0));
    }
    NG_OK(cuda->cuMemcpyDtoHAsync_v2(host, device, 1, side));
    NG_OK(cuda->cuEventRecord(join, side));
    NG_OK(cuda->cuStreamWaitEvent(main, join, 0));
    NG_OK(cuda->cuStreamEndCapture(main, &graph));
    NG_OK(cuda->cuGraphInstantiateWithFlags(&executable, graph, 0));
    NG_OK(cuda->cuGraphLaunch(executable, main));
    NG_OK(cuda->cuStreamSynchronize(main));
    EXPECT_EQ(host[0], edge ? 5 : 0);
  }
}

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

TEST_F(SimulatedGpu, NothingWorksAfterFork) {
  start();
  function(kAxpy, "axpy");
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    int count = 0;
    const bool refused = cuda->cuDeviceGetCount(&count) == Result::not_initialized &&
                         cuda->cuCtxSynchronize() == Result::not_initialized &&
                         cuda->cuInit(0) == Result::not_initialized;
    _exit(refused ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  NG_OK(cuda->cuCtxSynchronize());
}

TEST_F(SimulatedGpu, TwoDevices) {
  start({{"SIMGPU_DEVICES", "2"}});
  const DevicePtr x = allocate();
  upload(x, std::vector<float>(100, 4.f));
  Context second = nullptr;
  NG_OK(cuda->cuDevicePrimaryCtxRetain(&second, 1));
  NG_OK(cuda->cuCtxPushCurrent_v2(second));
  const DevicePtr y = allocate(kGranule, 1);
  int ordinal = 0;
  NG_OK(cuda->cuPointerGetAttribute(&ordinal, PointerAttribute::device_ordinal, y));
  EXPECT_EQ(ordinal, 1);
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  NG_OK(cuda->cuMemcpyAsync(y, x, 400, nullptr));
  const Function kernel = function(kAxpy, "axpy");
  NG_OK(axpy(kernel, 2.f, y, y, 100));
  EXPECT_EQ(download(y, 100), std::vector<float>(100, 12.f));
  NG_OK(axpy(kernel, 2.f, x, y, 100));  // the first device's memory
  EXPECT_EQ(cuda->cuStreamSynchronize(nullptr), Result::illegal_address);
  NG_OK(cuda->cuCtxPopCurrent_v2(&second));
  EXPECT_EQ(download(x, 100), std::vector<float>(100, 4.f)) << "the other device goes on";
}

TEST_F(SimulatedGpu, ThreadsShareIt) {
  start({{"SIMGPU_PROCESSES", "2"}});
  const Function kernel = function(kAxpy, "axpy");
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      NG_OK(cuda->cuCtxPushCurrent_v2(context));
      const StreamHandle own = stream();
      const DevicePtr x = allocate();
      float* const host = pinned<float>(256);
      for (int i = 0; i < 5; ++i) {
        NG_OK(cuda->cuMemcpyHtoDAsync_v2(x, host, 1024, own));
        NG_OK(axpy(kernel, 1.f, x, x, 256, own));
        NG_OK(cuda->cuMemsetD8Async(x + 4, 0, 4, own));
        NG_OK(cuda->cuMemcpyDtoHAsync_v2(host, x, 1024, own));
        NG_OK(cuda->cuStreamSynchronize(own));
        host[0] += 1.f;
      }
      EXPECT_EQ(host[0], 31.f);
      NG_OK(cuda->cuStreamDestroy_v2(own));
      NG_OK(cuda->cuMemUnmap(x, kGranule));
      NG_OK(cuda->cuMemAddressFree(x, kGranule));
      NG_OK(cuda->cuMemFreeHost(host));
    });
  }
  for (std::thread& thread : threads) thread.join();
  NG_OK(cuda->cuCtxSynchronize());
}

}  // namespace
}  // namespace ng::cuda
