// AVX2, FMA, F16C: decoders by shifts and conversions, since look-ups wider than 16 entries do not exist.
#include "kernels.hpp"

#include <immintrin.h>

namespace ng::cpu {
namespace {

#include "x86.inl"

struct V16 {
  __m256 lo, hi;
};

inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline V16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V16 v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
inline V16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V16 add(V16 a, V16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline V16 sub(V16 a, V16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline V16 mul(V16 a, V16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline V16 fma(V16 a, V16 b, V16 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline V16 load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 8))}; }
inline void store_f16(uint16_t* p, V16 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256 widen_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16));
}
inline V16 load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline __m256i round_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
inline void store_bf16(uint16_t* p, V16 v) {
  const __m256i packed = _mm256_packus_epi32(round_bf16(v.lo), round_bf16(v.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

inline __m256i widen_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline V16 load_u8(const uint8_t* p) { return {_mm256_cvtepi32_ps(widen_u8(p)), _mm256_cvtepi32_ps(widen_u8(p + 8))}; }
// The exponent field of a float; code 0 is 2^-127, a subnormal, and 255 NaN: both have this one mantissa bit.
inline __m256 half_e8m0(const uint8_t* p) {
  const __m256i codes = widen_u8(p);
  const __m256i ends = _mm256_or_si256(_mm256_cmpeq_epi32(codes, _mm256_setzero_si256()),
                                       _mm256_cmpeq_epi32(codes, _mm256_set1_epi32(255)));
  return _mm256_castsi256_ps(
      _mm256_or_si256(_mm256_slli_epi32(codes, 23), _mm256_and_si256(ends, _mm256_set1_epi32(0x400000))));
}
inline V16 load_e8m0(const uint8_t* p) { return {half_e8m0(p), half_e8m0(p + 8)}; }
inline V16 load_e4m3(const uint8_t* p) {
  const __m256i half = halves_of_e4m3(p);
  const V16 value = {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
  return mul(value, set1(0x1p8f));
}

constexpr int kDirectRows = 4;
constexpr int kTileRows = 4;
constexpr int kPanelBlocks = 1;

template <int N>
inline __m256i shift_lanes(__m256i v) {
  if constexpr (N > 0) return _mm256_slli_epi32(v, N);
  if constexpr (N < 0) return _mm256_srli_epi32(v, -N);
  return v;
}
template <int N>
inline __m256i shift_words(__m256i v) {
  if constexpr (N > 0) return _mm256_slli_epi16(v, N);
  if constexpr (N < 0) return _mm256_srli_epi16(v, -N);
  return v;
}
// Bits of a where the mask is set, of b elsewhere.
inline __m256i select(__m256i mask, __m256i a, __m256i b) {
  return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}

// A table of 16 bytes for look-ups by the low bits of bytes below 128.
inline __m256i load_table(const uint8_t* entries) { return _mm256_broadcastsi128_si256(load_128(entries)); }

// Columns 4 * Q .. of a unit, by a decoder's half<K>(unit, row): column K of eight rows from `row` on.
template <int Q, typename D>
inline void decode_columns(const D& decoder, const uint8_t* unit, V16* out) {
  out[0] = {decoder.template half<4 * Q>(unit, 0), decoder.template half<4 * Q>(unit, 8)};
  out[1] = {decoder.template half<4 * Q + 1>(unit, 0), decoder.template half<4 * Q + 1>(unit, 8)};
  out[2] = {decoder.template half<4 * Q + 2>(unit, 0), decoder.template half<4 * Q + 2>(unit, 8)};
  out[3] = {decoder.template half<4 * Q + 3>(unit, 0), decoder.template half<4 * Q + 3>(unit, 8)};
}

// The same by half<Q>(unit, side, columns): rows 0..7 (side 0) or 8..15 (side 1) of all four.
template <int Q, typename D>
inline void decode_halves(const D& decoder, const uint8_t* unit, V16* out) {
  __m256 lo[4];
  __m256 hi[4];
  decoder.template half<Q>(unit, 0, lo);
  decoder.template half<Q>(unit, 1, hi);
  for (int j = 0; j < 4; ++j) out[j] = {lo[j], hi[j]};
}

// 2 and 3 bits, and nf4, which no two bytes hold: a look-up in eight floats, which reads three index bits, and for 4
// bits a second one chosen by the fourth bit. The table repeats, so bits above the code's need no mask.
template <int kBits>
struct NibbleDecoder {
  static constexpr bool kUnsigned = true;
  __m256 lower, upper;

  explicit NibbleDecoder(const ElementTables& tables)
      : lower(_mm256_load_ps(tables.value)), upper(_mm256_load_ps(tables.value + 8)) {}

  template <int K>
  __m256 half(const uint8_t* unit, int row) const {
    if constexpr (kBits == 4) {
      constexpr int kShift = 4 * (K % 2 * 4 + K / 2 % 4);
      const __m256i index = shift_lanes<-kShift>(load_256(unit + K / 8 * 64 + row * 4));
      const __m256 choose = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index), _mm256_permutevar8x32_ps(upper, index), choose);
    } else {
      constexpr int kField = K % 2 * 8 + K / 2;
      __m256i index = shift_lanes<-2 * kField>(load_256(unit + row * 4));
      if constexpr (kBits == 3) {
        const __m256i top = _mm256_cvtepu16_epi32(load_128(unit + 64 + row * 2));
        index = select(_mm256_set1_epi32(3), index, shift_lanes<2 - kField>(top));
      }
      return _mm256_permutevar8x32_ps(lower, index);
    }
  }

  template <int Q>
  void decode(const uint8_t* unit, V16* out) const {
    decode_columns<Q>(*this, unit, out);
  }
};

// Words of two columns, even lanes' and odd lanes' first, as floats: bf16 is a float's upper half.
inline void widen_pairs(__m256i pairs, __m256* even, __m256* odd) {
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
}

// Other elements of 4 bits: both bytes of the value as bf16, which holds it, are looked up.
struct NibbleTableDecoder {
  static constexpr bool kUnsigned = true;
  __m256i low, high;

  explicit NibbleTableDecoder(const ElementTables& tables)
      : low(load_table(tables.low)), high(load_table(tables.high)) {}

  // A shift leaves four columns of a row in a lane, in this order.
  static constexpr int column(int quarter, int j) { return quarter / 2 * 8 + quarter % 2 * 2 + j / 2 + j % 2 * 4; }

  template <int Q>
  void half(const uint8_t* unit, int side, __m256 (&columns)[4]) const {
    __m256i codes = shift_words<-4 * (Q % 2)>(load_256(unit + Q / 2 * 64 + side * 32));
    codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    const __m256i lower = _mm256_shuffle_epi8(low, codes);
    const __m256i upper = _mm256_shuffle_epi8(high, codes);
    // Two rows in a 128-bit half, two lanes each.
    const __m256 first = _mm256_castsi256_ps(_mm256_unpacklo_epi8(lower, upper));
    const __m256 second = _mm256_castsi256_ps(_mm256_unpackhi_epi8(lower, upper));
    widen_pairs(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88)), &columns[0], &columns[1]);
    widen_pairs(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0xdd)), &columns[2], &columns[3]);
  }

  template <int Q>
  void decode(const uint8_t* unit, V16* out) const {
    decode_halves<Q>(*this, unit, out);
  }
};

