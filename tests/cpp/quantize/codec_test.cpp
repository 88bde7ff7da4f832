// quantize and dequantize against a plain reference, on every instruction set that this machine has.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/quantize.hpp"
#include "quantize/philox.hpp"

namespace ng {
namespace {

std::vector<Isa> isas() {
  std::vector<Isa> all;
  for (int i = 0; i <= static_cast<int>(isa_supported()); ++i) all.push_back(static_cast<Isa>(i));
  return all;
}

// Restores the instruction set that a test found.
class CodecTest : public ::testing::Test {
 protected:
  void TearDown() override { force_isa(isa_); }
  const Isa isa_ = isa();
};

std::vector<Element> all_elements() {
  std::vector<Element> all;
  for (uint8_t bits = 3; bits <= 8; ++bits) {
    for (uint8_t exponent = 1; exponent < bits; ++exponent) {
      all.push_back({ElementKind::fp, bits, exponent, static_cast<uint8_t>(bits - 1 - exponent)});
    }
  }
  for (uint8_t bits = 2; bits <= 8; ++bits) {
    all.push_back({ElementKind::signed_int, bits});
    all.push_back({ElementKind::unsigned_int, bits});
  }
  all.push_back({ElementKind::nf4, 4});
  return all;
}

// The specification of codes: the nearest value, a tie to the even code; saturating. Without mantissa bits all
// significands are odd, and IEEE 754 (4.3.1) sends a tie to the larger magnitude.
int reference_code(const Element& e, float q, int zero) {
  const auto values = element_values(e);
  if (e.kind == ElementKind::unsigned_int) {
    return std::clamp(static_cast<int>(std::nearbyint(std::clamp(q, -1000.0f, 1000.0f))) + zero, 0, e.codes() - 1);
  }
  q = std::clamp(q, -element_max(e), element_max(e));
  int best = -1;
  for (int code = 0; code < e.codes(); ++code) {
    const double value = values[static_cast<size_t>(code)];
    if (!std::isfinite(value)) continue;
    if (e.kind == ElementKind::signed_int && value < -element_max(e)) continue;
    if (e.kind == ElementKind::fp && std::signbit(value) != std::signbit(q)) continue;
    if (best < 0) best = code;
    const double distance = std::fabs(q - value), least = std::fabs(q - double{values[static_cast<size_t>(best)]});
    const bool powers = e.kind == ElementKind::fp && e.mantissa_bits == 0 && values[static_cast<size_t>(best)] != 0;
    if (distance < least || (distance == least && (powers || code % 2 == 0))) best = code;
  }
  return best;
}

int code_at(const CanonicalView& matrix, int64_t row, int64_t col) {
  const int bits = matrix.format.element.bits;
  const uint8_t* bytes = matrix.codes + row * matrix.format.row_bytes(matrix.cols);
  int code = 0;
  for (int bit = 0; bit < bits; ++bit) {
    const int64_t at = col * bits + bit;
    code |= ((bytes[at / 8] >> (at % 8)) & 1) << bit;
  }
  return code;
}

float scale_at(const CanonicalView& matrix, int64_t row, int64_t group) {
  const size_t size = scale_bytes(matrix.format.scale);
  const auto index = static_cast<size_t>(row * matrix.format.groups(matrix.cols) + group);
  uint32_t bits = 0;
  std::memcpy(&bits, static_cast<const std::byte*>(matrix.scales) + index * size, size);
  const float scale = scale_decode(matrix.format.scale, bits);
  return matrix.global_scale != nullptr ? scale * *matrix.global_scale : scale;
}

// The scale's definition in long double, which holds range / divisor closely enough to be rounded once.
uint32_t reference_scale(const Format& format, double range, double global, bool ceil) {
  const double most = element_max(format.element);
  if (range == 0) return 0;
  if (format.scale == ScaleType::e8m0) {
    const long double exponent = ceil ? std::ceil(std::log2(static_cast<long double>(range) / most))
                                      : std::floor(std::log2(static_cast<long double>(range))) -
                                            std::floor(std::log2(static_cast<long double>(most)));
    return static_cast<uint32_t>(std::clamp(exponent + 127, 0.0L, 254.0L));
  }
  const long double largest = scale_decode(format.scale, scale_encode(format.scale, INFINITY));
  const long double exact =
      std::min(static_cast<long double>(range) / (static_cast<long double>(most) * global), largest);
  // The nearest of the neighbours of the float that is nearest.
  const uint32_t near = scale_encode(format.scale, static_cast<float>(exact));
  uint32_t best = near;
  for (const uint32_t code : {near == 0 ? 0 : near - 1, near, near + 1}) {
    const float value = scale_decode(format.scale, code);
    if (!std::isfinite(value)) continue;
    const long double distance = std::fabs(exact - value), least = std::fabs(exact - scale_decode(format.scale, best));
    if (distance < least || (distance == least && code % 2 == 0)) best = code;
  }
  return scale_decode(format.scale, best) * global == 0 ? 0 : best;
}

std::vector<float> random_weights(int64_t count, uint32_t seed, float sigma = 0.02f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0, sigma);
  std::vector<float> weights(static_cast<size_t>(count));
  for (float& w : weights) w = normal(engine);
  return weights;
}

std::vector<std::byte> bytes_of(const CanonicalView& matrix) {
  const CanonicalBytes size = canonical_bytes(matrix.format, matrix.rows, matrix.cols);
  std::vector<std::byte> all(static_cast<size_t>(size.total()));
  std::byte* to = all.data();
  for (const auto& [from, count] : {std::pair<const void*, int64_t>{matrix.codes, size.codes},
                                    {matrix.scales, size.scales},
                                    {matrix.zeros, size.zeros},
                                    {matrix.global_scale, size.global_scale}}) {
    if (count != 0) std::memcpy(to, from, static_cast<size_t>(count));
    to += count;
  }
  return all;
}

void expect_matches_reference(const std::vector<float>& weights, int64_t rows, int64_t cols, const Format& format,
                              const QuantizeOptions& options = {}) {
  const TensorView view(const_cast<float*>(weights.data()), DType::f32, {rows, cols});
  const QTensor q = QTensor::quantize(view, format, options);
  const CanonicalView matrix = q.canonical_view();
  const Element& e = format.element;
  const int64_t groups = format.groups(cols), group = format.group == 0 ? cols : format.group;
  const auto range_of = [&](int64_t row, int64_t begin, int64_t end) {
    double low = 0, high = 0;
    for (int64_t col = begin; col < end; ++col) {
      const double w = weights[static_cast<size_t>(row * cols + col)];
      low = std::min(low, w);
      high = std::max(high, w);
    }
    return e.has_zero_point() ? high - low : std::max(-low, high);
  };
  double global = 1;
  if (format.has_global_scale()) {
    double low = 0, high = 0;
    for (const float w : weights) {
      low = std::min<double>(low, w);
      high = std::max<double>(high, w);
    }
    global = static_cast<float>((e.has_zero_point() ? high - low : std::max(-low, high)) /
                                (static_cast<double>(element_max(e)) * 448));
    ASSERT_EQ(*matrix.global_scale, static_cast<float>(global));
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * group, end = std::min(cols, begin + group);
      const double range = range_of(row, begin, end);
      const uint32_t bits = reference_scale(format, range, global, options.e8m0_ceil);
      const float scale = scale_at(matrix, row, g);
      ASSERT_EQ(scale, static_cast<float>(scale_decode(format.scale, bits) * global)) << format.str() << " " << range;
      const int zero = e.has_zero_point() ? matrix.zeros[row * groups + g] : 0;
      if (e.has_zero_point()) {
        double low = 0;
        for (int64_t col = begin; col < end; ++col)
          low = std::min<double>(low, weights[static_cast<size_t>(row * cols + col)]);
        const float most = element_max(e);
        const int expected =
            scale == 0 ? 0 : static_cast<int>(std::nearbyint(std::min(-static_cast<float>(low) / scale, most)));
        ASSERT_EQ(zero, expected) << format.str();
      }
      for (int64_t col = begin; col < end; ++col) {
        const float w = weights[static_cast<size_t>(row * cols + col)];
        const int expected = scale == 0 || range == 0 ? 0 : reference_code(e, w / scale, zero);
        ASSERT_EQ(code_at(matrix, row, col), expected)
            << format.str() << " [" << row << ", " << col << "] " << w << " / " << scale << " on " << isa_name(isa());
      }
    }
  }
}

