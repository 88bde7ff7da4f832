// CRC32C (Castagnoli, reflected 0x82F63B78; RFC 3720, appendix B.4): the checksum of checkpoints.
//
// A checksum against damage, not against an adversary. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace ng {

// The checksum of what `crc` is of, followed by `bytes`; start with 0. crc32c(crc32c(0, a), b) == crc32c(0, a + b).
uint32_t crc32c(uint32_t crc, std::span<const std::byte> bytes);

// Copies `bytes` to `out` and returns the checksum, in one pass over memory. pre: no overlap.
uint32_t crc32c_copy(uint32_t crc, std::span<const std::byte> bytes, std::byte* out);

}  // namespace ng
