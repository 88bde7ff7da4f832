// Asks the driver about an address.
#include "driver/pointer.hpp"

#include "driver/driver.hpp"

namespace ng::cuda {

void require_reachable(const void* pointer, int device, const char* name) {
  const Driver& driver = require_driver();
  const auto address = reinterpret_cast<DevicePtr>(pointer);
  MemoryType type{};
  const Result known = driver.cuPointerGetAttribute(&type, PointerAttribute::memory_type, address);
  NG_CHECK(known != Result::invalid_value, InvalidArgument, name, " is at ", pointer,
           ", which is memory of the host that is not pinned, or none at all; expected memory of cuda:", device);
  check(known, "cuPointerGetAttribute");
  if (type == MemoryType::host) return;
  int owner = -1;
  NG_CUDA(driver, cuPointerGetAttribute(&owner, PointerAttribute::device_ordinal, address));
  NG_CHECK(owner == device, InvalidArgument, name, " is memory of cuda:", owner, ", expected of cuda:", device);
}

}  // namespace ng::cuda
