// CRC32C by eight tables, eight bytes a step (Kounavis and Berry, 2005).
#include <string.h>

#include "io/cpu/kernels.hpp"

namespace ng::checksum {
namespace {

struct Tables {
  uint32_t entry[8][256];
};

// entry[k][b]: the register after byte b and then k zero bytes.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t state = byte;
    for (int bit = 0; bit < 8; ++bit) state = (state >> 1) ^ ((state & 1) != 0 ? kCastagnoli : 0);
    tables.entry[0][byte] = state;
  }
  for (int k = 1; k < 8; ++k) {
    for (int byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables.entry[k - 1][byte];
      tables.entry[k][byte] = (before >> 8) ^ tables.entry[0][before & 0xff];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t little_endian(const unsigned char* data) {
  return uint32_t{data[0]} | uint32_t{data[1]} << 8 | uint32_t{data[2]} << 16 | uint32_t{data[3]} << 24;
}

uint32_t sum(uint32_t state, const unsigned char* data, size_t bytes) {
  const auto& t = kTables.entry;
  for (; bytes >= 8; bytes -= 8, data += 8) {
    const uint32_t low = state ^ little_endian(data);
    const uint32_t high = little_endian(data + 4);
    state = t[7][low & 0xff] ^ t[6][low >> 8 & 0xff] ^ t[5][low >> 16 & 0xff] ^ t[4][low >> 24] ^  //
            t[3][high & 0xff] ^ t[2][high >> 8 & 0xff] ^ t[1][high >> 16 & 0xff] ^ t[0][high >> 24];
  }
  for (; bytes > 0; --bytes, ++data) state = (state >> 8) ^ t[0][(state ^ *data) & 0xff];
  return state;
}

uint32_t copy(uint32_t state, const unsigned char* data, size_t bytes, unsigned char* out) {
  constexpr size_t kBlock = 12288;  // what was copied is still in the first-level cache when it is summed
  while (bytes > 0) {
    const size_t block = bytes < kBlock ? bytes : kBlock;
    memcpy(out, data, block);
    state = sum(state, out, block);
    data += block;
    out += block;
    bytes -= block;
  }
  return state;
}

}  // namespace

const Kernels kPortable = {sum, copy};

}  // namespace ng::checksum
