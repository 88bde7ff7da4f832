// libFuzzer: a JSON header, a NUL byte and the data to the safetensors parser.
#include <cstddef>
#include <cstdint>

#include "targets.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  ng::fuzz::safetensors({reinterpret_cast<const char*>(data), size});
  return 0;
}
