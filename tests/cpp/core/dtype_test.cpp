// Conversions of the 16-bit floats, over all codes and around every rounding boundary.
#include "narrowgauge/dtype.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

// The value of a 16-bit float from its definition.
double value_of(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int sign = bits >> 15;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  double magnitude = 0;
  if (exponent == (1 << exponent_bits) - 1) {
    magnitude = mantissa == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    magnitude = std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
  }
  return sign != 0 ? -magnitude : magnitude;
}

template <typename T, typename Narrow>
void check_all_codes(Narrow narrow, int exponent_bits, int mantissa_bits) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto code = static_cast<uint16_t>(bits);
    const double expected = value_of(code, exponent_bits, mantissa_bits);
    const float value = to_float(T{code});
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(value)) << bits;
      EXPECT_TRUE(std::isnan(to_float(narrow(value)))) << bits;
      continue;
    }
    ASSERT_EQ(static_cast<double>(value), expected) << bits;
    ASSERT_EQ(std::signbit(value), std::signbit(expected)) << bits;
    ASSERT_EQ(narrow(value).bits, code) << bits;
    // The midpoint to the next code up, and its neighbours.
    if ((code & 0x7fff) == (((1 << exponent_bits) - 1) << mantissa_bits)) continue;
    const auto next_code = static_cast<uint16_t>(code + 1);
    double next = value_of(next_code, exponent_bits, mantissa_bits);
    if (std::isinf(next)) next = std::copysign(std::ldexp(1.0, 1 << (exponent_bits - 1)), next);
    const auto middle = static_cast<float>((expected + next) / 2);
    if (static_cast<double>(middle) != (expected + next) / 2 || std::isinf(middle)) continue;  // not a float
    ASSERT_EQ(narrow(middle).bits, (code & 1) == 0 ? code : next_code) << bits;
    ASSERT_EQ(narrow(std::nextafter(middle, 0.0f)).bits, code) << bits;
    ASSERT_EQ(narrow(std::nextafter(middle, 2 * middle)).bits, next_code) << bits;
  }
}

TEST(DType, Float16OverAllCodesAndTies) {
  check_all_codes<f16>([](float value) { return to_f16(value); }, 5, 10);
}

TEST(DType, Bfloat16OverAllCodesAndTies) {
  check_all_codes<bf16>([](float value) { return to_bf16(value); }, 8, 7);
}

TEST(DType, DlpackRoundTrip) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64, DType::u8, DType::i8, DType::u16,
                            DType::i16, DType::u32, DType::i32, DType::u64, DType::i64, DType::boolean}) {
    EXPECT_EQ(dtype_from_dlpack(dtype_dlpack(dtype)), dtype);
    EXPECT_EQ(dtype_bytes(dtype), dtype_dlpack(dtype).bits / 8u);
    EXPECT_FALSE(dtype_name(dtype).empty());
  }
  EXPECT_THROW(dtype_from_dlpack({5, 64}), InvalidArgument);  // complex
}

}  // namespace
}  // namespace ng