// Register Q of a pair unit: 32 of its 64 codes, rows 0..7 (side 0) or 8..15 (side 1). Bits above the code's are junk.
template <int kBits, int Q>
inline __m256i pair_codes(const uint8_t* unit, int side) {
  if constexpr (kBits == 8) return load_256(unit + Q * 64 + side * 32);
  __m256i codes = shift_words<-4 * (Q % 2)>(load_256(unit + Q / 2 * 64 + side * 32));
  if constexpr (kBits >= 6) {
    codes = select(_mm256_set1_epi8(0x0f), codes, shift_words<4 - 2 * Q>(load_256(unit + 128 + side * 32)));
  }
  if constexpr (kBits == 5 || kBits == 7) {
    constexpr int kTop = kBits - 1;
    __m256i plane = load_256(unit + (kBits == 5 ? 128 : 192));
    if (side == 1) plane = _mm256_srli_epi16(plane, 4);
    codes = select(_mm256_set1_epi8((1 << kTop) - 1), codes, shift_words<kTop - Q>(plane));
  }
  return codes;
}

// Codes to the top bits of 16-bit words: rows as 32-bit lanes of (column, column + 1), columns 4Q + 2 * half.
template <int kBits>
inline __m256i pair_words(__m256i codes, int half) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i words = half == 0 ? _mm256_unpacklo_epi8(zero, codes) : _mm256_unpackhi_epi8(zero, codes);
  return shift_words<8 - kBits>(words);
}

// fp of 5 and 6 bits: both bytes of the value as bf16, which holds it, are looked up by the magnitude.
template <int kBits>
struct TableDecoder {
  static constexpr bool kUnsigned = false;
  static constexpr int kTables = kBits - 4;
  __m256i low[kTables];
  __m256i high[kTables];

  explicit TableDecoder(const ElementTables& tables) {
    for (int i = 0; i < kTables; ++i) {
      low[i] = load_table(tables.low + 16 * i);
      high[i] = load_table(tables.high + 16 * i);
    }
  }

