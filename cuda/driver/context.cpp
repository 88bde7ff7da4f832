// Primary contexts, and what is remembered of each device.
#include "driver/context.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <vector>

#include "narrowgauge/device.hpp"

namespace ng::cuda {
namespace {

constexpr int kMaxDevices = 64;

struct DeviceState {
  std::atomic<Context> context{nullptr};
  std::atomic<const char*> last_kernel{nullptr};
};

DeviceState& state_of(int device) noexcept {
  static std::array<DeviceState, kMaxDevices> states;
  return states[static_cast<size_t>(device)];
}

Context retain(const Driver& driver, int device) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  std::atomic<Context>& context = state_of(device).context;
  if (Context known = context.load(std::memory_order_relaxed)) return known;
  Context retained = nullptr;
  DeviceId id = 0;
  NG_CUDA(driver, cuDeviceGet(&id, device));
  NG_CUDA(driver, cuDevicePrimaryCtxRetain(&retained, id));
  context.store(retained, std::memory_order_release);
  return retained;
}

Context context_of(const Driver& driver, int device) {
  const int count = std::min(cuda_device_count(), kMaxDevices);
  NG_CHECK(device >= 0 && device < count, InvalidArgument, "there is no device cuda:", device, ": the driver shows ",
           count);
  return retain(driver, device);
}

struct Checks {
  std::mutex mutex;
  std::vector<DeviceCheck*> all;
};

Checks& checks() {
  static auto* made = new Checks;  // never destroyed: streams may be waited for at exit
  return *made;
}

}  // namespace

ContextScope::ContextScope(int device) : driver_(require_driver()) {
  Context context = nullptr;
  if (device >= 0 && device < kMaxDevices) context = state_of(device).context.load(std::memory_order_acquire);
  if (context == nullptr) context = context_of(driver_, device);
  NG_CUDA(driver_, cuCtxPushCurrent_v2(context));
}

ContextScope::~ContextScope() {
  Context popped = nullptr;
  driver_.cuCtxPopCurrent_v2(&popped);
}

void note_kernel(int device, const char* name) noexcept {
  state_of(device).last_kernel.store(name, std::memory_order_relaxed);
}

void check_device(Result result, const char* what, int device) {
  if (result == Result::success) [[likely]] {
    return;
  }
  const char* kernel = state_of(device).last_kernel.load(std::memory_order_relaxed);
  if (kernel == nullptr) check(result, what);
  check(result, concat(what, " on cuda:", device, ", whose last kernel of this library was ", kernel,
                       " (CUDA_LAUNCH_BLOCKING=1 shows which one failed)")
                    .c_str());
}

void register_check(DeviceCheck& check) {
  const std::lock_guard lock(checks().mutex);
  auto& all = checks().all;
  if (std::find(all.begin(), all.end(), &check) == all.end()) all.push_back(&check);
}

void run_checks(int device) {
  std::vector<DeviceCheck*> all;
  {
    const std::lock_guard lock(checks().mutex);
    all = checks().all;
  }
  for (DeviceCheck* check : all) (*check)(device);
}

}  // namespace ng::cuda
