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

using Part = __m256;
constexpr int kParts = 2;
inline __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
inline __m256 sub(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

constexpr int kDirectRows = 4;
constexpr int kTwoTileRows = 4;
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
// Bytes of b where the byte of `choice` has its top bit set, of a elsewhere. Not the intrinsic, which GCC precedes by
// a comparison.
inline __m256i blend(__m256i a, __m256i b, __m256i choice) {
  __m256i result;
  asm("vpblendvb %3, %2, %1, %0" : "=x"(result) : "x"(a), "x"(b), "x"(choice));
  return result;
}

// A table of 16 bytes for look-ups by the low bits of bytes below 128.
inline __m256i load_table(const uint8_t* entries) { return _mm256_broadcastsi128_si256(load_128(entries)); }

// 2 and 3 bits: a look-up in eight floats, which reads three index bits. The table repeats, so bits above the code's
// need no mask.
template <int kBits>
struct SmallDecoder {
  static constexpr bool kUnsigned = true;
  __m256 values;

  explicit SmallDecoder(const ElementTables& tables) : values(_mm256_load_ps(tables.value)) {}

  template <int K, int P>
  __m256 column(const uint8_t* unit) const {
    constexpr int kField = K % 2 * 8 + K / 2;
    __m256i index = shift_lanes<-2 * kField>(load_256(unit + P * 32));
    if constexpr (kBits == 3) {
      const __m256i top = _mm256_cvtepu16_epi32(load_128(unit + 64 + P * 16));
      index = select(_mm256_set1_epi32(3), index, shift_lanes<2 - kField>(top));
    }
    return _mm256_permutevar8x32_ps(values, index);
  }

  template <int Q, int P>
  void decode(const uint8_t* unit, __m256* out) const {
    out[0] = column<4 * Q, P>(unit);
    out[1] = column<4 * Q + 1, P>(unit);
    out[2] = column<4 * Q + 2, P>(unit);
    out[3] = column<4 * Q + 3, P>(unit);
  }
};

// Quarter Q of a unit of 4 bits: 32 codes of eight rows. A shift leaves four columns of a row in a lane.
template <int Q, int P>
inline __m256i nibbles(const uint8_t* unit) {
  return _mm256_and_si256(shift_words<-4 * (Q % 2)>(load_256(unit + Q / 2 * 64 + P * 32)), _mm256_set1_epi8(15));
}
constexpr int nibble_column(int quarter, int j) { return quarter / 2 * 8 + quarter % 2 * 2 + j / 2 + j % 2 * 4; }

// nf4, whose values are no bf16 numbers: all four bytes of the float are looked up.
struct FloatTableDecoder {
  static constexpr bool kUnsigned = false;
  __m256i bytes[4];

  explicit FloatTableDecoder(const ElementTables& tables) {
    for (int i = 0; i < 4; ++i) {
      alignas(16) uint8_t plane[16];
      for (int code = 0; code < 16; ++code) {
        uint32_t bits = 0;
        __builtin_memcpy(&bits, tables.value + code, sizeof bits);
        plane[code] = static_cast<uint8_t>(bits >> (8 * i));
      }
      bytes[i] = load_table(plane);
    }
  }

  static constexpr int column(int quarter, int j) { return nibble_column(quarter, j); }

  template <int Q, int P>
  void decode(const uint8_t* unit, __m256* out) const {
    // A column's rows beside each other, in each 128-bit half.
    const __m256i transpose = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                               0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i codes = _mm256_shuffle_epi8(nibbles<Q, P>(unit), transpose);
    const __m256i b0 = _mm256_shuffle_epi8(bytes[0], codes);
    const __m256i b1 = _mm256_shuffle_epi8(bytes[1], codes);
    const __m256i b2 = _mm256_shuffle_epi8(bytes[2], codes);
    const __m256i b3 = _mm256_shuffle_epi8(bytes[3], codes);
    for (int i = 0; i < 2; ++i) {
      const __m256i lower = i == 0 ? _mm256_unpacklo_epi8(b0, b1) : _mm256_unpackhi_epi8(b0, b1);
      const __m256i upper = i == 0 ? _mm256_unpacklo_epi8(b2, b3) : _mm256_unpackhi_epi8(b2, b3);
      out[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(lower, upper));
      out[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower, upper));
    }
  }
};

// Words of two columns, even lanes' and odd lanes' first, as floats: bf16 is a float's upper half.
inline void widen_pairs(__m256i pairs, __m256* even, __m256* odd) {
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
}

