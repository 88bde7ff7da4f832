// dequantize_sum against dequantize and sums in order: rows of many runs, any group, types and strides of the output.
#include "quantize/sum.hpp"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

constexpr int64_t kRows = 3, kCols = 9001, kStride = 9100;

TEST(DequantizeSum, AddsInTheOrderOfThePeers) {
  for (const char* name :
       {"int8:g64:bf16", "int4:row:fp32", "uint3:g48:fp16", "fp6_e2m3:g1008:fp16", "nvfp4", "nf4:row:fp16"}) {
    const Format format = Format::parse(name);
    std::vector<QTensor> matrices;
    std::vector<CanonicalView> peers;
    std::vector<float> expected(kRows * kCols), values(expected.size());
    std::mt19937 random(5);
    std::normal_distribution<float> distribution;
    for (int peer = 0; peer < 3; ++peer) {
      for (float& value : values) value = distribution(random);
      matrices.push_back(QTensor::quantize({values.data(), DType::f32, {kRows, kCols}}, format));
      dequantize(matrices.back().canonical_view(), {values.data(), DType::f32, {kRows, kCols}}, default_executor());
      for (size_t i = 0; i < values.size(); ++i) expected[i] = peer == 0 ? values[i] : expected[i] + values[i];
    }
    for (const QTensor& matrix : matrices) peers.push_back(matrix.canonical_view());
    for (const int divisor : {1, 3}) {
      SCOPED_TRACE(concat(name, ' ', divisor));
      std::vector<float> wide(kRows * kStride, -1.0f);
      std::vector<bf16> half(wide.size());
      TensorView out(wide.data(), DType::f32, {kRows, kCols}), half_out(half.data(), DType::bf16, {kRows, kCols});
      out.strides[0] = half_out.strides[0] = kStride;
      codec::dequantize_sum(peers, divisor, out, default_executor());
      codec::dequantize_sum(peers, divisor, half_out, default_executor());
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t col = 0; col < kStride; ++col) {
          const auto at = static_cast<size_t>(row * kStride + col);
          const float sum =
              col < kCols ? expected[static_cast<size_t>(row * kCols + col)] / static_cast<float>(divisor) : 0;
          ASSERT_EQ(wide[at], col < kCols ? sum : -1.0f) << row << ' ' << col;
          ASSERT_EQ(half[at].bits, to_bf16(sum).bits) << row << ' ' << col;
        }
      }
    }
  }
}

}  // namespace
}  // namespace ng
