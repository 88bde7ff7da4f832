// The codec in AVX-512's vectors of sixteen floats; codes are packed by multiply-adds and byte permutes.
// GCC 12 warns of its own undefined vectors where these headers are inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "quantize/codec.hpp"

namespace ng::codec {
namespace {

constexpr int kLanes = 16;

// Markstein's theorem: with y = RN(1 / s) and q within one unit of the last place of x / s, RN(q + r y) = RN(x / s)
// where r = x - s q. x y is within 1.5 units, so the first step makes q and the second rounds it.
inline __m512 divide_fast(__m512 x, __m512 s, __m512 y) {
  const __m512 near = _mm512_mul_ps(x, y);
  const __m512 q = _mm512_fmadd_ps(_mm512_fnmadd_ps(s, near, x), y, near);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(s, q, x), y, q);
}

// Byte 8 i + j of the wide form (eight codes a word, in the low N bytes) is byte N i + j of the dense one.
template <int kBits>
struct Permute {
  alignas(64) uint8_t to_dense[64] = {};
  alignas(64) uint8_t to_wide[64] = {};
  constexpr Permute() {
    for (int i = 0; i < 8; ++i) {
      for (int j = 0; j < kBits; ++j) {
        to_dense[kBits * i + j] = (uint8_t)(8 * i + j);
        to_wide[8 * i + j] = (uint8_t)(kBits * i + j);
      }
    }
  }
};
template <int kBits>
constexpr Permute<kBits> kPermute;

template <int kBits>
void pack_block(const uint8_t* codes, uint8_t* out) {
  __m512i x = _mm512_loadu_si512(codes);
  if constexpr (kBits < 8) {
    // Pairs of bytes, then of words, are joined by a multiply-add with (1, 2^N), (1, 2^2N); pairs of 32 bits by a
    // shift.
    x = _mm512_maddubs_epi16(_mm512_set1_epi16((int16_t)((1 << (8 + kBits)) | 1)), x);
    x = _mm512_madd_epi16(x, _mm512_set1_epi32((1 << (16 + 2 * kBits)) | 1));
    const __m512i high = _mm512_slli_epi64(_mm512_srli_epi64(x, 32), 4 * kBits);
    x = _mm512_ternarylogic_epi64(high, x, _mm512_set1_epi64(0xffffffff), 0xf8);  // high | (x & mask)
    x = _mm512_permutexvar_epi8(_mm512_load_si512(kPermute<kBits>.to_dense), x);
  }
  _mm512_mask_storeu_epi8(out, ~__mmask64{0} >> (64 - 8 * kBits), x);
}

template <int kBits>
void unpack_block(const uint8_t* packed, uint8_t* codes) {
  __m512i x = _mm512_maskz_loadu_epi8(~__mmask64{0} >> (64 - 8 * kBits), packed);
  if constexpr (kBits < 8) {
    constexpr uint64_t kStarts = 0x0706050403020100 * kBits;  // where each of a word's codes starts
    x = _mm512_permutexvar_epi8(_mm512_load_si512(kPermute<kBits>.to_wide), x);
    x = _mm512_multishift_epi64_epi8(_mm512_set1_epi64((int64_t)kStarts), x);
    x = _mm512_and_si512(x, _mm512_set1_epi8((1 << kBits) - 1));
  }
  _mm512_storeu_si512(codes, x);
}

#include "quantize/cpu/codec.inl"

}  // namespace

const Table kAvx512 = {absmax, range, scales, encode, decode, errors, pack, unpack};

}  // namespace ng::codec