class ElementTest : public CodecTest, public ::testing::WithParamInterface<Element> {};

TEST_P(ElementTest, EveryValueAndTie) {
  // One row per scale of 2^k: all values, all midpoints and their neighbours, first the largest so that the scale
  // is what the test wants.
  const Element e = GetParam();
  const auto values = element_values(e);
  std::vector<float> row;
  const float most = element_max(e);
  row.push_back(most);
  if (e.kind == ElementKind::unsigned_int) row.push_back(0);
  const auto add = [&](float x) {
    for (const float y : {x, std::nextafter(x, -INFINITY), std::nextafter(x, INFINITY)}) {
      if (std::fabs(y) <= most && (y >= 0 || e.kind != ElementKind::unsigned_int)) row.push_back(y);
    }
  };
  for (int a = 0; a < e.codes(); ++a) {
    const float value = values[static_cast<size_t>(a)];
    if (!std::isfinite(value)) continue;
    add(value);
    for (const int b : {a - 1, a + 1}) {
      if (b < 0 || b >= e.codes() || !std::isfinite(values[static_cast<size_t>(b)])) continue;
      add(static_cast<float>((static_cast<double>(value) + static_cast<double>(values[static_cast<size_t>(b)])) / 2));
    }
  }
  for (const Isa isa : isas()) {
    force_isa(isa);
    // A row of scale 1 and others that leave the range of the fast division.
    for (const float unit : {1.0f, 0x1p-10f, 0x1p-37f, 0x1p-60f, 0x1p61f}) {
      std::vector<float> scaled(row);
      for (float& x : scaled) x *= unit;
      if (!std::isfinite(scaled[0])) continue;
      expect_matches_reference(scaled, 1, static_cast<int64_t>(row.size()), {e, 0, ScaleType::fp32});
    }
    expect_matches_reference(row, 1, static_cast<int64_t>(row.size()), {e, 0, ScaleType::bf16});
  }
}

