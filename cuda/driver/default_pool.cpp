// One DevicePool for each GPU, for whoever brings none.
#include <map>
#include <memory>
#include <mutex>

#include "narrowgauge/memory.hpp"

namespace ng {

std::shared_ptr<DevicePool> default_device_pool(int device) {
  struct Pools {
    std::mutex mutex;
    std::map<int, std::shared_ptr<DevicePool>> all;
  };
  static auto* pools = new Pools;  // never destroyed: tensors may outlive static destruction
  const std::lock_guard lock(pools->mutex);
  std::shared_ptr<DevicePool>& pool = pools->all[device];
  if (pool == nullptr) pool = std::make_shared<DevicePool>(device);
  return pool;
}

}  // namespace ng
