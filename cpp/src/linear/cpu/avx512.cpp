// AVX-512 (F, BW, DQ, VL, VBMI, VNNI): decoders by permute look-up. With AMX on top where the assembler knows it.
#include "kernels.hpp"

#include <immintrin.h>

namespace ng::cpu {
namespace {

#include "x86.inl"

using V16 = __m512;

inline V16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V16 v) { _mm512_storeu_ps(p, v); }
inline V16 set1(float x) { return _mm512_set1_ps(x); }
inline V16 add(V16 a, V16 b) { return _mm512_add_ps(a, b); }
inline V16 sub(V16 a, V16 b) { return _mm512_sub_ps(a, b); }
inline V16 mul(V16 a, V16 b) { return _mm512_mul_ps(a, b); }
inline V16 fma(V16 a, V16 b, V16 c) { return _mm512_fmadd_ps(a, b, c); }
inline V16 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, V16 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline V16 load_bf16(const uint16_t* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
// In integers: the conversion instruction would flush subnormals.
inline void store_bf16(uint16_t* p, V16 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}

inline V16 load_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_128(p))); }
// The exponent field of a float; code 0 is 2^-127, a subnormal, and 255 NaN: both have this one mantissa bit.
inline V16 load_e8m0(const uint8_t* p) {
  const __m128i codes = load_128(p);
  const __mmask16 ends = _mm_cmple_epu8_mask(_mm_add_epi8(codes, _mm_set1_epi8(1)), _mm_set1_epi8(1));
  const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(codes), 23);
  return _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, ends, bits, _mm512_set1_epi32(0x400000)));
}
inline V16 load_e4m3(const uint8_t* p) {
  return _mm512_mul_ps(_mm512_cvtph_ps(halves_of_e4m3(p)), _mm512_set1_ps(0x1p8f));
}

using Part = V16;
constexpr int kParts = 1;
constexpr int kDirectRows = 8;
constexpr int kTwoTileRows = 16;
constexpr int kTileRows = 8;
constexpr int kPanelBlocks = 2;