TEST_P(ElementTest, RandomMatricesOfEveryGroupAndScale) {
  const Element e = GetParam();
  uint32_t seed = 1;
  for (const Isa isa : isas()) {
    force_isa(isa);
    for (const int32_t group : {0, 16, 48, 64, 128, 1024}) {
      for (int scale = 0; scale < 5; ++scale) {
        const Format format{e, group, static_cast<ScaleType>(scale)};
        for (const int64_t cols : {1, 15, 64, 129, 333}) {
          expect_matches_reference(random_weights(3 * cols, seed++), 3, cols, format);
        }
        expect_matches_reference(random_weights(2 * 200, seed++, 1e-6f), 2, 200, format);
        expect_matches_reference(random_weights(2 * 200, seed++, 1e30f), 2, 200, format);
        expect_matches_reference(random_weights(2 * 200, seed++, 1e-41f), 2, 200, format);
        expect_matches_reference(random_weights(200, seed++), 1, 200, format, {.e8m0_ceil = true});
      }
    }
  }
}

TEST_P(ElementTest, SubnormalAndZeroGroups) {
  std::vector<float> weights(96, 0.0f);
  weights[3] = -0.0f;
  weights[40] = 1e-40f;
  weights[41] = -1e-45f;
  weights[70] = 1.0f;
  weights[71] = -0.0f;
  for (const Isa isa : isas()) {
    force_isa(isa);
    for (int scale = 0; scale < 5; ++scale) {
      expect_matches_reference(weights, 1, 96, {GetParam(), 32, static_cast<ScaleType>(scale)});
    }
  }
}

// Codes, scales and values do not depend on the instruction set, for every option and source type.
TEST_P(ElementTest, AllInstructionSetsAgree) {
  const Element e = GetParam();
  constexpr int64_t kRows = 5, kCols = 4096 + 333;
  const std::vector<float> weights = random_weights(kRows * kCols, 7);
  std::vector<uint16_t> halves, brains;
  for (const float w : weights) {
    halves.push_back(to_f16(w).bits);
    brains.push_back(to_bf16(w).bits);
  }
  const TensorView views[] = {{const_cast<float*>(weights.data()), DType::f32, {kRows, kCols}},
                              {halves.data(), DType::f16, {kRows, kCols}},
                              {brains.data(), DType::bf16, {kRows, kCols}}};
  for (const char* tail : {":row:fp32", ":g64:fp16", ":g48:bf16", ":g128:bf16", ":g32:e8m0", ":g16:e4m3"}) {
    const Format format = Format::parse(e.str() + tail);
    for (const TensorView& view : views) {
      for (const QuantizeOptions& options :
           {QuantizeOptions{}, QuantizeOptions{.search = ScaleSearch::mse}, QuantizeOptions{.full_range = true},
            QuantizeOptions{.stochastic = true, .seed = 42}}) {
        std::vector<std::byte> expected;
        std::vector<std::byte> expected_values[3];
        for (const Isa isa : isas()) {
          force_isa(isa);
          const QTensor q = QTensor::quantize(view, format, options);
          const std::vector<std::byte> bytes = bytes_of(q.canonical_view());
          if (expected.empty()) expected = bytes;
          ASSERT_EQ(bytes, expected) << format.str() << " " << dtype_name(view.dtype) << " " << isa_name(isa);
          for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
            std::vector<std::byte> values(static_cast<size_t>(kRows * kCols) * dtype_bytes(dtype));
            dequantize(q.canonical_view(), {values.data(), dtype, {kRows, kCols}}, default_executor());
            auto& first = expected_values[static_cast<size_t>(dtype)];
            if (first.empty()) first = values;
            ASSERT_EQ(values, first) << format.str() << " " << dtype_name(dtype) << " " << isa_name(isa);
          }
        }
      }
    }
  }
}

