// The function that each instruction set fills for the io room. Included by instruction-set files: C headers only.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace ng::checksum {

inline constexpr uint32_t kCastagnoli = 0x82f63b78u;  // reflected: bit 31 is x^0

// The register, without the complements before and after, once `bytes` bytes have passed through it.
using Crc32cFn = uint32_t (*)(uint32_t state, const unsigned char* data, size_t bytes);

extern const Crc32cFn kPortableCrc32c;
extern const Crc32cFn kAvx2Crc32c;

}  // namespace ng::checksum
