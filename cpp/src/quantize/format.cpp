// Formats: the grammar, the value of every code, and the encodings of scales.
//
// Everything here is plain scalar code, the specification that the vector codecs are tested against. Nothing here
// reads or writes matrices.
#include "narrowgauge/format.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

using Alias = std::pair<std::string_view, std::string_view>;

constexpr std::array<Alias, 11> kAliases{{
    {"fp8", "fp8_e4m3:row:fp32"},
    {"fp6", "fp6_e2m3:g128:fp16"},
    {"fp5", "fp5_e2m2:g64:fp16"},
    {"fp4", "fp4_e2m1:g64:fp16"},
    {"int8", "int8:row:fp32"},
    {"int4", "int4:g64:fp16"},
    {"nf4", "nf4:g64:fp16"},
    {"mxfp8", "fp8_e4m3:g32:e8m0"},
    {"mxfp6", "fp6_e2m3:g32:e8m0"},
    {"mxfp4", "fp4_e2m1:g32:e8m0"},
    {"nvfp4", "fp4_e2m1:g16:e4m3"},
}};

constexpr std::array<std::string_view, 5> kScaleNames{"fp32", "fp16", "bf16", "e8m0", "e4m3"};

constexpr std::string_view kElementHelp =
    "expected fpN_eXmY with 3 <= N <= 8, X >= 1 and N = 1 + X + Y, int2..int8, uint2..uint8 or nf4, or as the whole "
    "format one of the aliases fp8 fp6 fp5 fp4 int8 int4 nf4 mxfp8 mxfp6 mxfp4 nvfp4";
constexpr std::string_view kGroupHelp = "expected row or gN with N a multiple of 16, 16 <= N <= 1024";
constexpr std::string_view kScaleHelp = "expected fp32, fp16, bf16, e8m0 or e4m3";

// The quantiles of a normal distribution of QLoRA (Dettmers et al. 2023, appendix E), which has an exact zero.
constexpr std::array<float, 16> kNf4{
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// Takes `prefix` and a decimal number without leading zeros off the front of `text`; false if they are not there.
bool take(std::string_view& text, std::string_view prefix, int& number) {
  if (!text.starts_with(prefix)) return false;
  const std::string_view digits = text.substr(prefix.size());
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
  const auto length = static_cast<size_t>(end - digits.data());
  if (error != std::errc{} || digits[0] == '-' || (digits[0] == '0' && length > 1)) return false;
  text = digits.substr(length);
  return true;
}

Element parse_element(std::string_view part, std::string_view text) {
  std::string_view rest = part;
  int bits = 0, exponent = 0, mantissa = 0;
  if (part == "nf4") return {ElementKind::nf4, 4, 0, 0};
  if (take(rest, "int", bits) && rest.empty() && bits >= 2 && bits <= 8) {
    return {ElementKind::signed_int, static_cast<uint8_t>(bits), 0, 0};
  }
  rest = part;
  if (take(rest, "uint", bits) && rest.empty() && bits >= 2 && bits <= 8) {
    return {ElementKind::unsigned_int, static_cast<uint8_t>(bits), 0, 0};
  }
  rest = part;
  if (take(rest, "fp", bits) && take(rest, "_e", exponent) && take(rest, "m", mantissa) && rest.empty() && bits >= 3 &&
      bits <= 8 && exponent >= 1 && exponent <= 7 && mantissa <= 6 && bits == 1 + exponent + mantissa) {
    return {ElementKind::fp, static_cast<uint8_t>(bits), static_cast<uint8_t>(exponent),
            static_cast<uint8_t>(mantissa)};
  }
  throw InvalidArgument(concat("unknown element '", part, "' in format '", text, "': ", kElementHelp));
}

int32_t parse_group(std::string_view part, std::string_view text) {
  if (part == "row") return 0;
  std::string_view rest = part;
  int group = 0;
  const bool known = take(rest, "g", group) && rest.empty() && group >= 16 && group <= 1024 && group % 16 == 0;
  NG_CHECK(known, InvalidArgument, "bad group '", part, "' in format '", text, "': ", kGroupHelp);
  return group;
}

ScaleType parse_scale(std::string_view part, std::string_view text) {
  const auto* name = std::find(kScaleNames.begin(), kScaleNames.end(), part);
  NG_CHECK(name != kScaleNames.end(), InvalidArgument, "unknown scale '", part, "' in format '", text,
           "': ", kScaleHelp);
  return static_cast<ScaleType>(name - kScaleNames.begin());
}

float fp_value(const Element& element, int code) {
  const int mantissa_bits = element.mantissa_bits;
  const int mantissa = code & ((1 << mantissa_bits) - 1);
  const int exponent = (code >> mantissa_bits) & ((1 << element.exponent_bits) - 1);
  const bool negative = ((code >> (element.bits - 1)) & 1) != 0;
  const int bias = (1 << (element.exponent_bits - 1)) - 1;
  float magnitude;
  if (element.bits == 8 && element.exponent_bits == 5 && exponent == 31) {
    magnitude = mantissa == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  } else if (element.bits == 8 && element.exponent_bits == 4 && exponent == 15 && mantissa == 7) {
    magnitude = std::numeric_limits<float>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), 1 - bias - mantissa_bits);
  } else {
    magnitude = std::ldexp(static_cast<float>((1 << mantissa_bits) + mantissa), exponent - bias - mantissa_bits);
  }
  return std::copysign(magnitude, negative ? -1.0f : 1.0f);
}

}  // namespace