inline __m512i load_512(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline __m256i load_256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
// Bits of a where the mask is set, of b elsewhere.
inline __m512i select(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }

// A shift by a constant of either sign (left positive).
template <int N>
inline __m512i shift_words(__m512i v) {
  if constexpr (N > 0) return _mm512_slli_epi16(v, N);
  if constexpr (N < 0) return _mm512_srli_epi16(v, -N);
  return v;
}
template <int N>
inline __m512i shift_lanes(__m512i v) {
  if constexpr (N > 0) return _mm512_slli_epi32(v, N);
  if constexpr (N < 0) return _mm512_srli_epi32(v, -N);
  return v;
}

// 2 to 4 bits: the codes of a column are shifted to the low bits of 16 lanes and index a table of 16 floats. The
// permute reads four index bits, and the table repeats, so bits above the code's need no mask. The codes of the next
// column are in the upper words of the lanes, so that two columns index a table of 32 words at once.
template <int kBits>
struct NibbleDecoder {
  static constexpr bool kUnsigned = true;
  __m512 values;
  __m512i words;  // as bf16

  explicit NibbleDecoder(const ElementTables& tables)
      : values(_mm512_load_ps(tables.value)),
        words(_mm512_or_si512(_mm512_cvtepu8_epi16(load_256(tables.low)),
                              _mm512_slli_epi16(_mm512_cvtepu8_epi16(load_256(tables.high)), 8))) {}

  template <int K>
  __m512 column(const uint8_t* unit) const {
    __m512i index;
    if constexpr (kBits == 4) {
      index = shift_lanes<-4 * (K % 2 * 4 + K / 2 % 4)>(load_512(unit + K / 8 * 64));
    } else {
      constexpr int kField = K % 2 * 8 + K / 2;
      index = shift_lanes<-2 * kField>(load_512(unit));
      if constexpr (kBits == 3) {
        const __m512i top = _mm512_cvtepu16_epi32(load_256(unit + 64));
        index = select(_mm512_set1_epi32(3), index, shift_lanes<2 - kField>(top));
      }
    }
    return _mm512_permutexvar_ps(index, values);
  }

  template <int Q, int>
  void decode(const uint8_t* unit, V16* out) const {
    out[0] = column<4 * Q>(unit);
    out[1] = column<4 * Q + 1>(unit);
    out[2] = column<4 * Q + 2>(unit);
    out[3] = column<4 * Q + 3>(unit);
  }

  template <int Q>
  void pairs(const uint8_t* unit, __m512i (&out)[2]) const {
    out[0] = pair<4 * Q>(unit);
    out[1] = pair<4 * Q + 2>(unit);
  }

  // Columns K, which is even, and K + 1.
  template <int K>
  __m512i pair(const uint8_t* unit) const {
    __m512i index;
    if constexpr (kBits == 4) {
      index = shift_words<-4 * (K / 2 % 4)>(load_512(unit + K / 8 * 64));
    } else {
      index = shift_words<-K>(load_512(unit));
      if constexpr (kBits == 3) {
        const __m512i rows = _mm512_cvtepu16_epi32(load_256(unit + 64));
        const __m512i top = _mm512_or_si512(rows, _mm512_slli_epi32(rows, 8));
        index = select(_mm512_set1_epi16(3), index, shift_words<2 - K / 2>(top));
      }
    }
    return _mm512_permutexvar_epi16(index, words);
  }
};

// Low and high bytes of 64 bf16 values to 16 lanes of columns 0 and 1, and of columns 2 and 3.
inline void interleave(__m512i low, __m512i high, __m512i (&out)[2]) {
  out[0] = _mm512_unpacklo_epi8(low, high);
  out[1] = _mm512_unpackhi_epi8(low, high);
}
// Those to four columns of floats.
inline void widen(const __m512i (&pairs)[2], V16* out) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[i], 16));
    out[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs[i], upper));
  }
}

// The bytes of 128 values as bf16.
struct ByteTables {
  __m512i low, high, low_upper, high_upper;

  explicit ByteTables(const ElementTables& tables)
      : low(load_512(tables.low)),
        high(load_512(tables.high)),
        low_upper(load_512(tables.low + 64)),
        high_upper(load_512(tables.high + 64)) {}
  // By the low seven bits of each code; the other look-ups, by six, read the first half alone.
  __m512i low_of(__m512i codes) const { return _mm512_permutex2var_epi8(low, codes, low_upper); }
  __m512i high_of(__m512i codes) const { return _mm512_permutex2var_epi8(high, codes, high_upper); }
};

// Register Q of a pair unit of 5 to 7 bits: its 64 codes. Bits above the code's are junk, which look-ups ignore.
template <int kBits, int Q>
inline __m512i pair_codes(const uint8_t* unit) {
  __m512i codes = shift_words<-4 * (Q % 2)>(load_512(unit + Q / 2 * 64));
  if constexpr (kBits >= 6) {
    codes = select(_mm512_set1_epi8(0x0f), codes, shift_words<4 - 2 * Q>(load_512(unit + 128)));
  }
  if constexpr (kBits == 5 || kBits == 7) {
    constexpr int kPlane = kBits == 5 ? 128 : 192;
    constexpr int kTop = kBits - 1;
    const __m512i both = _mm512_broadcast_i64x4(load_256(unit + kPlane));
    const __m512i plane = _mm512_mask_srli_epi16(both, 0xffff0000u, both, 4);
    codes = select(_mm512_set1_epi8((1 << kTop) - 1), codes, shift_words<kTop - Q>(plane));
  }
  return codes;
}

// 5 to 7 bits: two byte look-ups (low and high byte of the value as bf16, which holds every such element exactly).
template <int kBits>
struct PairDecoder {
  static constexpr bool kUnsigned = true;
  ByteTables table;

  explicit PairDecoder(const ElementTables& tables) : table(tables) {}

