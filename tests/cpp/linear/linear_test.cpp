// linear against float64, per element, for every element type, instruction set and tile; and proof that the bound
// catches small faults.
#include "narrowgauge/linear.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <tuple>

#include "narrowgauge/error.hpp"
#include "reference.hpp"
#include "rows.hpp"

namespace ng {
namespace {

using test::IsaGuard;
using test::Matrix;
using test::packed_copy;
using test::random_activations;
using test::Rows;
using test::run;
using test::scales_of;
using test::view_of;
using test::worst_ratio;

class LinearTest : public testing::TestWithParam<std::tuple<Isa, std::string>> {};

TEST_P(LinearTest, MeetsTheBoundForEveryTile) {
  const auto& [isa, element] = GetParam();
  const IsaGuard guard(isa);
  std::mt19937 random(7);
  const std::string tails[] = {":row:fp32", ":g32:e8m0", ":g16:e4m3", ":g64:fp16", ":g48:bf16"};
  int tail = 0;
  // Whole blocks, ragged rows and columns, and a last group of less than a unit; strips of four blocks and a rest.
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{32, 128}, {19, 83}, {1, 1}, {83, 208}, {17, 330}}) {
    const Format format = Format::parse(element + tails[tail++]);
    Matrix w = test::random_matrix(format, n, k, random);
    std::vector<float> bias(static_cast<size_t>(n));
    for (float& b : bias) b = std::uniform_real_distribution<float>(-1, 1)(random);
    for (const int64_t m : {1, 2, 3, 4, 5, 8, 9, 16, 17, 100}) {
      if (m > 17 && n != 19) continue;  // more than one pass over the rows, or tiles
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        Rows x = random_activations(dtype, m, k, random);
        const Rows y = run(w, x, m % 2 == 0 ? bias : std::vector<float>{}, dtype);
        EXPECT_LE(worst_ratio(w, x, y, m % 2 == 0 ? bias : std::vector<float>{}), 1.0)
            << format.str() << " M=" << m << " N=" << n << " K=" << k << " " << dtype_name(dtype);
      }
    }
  }
}

// Every code at every place of a unit, by rows of x that pick one column: the element's value and nothing else, with
// infinities, NaN and signs.
TEST_P(LinearTest, EveryCodeIsDecodedExactly) {
  const auto& [isa, element] = GetParam();
  const IsaGuard guard(isa);
  const Format format = Format::parse(element + ":row:fp32");
  const int64_t codes = format.element.codes();
  const std::array<float, 256> values = element_values(format.element);
  for (int64_t col = 0; col < 16; ++col) {
    Matrix w(format, codes, 16);
    for (int64_t code = 0; code < codes; ++code) {
      w.set_scale(code, 0, 1.0f);
      w.set_code(code, col, static_cast<int>(code));
    }
    for (const int64_t m : {1, 4, 20}) {
      Rows x(DType::bf16, m, 16);
      for (int64_t row = 0; row < m; ++row) x.set(row, col, 1.0f);
      const Rows y = run(w, x, {}, DType::f32);
      for (int64_t code = 0; code < codes; ++code) {
        const auto expected = static_cast<double>(values[static_cast<size_t>(code)]);
        const double got = y.read(m - 1, code);
        EXPECT_TRUE(got == expected || (std::isnan(got) && std::isnan(expected)))
            << "code " << code << " in column " << col << " M=" << m << ": " << got << ", expected " << expected;
      }
    }
  }
}

TEST_P(LinearTest, GradientMatchesFloat64) {
  const auto& [isa, element] = GetParam();
  const IsaGuard guard(isa);
  std::mt19937 random(11);
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{37, 83}, {16, 32}, {300, 20}}) {
    const Format format = Format::parse(element + ":g32:fp16");
    Matrix w = test::random_matrix(format, n, k, random);
    const Buffer packed = packed_copy(w);
    const std::vector<double> weights = w.weights();
    for (const int64_t m : {1, 9}) {
      Rows dy = random_activations(DType::f32, m, n, random);
      Rows dx(DType::f32, m, k);
      linear_backward_input(dy.view(), view_of(w, packed), dx.view(), default_executor());
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t col = 0; col < k; ++col) {
          double expected = 0;
          double magnitude = 0;
          for (int64_t row = 0; row < n; ++row) {
            const double term =
                dy.values[static_cast<size_t>(i * n + row)] * weights[static_cast<size_t>(row * k + col)];
            expected += term;
            magnitude += std::abs(term);
          }
          // One rounding of the scaled weight more than the forward pass.
          const double tolerance = 0x1p-24 * (18 + static_cast<double>(n) / 16) * magnitude;
          ASSERT_NEAR(dx.read(i, col), expected, tolerance) << format.str() << " " << i << " " << col;
        }
      }
    }
  }
}