std::string Element::str() const {
  switch (kind) {
    case ElementKind::fp: return concat("fp", int{bits}, "_e", int{exponent_bits}, "m", int{mantissa_bits});
    case ElementKind::signed_int: return concat("int", int{bits});
    case ElementKind::unsigned_int: return concat("uint", int{bits});
    case ElementKind::nf4: break;
  }
  return "nf4";
}

Format Format::parse(std::string_view text) {
  for (const auto& [alias, full] : kAliases) {
    if (text == alias) return parse(full);
  }
  std::array<std::string_view, 3> parts{};
  size_t count = 0;
  for (std::string_view rest = text;;) {
    NG_CHECK(count < parts.size(), InvalidArgument, "unexpected ':", rest, "' in format '", text,
             "': expected element[:group[:scale]]");
    const size_t colon = rest.find(':');
    parts[count++] = rest.substr(0, colon);
    if (colon == std::string_view::npos) break;
    rest.remove_prefix(colon + 1);
  }
  Format format;
  format.element = parse_element(parts[0], text);
  if (count > 1) format.group = parse_group(parts[1], text);
  if (count > 2) {
    format.scale = parse_scale(parts[2], text);
  } else {
    format.scale = format.group == 0 ? ScaleType::fp32 : ScaleType::bf16;
  }
  return format;
}

std::string Format::str() const {
  const std::string part = group == 0 ? "row" : concat("g", group);
  return concat(element.str(), ":", part, ":", scale_name(scale));
}

int64_t Format::groups(int64_t cols) const noexcept {
  if (cols <= 0) return 0;
  return group == 0 ? 1 : (cols - 1) / group + 1;
}

int64_t Format::row_bytes(int64_t cols) const noexcept {
  return cols / 8 * element.bits + (cols % 8 * element.bits + 7) / 8;
}

double Format::bits_per_weight(int64_t cols) const noexcept {
  const double per_group = static_cast<double>(8 * scale_bytes(scale)) + (element.has_zero_point() ? 8 : 0);
  if (cols <= 0) return element.bits + (group == 0 ? 0.0 : per_group / group);
  return (static_cast<double>(8 * row_bytes(cols)) + per_group * static_cast<double>(groups(cols))) /
         static_cast<double>(cols);
}

std::span<const Alias> format_aliases() noexcept { return kAliases; }

size_t scale_bytes(ScaleType type) noexcept {
  switch (type) {
    case ScaleType::fp32: return 4;
    case ScaleType::fp16:
    case ScaleType::bf16: return 2;
    case ScaleType::e8m0:
    case ScaleType::e4m3: break;
  }
  return 1;
}

std::string_view scale_name(ScaleType type) noexcept { return kScaleNames[static_cast<size_t>(type)]; }

std::array<float, 256> element_values(const Element& element) {
  std::array<float, 256> values{};
  for (int code = 0; code < element.codes(); ++code) {
    float& value = values[static_cast<size_t>(code)];
    switch (element.kind) {
      case ElementKind::fp: value = fp_value(element, code); break;
      case ElementKind::signed_int:
        value = static_cast<float>(code < element.codes() / 2 ? code : code - element.codes());
        break;
      case ElementKind::unsigned_int: value = static_cast<float>(code); break;
      case ElementKind::nf4: value = kNf4[static_cast<size_t>(code)]; break;
    }
  }
  return values;
}