  template <int Q>
  void pairs(const uint8_t* unit, __m512i (&out)[2]) const {
    const __m512i codes = pair_codes<kBits, Q>(unit);
    if constexpr (kBits == 7) {
      interleave(table.low_of(codes), table.high_of(codes), out);
    } else {
      interleave(_mm512_permutexvar_epi8(codes, table.low), _mm512_permutexvar_epi8(codes, table.high), out);
    }
  }

  template <int Q, int>
  void decode(const uint8_t* unit, V16* out) const {
    __m512i columns[2];
    pairs<Q>(unit, columns);
    widen(columns, out);
  }
};

// fp8: the magnitude is looked up, the sign is the code's own top bit.
struct Fp8Decoder {
  static constexpr bool kUnsigned = false;
  ByteTables table;

  explicit Fp8Decoder(const ElementTables& tables) : table(tables) {}

  template <int Q>
  void pairs(const uint8_t* unit, __m512i (&out)[2]) const {
    const __m512i codes = load_512(unit + Q * 64);
    const __m512i magnitude = table.high_of(codes);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    interleave(table.low_of(codes), _mm512_ternarylogic_epi32(magnitude, codes, sign, 0xf8), out);
  }

  template <int Q, int>
  void decode(const uint8_t* unit, V16* out) const {
    __m512i columns[2];
    pairs<Q>(unit, columns);
    widen(columns, out);
  }
};

// int8 and uint8: each byte of a lane is placed under the exponent of 2^23, which makes the float 2^23 + byte, and the
// offset is subtracted: exact. A signed byte is made unsigned by flipping its top bit.
template <bool kSigned>
struct QuadDecoder {
  static constexpr bool kUnsigned = !kSigned;
  explicit QuadDecoder(const ElementTables&) {}

  template <int J>
  static __m512 column(__m512i bytes) {
    const __m512i select_byte = _mm512_set1_epi32(J);
    const __m512i from_lane =
        _mm512_add_epi32(select_byte, _mm512_set_epi32(12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0));
    const __m512i magic = _mm512_set1_epi32(0x4b000000);
    const __m512i placed = _mm512_mask_shuffle_epi8(magic, 0x1111111111111111ull, bytes, from_lane);
    return _mm512_sub_ps(_mm512_castsi512_ps(placed), _mm512_set1_ps(kSigned ? 0x1p23f + 128 : 0x1p23f));
  }

  template <int Q, int>
  void decode(const uint8_t* unit, V16* out) const {
    __m512i bytes = load_512(unit + Q * 64);
    if constexpr (kSigned) bytes = _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
    out[0] = column<0>(bytes);
    out[1] = column<1>(bytes);
    out[2] = column<2>(bytes);
    out[3] = column<3>(bytes);
  }
};

template <typename Use>
void find_decoder(const ElementTables& tables, Use use) {
  switch (tables.bits) {
    case 2: return use(Tag<NibbleDecoder<2>>{});
    case 3: return use(Tag<NibbleDecoder<3>>{});
    case 4: return use(Tag<NibbleDecoder<4>>{});
    case 5: return use(Tag<PairDecoder<5>>{});
    case 6: return use(Tag<PairDecoder<6>>{});
    case 7: return use(Tag<PairDecoder<7>>{});
    default: break;
  }
  if (tables.is_fp) return use(Tag<Fp8Decoder>{});
  if (tables.is_signed) return use(Tag<QuadDecoder<true>>{});
  return use(Tag<QuadDecoder<false>>{});
}

#include "kernel.inl"

// On top of it.
#include "avx512_integer.inl"
#if defined(NARROWGAUGE_AMX)
#include "amx.inl"
#endif

}  // namespace

const LinearKernels kAvx512Linear = kTable;
const FindIntegerFn kAvx512Integer = find_integer;
#if defined(NARROWGAUGE_AMX)
const FindIntegerFn kAmxInteger = find_amx_integer;
const FindBf16Fn kAmxBf16 = find_amx_bf16;
#endif

}  // namespace ng::cpu