TEST_P(ElementTest, DequantizesEveryCodeToEveryType) {
  const Element e = GetParam();
  const auto values = element_values(e);
  const int64_t cols = e.codes() + 3;  // and a tail
  for (const char* tail : {":row:fp32", ":g16:fp16", ":g32:e8m0", ":g16:e4m3"}) {
    const Format format = Format::parse(e.str() + tail);
    const CanonicalBytes sizes = canonical_bytes(format, 1, cols);
    std::vector<uint8_t> codes(static_cast<size_t>(sizes.codes)), zeros(static_cast<size_t>(sizes.zeros), 3);
    std::vector<std::byte> scales(static_cast<size_t>(sizes.scales));
    for (int64_t col = 0; col < cols; ++col) {
      for (int bit = 0; bit < e.bits; ++bit) {
        const int64_t at = col * e.bits + bit;
        codes[static_cast<size_t>(at / 8)] |= static_cast<uint8_t>(((col % e.codes()) >> bit & 1) << (at % 8));
      }
    }
    for (const float unit : {0.37f, 1.0f, 0x1p-140f, 3e38f, 1e-3f, NAN}) {
      const uint32_t bits = scale_encode(format.scale, unit);
      const size_t size = scale_bytes(format.scale);
      for (size_t i = 0; i < scales.size(); i += size) std::memcpy(scales.data() + i, &bits, size);
      float global = 0.7f;
      const CanonicalView matrix{format,
                                 1,
                                 cols,
                                 codes.data(),
                                 scales.data(),
                                 zeros.empty() ? nullptr : zeros.data(),
                                 format.has_global_scale() ? &global : nullptr};
      const float scale = scale_at(matrix, 0, 0);
      for (const Isa isa : isas()) {
        force_isa(isa);
        std::vector<float> floats(static_cast<size_t>(cols));
        std::vector<uint16_t> halves(floats.size()), brains(floats.size());
        dequantize(matrix, {floats.data(), DType::f32, {cols}}, default_executor());
        dequantize(matrix, {halves.data(), DType::f16, {cols}}, default_executor());
        dequantize(matrix, {brains.data(), DType::bf16, {cols}}, default_executor());
        for (size_t i = 0; i < floats.size(); ++i) {
          const float value = values[i % static_cast<size_t>(e.codes())] - (e.has_zero_point() ? 3.0f : 0.0f);
          const float expected = value * scale;
          if (std::isnan(expected)) {
            ASSERT_TRUE(std::isnan(floats[i])) << format.str() << " " << i;
            ASSERT_TRUE(std::isnan(to_float(f16{halves[i]}))) << format.str() << " " << i;
            ASSERT_TRUE(std::isnan(to_float(bf16{brains[i]}))) << format.str() << " " << i;
            continue;
          }
          ASSERT_EQ(std::bit_cast<uint32_t>(floats[i]), std::bit_cast<uint32_t>(expected))
              << format.str() << " code " << i << " scale " << scale << " on " << isa_name(isa);
          ASSERT_EQ(halves[i], to_f16(expected).bits) << format.str() << " " << i << " " << expected;
          ASSERT_EQ(brains[i], to_bf16(expected).bits) << format.str() << " " << i << " " << expected;
        }
      }
    }
  }
}

