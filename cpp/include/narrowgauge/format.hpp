// Format: how numbers are stored. element : group : scale, such as fp6_e2m3:g128:fp16.
//
//   element  fpN_eXmY   1 sign, X exponent and Y mantissa bits, N = 1 + X + Y, 3 <= N <= 8, X >= 1
//            intN       N = 2..8, two's complement, symmetric about zero
//            uintN      N = 2..8, unsigned with a zero point per group
//            nf4        the 16-entry normal-float codebook (Dettmers et al. 2023, QLoRA, appendix E)
//   group    gN         N consecutive elements of a row share a scale: a multiple of 16, 16 <= N <= 1024
//            row        the whole row shares one
//   scale    fp32 fp16 bf16 | e8m0 (OCP MX v1.0: a power of two) | e4m3 (NVFP4: with one fp32 global scale)
//
// Omitted group = row; omitted scale = fp32 for row, bf16 for groups. Printing is always full. Aliases: fp8 fp6
// fp5 fp4 int8 int4 nf4 mxfp8 mxfp6 mxfp4 nvfp4 (see format_aliases()).
//
// fp elements follow IEEE and OCP: bias 2^(X-1) - 1, subnormals, signed zeros, no special codes except NaN in
// fp8_e4m3 and Inf/NaN in fp8_e5m2. value(code) * scale is the number; for uintN it is (code - zero) * scale.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "narrowgauge/dtype.hpp"

namespace ng {

enum class ElementKind : uint8_t { fp, signed_int, unsigned_int, nf4 };

struct Element {
  ElementKind kind = ElementKind::fp;
  uint8_t bits = 0;
  uint8_t exponent_bits = 0;  // fp only
  uint8_t mantissa_bits = 0;  // fp only

  // 2^bits codes: [0, 2^bits).
  int codes() const noexcept { return 1 << bits; }
  bool has_zero_point() const noexcept { return kind == ElementKind::unsigned_int; }
  std::string str() const;
  friend bool operator==(const Element&, const Element&) = default;
};

enum class ScaleType : uint8_t { fp32, fp16, bf16, e8m0, e4m3 };

struct Format {
  Element element;
  int32_t group = 0;  // elements per scale; 0 = the row
  ScaleType scale = ScaleType::fp32;

  // Throws InvalidArgument that names the bad part and the valid choices.
  static Format parse(std::string_view text);
  std::string str() const;
  friend bool operator==(const Format&, const Format&) = default;

  bool has_global_scale() const noexcept { return scale == ScaleType::e4m3; }
  // Scales in a row of `cols` elements: ceil(cols / group), 1 for row; 0 if cols is 0.
  int64_t groups(int64_t cols) const noexcept;
  // Bytes of the densely packed codes of one row: ceil(cols * bits / 8).
  int64_t row_bytes(int64_t cols) const noexcept;
  // Stored bits per element, scales and zero points included, for rows of `cols` elements (the group's share
  // for an unlimited row if cols is 0).
  double bits_per_weight(int64_t cols = 0) const noexcept;
};

// alias -> full name, in the order of the documentation.
std::span<const std::pair<std::string_view, std::string_view>> format_aliases() noexcept;

size_t scale_bytes(ScaleType type) noexcept;
std::string_view scale_name(ScaleType type) noexcept;

// The value of every code; entries past element.codes() are 0. uintN: the code itself, before the zero point.
std::array<float, 256> element_values(const Element& element);

// Largest finite value: what amax maps to. intN: 2^(N-1) - 1. uintN: 2^N - 1. nf4: 1.
float element_max(const Element& element) noexcept;
// Smallest positive normal and subnormal; for kinds without exponents both are the smallest positive value.
float element_min_normal(const Element& element) noexcept;
float element_min_subnormal(const Element& element) noexcept;

// Scales between fp32 and their stored bits (fp32 4 bytes, fp16 and bf16 2, e8m0 and e4m3 1), in the low bytes.
// Encoding rounds to nearest even and saturates at the type's largest finite value; e8m0 takes the floor power
// of two, at least 2^-127. Decoding is exact.
uint32_t scale_encode(ScaleType type, float scale) noexcept;
float scale_decode(ScaleType type, uint32_t bits) noexcept;

}  // namespace ng