float element_max(const Element& element) noexcept {
  switch (element.kind) {
    case ElementKind::fp: {
      // The special codes of the two fp8 types are the last ones of each sign.
      const int specials = element.bits != 8 ? 0 : element.exponent_bits == 4 ? 1 : element.exponent_bits == 5 ? 4 : 0;
      return fp_value(element, element.codes() / 2 - 1 - specials);
    }
    case ElementKind::signed_int: return static_cast<float>((1 << (element.bits - 1)) - 1);
    case ElementKind::unsigned_int: return static_cast<float>(element.codes() - 1);
    case ElementKind::nf4: break;
  }
  return 1.0f;
}

float element_min_normal(const Element& element) noexcept {
  if (element.kind != ElementKind::fp) return element_min_subnormal(element);
  return fp_value(element, 1 << element.mantissa_bits);
}

float element_min_subnormal(const Element& element) noexcept {
  if (element.kind == ElementKind::nf4) return kNf4[8];
  // Code 1 is the smallest positive one of every other kind (with no mantissa bits it is the smallest normal).
  return element.kind == ElementKind::fp ? fp_value(element, 1) : 1.0f;
}

uint32_t scale_encode(ScaleType type, float scale) noexcept {
  const auto bits = std::bit_cast<uint32_t>(scale);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const bool nan = magnitude > 0x7f800000u;
  switch (type) {
    case ScaleType::fp32: return magnitude == 0x7f800000u ? bits - 1 : bits;
    case ScaleType::fp16: {
      const uint32_t half = to_f16(scale).bits;
      return (half & 0x7fffu) == 0x7c00u ? half - 1 : half;
    }
    case ScaleType::bf16: {
      const uint32_t brain = to_bf16(scale).bits;
      return (brain & 0x7fffu) == 0x7f80u ? brain - 1 : brain;
    }
    case ScaleType::e8m0:
      if (nan) return 255;
      return std::min(std::max(scale, 0.0f) == 0.0f ? 0u : magnitude >> 23, 254u);
    case ScaleType::e4m3: break;
  }
  const uint32_t sign = (bits >> 24) & 0x80u;
  if (nan) return sign | 0x7fu;
  const float absolute = std::min(std::bit_cast<float>(magnitude), 448.0f);
  // Adding 1.5 * 2^23 units of the last place leaves the code's mantissa, rounded to even, in the low bits.
  const int exponent = std::max(static_cast<int>(std::bit_cast<uint32_t>(absolute) >> 23) - 127, -6);
  const auto magic = std::bit_cast<float>((static_cast<uint32_t>(exponent - 3 + 23 + 127) << 23) | 0x400000u);
  const uint32_t steps = std::bit_cast<uint32_t>(absolute + magic) - std::bit_cast<uint32_t>(magic);
  return sign | ((static_cast<uint32_t>(exponent + 6) << 3) + steps);
}

float scale_decode(ScaleType type, uint32_t bits) noexcept {
  switch (type) {
    case ScaleType::fp32: return std::bit_cast<float>(bits);
    case ScaleType::fp16: return to_float(f16{static_cast<uint16_t>(bits)});
    case ScaleType::bf16: return to_float(bf16{static_cast<uint16_t>(bits)});
    case ScaleType::e8m0:
      // 2^(bits - 127); 2^-127 is a subnormal float.
      if ((bits & 0xffu) == 255) return std::numeric_limits<float>::quiet_NaN();
      return std::bit_cast<float>((bits & 0xffu) == 0 ? 0x00400000u : (bits & 0xffu) << 23);
    case ScaleType::e4m3: break;
  }
  // The code's exponent and mantissa in the float's place, then the difference of the biases: exact for subnormals.
  if ((bits & 0x7fu) == 0x7fu) return std::numeric_limits<float>::quiet_NaN();
  const float magnitude = std::bit_cast<float>((bits & 0x7fu) << 20) * 0x1p120f;
  return (bits & 0x80u) != 0 ? -magnitude : magnitude;
}

}  // namespace ng
