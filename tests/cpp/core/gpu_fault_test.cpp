// What goes wrong on a GPU becomes a CudaError that says where. The last of these leaves the device unusable, so they
// have a process of their own: SimulatedDevice.Faults in CTest.
#include <gtest/gtest.h>

#include <string>

#include "driver/kernel.hpp"
#include "driver/pointer.hpp"
#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"
#include "narrowgauge/stream.hpp"

namespace ng {
namespace {

constexpr char kWritesToNull[] = R"(
.version 7.0
.target sm_80
.address_size 64
.visible .entry writes_to_null(.param .u32 value)
{
  .reg .b32 %r<2>;
  .reg .b64 %rd<2>;
  ld.param.u32 %r1, [value];
  mov.u64 %rd1, 0;
  st.global.u32 [%rd1], %r1;
  ret;
}
)";

class GpuFault : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!why_no_cuda().empty()) GTEST_SKIP() << why_no_cuda();
  }

  static std::string message_of(const auto& f) {
    try {
      f();
    } catch (const CudaError& error) {
      return error.what();
    }
    return "no CudaError";
  }
};

void expect_in(const std::string& message, const char* part) {
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

TEST_F(GpuFault, AnImageThatDoesNotLoad) {
  static const cuda::Image image{"broken", nullptr, ".version 7.0\n.target sm_80\n.address_size 64\nno instruction;\n"};
  const cuda::ContextScope context(0);
  expect_in(message_of([&] { cuda::find_kernel(image, "kernel", 0); }), "loading the kernels 'broken' on cuda:0");
}

TEST_F(GpuFault, AKernelThatIsNotThere) {
  static const cuda::Image image{"test", nullptr, kWritesToNull};
  const cuda::ContextScope context(0);
  expect_in(message_of([&] { cuda::find_kernel(image, "other", 0); }), "looking for kernel other in 'test'");
}

TEST_F(GpuFault, ABuildWithoutKernels) {
  static const cuda::Image image{"none", nullptr, ""};
  const cuda::ContextScope context(0);
  expect_in(message_of([&] { cuda::find_kernel(image, "kernel", 0); }), "made without nvcc");
}

TEST_F(GpuFault, ALaunchThatIsRefused) {
  static const cuda::Image image{"test", nullptr, kWritesToNull};
  const cuda::ContextScope context(0);
  const cuda::Launch launch{"writes_to_null", cuda::find_kernel(image, "writes_to_null", 0), {1}, {4096}};
  expect_in(message_of([&] { cuda::launch(launch, Stream(0, nullptr), 1u); }),
            "launching writes_to_null on cuda:0 with 1x1x1 blocks of 4096x1x1 threads");
}

TEST_F(GpuFault, PointersOfAnotherDevice) {
  if (cuda_device_count() < 2) GTEST_SKIP() << "there is one GPU";
  DevicePool other(1);
  void* block = other.allocate(64);
  const cuda::ContextScope context(0);
  try {
    cuda::check_pointer(block, "x", 0, 1);
    ADD_FAILURE() << "no error";
  } catch (const InvalidArgument& error) {
    expect_in(error.what(), "x lies on cuda:1; expected memory of cuda:0");
  }
  cuda::check_pointer(block, "x", 1, 64);
  other.deallocate(block, 64);
}

// Last: the device is lost.
TEST_F(GpuFault, AKernelThatFailsIsNamed) {
  static const cuda::Image image{"test", nullptr, kWritesToNull};
  const Stream stream = Stream::create(0);
  {
    const cuda::ContextScope context(0);
    const cuda::Launch launch{"writes_to_null", cuda::find_kernel(image, "writes_to_null", 0), {1}, {1}};
    cuda::launch(launch, stream, 1u);
  }
  const std::string message = message_of([&] { stream.synchronize(); });
  expect_in(message, "CUDA_ERROR_ILLEGAL_ADDRESS");
  expect_in(message, "on cuda:0, whose last kernel of this library was writes_to_null");
}

}  // namespace
}  // namespace ng
