// Memory of a device for tests, and what goes in and out of it.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include "driver/context.hpp"
#include "narrowgauge/device.hpp"
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

// A test with a GPU and kernels: 16 MiB of its memory, given out from next_ on, and a stream.
class CudaKernelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::driver() == nullptr) GTEST_SKIP() << why_no_cuda();
    if (cuda_architectures().empty()) GTEST_SKIP() << "this build has no kernels";
    context_.emplace(0);
    memory_.emplace(size_t{16} << 20, 0);
    next_ = memory_->data();
    stream_.emplace(Stream::create(0));
  }
  void TearDown() override {
    // What was given to it must not reach memory that comes later.
    if (stream_) {
      EXPECT_NO_THROW(stream_->synchronize());
    }
  }

  std::optional<cuda::ContextScope> context_;  // first: it outlives the others
  std::optional<CudaMemory> memory_;
  std::byte* next_ = nullptr;
  std::optional<Stream> stream_;
};

}  // namespace ng
