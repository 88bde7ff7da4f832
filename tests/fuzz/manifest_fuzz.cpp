// libFuzzer: the text of a manifest, sealed with a right checksum, to its parser and rules.
#include <cstddef>
#include <cstdint>

#include "targets.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  ng::fuzz::manifest({reinterpret_cast<const char*>(data), size});
  return 0;
}