class PackTest : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, PackTest, testing::ValuesIn(test::all_elements()),
                         [](const auto& suite) { return suite.param; });

TEST_P(PackTest, UnpackGivesBackWhatWasPacked) {
  const std::string& element = GetParam();
  std::mt19937 random(3);
  for (const char* tail : {":row:fp32", ":g16:e4m3", ":g32:e8m0", ":g128:fp16"}) {
    for (const auto& [n, k] : {std::pair<int64_t, int64_t>{16, 64}, {1, 1}, {35, 1100}, {18, 131}}) {
      Matrix matrix = test::random_matrix(Format::parse(element + tail), n, k, random);
      const Buffer packed = packed_copy(matrix);
      Matrix back(matrix.format, n, k);
      std::fill(back.codes.begin(), back.codes.end(), uint8_t{0xa5});
      unpack(view_of(matrix, packed), back.view(), default_executor());
      EXPECT_EQ(back.codes, matrix.codes);
      EXPECT_EQ(back.scales, matrix.scales);
      EXPECT_EQ(back.zeros, matrix.zeros);
      EXPECT_EQ(back.global_scale, matrix.global_scale);
      // Packed bytes: dense where the shape is whole blocks.
      if (n % 16 == 0 && k % 64 == 0) {
        EXPECT_LE(packed.size(), static_cast<size_t>(canonical_bytes(matrix.format, n, k).total()) + 4 * 64);
      }
      std::vector<float> gathered(static_cast<size_t>(2 * k));
      const int64_t rows[] = {n - 1, 0};
      gather_rows(view_of(matrix, packed), rows, 2, TensorView(gathered.data(), DType::f32, {2, k}),
                  default_executor());
      const std::vector<double> weights = matrix.weights();
      for (int64_t col = 0; col < k; ++col) {
        EXPECT_FLOAT_EQ(gathered[static_cast<size_t>(col)],
                        static_cast<float>(weights[static_cast<size_t>((n - 1) * k + col)]));
        EXPECT_FLOAT_EQ(gathered[static_cast<size_t>(k + col)], static_cast<float>(weights[static_cast<size_t>(col)]));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, LinearTest,
                         testing::Combine(testing::ValuesIn(test::supported_isas()),
                                          testing::ValuesIn(test::all_elements())),
                         [](const auto& suite) {
                           return std::string(isa_name(std::get<0>(suite.param))) + "_" + std::get<1>(suite.param);
                         });

TEST(Pack, RefusesSizesThatOverflowWithPadding) {
  // Each is small enough as a canonical matrix; padded to 16 rows or columns it is not.
  EXPECT_NO_THROW(canonical_bytes(Format::parse("int8"), 1, int64_t{1} << 59));
  EXPECT_THROW(packed_bytes(Format::parse("int8"), 1, int64_t{1} << 59), InvalidArgument);
  EXPECT_THROW(packed_bytes(Format::parse("int2:row:fp16"), int64_t{1} << 58, 1), InvalidArgument);
}

class LinearIsaTest : public testing::TestWithParam<Isa> {};
INSTANTIATE_TEST_SUITE_P(All, LinearIsaTest, testing::ValuesIn(test::supported_isas()),
                         [](const auto& suite) { return std::string(isa_name(suite.param)); });

// Sums whose rounding errors all point the same way: the worst case that the block length must bound.
TEST_P(LinearIsaTest, BoundHoldsForSystematicRounding) {
  const IsaGuard guard(GetParam());
  for (const char* name : {"int8:row:fp32", "fp6_e2m3:g128:fp16", "int4:g64:fp16"}) {
    const Format format = Format::parse(name);
    for (const int64_t k : {16, 48, 256, 4096}) {
      Matrix w(format, 16, k);
      for (int64_t row = 0; row < 16; ++row) {
        for (int64_t col = 0; col < k; ++col) {
          w.set_code(row, col, 3);
          w.set_scale(row, col, 1.0f / 3.0f);
        }
      }
      for (const int64_t m : {1, 2, 4, 8, 24}) {
        for (const float value : {1.0f / 3.0f, 0.7f, 1.0000001f}) {
          for (const DType dtype : {DType::f32, DType::bf16}) {
            Rows x(dtype, m, k);
            for (int64_t i = 0; i < m; ++i) {
              for (int64_t col = 0; col < k; ++col) x.set(i, col, value * static_cast<float>(i + 1));
            }
            const Rows y = run(w, x, {}, DType::f32);
            EXPECT_LE(worst_ratio(w, x, y, {}), 1.0) << name << " M=" << m << " K=" << k << " x=" << value;
          }
        }
      }
    }
  }
}

TEST_P(LinearIsaTest, BoundHoldsForExtremeScalesAndSubnormals) {
  const IsaGuard guard(GetParam());
  std::mt19937 random(5);
  for (const char* name : {"fp8_e4m3:row:fp32", "fp6_e2m3:g32:fp32", "int4:g16:fp32", "nf4:g64:fp32",
                           "fp8_e5m2:g32:e8m0", "fp4_e2m1:g32:e8m0", "fp8_e7m0:row:fp32", "uint8:g64:fp32"}) {
    for (const float scale : {1e-40f, 1e-30f, 1e25f}) {
      for (const float size : {1e-38f, 1e-20f, 1.0f}) {
        Matrix w = test::random_matrix(Format::parse(name), 18, 70, random, scale);
        for (const int64_t m : {1, 17}) {
          for (const DType dtype : {DType::f32, DType::bf16}) {
            Rows x = random_activations(dtype, m, 70, random, size);
            const Rows y = run(w, x, {}, DType::f32);
            EXPECT_LE(worst_ratio(w, x, y, {}), 1.0) << name << " scale " << scale << " x " << size << " M=" << m;
          }
        }
      }
    }
  }
}

// The bound is only worth something if small faults break it.
TEST_P(LinearIsaTest, PlantedFaultsBreakTheBound) {
  const IsaGuard guard(GetParam());
  std::mt19937 random(13);
  const Format format = Format::parse("fp6_e2m3:g64:fp16");
  for (const int64_t m : {1, 5, 9, 17}) {
    const int64_t n = 33;
    const int64_t k = 203;
    Matrix w = test::random_matrix(format, n, k, random);
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Rows x = random_activations(dtype, m, k, random);
      ASSERT_LE(worst_ratio(w, x, run(w, x, {}, DType::f32), {}), 1.0);

      Matrix one_code = w;
      one_code.set_code(n - 1, 100, w.code(n - 1, 100) ^ 1);
      EXPECT_GT(worst_ratio(w, x, run(one_code, x, {}, DType::f32), {}), 1.0) << "one code off by its last bit";

      Matrix last_element = w;
      last_element.set_code(n - 1, k - 1, w.code(n - 1, k - 1) ^ 32);
      EXPECT_GT(worst_ratio(w, x, run(last_element, x, {}, DType::f32), {}), 1.0) << "the last element negated";

      Matrix swapped = w;
      swapped.set_scale(3, 0, w.scale(3, 64));
      swapped.set_scale(3, 64, w.scale(3, 0));
      EXPECT_GT(worst_ratio(w, x, run(swapped, x, {}, DType::f32), {}), 1.0) << "two scales swapped";
    }

    // The lowest of three bf16 terms of the activations left out, where it always has the product's sign.
    Rows all_terms(DType::f32, m, k);
    Rows two_terms(DType::f32, m, k);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t col = 0; col < k; ++col) {
        const float sign = w.weight(2, col) < 0 ? -1.0f : 1.0f;
        all_terms.set(i, col, sign * (1.0f + 0x1p-9f + 0x1p-18f));
        two_terms.set(i, col, sign * (1.0f + 0x1p-9f));
      }
    }
    EXPECT_GT(worst_ratio(w, all_terms, run(w, two_terms, {}, DType::f32), {}), 1.0) << "a bf16 term omitted";
  }
}