TEST_P(ElementTest, StochasticRoundingFollowsTheDefinition) {
  const Element e = GetParam();
  constexpr int64_t kRows = 3, kCols = 77;
  const std::vector<float> weights = random_weights(kRows * kCols, 11);
  const TensorView view(const_cast<float*>(weights.data()), DType::f32, {kRows, kCols});
  const Format format{e, 16, ScaleType::fp32};
  const uint64_t seed = 0x123456789abcdefULL;
  const QTensor q = QTensor::quantize(view, format, {.stochastic = true, .seed = seed});
  const CanonicalView matrix = q.canonical_view();
  const auto values = element_values(e);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t col = 0; col < kCols; ++col) {
      const auto index = static_cast<uint64_t>(row * kCols + col);
      const double random = philox(index >> 2, seed)[index & 3] * 0x1p-32;
      const float quotient = weights[index] / scale_at(matrix, row, col / 16);
      const int zero = e.has_zero_point() ? matrix.zeros[row * format.groups(kCols) + col / 16] : 0;
      const double seen = values[static_cast<size_t>(code_at(matrix, row, col))] - static_cast<float>(zero);
      // The neighbours among all values: below towards zero (uintN: down), above away from it.
      const bool down = e.has_zero_point() || quotient >= 0;
      double below = NAN, above = NAN;
      for (int code = 0; code < e.codes(); ++code) {
        const double value = values[static_cast<size_t>(code)] - static_cast<float>(zero);
        if (!std::isfinite(value)) continue;
        if (e.kind == ElementKind::signed_int && value < -element_max(e)) continue;
        const double signed_value = down ? value : -value, target = down ? quotient : -quotient;
        if (!e.has_zero_point() && signed_value < 0) continue;
        if (signed_value <= target && !(signed_value <= (down ? below : -below))) below = value;
        if (signed_value > target && !(signed_value >= (down ? above : -above))) above = value;
      }
      if (std::isnan(below)) below = above;  // saturated
      if (std::isnan(above)) above = below;
      const double fraction = above == below ? 0 : (quotient - below) / (above - below);
      EXPECT_EQ(seen, random < fraction ? above : below) << format.str() << " " << quotient << " " << random;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, ElementTest, ::testing::ValuesIn(all_elements()),
                         [](const ::testing::TestParamInfo<Element>& tested) { return tested.param.str(); });

TEST_F(CodecTest, PhiloxKnownAnswers) {
  // From the test vectors of Random123: counter and key of zeros, and of ones in the words that this use sets.
  EXPECT_EQ(philox(0, 0), (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
}

TEST_F(CodecTest, StochasticRoundingIsUnbiased) {
  std::vector<float> weights(1 << 16, 0.3f);
  weights[0] = 1;
  const TensorView view(weights.data(), DType::f32, {1, static_cast<int64_t>(weights.size())});
  const QTensor q = QTensor::quantize(view, Format::parse("int4:row"), {.stochastic = true, .seed = 3});
  dequantize(q.canonical_view(), view, default_executor());
  double sum = 0;
  for (const float w : weights) sum += w;
  EXPECT_NEAR(sum / static_cast<double>(weights.size()), 0.3, 1e-3);
}

TEST_F(CodecTest, SearchNeverRaisesTheError) {
  for (const char* text :
       {"fp6", "fp4", "int4", "uint4:g64", "nf4", "mxfp4", "nvfp4", "int8", "fp5_e2m2:row", "int2:g32"}) {
    const Format format = Format::parse(text);
    constexpr int64_t kRows = 8, kCols = 9000;
    const std::vector<float> weights = random_weights(kRows * kCols, 5);
    const TensorView view(const_cast<float*>(weights.data()), DType::f32, {kRows, kCols});
    std::vector<float> values(weights.size());
    const int64_t group = format.group == 0 ? kCols : format.group;
    std::vector<double> error[2];
    for (const auto search : {ScaleSearch::absmax, ScaleSearch::mse}) {
      const QTensor q = QTensor::quantize(view, format, {.search = search});
      dequantize(q.canonical_view(), {values.data(), DType::f32, {kRows, kCols}}, default_executor());
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t begin = 0; begin < kCols; begin += group) {
          double sum = 0;
          for (int64_t col = begin; col < std::min(kCols, begin + group); ++col) {
            const auto i = static_cast<size_t>(row * kCols + col);
            sum += std::pow(static_cast<double>(weights[i]) - static_cast<double>(values[i]), 2);
          }
          error[search == ScaleSearch::mse].push_back(sum);
        }
      }
    }
    double total[2] = {};
    for (size_t g = 0; g < error[0].size(); ++g) {
      EXPECT_LE(error[1][g], error[0][g] * (1 + 1e-12)) << text;
      total[0] += error[0][g];
      total[1] += error[1][g];
    }
    EXPECT_LT(total[1], total[0]) << text;
  }
}

