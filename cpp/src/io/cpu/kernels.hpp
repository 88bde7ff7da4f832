// The functions that each instruction set fills for the io room. Included by instruction-set files: C headers only.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace ng::checksum {

inline constexpr uint32_t kCastagnoli = 0x82f63b78u;  // reflected: bit 31 is x^0

struct Kernels {
  // The register, without the complements before and after, once `bytes` bytes have passed through it.
  uint32_t (*sum)(uint32_t state, const unsigned char* data, size_t bytes);
  // The same, and a copy to `out` in one pass. Long copies go past the caches, which they would only empty.
  uint32_t (*copy)(uint32_t state, const unsigned char* data, size_t bytes, unsigned char* out);
};

extern const Kernels kPortable;
extern const Kernels kAvx2;

}  // namespace ng::checksum