TEST_P(LinearIsaTest, NanCodesAndScalesArrive) {
  const IsaGuard guard(GetParam());
  std::mt19937 random(17);
  for (const int64_t m : {1, 20}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const int code : {0x7f, 0xff}) {
        Matrix w = test::random_matrix(Format::parse("fp8_e4m3:g32:e8m0"), 20, 64, random);
        w.set_code(5, 33, code);
        w.scales[w.group_index(7, 0)] = 255;  // e8m0 NaN
        Rows x = random_activations(dtype, m, 64, random);
        const Rows y = run(w, x, {}, DType::f32);
        for (int64_t n = 0; n < 20; ++n) EXPECT_EQ(std::isnan(y.read(0, n)), n == 5 || n == 7) << n;
      }
      Matrix w = test::random_matrix(Format::parse("fp8_e5m2:row:fp32"), 20, 64, random);
      w.set_code(2, 3, 0x7c);  // +Inf
      w.set_code(4, 3, 0x7d);  // NaN
      Rows x = random_activations(dtype, m, 64, random);
      const Rows y = run(w, x, {}, DType::f32);
      EXPECT_TRUE(std::isinf(y.read(0, 2)));
      EXPECT_TRUE(std::isnan(y.read(0, 4)));
      EXPECT_TRUE(std::isfinite(y.read(0, 3)));
    }
  }
}

