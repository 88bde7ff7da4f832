// Memory of a device for tests, and what goes in and out of it.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

#include "core/shim/cuda.hpp"
#include "narrowgauge/stream.hpp"

namespace ng {

// Whole granules of memory that is mapped for a device and nothing else uses. The context of the device is current
// where it is made and destroyed.
class CudaMemory {
 public:
  CudaMemory(size_t bytes, int device) {
    cuda::AllocationProperties properties{};
    properties.type = 1;
    properties.location = {1, device};
    size_t granule = 0;
    check(driver().cuMemGetAllocationGranularity(&granule, &properties, cuda::kGranularityMinimum));
    bytes_ = (bytes / granule + 1) * granule;
    cuda::MemoryHandle handle = 0;
    const cuda::AccessDescriptor access{{1, device}, 3};
    check(driver().cuMemAddressReserve(&address_, bytes_, 0, 0, 0));
    check(driver().cuMemCreate(&handle, bytes_, &properties, 0));
    check(driver().cuMemMap(address_, bytes_, 0, handle, 0));
    check(driver().cuMemSetAccess(address_, bytes_, &access, 1));
    check(driver().cuMemRelease(handle));
  }
  ~CudaMemory() {
    driver().cuMemUnmap(address_, bytes_);
    driver().cuMemAddressFree(address_, bytes_);
  }
  CudaMemory(const CudaMemory&) = delete;
  CudaMemory& operator=(const CudaMemory&) = delete;

  std::byte* data() const { return reinterpret_cast<std::byte*>(address_); }
  size_t bytes() const { return bytes_; }

  // Copy, in the order of the stream; the host's memory is pageable, so it may be changed or read right after.
  static void upload(std::byte* to, std::span<const std::byte> from, const Stream& stream) {
    if (from.empty()) return;
    check(driver().cuMemcpyHtoDAsync_v2(reinterpret_cast<cuda::DevicePtr>(to), from.data(), from.size(), of(stream)));
  }
  static std::vector<std::byte> download(const std::byte* from, size_t bytes, const Stream& stream) {
    std::vector<std::byte> to(bytes);
    if (bytes == 0) return to;
    check(driver().cuMemcpyDtoHAsync_v2(to.data(), reinterpret_cast<cuda::DevicePtr>(from), bytes, of(stream)));
    return to;
  }
  static void fill(std::byte* to, unsigned char value, size_t bytes, const Stream& stream) {
    if (bytes == 0) return;
    check(driver().cuMemsetD8Async(reinterpret_cast<cuda::DevicePtr>(to), value, bytes, of(stream)));
  }

 private:
  static const cuda::Driver& driver() { return *cuda::driver(); }
  static cuda::StreamHandle of(const Stream& stream) { return reinterpret_cast<cuda::StreamHandle>(stream.handle()); }
  static void check(cuda::Result result) { ASSERT_EQ(result, cuda::Result::success); }

  cuda::DevicePtr address_ = 0;
  size_t bytes_ = 0;
};

// The device's primary context, current while this lives.
class CudaContext {
 public:
  explicit CudaContext(int device) {
    cuda::Context context = nullptr;
    cuda::driver()->cuDevicePrimaryCtxRetain(&context, device);
    cuda::driver()->cuCtxPushCurrent_v2(context);
  }
  ~CudaContext() {
    cuda::Context context = nullptr;
    cuda::driver()->cuCtxPopCurrent_v2(&context);
  }
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;
};

}  // namespace ng
