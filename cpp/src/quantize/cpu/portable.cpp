// The codec in portable vectors of four floats, the size that every 64-bit machine has.
#include "quantize/codec.hpp"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "codes are a little-endian bit stream and are packed as little-endian words"
#endif

namespace ng::codec {
namespace {

constexpr int kLanes = 4;

// One instruction wherever there is no fused multiply-add to do better with.
template <typename F>
inline F divide_fast(F x, F s, F) {
  return x / s;
}

// Eight codes a word: neighbours are joined in three steps, to 2, 4 and 8 codes of N bits.
template <int kBits>
void pack_block(const uint8_t* codes, uint8_t* out) {
  for (int i = 0; i < 8; ++i) {
    uint64_t x;
    __builtin_memcpy(&x, codes + 8 * i, 8);
    x = (x & 0x00ff00ff00ff00ff) | (x & 0xff00ff00ff00ff00) >> (8 - kBits);
    x = (x & 0x0000ffff0000ffff) | (x & 0xffff0000ffff0000) >> (16 - 2 * kBits);
    x = (x & 0x00000000ffffffff) | (x & 0xffffffff00000000) >> (32 - 4 * kBits);
    __builtin_memcpy(out + kBits * i, &x, kBits);
  }
}

template <int kBits>
void unpack_block(const uint8_t* packed, uint8_t* codes) {
  constexpr uint64_t kOne = ~uint64_t{0};
  constexpr uint64_t kFour = kOne >> (64 - 4 * kBits);
  constexpr uint64_t kTwo = (kOne >> (64 - 2 * kBits)) * 0x0000000100000001;
  constexpr uint64_t kEach = (kOne >> (64 - kBits)) * 0x0001000100010001;
  for (int i = 0; i < 8; ++i) {
    uint64_t x = 0;
    __builtin_memcpy(&x, packed + kBits * i, kBits);
    x = (x & kFour) | (x & ~kFour) << (32 - 4 * kBits);
    x = (x & kTwo) | ((x & (kTwo << 2 * kBits)) << (16 - 2 * kBits));
    x = (x & kEach) | ((x & (kEach << kBits)) << (8 - kBits));
    __builtin_memcpy(codes + 8 * i, &x, 8);
  }
}

#include "quantize/cpu/codec.inl"

}  // namespace

const Table kPortable = {absmax, range, scales, encode, decode, errors, pack, unpack};

}  // namespace ng::codec