// Four columns from the lower and upper bytes of 32 numbers in bf16, in the order of a pair unit.
inline void widen_bytes(__m256i lower, __m256i upper, __m256* out) {
  widen_pairs(_mm256_unpacklo_epi8(lower, upper), &out[0], &out[1]);
  widen_pairs(_mm256_unpackhi_epi8(lower, upper), &out[2], &out[3]);
}

// Other elements of 4 bits: both bytes of the value as bf16, which holds it, are looked up.
struct NibbleDecoder {
  static constexpr bool kUnsigned = true;
  __m256i low, high;

  explicit NibbleDecoder(const ElementTables& tables) : low(load_table(tables.low)), high(load_table(tables.high)) {}

  static constexpr int column(int quarter, int j) { return nibble_column(quarter, j); }

  template <int Q, int P>
  void decode(const uint8_t* unit, __m256* out) const {
    const __m256i codes = nibbles<Q, P>(unit);
    const __m256i lower = _mm256_shuffle_epi8(low, codes);
    const __m256i upper = _mm256_shuffle_epi8(high, codes);
    // Two rows in a 128-bit half, two lanes each.
    const __m256 first = _mm256_castsi256_ps(_mm256_unpacklo_epi8(lower, upper));
    const __m256 second = _mm256_castsi256_ps(_mm256_unpackhi_epi8(lower, upper));
    widen_pairs(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88)), &out[0], &out[1]);
    widen_pairs(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0xdd)), &out[2], &out[3]);
  }
};

// Register Q of a pair unit: 32 of its 64 codes, rows 8 * P on. Bits above the code's are junk.
template <int kBits, int Q, int P>
inline __m256i pair_codes(const uint8_t* unit) {
  if constexpr (kBits == 8) return load_256(unit + Q * 64 + P * 32);
  __m256i codes = shift_words<-4 * (Q % 2)>(load_256(unit + Q / 2 * 64 + P * 32));
  if constexpr (kBits >= 6) {
    codes = select(_mm256_set1_epi8(0x0f), codes, shift_words<4 - 2 * Q>(load_256(unit + 128 + P * 32)));
  }
  if constexpr (kBits == 5 || kBits == 7) {
    constexpr int kTop = kBits - 1;
    const __m256i plane = shift_words<-4 * P>(load_256(unit + (kBits == 5 ? 128 : 192)));
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

  template <int Q, int P>
  void decode(const uint8_t* unit, __m256* out) const {
    const __m256i codes = nibbles<Q, P>(unit);
    __m256i lower = _mm256_shuffle_epi8(low[0], codes);
    __m256i upper = _mm256_shuffle_epi8(high[0], codes);
    __m256i sign;
    if constexpr (kBits == 5) {
      sign = shift_words<7 - Q>(shift_words<-4 * P>(load_256(unit + 128)));
    } else {
      // The magnitude's top bit, and then the sign.
      const __m256i rest = load_256(unit + 128 + P * 32);
      const __m256i top = shift_words<7 - 2 * Q>(rest);
      lower = blend(lower, _mm256_shuffle_epi8(low[1], codes), top);
      upper = blend(upper, _mm256_shuffle_epi8(high[1], codes), top);
      sign = shift_words<6 - 2 * Q>(rest);
    }
    upper = _mm256_or_si256(upper, _mm256_and_si256(sign, _mm256_set1_epi8(-128)));
    widen_bytes(lower, upper, out);
  }
};

// fp of 7 and 8 bits with up to three bits of mantissa: both bytes of the value as bf16. Of a normal number the lower
// one depends on the last four bits of the magnitude, and the upper one is what is above the exponent's last bit, and a
// bias. Codes below 8, where the subnormal numbers are, have a second look-up of what that gets wrong.
template <int kBits>
struct ByteDecoder {
  static constexpr bool kUnsigned = false;
  __m256i low, wrong_low, wrong_high, bias, finite, upper_bits;
  __m128i shift;

  explicit ByteDecoder(const ElementTables& tables) {
    const int mantissa_bits = kBits - 1 - tables.exponent_bits;
    shift = _mm_cvtsi32_si128(mantissa_bits + 1);
    upper_bits = _mm256_set1_epi8(static_cast<char>(0x7f >> (mantissa_bits + 1)));
    bias = _mm256_set1_epi8(static_cast<char>(tables.high[16] - (16 >> (mantissa_bits + 1))));
    low = load_table(tables.low + 16);
    // Entries 8 to 15, which the magnitude plus 120 looks up.
    alignas(16) uint8_t wrong[2][16] = {};
    for (int i = 0; i < 8; ++i) {
      wrong[0][8 + i] = static_cast<uint8_t>(tables.low[i] ^ tables.low[16 + i]);
      wrong[1][8 + i] = static_cast<uint8_t>(
          tables.high[i] ^ (tables.high[16] - (16 >> (mantissa_bits + 1)) + (i >> (mantissa_bits + 1))));
    }
    wrong_low = load_table(wrong[0]);
    wrong_high = load_table(wrong[1]);
    // fp8_e4m3's last magnitude is NaN, fp8_e5m2's last exponent infinity and NaN.
    finite = _mm256_set1_epi8(tables.nan_code ? 0x7e : tables.exponent_bits == 5 ? 0x7b : 0x7f);
  }

  template <int Q, int P>
  void decode(const uint8_t* unit, __m256* out) const {
    const __m256i codes = pair_codes<kBits, Q, P>(unit);
    const __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi8((1 << (kBits - 1)) - 1));
    const __m256i below_8 = _mm256_add_epi8(magnitude, _mm256_set1_epi8(0x78));
    __m256i lower = _mm256_shuffle_epi8(low, magnitude);
    __m256i upper = _mm256_add_epi8(_mm256_and_si256(_mm256_srl_epi16(magnitude, shift), upper_bits), bias);
    lower = _mm256_xor_si256(lower, _mm256_shuffle_epi8(wrong_low, below_8));
    upper = _mm256_xor_si256(upper, _mm256_shuffle_epi8(wrong_high, below_8));
    if constexpr (kBits == 8) {
      const __m256i special = _mm256_cmpgt_epi8(magnitude, finite);
      upper = _mm256_or_si256(upper, _mm256_and_si256(special, _mm256_set1_epi8(0x7f)));
    }
    const __m256i sign = _mm256_and_si256(shift_words<8 - kBits>(codes), _mm256_set1_epi8(-128));
    widen_bytes(lower, _mm256_or_si256(upper, sign), out);
  }
};

