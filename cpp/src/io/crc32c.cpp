// Choice of the kernel, and the pass that copies too.
#include "io/crc32c.hpp"

#include <algorithm>
#include <cstring>

#include "io/cpu/kernels.hpp"
#include "narrowgauge/device.hpp"

namespace ng {
namespace {

checksum::Crc32cFn kernel() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx2) return checksum::kAvx2Crc32c;
#endif
  return checksum::kPortableCrc32c;
}

uint32_t update(checksum::Crc32cFn kernel, uint32_t crc, std::span<const std::byte> bytes) {
  return ~kernel(~crc, reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
}

}  // namespace

uint32_t crc32c(uint32_t crc, std::span<const std::byte> bytes) { return update(kernel(), crc, bytes); }

uint32_t crc32c_copy(uint32_t crc, std::span<const std::byte> bytes, std::byte* out) {
  // What was copied is still in the first-level cache when it is summed.
  constexpr size_t kBlock = 12 * 1024;
  const checksum::Crc32cFn chosen = kernel();
  while (!bytes.empty()) {
    const auto block = bytes.first(std::min(bytes.size(), kBlock));
    std::memcpy(out, block.data(), block.size());
    crc = update(chosen, crc, {out, block.size()});
    out += block.size();
    bytes = bytes.subspan(block.size());
  }
  return crc;
}

}  // namespace ng