// More rows than a pass, ragged strips and tiles, for bf16, which has kernels of its own on AMX.
TEST_P(LinearIsaTest, TheSameBitsForAnyThreads) {
  const IsaGuard guard(GetParam());
  std::mt19937 random(29);
  const auto one = make_pool(1);
  const auto two = make_pool(2);
  for (const char* name : {"fp6_e2m3:g128:fp16", "uint4:g48:fp16", "fp8_e4m3:g16:e4m3", "int3:row:fp32"}) {
    Matrix w = test::random_matrix(Format::parse(name), 150, 340, random);
    for (const int64_t m : {2, 33, 260}) {
      Rows x = random_activations(DType::bf16, m, w.cols, random);
      const Rows y = run(w, x, {}, DType::f32, Activations::exact, *one);
      EXPECT_EQ(run(w, x, {}, DType::f32, Activations::exact, *two).bytes, y.bytes) << name << " M=" << m;
      EXPECT_LE(worst_ratio(w, x, y, {}), 1.0) << name << " M=" << m;
    }
  }
}

TEST_P(LinearIsaTest, StridedRowsAndOtherOutputTypes) {
  const IsaGuard guard(GetParam());
  std::mt19937 random(19);
  Matrix w = test::random_matrix(Format::parse("fp6_e2m3:g32:fp16"), 20, 40, random);
  const Buffer packed = packed_copy(w);
  for (const int64_t m : {3, 11, 18}) {
    Rows wide = random_activations(DType::bf16, m, 64, random);
    TensorView x = wide.view();
    x.shape[1] = 40;  // rows of 40 in a matrix of 64
    Rows y_wide(DType::f32, m, 32);
    TensorView y = y_wide.view();
    y.shape[1] = 20;
    linear(x, view_of(w, packed), nullptr, nullptr, y, default_executor());
    const std::vector<double> weights = w.weights();
    const std::vector<double> scales = scales_of(w);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t n = 0; n < 20; ++n) {
        const test::Bound bound = test::linear_bound(weights.data() + n * 40, scales.data() + n * 40,
                                                     wide.values.data() + i * 64, 40, 0, DType::f32);
        EXPECT_LE(std::abs(y_wide.read(i, n) - bound.y64), bound.tolerance);
      }
      for (int64_t n = 20; n < 32; ++n) EXPECT_EQ(y_wide.read(i, n), 0) << "wrote past the row";
    }
  }
}

