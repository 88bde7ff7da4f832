// What a kernel does wrong is the error that hardware would give, and a report that says where.
#include <string>
#include <vector>

#include "kernels.hpp"
#include "simulated_gpu.hpp"

namespace ng::cuda {
namespace {

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
  EXPECT_NE(report().find("use-after-free global read of 4 bytes"), std::string::npos) << report();
}

TEST_F(SimulatedGpu, TwoBlocksWriteOneByte) {
  start();
  const Function kernel = function(kSameBytes, "same_bytes");
  DevicePtr out = allocate();
  NG_OK(launch(kernel, 1, 128, nullptr, {&out}));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  NG_OK(launch(kernel, 2, 128, nullptr, {&out}));
  EXPECT_EQ(cuda->cuStreamSynchronize(nullptr), Result::launch_failed);
  EXPECT_NE(report().find("two blocks write the same global byte"), std::string::npos) << report();
}

}  // namespace
}  // namespace ng::cuda