// fp of 7 and 8 bits with more mantissa: the code's fields are moved into those of a half, which the hardware
// converts exactly, subnormals included, and the difference of the biases is a power of two.
template <int kBits>
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
    unbias = _mm256_set1_ps(factor);
  }

  // Two columns of eight rows.
  void convert(__m256i words, __m256* even, __m256* odd) const {
    const __m256i halves = _mm256_and_si256(_mm256_sra_epi16(words, exponent_shift), fields);
    const __m256 a = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));       // rows 0..3
    const __m256 b = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));  // rows 4..7
    const __m256 evens = _mm256_shuffle_ps(a, b, 0x88);
    const __m256 odds = _mm256_shuffle_ps(a, b, 0xdd);
    *even = _mm256_mul_ps(in_order(evens), unbias);
    *odd = _mm256_mul_ps(in_order(odds), unbias);
  }
  static __m256 in_order(__m256 v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); }

  template <int Q, int P>
  void decode(const uint8_t* unit, __m256* out) const {
    const __m256i codes = pair_codes<kBits, Q, P>(unit);
    for (int half = 0; half < 2; ++half) convert(pair_words<kBits>(codes, half), &out[2 * half], &out[2 * half + 1]);
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

  template <int Q, int P>
  void decode(const uint8_t* unit, __m256* out) const {
    const __m256i codes = pair_codes<kBits, Q, P>(unit);
    for (int half = 0; half < 2; ++half) {
      const __m256i words = pair_words<kBits>(codes, half);
      out[2 * half] = to_float(_mm256_slli_epi32(words, 16));
      out[2 * half + 1] = to_float(words);
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

  template <int Q, int P>
  void decode(const uint8_t* unit, __m256* out) const {
    const __m256i lanes = load_256(unit + Q * 64 + P * 32);
    out[0] = column<0>(lanes);
    out[1] = column<1>(lanes);
    out[2] = column<2>(lanes);
    out[3] = column<3>(lanes);
  }
};

template <int kBits, typename Use>
void find_pair_decoder(const ElementTables& tables, Use use) {
  if (tables.is_fp) {
    if constexpr (kBits <= 6) {
      return use(Tag<TableDecoder<kBits>>{});
    } else {
      if (kBits - 1 - tables.exponent_bits <= 3) return use(Tag<ByteDecoder<kBits>>{});
      return use(Tag<HalfDecoder<kBits>>{});
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
    case 2: return use(Tag<SmallDecoder<2>>{});
    case 3: return use(Tag<SmallDecoder<3>>{});
    case 4:
      // All but a codebook's.
      if (tables.is_fp || tables.integer_step == 1) return use(Tag<NibbleDecoder>{});
      return use(Tag<FloatTableDecoder>{});
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
