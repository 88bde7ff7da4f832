// Copies, fills, virtual memory.
#include <numeric>
#include <vector>

#include "kernels.hpp"
#include "simulated_gpu.hpp"

namespace ng::cuda {
namespace {

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

TEST_F(SimulatedGpu, KernelsReachPinnedMemory) {
  start({{"SIMGPU_DEVICES", "2"}});
  const Function kernel = function(kAxpy, "axpy");
  float* const x = pinned<float>(1000);
  float* const y = pinned<float>(1000);
  std::iota(x, x + 1000, 0.f);
  NG_OK(axpy(kernel, 2.f, address(x), address(y), 1000));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  for (size_t i = 0; i < 1000; ++i) ASSERT_EQ(y[i], 2.f * static_cast<float>(i)) << i;
  // Beside device memory, and what the host writes between launches.
  const DevicePtr sum = allocate();
  upload(sum, std::vector<float>(1000, 1.f));
  x[7] = 100.f;
  NG_OK(axpy(kernel, 1.f, address(x), sum, 1000));
  EXPECT_EQ(download(sum, 1000)[7], 101.f);
  // Another device, and memory that was freed and given out again.
  NG_OK(cuda->cuMemFreeHost(y));
  float* const z = pinned<float>(1000);
  EXPECT_EQ(z, y);
  Context second = nullptr;
  NG_OK(cuda->cuDevicePrimaryCtxRetain(&second, 1));
  NG_OK(cuda->cuCtxPushCurrent_v2(second));
  NG_OK(axpy(function(kAxpy, "axpy"), 1.f, address(x), address(z), 1000));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  EXPECT_EQ(z[7], 100.f);
  EXPECT_EQ(report(), "");
}

TEST_F(SimulatedGpu, PinnedMemoryHasBounds) {
  start();
  const Function kernel = function(kAxpy, "axpy");
  float* const x = pinned<float>(100);
  NG_OK(axpy(kernel, 1.f, address(x), address(x), 101));
  EXPECT_EQ(cuda->cuStreamSynchronize(nullptr), Result::illegal_address);
  EXPECT_NE(report().find("out-of-bounds global read"), std::string::npos) << report();
  EXPECT_NE(report().find("1 bytes before it"), std::string::npos) << report();
}

TEST_F(SimulatedGpu, PinnedMemoryAfterItsEnd) {
  start();
  const Function kernel = function(kAxpy, "axpy");
  float* const x = pinned<float>(100);
  NG_OK(cuda->cuMemFreeHost(x));
  NG_OK(axpy(kernel, 1.f, address(x), address(x), 100));
  EXPECT_EQ(cuda->cuStreamSynchronize(nullptr), Result::illegal_address);
  EXPECT_NE(report().find("use-after-free"), std::string::npos) << report();
  EXPECT_DEATH(x[0] = 1.f, "");
}

TEST_F(SimulatedGpu, PageableMemoryIsOutOfReach) {
  start();
  const Function kernel = function(kAxpy, "axpy");
  std::vector<float> x(100);
  NG_OK(axpy(kernel, 1.f, address(x.data()), address(x.data()), 100));
  EXPECT_EQ(cuda->cuStreamSynchronize(nullptr), Result::illegal_address);
  EXPECT_NE(report().find("pinned host memory at"), std::string::npos) << report();
}

}  // namespace
}  // namespace ng::cuda
