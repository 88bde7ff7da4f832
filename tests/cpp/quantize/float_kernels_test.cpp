// The codec's kernels on plain floats, of every instruction set of this machine, against dtype.hpp and a plain loop.
#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "narrowgauge/device.hpp"
#include "narrowgauge/dtype.hpp"
#include "quantize/codec.hpp"

namespace ng::codec {
namespace {

class FloatKernels : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (GetParam() > static_cast<int>(isa_supported())) GTEST_SKIP() << "not on this machine";
    force_isa(static_cast<Isa>(GetParam()));
  }
  void TearDown() override { force_isa(isa_); }
  const Isa isa_ = isa();
};

INSTANTIATE_TEST_SUITE_P(Isas, FloatKernels, ::testing::Range(0, 3));

TEST_P(FloatKernels, EveryHalfIsWidened) {
  constexpr int64_t kAll = 65536;
  std::vector<uint16_t> halves(kAll);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  for (const int64_t n : {kAll, kAll - 5, int64_t{7}, int64_t{0}}) {
    std::vector<float> f16s(static_cast<size_t>(n) + 1, -1.0f), bf16s = f16s;
    table().widen(halves.data(), Source::f16, n, f16s.data());
    table().widen(halves.data(), Source::bf16, n, bf16s.data());
    for (int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<size_t>(i);
      ASSERT_EQ(std::bit_cast<uint32_t>(f16s[at]), std::bit_cast<uint32_t>(to_float(f16{halves[at]}))) << i;
      ASSERT_EQ(std::bit_cast<uint32_t>(bf16s[at]), std::bit_cast<uint32_t>(to_float(bf16{halves[at]}))) << i;
    }
    EXPECT_EQ(f16s.back(), -1.0f);
    EXPECT_EQ(bf16s.back(), -1.0f);
  }
}

// Numbers of all exponents, ties of both types, infinities and NaN.
std::vector<float> floats() {
  std::vector<float> all{0.0f,
                         -0.0f,
                         65519.9f,
                         65520.0f,
                         1e-45f,
                         std::numeric_limits<float>::infinity(),
                         -std::numeric_limits<float>::infinity(),
                         std::numeric_limits<float>::quiet_NaN()};
  std::mt19937 random(3);
  for (int i = 0; i < 50000; ++i) {
    const auto bits = static_cast<uint32_t>(random());
    for (const uint32_t cleared : {0u, 0xfffu, 0x7fffu}) {
      const auto value = std::bit_cast<float>((bits & ~cleared) | (cleared == 0 ? 0 : (cleared + 1) >> 1));
      if (value == value) all.push_back(value);
    }
  }
  return all;
}

TEST_P(FloatKernels, QuotientsAreRoundedOnce) {
  const std::vector<float> from = floats();
  const auto n = static_cast<int64_t>(from.size());
  for (const float divisor : {1.0f, 3.0f}) {
    std::vector<float> wide(from.size());
    std::vector<f16> f16s(from.size());
    std::vector<bf16> bf16s(from.size());
    table().narrow(from.data(), n, divisor, Source::f32, wide.data());
    table().narrow(from.data(), n, divisor, Source::f16, f16s.data());
    table().narrow(from.data(), n, divisor, Source::bf16, bf16s.data());
    for (size_t i = 0; i < from.size(); ++i) {
      const float quotient = from[i] / divisor;
      ASSERT_EQ(std::bit_cast<uint32_t>(wide[i]), std::bit_cast<uint32_t>(quotient)) << from[i];
      ASSERT_EQ(f16s[i].bits, to_f16(quotient).bits) << from[i];
      ASSERT_EQ(bf16s[i].bits, to_bf16(quotient).bits) << from[i];
    }
  }
}

TEST_P(FloatKernels, SumsOfAnyLength) {
  for (const int64_t n : {0, 1, 15, 100}) {
    std::vector<float> sum(101, 0.1f), from(101, 0.7f);
    table().add(from.data(), n, sum.data());
    for (int64_t i = 0; i < 101; ++i) EXPECT_EQ(sum[static_cast<size_t>(i)], i < n ? 0.1f + 0.7f : 0.1f);
  }
}

// The specification.
void plain_hadamard(float* x) {
  for (int half = 1; half < kBlock; half *= 2) {
    for (int i = 0; i < kBlock; ++i) {
      if ((i & half) != 0) continue;
      const float a = x[i], b = x[i + half];
      x[i] = a + b;
      x[i + half] = a - b;
    }
  }
  for (int i = 0; i < kBlock; ++i) x[i] *= 0.125f;
}

TEST_P(FloatKernels, HadamardBlocks) {
  constexpr int64_t kBlocks = 33;
  std::vector<float> x(kBlocks * kBlock + 1);
  std::mt19937 random(4);
  std::normal_distribution<float> distribution;
  for (float& value : x) value = distribution(random);
  x[5] = 1e38f;
  x[70] = 1e-44f;
  std::vector<float> expected = x;
  for (int64_t block = 0; block < kBlocks; ++block) plain_hadamard(expected.data() + block * kBlock);
  table().hadamard(x.data(), kBlocks);
  EXPECT_EQ(std::memcmp(x.data(), expected.data(), x.size() * sizeof(float)), 0);
}

}  // namespace
}  // namespace ng::codec