TEST(Linear, EmptyShapes) {
  std::mt19937 random(23);
  const Format format = Format::parse("fp6");
  {
    Matrix w = test::random_matrix(format, 4, 8, random);
    Rows x(DType::f32, 0, 8);
    EXPECT_NO_THROW(run(w, x, {}, DType::f32));
  }
  {
    Matrix w(format, 0, 8);
    Rows x(DType::f32, 3, 8);
    EXPECT_NO_THROW(run(w, x, {}, DType::f32));
  }
  for (const int64_t m : {2, 10, 20}) {
    Matrix w(format, 3, 0);
    Rows x(DType::f32, m, 0);
    const Rows with_bias = run(w, x, {1.0f, 2.0f, 3.0f}, DType::f32);
    EXPECT_EQ(with_bias.read(1, 2), 3.0);
    EXPECT_EQ(run(w, x, {}, DType::f32).read(1, 2), 0.0);
  }
}

// y and residual of every type, in tiles and panels, with rounded activations too: one fp32 addition more.
TEST(Linear, ResidualIsAddedBeforeRounding) {
  std::mt19937 random(15);
  for (const auto& [rows, x_type, activations] : {std::tuple{1, DType::f32, Activations::exact},
                                                  {9, DType::f32, Activations::exact},
                                                  {70, DType::f32, Activations::exact},
                                                  {33, DType::bf16, Activations::exact},
                                                  {33, DType::f32, Activations::int8}}) {
    Matrix w = test::random_matrix(Format::parse("fp6_e2m3:g32:fp16"), 37, 96, random);
    Rows x = random_activations(x_type, rows, 96, random);
    const std::vector<float> bias(37, 0.375f);
    const Rows plain = run(w, x, bias, DType::f32, activations);
    for (const DType r_type : {DType::f32, DType::f16, DType::bf16}) {
      Rows r = random_activations(r_type, rows, 37, random);
      const TensorView view = r.view();
      for (const DType y_type : {DType::f32, DType::f16, DType::bf16}) {
        const Rows y = run(w, x, bias, y_type, activations, default_executor(), &view);
        Rows expected(y_type, rows, 37);
        for (int64_t m = 0; m < rows; ++m) {
          for (int64_t n = 0; n < 37; ++n) {
            const float sum = static_cast<float>(plain.read(m, n)) + static_cast<float>(r.read(m, n));
            expected.set(m, n, sum);
            ASSERT_EQ(y.read(m, n), expected.read(m, n)) << rows << ' ' << m << ' ' << n;
          }
        }
      }
    }
  }
}

TEST(Linear, RefusesWhatDoesNotFit) {
  std::mt19937 random(29);
  Matrix w = test::random_matrix(Format::parse("fp6"), 4, 8, random);
  const Buffer packed = packed_copy(w);
  std::vector<float> data(64);
  const auto tensor = [&](std::initializer_list<int64_t> shape) { return TensorView(data.data(), DType::f32, shape); };
  Executor& executor = default_executor();
  const PackedView view = view_of(w, packed);
  EXPECT_THROW(linear(tensor({2, 9}), view, nullptr, nullptr, tensor({2, 4}), executor), InvalidArgument);
  EXPECT_THROW(linear(tensor({2, 8}), view, nullptr, nullptr, tensor({3, 4}), executor), InvalidArgument);
  EXPECT_THROW(linear(tensor({2, 8}), view, nullptr, nullptr, tensor({2, 5}), executor), InvalidArgument);
  const TensorView bias = tensor({5});
  EXPECT_THROW(linear(tensor({2, 8}), view, &bias, nullptr, tensor({2, 4}), executor), InvalidArgument);
  EXPECT_THROW(linear(TensorView(nullptr, DType::f32, {2, 8}), view, nullptr, nullptr, tensor({2, 4}), executor),
               InvalidArgument);
  EXPECT_THROW(linear(TensorView(data.data(), DType::i32, {2, 8}), view, nullptr, nullptr, tensor({2, 4}), executor),
               InvalidArgument);
  TensorView strided = tensor({2, 8});
  strided.strides[1] = 2;
  EXPECT_THROW(linear(strided, view, nullptr, nullptr, tensor({2, 4}), executor), InvalidArgument);
  PackedView unaligned = view;
  unaligned.data += 1;
  EXPECT_THROW(linear(tensor({2, 8}), unaligned, nullptr, nullptr, tensor({2, 4}), executor), InvalidArgument);
}

}  // namespace
}  // namespace ng
