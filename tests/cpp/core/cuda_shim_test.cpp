// Our declarations of the driver API beside the toolkit's, where that is installed; and what is said where no driver
// is.
#include "core/shim/cuda.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <string>
#include <type_traits>

#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"

#ifdef NARROWGAUGE_CUDA_H
#include <cuda.h>

namespace ng::cuda {
namespace {

// Arguments are passed alike: pointers as pointers, numbers and enumerations of the same size as each other.
template <typename Ours, typename Theirs>
constexpr bool alike =
    sizeof(Ours) == sizeof(Theirs) && std::is_floating_point_v<Ours> == std::is_floating_point_v<Theirs>;

template <typename Ours, typename Theirs>
constexpr bool same_call = false;
template <typename R, typename... A, typename S, typename... B>
constexpr bool same_call<R (*)(A...), S (*)(B...)> = [] {
  if constexpr (sizeof...(A) == sizeof...(B)) {
    return alike<R, S> && (alike<A, B> && ...);
  } else {
    return false;
  }
}();

#define NG_COMPARE(name, parameters) static_assert(same_call<decltype(Driver::name), decltype(&::name)>, #name);
NG_CUDA_FUNCTIONS(NG_COMPARE)
#undef NG_COMPARE

template <typename A, typename B>
constexpr bool same_value(A a, B b) {
  return static_cast<long long>(a) == static_cast<long long>(b);
}

static_assert(same_value(Result::success, CUDA_SUCCESS) && same_value(Result::out_of_memory, CUDA_ERROR_OUT_OF_MEMORY));
static_assert(same_value(Result::invalid_value, CUDA_ERROR_INVALID_VALUE));
static_assert(same_value(Result::not_initialized, CUDA_ERROR_NOT_INITIALIZED));
static_assert(same_value(Result::deinitialized, CUDA_ERROR_DEINITIALIZED));
static_assert(same_value(Result::stub_library, CUDA_ERROR_STUB_LIBRARY));
static_assert(same_value(Result::no_device, CUDA_ERROR_NO_DEVICE));
static_assert(same_value(Result::invalid_device, CUDA_ERROR_INVALID_DEVICE));
static_assert(same_value(Result::invalid_image, CUDA_ERROR_INVALID_IMAGE));
static_assert(same_value(Result::invalid_context, CUDA_ERROR_INVALID_CONTEXT));
static_assert(same_value(Result::no_binary_for_gpu, CUDA_ERROR_NO_BINARY_FOR_GPU));
static_assert(same_value(Result::invalid_ptx, CUDA_ERROR_INVALID_PTX));
static_assert(same_value(Result::unsupported_ptx_version, CUDA_ERROR_UNSUPPORTED_PTX_VERSION));
static_assert(same_value(Result::invalid_handle, CUDA_ERROR_INVALID_HANDLE));
static_assert(same_value(Result::not_found, CUDA_ERROR_NOT_FOUND));
static_assert(same_value(Result::not_ready, CUDA_ERROR_NOT_READY));
static_assert(same_value(Result::illegal_address, CUDA_ERROR_ILLEGAL_ADDRESS));
static_assert(same_value(Result::launch_out_of_resources, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES));
static_assert(same_value(Result::launch_timeout, CUDA_ERROR_LAUNCH_TIMEOUT));
static_assert(same_value(Result::misaligned_address, CUDA_ERROR_MISALIGNED_ADDRESS));
static_assert(same_value(Result::launch_failed, CUDA_ERROR_LAUNCH_FAILED));
static_assert(same_value(Result::not_permitted, CUDA_ERROR_NOT_PERMITTED));
static_assert(same_value(Result::not_supported, CUDA_ERROR_NOT_SUPPORTED));
static_assert(same_value(Result::system_not_ready, CUDA_ERROR_SYSTEM_NOT_READY));
static_assert(same_value(Result::stream_capture_unsupported, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED));
static_assert(same_value(Result::stream_capture_invalidated, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
static_assert(same_value(Result::stream_capture_merge, CUDA_ERROR_STREAM_CAPTURE_MERGE));
static_assert(same_value(Result::stream_capture_unmatched, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED));
static_assert(same_value(Result::stream_capture_unjoined, CUDA_ERROR_STREAM_CAPTURE_UNJOINED));
static_assert(same_value(Result::stream_capture_isolation, CUDA_ERROR_STREAM_CAPTURE_ISOLATION));
static_assert(same_value(Result::captured_event, CUDA_ERROR_CAPTURED_EVENT));
static_assert(same_value(Result::unknown, CUDA_ERROR_UNKNOWN));

static_assert(same_value(DeviceAttribute::warp_size, CU_DEVICE_ATTRIBUTE_WARP_SIZE));
static_assert(same_value(DeviceAttribute::max_registers_per_block, CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK));
static_assert(same_value(DeviceAttribute::clock_rate_khz, CU_DEVICE_ATTRIBUTE_CLOCK_RATE));
static_assert(same_value(DeviceAttribute::multiprocessor_count, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT));
static_assert(same_value(DeviceAttribute::memory_clock_rate_khz, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE));
static_assert(same_value(DeviceAttribute::memory_bus_width_bits, CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH));
static_assert(same_value(DeviceAttribute::l2_cache_bytes, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE));
static_assert(same_value(DeviceAttribute::max_threads_per_multiprocessor,
                         CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR));
static_assert(same_value(DeviceAttribute::unified_addressing, CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING));
static_assert(same_value(DeviceAttribute::compute_capability_major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR));
static_assert(same_value(DeviceAttribute::compute_capability_minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR));
static_assert(same_value(DeviceAttribute::max_shared_bytes_per_multiprocessor,
                         CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR));
static_assert(same_value(DeviceAttribute::max_shared_bytes_per_block_optin,
                         CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN));
static_assert(same_value(DeviceAttribute::virtual_memory_management,
                         CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED));

static_assert(same_value(PointerAttribute::context, CU_POINTER_ATTRIBUTE_CONTEXT));
static_assert(same_value(PointerAttribute::memory_type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE));
static_assert(same_value(PointerAttribute::device_ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL));
static_assert(same_value(PointerAttribute::range_begin, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR));
static_assert(same_value(PointerAttribute::range_bytes, CU_POINTER_ATTRIBUTE_RANGE_SIZE));
static_assert(same_value(MemoryType::host, CU_MEMORYTYPE_HOST) && same_value(MemoryType::device, CU_MEMORYTYPE_DEVICE));
static_assert(same_value(MemoryType::array, CU_MEMORYTYPE_ARRAY));
static_assert(same_value(MemoryType::unified, CU_MEMORYTYPE_UNIFIED));
static_assert(same_value(FunctionAttribute::max_threads_per_block, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK));
static_assert(same_value(FunctionAttribute::shared_bytes, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES));
static_assert(same_value(FunctionAttribute::const_bytes, CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES));
static_assert(same_value(FunctionAttribute::local_bytes, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES));
static_assert(same_value(FunctionAttribute::registers, CU_FUNC_ATTRIBUTE_NUM_REGS));
static_assert(same_value(FunctionAttribute::ptx_version, CU_FUNC_ATTRIBUTE_PTX_VERSION));
static_assert(same_value(FunctionAttribute::binary_version, CU_FUNC_ATTRIBUTE_BINARY_VERSION));
static_assert(same_value(FunctionAttribute::max_dynamic_shared_bytes, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES));
static_assert(same_value(JitOption::info_log, CU_JIT_INFO_LOG_BUFFER));
static_assert(same_value(JitOption::info_log_bytes, CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES));
static_assert(same_value(JitOption::error_log, CU_JIT_ERROR_LOG_BUFFER));
static_assert(same_value(JitOption::error_log_bytes, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES));
static_assert(same_value(CaptureMode::global, CU_STREAM_CAPTURE_MODE_GLOBAL));
static_assert(same_value(CaptureMode::thread_local_, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
static_assert(same_value(CaptureMode::relaxed, CU_STREAM_CAPTURE_MODE_RELAXED));
static_assert(same_value(CaptureStatus::none, CU_STREAM_CAPTURE_STATUS_NONE));
static_assert(same_value(CaptureStatus::active, CU_STREAM_CAPTURE_STATUS_ACTIVE));
static_assert(same_value(CaptureStatus::invalidated, CU_STREAM_CAPTURE_STATUS_INVALIDATED));
static_assert(same_value(kStreamNonBlocking, CU_STREAM_NON_BLOCKING));
static_assert(same_value(kEventDisableTiming, CU_EVENT_DISABLE_TIMING));
static_assert(same_value(kHostAllocPortable, CU_MEMHOSTALLOC_PORTABLE));

static_assert(sizeof(MemoryLocation) == sizeof(CUmemLocation));
static_assert(sizeof(AllocationProperties) == sizeof(CUmemAllocationProp));
static_assert(offsetof(AllocationProperties, location) == offsetof(CUmemAllocationProp, location));
static_assert(offsetof(AllocationProperties, flags) == offsetof(CUmemAllocationProp, allocFlags));
static_assert(sizeof(AccessDescriptor) == sizeof(CUmemAccessDesc));
static_assert(offsetof(AccessDescriptor, flags) == offsetof(CUmemAccessDesc, flags));
static_assert(CU_MEM_LOCATION_TYPE_DEVICE == 1 && CU_MEM_ALLOCATION_TYPE_PINNED == 1);
static_assert(CU_MEM_ACCESS_FLAGS_PROT_READWRITE == 3);
static_assert(same_value(kGranularityMinimum, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
static_assert(same_value(kGranularityRecommended, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));

}  // namespace
}  // namespace ng::cuda
#endif

namespace ng {
namespace {

TEST(CudaTest, WithoutADriverAReasonIsGiven) {
  if (cuda::driver() != nullptr) GTEST_SKIP() << "there is a driver";
  EXPECT_NE(why_no_cuda(), "");
  EXPECT_EQ(cuda_device_count(), 0);
  try {
    cuda_device(0);
    FAIL() << "no error";
  } catch (const CudaError& error) {
    EXPECT_NE(std::string(error.what()).find(why_no_cuda()), std::string::npos) << error.what();
  }
  EXPECT_THROW(cuda_driver_version(), CudaError);
}

TEST(CudaTest, DevicesAreDescribed) {
  if (cuda::driver() == nullptr) GTEST_SKIP() << why_no_cuda();
  EXPECT_GE(cuda_driver_version(), cuda::kMinimumDriverVersion);
  ASSERT_GT(cuda_device_count(), 0);
  const CudaDevice device = cuda_device(0);
  EXPECT_NE(device.name, "");
  EXPECT_GE(device.capability, 80);
  EXPECT_GT(device.multiprocessors, 0);
  EXPECT_GT(device.memory_bytes, 0u);
  EXPECT_THROW(cuda_device(cuda_device_count()), InvalidArgument);
  EXPECT_THROW(cuda_device(-1), InvalidArgument);
}

TEST(CudaTest, ForkedChildrenAreRefused) {
  if (cuda::driver() == nullptr) GTEST_SKIP() << why_no_cuda();
  const pid_t child = fork();
  if (child == 0) {
    try {
      cuda_device(0);
      _exit(1);
    } catch (const CudaError&) {
      _exit(0);
    } catch (...) {
      _exit(2);
    }
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

}  // namespace
}  // namespace ng
