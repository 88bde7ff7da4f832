// Devices, contexts, threads and forks.
#include <sys/wait.h>

#include <thread>
#include <vector>

#include "kernels.hpp"
#include "simulated_gpu.hpp"

namespace ng::cuda {
namespace {

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

}  // namespace
}  // namespace ng::cuda
