// The codec in AVX2's vectors of eight floats; codes of 4 and 8 bits are packed in them too, others by BMI2's bit
// extract and deposit.
#include <immintrin.h>

#include "quantize/codec.hpp"

namespace ng::codec {
namespace {

constexpr int kLanes = 8;
typedef float F __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));
typedef uint32_t U __attribute__((vector_size(32)));
typedef uint16_t H __attribute__((vector_size(16)));

constexpr bool kFused = true;
inline F fused(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

// Shifts by lane are one operation, by a count in a register two.
inline I shift_left(I x, int32_t n) { return (I)_mm256_sllv_epi32((__m256i)x, _mm256_set1_epi32(n)); }
inline I shift_right(I x, int32_t n) { return (I)_mm256_srav_epi32((__m256i)x, _mm256_set1_epi32(n)); }

// Sixteen elements share a scale.
inline F pair_of(float a, float) { return a - F{}; }
inline I pair_of(int32_t a, int32_t) { return a - I{}; }

inline int32_t largest(I x) {
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1)));
}

// There is an instruction for the smallest of eight.
inline int32_t largest(H x) {
  return 0xffff ^ _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128((__m128i)x, _mm_set1_epi32(-1))), 0);
}

inline void narrow_codes(uint8_t* codes, const I* from) {
  // Packing works in 128-bit halves, which leaves groups of four codes to be put in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int i = 0; i < 2; ++i, from += 4) {
    const __m256i low = _mm256_packus_epi32((__m256i)from[0], (__m256i)from[1]);
    const __m256i high = _mm256_packus_epi32((__m256i)from[2], (__m256i)from[3]);
    const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    _mm256_storeu_si256((__m256i*)(codes + 32 * i), packed);
  }
}

inline void widen_codes(const uint8_t* codes, I* to) {
  for (int i = 0; i < 8; ++i) to[i] = (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + 8 * i)));
}

inline void widen_halves(const uint8_t* from, U* to) {
  for (int i = 0; i < 2; ++i) to[i] = (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + 16 * i)));
}

inline void narrow_halves(uint8_t* to, const U* from) {
  const __m256i packed = _mm256_packus_epi32((__m256i)from[0], (__m256i)from[1]);
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(packed, 0xd8));
}

template <int kBits>
constexpr uint64_t kEachCode = (uint64_t{0xff} >> (8 - kBits)) * 0x0101010101010101;

template <int kBits>
void pack_block(const uint8_t* codes, uint8_t* out) {
  if constexpr (kBits == 8) {
    __builtin_memcpy(out, codes, kBlock);
    return;
  }
  if constexpr (kBits == 4) {
    const __m256i join = _mm256_set1_epi16(0x1001);  // neighbours a and b to a + 16 b
    const __m256i low = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i*)codes), join);
    const __m256i high = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i*)(codes + 32)), join);
    _mm256_storeu_si256((__m256i*)out, _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8));
    return;
  }
  for (int i = 0; i < 8; ++i) {
    uint64_t x;
    __builtin_memcpy(&x, codes + 8 * i, 8);
    x = _pext_u64(x, kEachCode<kBits>);
    __builtin_memcpy(out + kBits * i, &x, kBits);
  }
}

template <int kBits>
void unpack_block(const uint8_t* packed, uint8_t* codes) {
  if constexpr (kBits == 8) {
    __builtin_memcpy(codes, packed, kBlock);
    return;
  }
  if constexpr (kBits == 4) {
    for (int i = 0; i < 2; ++i) {
      const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(packed + 16 * i)));
      const __m256i both = _mm256_or_si256(x, _mm256_slli_epi16(x, 4));
      _mm256_storeu_si256((__m256i*)(codes + 32 * i), _mm256_and_si256(both, _mm256_set1_epi8(15)));
    }
    return;
  }
  for (int i = 0; i < 8; ++i) {
    uint64_t x = 0;
    __builtin_memcpy(&x, packed + kBits * i, kBits);
    x = _pdep_u64(x, kEachCode<kBits>);
    __builtin_memcpy(codes + 8 * i, &x, 8);
  }
}

template <int kDistance>
inline F exchanged(F x) {
  return __builtin_shufflevector(x, x, 0 ^ kDistance, 1 ^ kDistance, 2 ^ kDistance, 3 ^ kDistance, 4 ^ kDistance,
                                 5 ^ kDistance, 6 ^ kDistance, 7 ^ kDistance);
}

constexpr bool kLookup = false;
struct Lookup;

#include "quantize/cpu/codec.inl"

}  // namespace

const Table kAvx2 = {absmax, range, scales, scale_values, spread, encode, decode,
                     errors, pack,  unpack, widen,        add,    narrow, hadamard};

}  // namespace ng::codec
