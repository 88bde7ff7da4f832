// Choice of the kernels.
#include "io/crc32c.hpp"

#include "io/cpu/kernels.hpp"
#include "narrowgauge/device.hpp"

namespace ng {
namespace {

const checksum::Kernels& kernels() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx2) return checksum::kAvx2;
#endif
  return checksum::kPortable;
}

const unsigned char* data_of(std::span<const std::byte> bytes) {
  return reinterpret_cast<const unsigned char*>(bytes.data());
}

}  // namespace

uint32_t crc32c(uint32_t crc, std::span<const std::byte> bytes) {
  return ~kernels().sum(~crc, data_of(bytes), bytes.size());
}

uint32_t crc32c_copy(uint32_t crc, std::span<const std::byte> bytes, std::byte* out) {
  return ~kernels().copy(~crc, data_of(bytes), bytes.size(), reinterpret_cast<unsigned char*>(out));
}

}  // namespace ng
