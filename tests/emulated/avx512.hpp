// AVX-512 in C++: SIMDe under the names of Intel's intrinsics, and the few that SIMDe 0.7.4 lacks.
#pragma once

#define SIMDE_NO_INLINE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <cstdlib>
#include <cstring>

#include <immintrin.h>
#include <simde/x86/avx512.h>

namespace emulated {

#define NG_EMULATE(name, result, argument, lanes, to, from)                      \
  inline simde__##result name(simde__##argument given) {                         \
    const simde__##argument##_private a = simde__##argument##_to_private(given); \
    simde__##result##_private r;                                                 \
    for (int i = 0; i < (lanes); ++i) r.to[i] = a.from[i];                       \
    return simde__##result##_from_private(r);                                    \
  }
NG_EMULATE(cvtepi32_epi16, m256i, m512i, 16, i16, i32)
NG_EMULATE(cvtepi32_ps, m512, m512i, 16, f32, i32)
NG_EMULATE(cvtepu16_epi32, m512i, m256i, 16, i32, u16)
NG_EMULATE(cvtepu8_epi16, m512i, m256i, 32, i16, u8)
NG_EMULATE(cvtepu8_epi32, m512i, m128i, 16, i32, u8)
#undef NG_EMULATE

inline simde__m512 cvtph_ps(__m256i halves) {
  simde__m512_private r;
  r.m256[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  r.m256[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  return simde__m512_from_private(r);
}
inline __m256i cvtps_ph(simde__m512 floats) {
  const simde__m512_private a = simde__m512_to_private(floats);
  return _mm256_set_m128i(_mm256_cvtps_ph(a.m256[1], 0), _mm256_cvtps_ph(a.m256[0], 0));
}
inline simde__m512i mask_srli_epi16(simde__m512i otherwise, __mmask32 mask, simde__m512i given, int count) {
  const simde__m512i_private a = simde__m512i_to_private(given);
  simde__m512i_private r = simde__m512i_to_private(otherwise);
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) != 0) r.u16[i] = static_cast<uint16_t>(a.u16[i] >> count);
  }
  return simde__m512i_from_private(r);
}
inline __mmask16 cmple_epu8_mask(__m128i a, __m128i b) {
  return static_cast<__mmask16>(_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_min_epu8(a, b), a)));
}

}  // namespace emulated

#undef _mm512_cvtps_ph
#undef _mm512_mask_srli_epi16
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepu8_epi16 emulated::cvtepu8_epi16
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(floats, rounding) emulated::cvtps_ph(floats)
#define _mm512_mask_srli_epi16 emulated::mask_srli_epi16
#define _mm_cmple_epu8_mask emulated::cmple_epu8_mask
