// Portable: plain C++ that any compiler turns into its baseline vectors; also the reference for the others.
#include "kernels.hpp"

namespace ng::cpu {
namespace {

// A vector extension of GCC and Clang: lowered to whatever vectors the target has.
typedef float V16 __attribute__((vector_size(64)));

inline V16 load(const float* p) {
  V16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V16 v) { __builtin_memcpy(p, &v, sizeof v); }
inline V16 set1(float x) { return V16{} + x; }
inline V16 add(V16 a, V16 b) { return a + b; }
inline V16 sub(V16 a, V16 b) { return a - b; }
inline V16 mul(V16 a, V16 b) { return a * b; }
// Two roundings: a product's own adds one to what reaches a term, which shorter sums make up for (kernel.inl).
inline V16 fma(V16 a, V16 b, V16 c) { return a * b + c; }

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  uint32_t bits = sign | ((exponent == 31 ? 0xffu : exponent + 112) << 23) | (mantissa << 13);
  float value = 0;
  if (exponent == 0) {
    value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint16_t float_to_half(float value) {
  uint32_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half = 0;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // adding 1/2 puts the half's last bit at the float's last bit
    float rounded = 0;
    __builtin_memcpy(&rounded, &magnitude, sizeof rounded);
    rounded += 0.5f;
    __builtin_memcpy(&half, &rounded, sizeof half);
    half -= 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}
inline V16 from_bits(const uint32_t* bits) {
  V16 v;
  __builtin_memcpy(&v, bits, sizeof v);
  return v;
}
inline V16 load_f16(const uint16_t* p) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = half_to_float(p[i]);
  return load(values);
}
inline void store_f16(uint16_t* p, V16 v) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(v[i]);
}
inline V16 load_bf16(const uint16_t* p) {
  uint32_t bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = static_cast<uint32_t>(p[i]) << 16;
  return from_bits(bits);
}
inline V16 load_u8(const uint8_t* p) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(p[i]);
  return load(values);
}
// The exponent field of a float; code 0 is 2^-127, a subnormal, and 255 NaN: both have this one mantissa bit.
inline V16 load_e8m0(const uint8_t* p) {
  uint32_t bits[16];
  for (int i = 0; i < 16; ++i) {
    bits[i] = (static_cast<uint32_t>(p[i]) << 23) | (p[i] == 0 || p[i] == 255 ? 0x400000u : 0u);
  }
  return from_bits(bits);
}
// As a half, whose exponents are biased by 15 instead of 7: 2^-8 of the value.
inline V16 load_e4m3(const uint8_t* p) {
  uint16_t halves[16];
  for (int i = 0; i < 16; ++i) {
    const int magnitude = p[i] & 0x7f;
    halves[i] = static_cast<uint16_t>((p[i] & 0x80) << 8 | (magnitude == 0x7f ? 0x7fff : magnitude << 7));
  }
  return load_f16(halves) * 0x1p8f;
}
inline void store_bf16(uint16_t* p, V16 v) {
  uint32_t bits[16];
  __builtin_memcpy(bits, &v, sizeof bits);
  for (int i = 0; i < 16; ++i) {
    const bool nan = (bits[i] & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = nan ? bits[i] | 0x400000u : bits[i] + 0x7fffu + ((bits[i] >> 16) & 1u);
    p[i] = static_cast<uint16_t>(rounded >> 16);
  }
}

using Part = V16;
constexpr int kParts = 1;
constexpr int kDirectRows = 4;
constexpr int kTwoTileRows = 4;
constexpr int kTileRows = 4;
constexpr int kPanelBlocks = 1;

// 2 to 4 bits: the fields of a lane are shifted down; the table repeats, so four bits always index it.
template <int kBits>
struct NibbleDecoder {
  static constexpr bool kUnsigned = true;
  const float* values;
  explicit NibbleDecoder(const ElementTables& tables) : values(tables.value) {}

  template <int Q, int>
  void decode(const uint8_t* unit, V16* out) const {
    for (int j = 0; j < 4; ++j) {
      const int k = 4 * Q + j;
      const int field = k % 2 * 8 + k / 2;
      float column[16];
      for (int r = 0; r < 16; ++r) {
        uint32_t lane = 0;
        __builtin_memcpy(&lane, unit + (kBits == 4 ? k / 8 * 64 : 0) + r * 4, sizeof lane);
        unsigned code = 0;
        if constexpr (kBits == 4) {
          code = (lane >> (4 * (k % 2 * 4 + k / 2 % 4))) & 15u;
        } else {
          code = (lane >> (2 * field)) & 3u;
        }
        if constexpr (kBits == 3) {
          uint16_t top = 0;
          __builtin_memcpy(&top, unit + 64 + r * 2, sizeof top);
          code |= ((static_cast<unsigned>(top) >> field) & 1u) << 2;
        }
        column[r] = values[code];
      }
      out[j] = load(column);
    }
  }
};

// 5 to 8 bits: the planes of a register of 64 codes are joined, then each code is looked up.
template <int kBits, bool kQuad>
struct ByteDecoder {
  static constexpr bool kUnsigned = true;
  const float* values;
  explicit ByteDecoder(const ElementTables& tables) : values(tables.value) {}

  template <int Q, int>
  void decode(const uint8_t* unit, V16* out) const {
    uint8_t codes[64];
    for (int b = 0; b < 64; ++b) {
      if constexpr (kBits == 8) {
        codes[b] = unit[Q * 64 + b];
      } else {
        unsigned code = (static_cast<unsigned>(unit[Q / 2 * 64 + b]) >> (4 * (Q % 2))) & 15u;
        if constexpr (kBits >= 6) code |= ((static_cast<unsigned>(unit[128 + b]) >> (2 * Q)) & 3u) << 4;
        if constexpr (kBits != 6) {
          constexpr int kPlane = kBits == 5 ? 128 : 192;
          code |= ((static_cast<unsigned>(unit[kPlane + b % 32]) >> (b / 32 * 4 + Q)) & 1u) << (kBits - 1);
        }
        codes[b] = static_cast<uint8_t>(code);
      }
    }
    for (int j = 0; j < 4; ++j) {
      float column[16];
      for (int r = 0; r < 16; ++r) {
        column[r] = values[codes[kQuad ? r * 4 + j : r / 4 * 16 + j / 2 * 8 + r % 4 * 2 + j % 2]];
      }
      out[j] = load(column);
    }
  }
};

template <typename Use>
void find_decoder(const ElementTables& tables, Use use) {
  switch (tables.bits) {
    case 2: return use(Tag<NibbleDecoder<2>>{});
    case 3: return use(Tag<NibbleDecoder<3>>{});
    case 4: return use(Tag<NibbleDecoder<4>>{});
    case 5: return use(Tag<ByteDecoder<5, false>>{});
    case 6: return use(Tag<ByteDecoder<6, false>>{});
    case 7: return use(Tag<ByteDecoder<7, false>>{});
    default: break;
  }
  if (tables.is_fp) return use(Tag<ByteDecoder<8, false>>{});
  return use(Tag<ByteDecoder<8, true>>{});
}

#include "kernel.inl"

// On top of it.
#include "portable_integer.inl"

}  // namespace

const LinearKernels kPortableLinear = kTable;
const FindIntegerFn kPortableInteger = find_integer;

}  // namespace ng::cpu
