// The codec in AVX-512's vectors of sixteen floats; codes are packed by multiply-adds and byte permutes.
#include <immintrin.h>

#include "quantize/codec.hpp"

namespace ng::codec {
namespace {

constexpr int kLanes = 16;
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));

constexpr bool kFused = true;
inline F fused(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

// Shifts by lane are one operation, by a count in a register two.
inline I shift_left(I x, int32_t n) { return (I)_mm512_sllv_epi32((__m512i)x, _mm512_set1_epi32(n)); }
inline I shift_right(I x, int32_t n) { return (I)_mm512_srav_epi32((__m512i)x, _mm512_set1_epi32(n)); }

inline F pair_of(float a, float b) { return (F)_mm512_mask_blend_ps(0xff00, _mm512_set1_ps(a), _mm512_set1_ps(b)); }
inline I pair_of(int32_t a, int32_t b) {
  return (I)_mm512_mask_blend_epi32(0xff00, _mm512_set1_epi32(a), _mm512_set1_epi32(b));
}

inline int32_t largest(I x) { return _mm512_reduce_max_epi32((__m512i)x); }

// There is an instruction for the smallest of eight.
inline int32_t largest(H x) {
  const __m128i most = _mm_max_epu16(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  return 0xffff ^ _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(most, _mm_set1_epi32(-1))), 0);
}

inline void narrow_codes(uint8_t* codes, const I* from) {
  // Packing works in 128-bit quarters, which leaves groups of four codes to be put in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_packus_epi32((__m512i)from[0], (__m512i)from[1]);
  const __m512i high = _mm512_packus_epi32((__m512i)from[2], (__m512i)from[3]);
  _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
}

inline void widen_codes(const uint8_t* codes, I* to) {
  for (int i = 0; i < 4; ++i) to[i] = (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + 16 * i)));
}

inline void widen_halves(const uint8_t* from, U* to) {
  to[0] = (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
}

inline void narrow_halves(uint8_t* to, const U* from) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)from[0]));
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

template <int kDistance>
inline F exchanged(F x) {
  return __builtin_shufflevector(x, x, 0 ^ kDistance, 1 ^ kDistance, 2 ^ kDistance, 3 ^ kDistance, 4 ^ kDistance,
                                 5 ^ kDistance, 6 ^ kDistance, 7 ^ kDistance, 8 ^ kDistance, 9 ^ kDistance,
                                 10 ^ kDistance, 11 ^ kDistance, 12 ^ kDistance, 13 ^ kDistance, 14 ^ kDistance,
                                 15 ^ kDistance);
}

// The bf16 values of fp codes, 32 at a time in 16-bit lanes: a table of 32 for the low codes, among them all subnormal
// ones, and a shift and an addition for the others.
constexpr bool kLookup = true;
class Lookup {
 public:
  // values: float bits of codes 0 to 31.
  Lookup(const I* values, const Element& e)
      : table_(_mm512_inserti64x4(_mm512_castsi256_si512(high_half(values[0])), high_half(values[1]), 1)),
        magnitude_(_mm512_set1_epi16((int16_t)((1 << (e.bits - 1)) - 1))),
        to_mantissa_(_mm512_set1_epi16((int16_t)(7 - e.fp.mantissa_bits))),
        rebias_(_mm512_set1_epi16((int16_t)(e.fp.rebias >> 16))),
        special_(_mm512_set1_epi16((int16_t)e.fp.special)),
        to_sign_(_mm512_set1_epi16((int16_t)(16 - e.bits))) {}

  template <bool kAllInTable>
  U pairs(const uint8_t* codes) const {
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)codes));
    __m512i value;
    if constexpr (kAllInTable) {
      value = _mm512_permutexvar_epi16(code, table_);
    } else {
      const __m512i magnitude = _mm512_and_si512(code, magnitude_);
      const __mmask32 low = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(32));
      const __mmask32 special = _mm512_cmpge_epu16_mask(magnitude, special_);
      value = _mm512_add_epi16(_mm512_sllv_epi16(magnitude, to_mantissa_), rebias_);
      value = _mm512_mask_permutexvar_epi16(value, low, code, table_);
      value = _mm512_mask_blend_epi16(special, value, _mm512_or_si512(value, _mm512_set1_epi16(0x7f80)));
    }
    const __m512i sign = _mm512_sllv_epi16(code, to_sign_);
    return (U)_mm512_ternarylogic_epi64(value, sign, _mm512_set1_epi16((int16_t)0x8000),
                                        0xf8);  // value | (sign & mask)
  }

 private:
  static __m256i high_half(I x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)x, 16)); }

  __m512i table_, magnitude_, to_mantissa_, rebias_, special_, to_sign_;
};

#include "quantize/cpu/codec.inl"

}  // namespace

const Table kAvx512 = {absmax, range, scales, scale_values, spread, encode, decode,
                       errors, pack,  unpack, widen,        add,    narrow, hadamard};

}  // namespace ng::codec