TEST_F(CodecTest, StridedRowsAndAllThreadCountsAgree) {
  constexpr int64_t kRows = 3, kCols = 70001, kStride = kCols + 7;
  const std::vector<float> padded = random_weights(kRows * kStride, 9);
  std::vector<float> dense;
  for (int64_t row = 0; row < kRows; ++row) {
    dense.insert(dense.end(), padded.begin() + row * kStride, padded.begin() + row * kStride + kCols);
  }
  TensorView strided(const_cast<float*>(padded.data()), DType::f32, {kRows, kCols});
  strided.strides[0] = kStride;
  for (const char* text : {"int8", "fp6", "fp8:row", "uint8:row", "nvfp4"}) {
    if (std::string(text) == "fp8:row") text = "fp8_e4m3:row";
    const Format format = Format::parse(text);
    const auto one = make_pool(1), four = make_pool(4);
    const QTensor a = QTensor::quantize(strided, format, {}, *one);
    const QTensor b = QTensor::quantize({dense.data(), DType::f32, {kRows, kCols}}, format, {}, *four);
    EXPECT_EQ(bytes_of(a.canonical_view()), bytes_of(b.canonical_view())) << text;
  }
}

TEST_F(CodecTest, NanAndInfinityAreNamedOrSaturated) {
  for (const char* text : {"int8", "fp6", "uint4:g32", "nvfp4", "fp8_e4m3:row:bf16"}) {
    const Format format = Format::parse(text);
    std::vector<float> weights = random_weights(4 * 5000, 13);
    const TensorView view(weights.data(), DType::f32, {4, 5000});
    weights[5000 + 4321] = -INFINITY;
    weights[15000] = NAN;
    try {
      QTensor::quantize(view, format);
      FAIL() << text;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find("weights[1, 4321] (element 9321) is -inf"), std::string::npos)
          << error.what();
    }
    const QTensor q = QTensor::quantize(view, format, {.nan = NanPolicy::saturate});
    weights[5000 + 4321] = -std::numeric_limits<float>::max();
    weights[15000] = 0;
    const QTensor expected = QTensor::quantize(view, format);
    EXPECT_EQ(bytes_of(q.canonical_view()), bytes_of(expected.canonical_view())) << text;
  }
}

// Of weights with NaN and Inf, quantized with NanPolicy::keep: groups without them are as if those were zeros; the
// others have the scale NaN and nothing else, and all of their values are NaN.
void expect_kept(const Format& format, DType dtype, QuantizeOptions options) {
  constexpr int64_t kRows = 6, kCols = 1100;
  const std::vector<float> finite = random_weights(kRows * kCols, 21);
  std::vector<float> holed = finite, zeroed = finite;
  std::vector<bool> bad(static_cast<size_t>(kRows * format.groups(kCols)));
  const auto plant = [&](int64_t row, int64_t col, float value) {
    holed[static_cast<size_t>(row * kCols + col)] = value;
    zeroed[static_cast<size_t>(row * kCols + col)] = 0;
    bad[static_cast<size_t>(row * format.groups(kCols) + (format.group == 0 ? 0 : col / format.group))] = true;
  };
  plant(1, 0, NAN);
  plant(2, 77, INFINITY);
  plant(2, 78, -NAN);
  plant(4, 1099, -INFINITY);
  plant(4, 500, NAN);
  const auto typed = [&](const std::vector<float>& values) {
    std::vector<std::byte> bytes(values.size() * dtype_bytes(dtype));
    for (size_t i = 0; i < values.size(); ++i) {
      const uint16_t half = dtype == DType::f16 ? to_f16(values[i]).bits : to_bf16(values[i]).bits;
      dtype == DType::f32 ? std::memcpy(&bytes[4 * i], &values[i], 4) : std::memcpy(&bytes[2 * i], &half, 2);
    }
    return bytes;
  };
  std::vector<std::byte> with = typed(holed), without = typed(zeroed);
  options.nan = NanPolicy::keep;
  const QTensor q = QTensor::quantize({with.data(), dtype, {kRows, kCols}}, format, options);
  options.nan = NanPolicy::error;
  const QTensor reference = QTensor::quantize({without.data(), dtype, {kRows, kCols}}, format, options);
  const CanonicalView seen = q.canonical_view(), expected = reference.canonical_view();
  const auto group_of = [&](int64_t row, int64_t col) {
    return static_cast<size_t>(row * format.groups(kCols) + (format.group == 0 ? 0 : col / format.group));
  };
  if (format.has_global_scale()) {
    EXPECT_EQ(*seen.global_scale, *expected.global_scale);
  }
  for (size_t g = 0; g < bad.size(); ++g) {
    const size_t width = scale_bytes(format.scale);
    uint32_t bits = 0, wanted = 0;
    std::memcpy(&bits, static_cast<std::byte*>(seen.scales) + g * width, width);
    std::memcpy(&wanted, static_cast<std::byte*>(expected.scales) + g * width, width);
    if (bad[g]) wanted = scale_encode(format.scale, NAN);
    ASSERT_EQ(bits, wanted) << "group " << g;
    if (seen.zeros != nullptr) {
      ASSERT_EQ(seen.zeros[g], bad[g] ? 0 : expected.zeros[g]) << "group " << g;
    }
  }
  std::vector<float> values(holed.size()), wanted(holed.size()), sum(holed.size());
  dequantize(seen, {values.data(), DType::f32, {kRows, kCols}}, default_executor());
  dequantize(expected, {wanted.data(), DType::f32, {kRows, kCols}}, default_executor());
  dequantize_sum(std::vector{seen, expected}, {sum.data(), DType::f32, {kRows, kCols}}, default_executor());
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t col = 0; col < kCols; ++col) {
      const auto i = static_cast<size_t>(row * kCols + col);
      const bool is_bad = bad[group_of(row, col)];
      ASSERT_EQ(code_at(seen, row, col), is_bad ? 0 : code_at(expected, row, col)) << row << ' ' << col;
      ASSERT_EQ(std::isnan(values[i]), is_bad) << row << ' ' << col;
      ASSERT_EQ(std::isnan(sum[i]), is_bad) << row << ' ' << col;
      if (!is_bad) {
        ASSERT_EQ(values[i], wanted[i]) << row << ' ' << col;
      }
    }
  }
}

