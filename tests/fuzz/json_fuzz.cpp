// libFuzzer: any text to the strict JSON reader.
#include <cstddef>
#include <cstdint>

#include "targets.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  ng::fuzz::json({reinterpret_cast<const char*>(data), size});
  return 0;
}
