// The simulated GPU's environment, and the properties of the GPUs it takes after.
#include "settings.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <thread>

namespace ng::cuda {
namespace {

std::string text_of(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : otherwise;
}

template <typename Number>
Number number_of(const char* name, Number otherwise) {
  const std::string text = text_of(name, "");
  return text.empty() ? otherwise : static_cast<Number>(std::strtoull(text.c_str(), nullptr, 10));
}

// Of A100, A10, L40S, H100, B200, B300 and RTX 5090.
struct Properties {
  int compute_capability;
  int multiprocessors;
  int threads_per_multiprocessor;
  int shared_kib_per_multiprocessor;
  int shared_kib_per_block;
  int clock_khz;
  int memory_clock_khz;
  int memory_bus_bits;
  int l2_mib;
};
constexpr Properties kProperties[] = {
    {80, 108, 2048, 164, 163, 1'410'000, 1'215'000, 5120, 40},
    {86, 72, 1536, 100, 99, 1'695'000, 6'251'000, 384, 6},
    {89, 142, 1536, 100, 99, 2'520'000, 9'001'000, 384, 96},
    {90, 132, 2048, 228, 227, 1'980'000, 2'619'000, 5120, 50},
    {100, 148, 2048, 228, 227, 1'965'000, 3'996'000, 8192, 126},
    {103, 148, 2048, 228, 227, 1'965'000, 3'996'000, 8192, 126},
    {120, 170, 1536, 100, 99, 2'407'000, 14'001'000, 512, 96},
};

const Properties& properties() {
  const auto* found = std::find_if(std::begin(kProperties), std::end(kProperties), [](const Properties& row) {
    return row.compute_capability == settings().compute_capability;
  });
  if (found == std::end(kProperties)) {
    report("SIMGPU_CC names a compute capability that is not simulated");
    fail(Result::invalid_value);
  }
  return *found;
}

}  // namespace

const Settings& settings() {
  static const Settings instance = [] {
    Settings out;
    out.devices = number_of("SIMGPU_DEVICES", out.devices);
    out.compute_capability = number_of("SIMGPU_CC", out.compute_capability);
    out.memory = number_of("SIMGPU_MEMORY", out.memory);
    out.driver_version = number_of("SIMGPU_DRIVER_VERSION", out.driver_version);
    out.processes = number_of("SIMGPU_PROCESSES", std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
    out.adversarial = text_of("SIMGPU_DELAY", "") == "adversarial";
    out.report = text_of("SIMGPU_REPORT", "");
    out.python = text_of("SIMGPU_PYTHON", out.python.c_str());
    return out;
  }();
  return instance;
}

int device_attribute(DeviceAttribute attribute) {
  const Properties& gpu = properties();
  switch (attribute) {
    case DeviceAttribute::warp_size: return 32;
    case DeviceAttribute::max_registers_per_block: return 65536;
    case DeviceAttribute::clock_rate_khz: return gpu.clock_khz;
    case DeviceAttribute::multiprocessor_count: return gpu.multiprocessors;
    case DeviceAttribute::memory_clock_rate_khz: return gpu.memory_clock_khz;
    case DeviceAttribute::memory_bus_width_bits: return gpu.memory_bus_bits;
    case DeviceAttribute::l2_cache_bytes: return gpu.l2_mib << 20;
    case DeviceAttribute::max_threads_per_multiprocessor: return gpu.threads_per_multiprocessor;
    case DeviceAttribute::unified_addressing: return 1;
    case DeviceAttribute::compute_capability_major: return gpu.compute_capability / 10;
    case DeviceAttribute::compute_capability_minor: return gpu.compute_capability % 10;
    case DeviceAttribute::max_shared_bytes_per_multiprocessor: return gpu.shared_kib_per_multiprocessor << 10;
    case DeviceAttribute::max_shared_bytes_per_block_optin: return gpu.shared_kib_per_block << 10;
    case DeviceAttribute::virtual_memory_management: return 1;
  }
  return -1;
}

void report(const std::string& text) {
  const std::string line = "simgpu: " + text + '\n';
  const std::string& path = settings().report;
  const int file = path.empty() ? STDERR_FILENO : open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (file < 0) return;
  // In one write: the lines of several threads and processes do not mix.
  [[maybe_unused]] const ssize_t written = write(file, line.data(), line.size());
  if (file != STDERR_FILENO) close(file);
}

}  // namespace ng::cuda
