// The codec in AVX2's vectors of eight floats; codes are packed by BMI2's bit extract and deposit.
#include <immintrin.h>

#include "quantize/codec.hpp"

namespace ng::codec {
namespace {

constexpr int kLanes = 8;

// Markstein's theorem: with y = RN(1 / s) and q within one unit of the last place of x / s, RN(q + r y) = RN(x / s)
// where r = x - s q. x y is within 1.5 units, so the first step makes q and the second rounds it.
inline __m256 divide_fast(__m256 x, __m256 s, __m256 y) {
  const __m256 near = _mm256_mul_ps(x, y);
  const __m256 q = _mm256_fmadd_ps(_mm256_fnmadd_ps(s, near, x), y, near);
  return _mm256_fmadd_ps(_mm256_fnmadd_ps(s, q, x), y, q);
}

template <int kBits>
constexpr uint64_t kEachCode = (uint64_t{0xff} >> (8 - kBits)) * 0x0101010101010101;

template <int kBits>
void pack_block(const uint8_t* codes, uint8_t* out) {
  for (int i = 0; i < 8; ++i) {
    uint64_t x;
    __builtin_memcpy(&x, codes + 8 * i, 8);
    x = _pext_u64(x, kEachCode<kBits>);
    __builtin_memcpy(out + kBits * i, &x, kBits);
  }
}

template <int kBits>
void unpack_block(const uint8_t* packed, uint8_t* codes) {
  for (int i = 0; i < 8; ++i) {
    uint64_t x = 0;
    __builtin_memcpy(&x, packed + kBits * i, kBits);
    x = _pdep_u64(x, kEachCode<kBits>);
    __builtin_memcpy(codes + 8 * i, &x, 8);
  }
}

#include "quantize/cpu/codec.inl"

}  // namespace

const Table kAvx2 = {absmax, range, scales, encode, decode, errors, pack, unpack};

}  // namespace ng::codec