TEST_F(CodecTest, GroupsWithNanOrInfinityAreKeptAsNan) {
  for (const Isa isa : isas()) {
    force_isa(isa);
    for (const Element& element : all_elements()) {
      for (const ScaleType scale :
           {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16, ScaleType::e8m0, ScaleType::e4m3}) {
        for (const int group : {0, 16, 48, 128}) {
          const Format format{element, group, scale};
          SCOPED_TRACE(format.str() + " on " + std::string(isa_name(isa)));
          expect_kept(format, group == 48 ? DType::f16 : group == 16 ? DType::bf16 : DType::f32, {});
          if (HasFatalFailure() || HasNonfatalFailure()) return;
        }
      }
    }
    for (const char* text : {"fp6", "uint4:g32:bf16", "int8", "nf4", "nvfp4", "uint5:row:fp32"}) {
      SCOPED_TRACE(std::string(text) + " on " + std::string(isa_name(isa)));
      expect_kept(Format::parse(text), DType::f32, {.search = ScaleSearch::mse});
      expect_kept(Format::parse(text), DType::bf16, {.stochastic = true, .seed = 5});
    }
  }
}

// Of few long rows, which all threads share; and of a matrix of which no element is finite.
TEST_F(CodecTest, RowsWithNanAreKeptAsNanByManyThreads) {
  constexpr int64_t kCols = 70000;
  std::vector<float> weights = random_weights(2 * kCols, 22);
  weights[kCols + 69999] = NAN;
  const auto four = make_pool(4);
  for (const char* text : {"int8:row:fp32", "uint8:row:bf16", "fp8_e4m3:row:e4m3"}) {
    const Format format = Format::parse(text);
    const QTensor q =
        QTensor::quantize({weights.data(), DType::f32, {2, kCols}}, format, {.nan = NanPolicy::keep}, *four);
    EXPECT_TRUE(std::isfinite(scale_at(q.canonical_view(), 0, 0))) << text;
    EXPECT_TRUE(std::isnan(scale_at(q.canonical_view(), 1, 0))) << text;
  }
  const std::vector<float> none(64, -INFINITY);
  const QTensor q = QTensor::quantize({const_cast<float*>(none.data()), DType::f32, {2, 32}}, Format::parse("nvfp4"),
                                      {.nan = NanPolicy::keep});
  EXPECT_EQ(*q.canonical_view().global_scale, 0);
  for (int64_t group = 0; group < 2; ++group) EXPECT_TRUE(std::isnan(scale_at(q.canonical_view(), 0, group)));
}

