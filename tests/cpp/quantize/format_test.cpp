// The grammar, the tables of values and the encodings of scales. Values are checked against independent oracles in
// tests/python/test_format.py; here against constants from the standards and against the definitions.
#include "narrowgauge/format.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

std::string message_of(std::string_view text) {
  try {
    Format::parse(text);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

TEST(Format, PrintsInFull) {
  EXPECT_EQ(Format::parse("fp6_e2m3:g128:fp16").str(), "fp6_e2m3:g128:fp16");
  EXPECT_EQ(Format::parse("fp6_e2m3").str(), "fp6_e2m3:row:fp32");
  EXPECT_EQ(Format::parse("uint4:g32").str(), "uint4:g32:bf16");
  EXPECT_EQ(Format::parse("int4:row").str(), "int4:row:fp32");
  EXPECT_EQ(Format::parse("nf4:g1024:e8m0").str(), "nf4:g1024:e8m0");
  for (const auto& [alias, full] : format_aliases()) EXPECT_EQ(Format::parse(alias).str(), full);
}

TEST(Format, ParsesWhatItPrints) {
  int elements = 0;
  const auto round_trips = [&](const Element& element) {
    ++elements;
    for (const int group : {0, 16, 48, 1024}) {
      for (int scale = 0; scale < 5; ++scale) {
        const Format format{element, group, static_cast<ScaleType>(scale)};
        EXPECT_EQ(Format::parse(format.str()), format) << format.str();
      }
    }
  };
  for (uint8_t bits = 3; bits <= 8; ++bits) {
    for (uint8_t exponent = 1; exponent < bits; ++exponent) {
      round_trips({ElementKind::fp, bits, exponent, static_cast<uint8_t>(bits - 1 - exponent)});
    }
  }
  for (uint8_t bits = 2; bits <= 8; ++bits) {
    round_trips({ElementKind::signed_int, bits});
    round_trips({ElementKind::unsigned_int, bits});
  }
  round_trips({ElementKind::nf4, 4});
  EXPECT_EQ(elements, 27 + 14 + 1);
}

TEST(Format, ErrorsNameTheBadPart) {
  EXPECT_NE(message_of("fp6_e3m3").find("unknown element 'fp6_e3m3'"), std::string::npos);
  EXPECT_NE(message_of("fp6_e3m3:g128").find("N = 1 + X + Y"), std::string::npos);
  EXPECT_NE(message_of("int4:g100").find("bad group 'g100'"), std::string::npos);
  EXPECT_NE(message_of("int4:g64:fp8").find("unknown scale 'fp8'"), std::string::npos);
  EXPECT_NE(message_of("int4:g64:fp16:x").find("unexpected ':x'"), std::string::npos);
  for (const char* text : {"",
                           ":",
                           "int",
                           "int1",
                           "int9",
                           "int08",
                           "int+4",
                           "int-4",
                           "uint9",
                           "fp9_e4m4",
                           "fp2_e1m0",
                           "fp8_e0m7",
                           "fp8_e4m3 ",
                           " fp8",
                           "FP8",
                           "fp8_e4m3fn",
                           "nf3",
                           "fp7",
                           "int4:",
                           "int4:g",
                           "int4:g0",
                           "int4:g8",
                           "int4:g1040",
                           "int4:g016",
                           "int4:g-64",
                           "int4:g99999999999999",
                           "int4:64",
                           "int4:row:",
                           "int4:row:fp64",
                           "int4::fp16",
                           "fp6:g128"}) {
    EXPECT_NE(message_of(text), "") << text;
  }
}

TEST(Format, CountsBytesAndBits) {
  const Format fp6 = Format::parse("fp6");
  EXPECT_EQ(fp6.groups(0), 0);
  EXPECT_EQ(fp6.groups(1), 1);
  EXPECT_EQ(fp6.groups(128), 1);
  EXPECT_EQ(fp6.groups(129), 2);
  EXPECT_EQ(fp6.row_bytes(0), 0);
  EXPECT_EQ(fp6.row_bytes(1), 1);
  EXPECT_EQ(fp6.row_bytes(4), 3);
  EXPECT_EQ(fp6.row_bytes(11), 9);
  EXPECT_DOUBLE_EQ(fp6.bits_per_weight(), 6.125);
  EXPECT_DOUBLE_EQ(fp6.bits_per_weight(4096), 6.125);
  EXPECT_DOUBLE_EQ(Format::parse("uint4:g64:fp16").bits_per_weight(), 4.375);
  EXPECT_DOUBLE_EQ(Format::parse("int8").bits_per_weight(), 8.0);
  EXPECT_DOUBLE_EQ(Format::parse("int8").bits_per_weight(32), 9.0);
  EXPECT_DOUBLE_EQ(Format::parse("mxfp4").bits_per_weight(), 4.25);
}

TEST(Element, Limits) {
  const auto check = [](const char* name, float max, float min_normal, float min_subnormal) {
    const Element element = Format::parse(std::string(name) + ":row").element;
    EXPECT_EQ(element_max(element), max) << name;
    EXPECT_EQ(element_min_normal(element), min_normal) << name;
    EXPECT_EQ(element_min_subnormal(element), min_subnormal) << name;
  };
  check("fp8_e4m3", 448, 0x1p-6f, 0x1p-9f);
  check("fp8_e5m2", 57344, 0x1p-14f, 0x1p-16f);
  check("fp8_e3m4", 31, 0.25f, 0x1p-6f);
  check("fp8_e7m0", 0x1p64f, 0x1p-62f, 0x1p-62f);
  check("fp6_e2m3", 7.5f, 1.0f, 0.125f);
  check("fp6_e3m2", 28, 0.25f, 0.0625f);
  check("fp5_e2m2", 7, 1, 0.25f);
  check("fp4_e2m1", 6, 1, 0.5f);
  check("fp3_e1m1", 3, 2, 1);
  check("fp3_e2m0", 4, 1, 1);
  check("int8", 127, 1, 1);
  check("int2", 1, 1, 1);
  check("uint8", 255, 1, 1);
  check("nf4", 1, 0.07958029955625534f, 0.07958029955625534f);
}

TEST(Element, OnlyTwoTypesHaveSpecialCodes) {
  for (uint8_t bits = 3; bits <= 8; ++bits) {
    for (uint8_t exponent = 1; exponent < bits; ++exponent) {
      const Element element{ElementKind::fp, bits, exponent, static_cast<uint8_t>(bits - 1 - exponent)};
      const auto values = element_values(element);
      int specials = 0;
      for (int code = 0; code < element.codes(); ++code) specials += !std::isfinite(values[static_cast<size_t>(code)]);
      const int expected = bits == 8 && exponent == 4 ? 2 : bits == 8 && exponent == 5 ? 8 : 0;
      EXPECT_EQ(specials, expected) << element.str();
    }
  }
}

TEST(Scale, DecodeThenEncodeIsTheIdentity) {
  for (const ScaleType type : {ScaleType::fp16, ScaleType::bf16, ScaleType::e8m0, ScaleType::e4m3}) {
    const uint32_t codes = scale_bytes(type) == 2 ? 0x10000 : 0x100;
    for (uint32_t code = 0; code < codes; ++code) {
      const float value = scale_decode(type, code);
      if (!std::isfinite(value)) continue;
      EXPECT_EQ(scale_encode(type, value), code) << scale_name(type);
    }
  }
}

// Midpoints of neighbouring codes go to the even one; everything else to the nearest.
TEST(Scale, RoundsToNearestEven) {
  for (const ScaleType type : {ScaleType::fp16, ScaleType::bf16, ScaleType::e4m3}) {
    const uint32_t last = scale_encode(type, std::numeric_limits<float>::max());
    for (uint32_t code = 0; code < last; ++code) {
      const double low = scale_decode(type, code), high = scale_decode(type, code + 1);
      const auto middle = static_cast<float>((low + high) / 2);
      EXPECT_EQ(scale_encode(type, middle), code + (code & 1)) << scale_name(type) << " " << code;
      EXPECT_EQ(scale_encode(type, std::nextafter(middle, 0.0f)), code) << scale_name(type) << " " << code;
      EXPECT_EQ(scale_encode(type, std::nextafter(middle, INFINITY)), code + 1) << scale_name(type) << " " << code;
    }
  }
}

TEST(Scale, SaturatesAndKeepsNan) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(scale_encode(ScaleType::fp32, inf), 0x7f7fffffu);
  EXPECT_EQ(scale_encode(ScaleType::fp16, 1e6f), 0x7bffu);
  EXPECT_EQ(scale_encode(ScaleType::bf16, std::numeric_limits<float>::max()), 0x7f7fu);
  EXPECT_EQ(scale_encode(ScaleType::e8m0, inf), 254u);
  EXPECT_EQ(scale_encode(ScaleType::e4m3, 1000.0f), 0x7eu);
  for (int type = 0; type < 5; ++type) {
    const auto scale = static_cast<ScaleType>(type);
    EXPECT_TRUE(std::isnan(scale_decode(scale, scale_encode(scale, nan))));
  }
}

TEST(Scale, PowersOfTwoTakeTheFloor) {
  EXPECT_EQ(scale_decode(ScaleType::e8m0, scale_encode(ScaleType::e8m0, 1.0f)), 1.0f);
  EXPECT_EQ(scale_decode(ScaleType::e8m0, scale_encode(ScaleType::e8m0, 1.999f)), 1.0f);
  EXPECT_EQ(scale_decode(ScaleType::e8m0, scale_encode(ScaleType::e8m0, 0x1p-126f)), 0x1p-126f);
  EXPECT_EQ(scale_decode(ScaleType::e8m0, scale_encode(ScaleType::e8m0, 0x1p-140f)), 0x1p-127f);
  EXPECT_EQ(scale_decode(ScaleType::e8m0, scale_encode(ScaleType::e8m0, 0.0f)), 0x1p-127f);
  EXPECT_EQ(scale_decode(ScaleType::e8m0, 0), 0x1p-127f);
}

}  // namespace
}  // namespace ng