  template <int Q>
  void half(const uint8_t* unit, int side, __m256 (&columns)[4]) const {
    __m256i codes = shift_words<-4 * (Q % 2)>(load_256(unit + Q / 2 * 64 + side * 32));
    codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    __m256i lower = _mm256_shuffle_epi8(low[0], codes);
    __m256i upper = _mm256_shuffle_epi8(high[0], codes);
    __m256i sign;
    if constexpr (kBits == 5) {
      const __m256i plane = load_256(unit + 128);
      sign = shift_words<7 - Q>(side == 0 ? plane : _mm256_srli_epi16(plane, 4));
    } else {
      // A blend looks at the last bit of a byte: the magnitude's, and then the sign.
      const __m256i rest = load_256(unit + 128 + side * 32);
      const __m256i top = shift_words<7 - 2 * Q>(rest);
      lower = _mm256_blendv_epi8(lower, _mm256_shuffle_epi8(low[1], codes), top);
      upper = _mm256_blendv_epi8(upper, _mm256_shuffle_epi8(high[1], codes), top);
      sign = shift_words<6 - 2 * Q>(rest);
    }
    upper = _mm256_or_si256(upper, _mm256_and_si256(sign, _mm256_set1_epi8(-128)));
    widen_pairs(_mm256_unpacklo_epi8(lower, upper), &columns[0], &columns[1]);
    widen_pairs(_mm256_unpackhi_epi8(lower, upper), &columns[2], &columns[3]);
  }

  template <int Q>
  void decode(const uint8_t* unit, V16* out) const {
    decode_halves<Q>(*this, unit, out);
  }
};

// fp of 7 and 8 bits whose exponents a half has: the code's fields are moved into those of a half, which the hardware
// converts exactly, subnormals included, and the difference of the biases is a power of two.
template <int kBits, bool kNanCode>
struct HalfDecoder {
  static constexpr bool kUnsigned = false;
  __m128i exponent_shift;
  __m256i fields;
  __m256 unbias;

  explicit HalfDecoder(const ElementTables& tables)
      : exponent_shift(_mm_cvtsi32_si128(5 - tables.exponent_bits)),
        fields(_mm256_set1_epi16(static_cast<short>(0x8000 | (0x7fff >> (5 - tables.exponent_bits))))) {
    uint32_t bits = static_cast<uint32_t>(127 + 15 - ((1 << (tables.exponent_bits - 1)) - 1)) << 23;
    float factor = 1.0f;
    __builtin_memcpy(&factor, &bits, sizeof factor);
    // fp8_e5m2 has the half's own exponents, infinities and NaNs: factor 1.
    unbias = _mm256_set1_ps(factor);
  }

  // Two columns of eight rows.
  void convert(__m256i words, __m256* even, __m256* odd) const {
    __m256i halves = _mm256_and_si256(_mm256_sra_epi16(words, exponent_shift), fields);
    if constexpr (kNanCode) {  // fp8_e4m3's all-ones magnitude
      const __m256i magnitude = _mm256_and_si256(halves, _mm256_set1_epi16(0x7fff));
      const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3f80));
      halves = _mm256_or_si256(halves, _mm256_and_si256(nan, _mm256_set1_epi16(0x7fff)));
    }
    const __m256 a = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));       // rows 0..3
    const __m256 b = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));  // rows 4..7
    const __m256 evens = _mm256_shuffle_ps(a, b, 0x88);
    const __m256 odds = _mm256_shuffle_ps(a, b, 0xdd);
    *even = _mm256_mul_ps(in_order(evens), unbias);
    *odd = _mm256_mul_ps(in_order(odds), unbias);
  }
  static __m256 in_order(__m256 v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); }

  template <int Q>
  void decode(const uint8_t* unit, V16* out) const {
    const __m256i lower = pair_codes<kBits, Q>(unit, 0);
    const __m256i upper = pair_codes<kBits, Q>(unit, 1);
    for (int half = 0; half < 2; ++half) {
      convert(pair_words<kBits>(lower, half), &out[2 * half].lo, &out[2 * half + 1].lo);
      convert(pair_words<kBits>(upper, half), &out[2 * half].hi, &out[2 * half + 1].hi);
    }
  }
};

// Integers of 5 to 7 bits: the code's sign bit is moved to the top of a 32-bit lane and shifted back.
template <int kBits, bool kSigned>
struct IntDecoder {
  static constexpr bool kUnsigned = !kSigned;
  explicit IntDecoder(const ElementTables&) {}

  static __m256 to_float(__m256i top_aligned) {
    return _mm256_cvtepi32_ps(kSigned ? _mm256_srai_epi32(top_aligned, 32 - kBits)
                                      : _mm256_srli_epi32(top_aligned, 32 - kBits));
  }

