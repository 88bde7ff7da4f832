// Pointers of callers.
#include "driver/pointer.hpp"

#include <cstdint>

#include "driver/driver.hpp"

namespace ng::cuda {

void check_pointer(const void* pointer, const char* name, int device, size_t alignment) {
  if (pointer == nullptr) return;
  const auto address = reinterpret_cast<DevicePtr>(pointer);
  const Driver& driver = require_driver();
  auto type = MemoryType::host;
  int owner = -1;
  // Memory that the driver does not know is the host's.
  if (driver.cuPointerGetAttribute(&type, PointerAttribute::memory_type, address) != Result::success ||
      driver.cuPointerGetAttribute(&owner, PointerAttribute::device_ordinal, address) != Result::success) {
    type = MemoryType::host;
  }
  NG_CHECK(type != MemoryType::host, InvalidArgument, name, " lies in host memory, at ", pointer,
           "; expected memory of cuda:", device);
  NG_CHECK(owner == device, InvalidArgument, name, " lies on cuda:", owner, "; expected memory of cuda:", device,
           ", the stream's device");
  NG_CHECK(address % alignment == 0, InvalidArgument, name, " is at address ", pointer, "; expected alignment to ",
           alignment, " bytes");
}

}  // namespace ng::cuda