TEST_F(CodecTest, EmptyMatrices) {
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{0, 16}, {16, 0}, {0, 0}}) {
    for (const char* text : {"int8", "fp6", "nvfp4", "uint4:g32"}) {
      const QTensor q = QTensor::quantize({nullptr, DType::f32, {rows, cols}}, Format::parse(text));
      EXPECT_EQ(q.rows(), rows);
      EXPECT_EQ(q.cols(), cols);
      dequantize(q.canonical_view(), {nullptr, DType::bf16, {rows, cols}}, default_executor());
    }
  }
}

TEST_F(CodecTest, LeadingAxesAndVectors) {
  std::vector<float> weights = random_weights(24 * 33, 17);
  const QTensor cube = QTensor::quantize({weights.data(), DType::f32, {4, 6, 33}}, Format::parse("fp6"));
  const QTensor flat = QTensor::quantize({weights.data(), DType::f32, {24, 33}}, Format::parse("fp6"));
  EXPECT_EQ(bytes_of(cube.canonical_view()), bytes_of(flat.canonical_view()));
  EXPECT_EQ(cube.shape(), (std::vector<int64_t>{4, 6, 33}));
  EXPECT_EQ(QTensor::quantize({weights.data(), DType::f32, {33}}, Format::parse("fp6")).rows(), 1);
  const QTensor copy = QTensor::copy_of(cube.canonical_view(), {4, 6, 33});
  EXPECT_EQ(bytes_of(copy.canonical_view()), bytes_of(cube.canonical_view()));
  EXPECT_EQ(copy.nbytes(), 24 * (25 + 2));
}

TEST_F(CodecTest, BadArgumentsAreRefused) {
  std::vector<float> weights(64);
  const Format format = Format::parse("uint4:g32:e4m3");
  const TensorView view(weights.data(), DType::f32, {4, 16});
  EXPECT_THROW(QTensor::quantize({weights.data(), DType::f64, {2, 16}}, format), InvalidArgument);
  EXPECT_THROW(QTensor::quantize({weights.data(), DType::i8, {2, 16}}, format), InvalidArgument);
  EXPECT_THROW(QTensor::quantize(view, Format{}), InvalidArgument);
  EXPECT_THROW(canonical_bytes(format, -1, 16), InvalidArgument);
  EXPECT_THROW(canonical_bytes(format, int64_t{1} << 40, int64_t{1} << 40), InvalidArgument);
  const QTensor q = QTensor::quantize(view, format);
  CanonicalView matrix = q.canonical_view();
  EXPECT_THROW(dequantize(matrix, {weights.data(), DType::f32, {16, 4}}, default_executor()), InvalidArgument);
  EXPECT_THROW(dequantize(matrix, {weights.data(), DType::u8, {4, 16}}, default_executor()), InvalidArgument);
  EXPECT_THROW(QTensor::copy_of(matrix, {2, 2, 15}), InvalidArgument);
  EXPECT_THROW(q.packed_view(), InvalidArgument);
  for (auto member : {&CanonicalView::codes, &CanonicalView::zeros}) {
    CanonicalView broken = matrix;
    broken.*member = nullptr;
    EXPECT_THROW(quantize(view, broken, {}, default_executor()), InvalidArgument);
  }
  matrix.global_scale = nullptr;
  EXPECT_THROW(quantize(view, matrix, {}, default_executor()), InvalidArgument);
}

// Bits beyond the last code of a row are zero, whatever the buffer held.
TEST_F(CodecTest, PaddingBitsAreZero) {
  std::vector<float> weights = random_weights(2 * 3, 19);
  for (const char* text : {"int3:row", "uint5:row", "nf4:row", "fp6_e2m3:row"}) {
    const Format format = Format::parse(text);
    std::vector<uint8_t> codes(static_cast<size_t>(2 * format.row_bytes(3)), 0xff), zeros(2);
    std::vector<float> scales(2);
    const CanonicalView out{format, 2, 3, codes.data(), scales.data(), zeros.data(), nullptr};
    for (const Isa isa : isas()) {
      force_isa(isa);
      quantize({weights.data(), DType::f32, {2, 3}}, out, {}, default_executor());
      const int used = 3 * format.element.bits % 8;
      for (const size_t row : {size_t{0}, size_t{1}}) {
        const uint8_t last = codes[(row + 1) * static_cast<size_t>(format.row_bytes(3)) - 1];
        EXPECT_EQ(last >> used, 0) << text;
      }
    }
  }
}

}  // namespace
}  // namespace ng
