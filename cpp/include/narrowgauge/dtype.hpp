// Plain element types of tensors, and bit-exact conversions between the 16-bit floats and float.
//
// These are the types of activations and of unquantised weights. Narrow elements (fp6, int4, ...) are not
// dtypes: they live in a Format (format.hpp).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace ng {

enum class DType : uint8_t { f32, f16, bf16, f64, u8, i8, u16, i16, u32, i32, u64, i64, boolean };

// DLPack's description of a type (DLPack 1.x: DLDataTypeCode, bits, lanes = 1).
struct DLType {
  uint8_t code;
  uint8_t bits;
  friend bool operator==(DLType, DLType) = default;
};

size_t dtype_bytes(DType dtype) noexcept;
DLType dtype_dlpack(DType dtype) noexcept;
std::string_view dtype_name(DType dtype) noexcept;  // "float32", "bfloat16", ...

// The dtype for a DLPack code and width; throws InvalidArgument where narrowgauge has none.
DType dtype_from_dlpack(DLType type);

// bfloat16: the upper half of a float. Conversion rounds to nearest even; NaN stays NaN.
struct bf16 {
  uint16_t bits;
};
// IEEE binary16. Conversion rounds to nearest even, keeps subnormals, overflows to infinity.
struct f16 {
  uint16_t bits;
};

constexpr float to_float(bf16 value) noexcept { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

constexpr bf16 to_bf16(float value) noexcept {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

constexpr float to_float(f16 value) noexcept {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  const uint32_t wide = exponent == 31 ? 0xffu : exponent + (127 - 15);
  return std::bit_cast<float>(sign | (wide << 23) | (mantissa << 13));
}

constexpr f16 to_f16(float value) noexcept {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 2^16 or beyond
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 2^-1 puts the half's last bit at the float's last bit, so the addition rounds to even.
    const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(rounded) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace ng