  template <int Q>
  void decode(const uint8_t* unit, V16* out) const {
    const __m256i lower = pair_codes<kBits, Q>(unit, 0);
    const __m256i upper = pair_codes<kBits, Q>(unit, 1);
    for (int half = 0; half < 2; ++half) {
      const __m256i lo = pair_words<kBits>(lower, half);
      const __m256i hi = pair_words<kBits>(upper, half);
      out[2 * half] = {to_float(_mm256_slli_epi32(lo, 16)), to_float(_mm256_slli_epi32(hi, 16))};
      out[2 * half + 1] = {to_float(lo), to_float(hi)};
    }
  }
};

// int8 and uint8: byte j of a lane to the top, and back.
template <bool kSigned>
struct QuadDecoder {
  static constexpr bool kUnsigned = !kSigned;
  explicit QuadDecoder(const ElementTables&) {}

  template <int J>
  static __m256 column(__m256i lanes) {
    return IntDecoder<8, kSigned>::to_float(shift_lanes<24 - 8 * J>(lanes));
  }

  template <int Q>
  void decode(const uint8_t* unit, V16* out) const {
    const __m256i lo = load_256(unit + Q * 64);
    const __m256i hi = load_256(unit + Q * 64 + 32);
    out[0] = {column<0>(lo), column<0>(hi)};
    out[1] = {column<1>(lo), column<1>(hi)};
    out[2] = {column<2>(lo), column<2>(hi)};
    out[3] = {column<3>(lo), column<3>(hi)};
  }
};

// fp with more exponents than a half (fp7_e5m1, fp7_e6m0, fp8_e6m1, fp8_e7m0): rare, so looked up code by code.
template <int kBits>
struct LookupDecoder {
  static constexpr bool kUnsigned = false;
  const float* values;
  explicit LookupDecoder(const ElementTables& tables) : values(tables.value) {}

  template <int Q>
  void decode(const uint8_t* unit, V16* out) const {
    alignas(32) uint8_t codes[64];
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes), pair_codes<kBits, Q>(unit, 0));
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes + 32), pair_codes<kBits, Q>(unit, 1));
    alignas(32) float columns[4][16];
    for (int r = 0; r < 16; ++r) {
      for (int j = 0; j < 4; ++j) {
        columns[j][r] = values[codes[r / 4 * 16 + j / 2 * 8 + r % 4 * 2 + j % 2] & ((1 << kBits) - 1)];
      }
    }
    for (int j = 0; j < 4; ++j) out[j] = load(columns[j]);
  }
};

template <int kBits, typename Use>
void find_pair_decoder(const ElementTables& tables, Use use) {
  if (tables.is_fp) {
    if constexpr (kBits <= 6) {
      return use(Tag<TableDecoder<kBits>>{});
    } else {
      // A half's largest exponent means infinity and NaN, as it does in fp8_e5m2 but in no other element.
      const int half_exponents = kBits == 8 ? 5 : 4;
      if (tables.exponent_bits > half_exponents) return use(Tag<LookupDecoder<kBits>>{});
      if constexpr (kBits == 8) {
        if (tables.nan_code) return use(Tag<HalfDecoder<kBits, true>>{});
      }
      return use(Tag<HalfDecoder<kBits, false>>{});
    }
  }
  if constexpr (kBits < 8) {
    if (tables.is_signed) return use(Tag<IntDecoder<kBits, true>>{});
    return use(Tag<IntDecoder<kBits, false>>{});
  }
}

template <typename Use>
void find_decoder(const ElementTables& tables, Use use) {
  switch (tables.bits) {
    case 2: return use(Tag<NibbleDecoder<2>>{});
    case 3: return use(Tag<NibbleDecoder<3>>{});
    case 4:
      // All but a codebook's.
      if (tables.is_fp || tables.integer_step == 1) return use(Tag<NibbleTableDecoder>{});
      return use(Tag<NibbleDecoder<4>>{});
    case 5: return find_pair_decoder<5>(tables, use);
    case 6: return find_pair_decoder<6>(tables, use);
    case 7: return find_pair_decoder<7>(tables, use);
    default: break;
  }
  if (tables.is_fp) return find_pair_decoder<8>(tables, use);
  if (tables.is_signed) return use(Tag<QuadDecoder<true>>{});
  return use(Tag<QuadDecoder<false>>{});
}

#include "kernel.inl"

// On top of it.
#include "avx2_integer.inl"

}  // namespace

const LinearKernels kAvx2Linear = kTable;
const FindIntegerFn kAvx2Integer = find_integer;

}  // namespace ng::cpu
