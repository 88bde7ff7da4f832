// What avx2.cpp and avx512.cpp share; included inside their unnamed namespace.

inline __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// Sixteen e4m3 codes as halves, whose exponents are biased by 15 instead of 7: 2^-8 of the value. NaN stays NaN.
inline __m256i halves_of_e4m3(const uint8_t* p) {
  const __m256i codes = _mm256_cvtepu8_epi16(load_128(p));
  const __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(codes, magnitude), 8);
  const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
  return _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign),
                         _mm256_and_si256(nan, _mm256_set1_epi16(0x7fff)));
}
