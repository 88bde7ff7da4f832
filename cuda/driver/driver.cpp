// Errors of the driver, and the GPUs that it shows.
#include "driver/driver.hpp"

#include <unistd.h>

#include <array>

#include "narrowgauge/device.hpp"

namespace ng {
namespace cuda {
namespace {

const char* or_unknown(const char* text) noexcept { return text != nullptr ? text : "unknown"; }

}  // namespace

const Driver& require_driver() {
  const Driver* table = driver();
  NG_CHECK(table != nullptr, CudaError, "CUDA cannot be used: ", why_unavailable());
  NG_CHECK(getpid() == driver_process(), CudaError, "CUDA was started by process ", driver_process(),
           " and does not work in this forked child of it: start children with spawn instead");
  return *table;
}

void check(Result result, const char* what) {
  if (result == Result::success) [[likely]] {
    return;
  }
  const Driver& table = *driver();
  const char* name = nullptr;
  const char* text = nullptr;
  table.cuGetErrorName(result, &name);
  table.cuGetErrorString(result, &text);
  NG_CHECK(result != Result::out_of_memory, OutOfMemory, what, ": ", or_unknown(name), " (", or_unknown(text), ')');
  throw CudaError(concat(what, ": ", or_unknown(name), " (", or_unknown(text), ')'));
}

}  // namespace cuda

std::string why_no_cuda() { return cuda::why_unavailable(); }

int cuda_device_count() {
  if (cuda::driver() == nullptr) return 0;
  int count = 0;
  NG_CUDA(cuda::require_driver(), cuDeviceGetCount(&count));
  return count;
}

CudaDevice cuda_device(int index) {
  const cuda::Driver& driver = cuda::require_driver();
  const int count = cuda_device_count();
  NG_CHECK(index >= 0 && index < count, InvalidArgument, "there is no device cuda:", index, ": the driver shows ",
           count);
  cuda::DeviceId device = 0;
  NG_CUDA(driver, cuDeviceGet(&device, index));
  std::array<char, 256> name{};
  NG_CUDA(driver, cuDeviceGetName(name.data(), static_cast<int>(name.size()) - 1, device));
  size_t memory = 0;
  NG_CUDA(driver, cuDeviceTotalMem_v2(&memory, device));
  const auto attribute = [&](cuda::DeviceAttribute which) {
    int value = 0;
    NG_CUDA(driver, cuDeviceGetAttribute(&value, which, device));
    return value;
  };
  using Attribute = cuda::DeviceAttribute;
  return {
      .name = name.data(),
      .capability =
          10 * attribute(Attribute::compute_capability_major) + attribute(Attribute::compute_capability_minor),
      .multiprocessors = attribute(Attribute::multiprocessor_count),
      .memory_bytes = memory,
      .l2_bytes = static_cast<uint64_t>(attribute(Attribute::l2_cache_bytes)),
      .shared_bytes = static_cast<uint64_t>(attribute(Attribute::max_shared_bytes_per_block_optin)),
  };
}

int cuda_driver_version() {
  int version = 0;
  NG_CUDA(cuda::require_driver(), cuDriverGetVersion(&version));
  return version;
}

std::string_view cuda_architectures() noexcept { return NARROWGAUGE_CUDA_ARCHITECTURES; }

}  // namespace ng
