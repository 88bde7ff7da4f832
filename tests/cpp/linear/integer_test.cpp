// linear with activations rounded to int16 and int8: the bound against float64 of the rounded x, the rounding itself,
// the same bits on every instruction set, for every number of rows and of threads, and proof that faults are seen.
#include <gtest/gtest.h>

#include "narrowgauge/error.hpp"
#include "narrowgauge/linear_plan.hpp"
#include "rows.hpp"

namespace ng {
namespace {

using test::IsaGuard;
using test::Matrix;
using test::packed_copy;
using test::random_activations;
using test::Rows;
using test::run;
using test::view_of;
using test::worst_ratio;

constexpr Activations kRounded[] = {Activations::int16, Activations::int8};

std::vector<std::string> integer_elements() {
  std::vector<std::string> names;
  for (const std::string& name : test::all_elements()) {
    try {
      check_activations(Activations::int8, Format::parse(name));
      names.push_back(name);
    } catch (const InvalidArgument&) {
    }
  }
  return names;
}

float largest(const Rows& x, int64_t row) {
  float amax = 0;
  for (int64_t col = 0; col < x.cols; ++col) {
    amax = std::max(amax, std::abs(static_cast<float>(x.values[static_cast<size_t>(row * x.cols + col)])));
  }
  return amax;
}

float limit_of(Activations activations) { return activations == Activations::int8 ? 127.0f : 32512.0f; }

float step_of(const Rows& x, int64_t row, Activations activations) {
  return std::max(largest(x, row) / limit_of(activations), 0x1p-100f);
}

// x as linear.hpp says that it is rounded; fails the test where an element is further away than it says.
Rows rounded(const Rows& x, Activations activations) {
  Rows result = x;
  for (int64_t row = 0; row < x.rows; ++row) {
    const float step = step_of(x, row, activations);
    const float inverse = step == 0x1p-100f ? 0x1p100f : limit_of(activations) / largest(x, row);
    for (int64_t col = 0; col < x.cols; ++col) {
      double& value = result.values[static_cast<size_t>(row * x.cols + col)];
      // In fp32, which decides near the middle of two integers.
      const double nearest =
          static_cast<double>(std::nearbyint(static_cast<float>(value) * inverse)) * static_cast<double>(step);
      EXPECT_LE(std::abs(nearest - value), 0.51 * static_cast<double>(step));
      value = nearest;
    }
  }
  return result;
}

class IntegerTest : public testing::TestWithParam<std::tuple<Isa, std::string>> {};
INSTANTIATE_TEST_SUITE_P(All, IntegerTest,
                         testing::Combine(testing::ValuesIn(test::supported_isas()),
                                          testing::ValuesIn(integer_elements())),
                         [](const auto& suite) {
                           return std::string(isa_name(std::get<0>(suite.param))) + "_" + std::get<1>(suite.param);
                         });

TEST_P(IntegerTest, MeetsTheBoundAndRowsStandAlone) {
  const auto& [isa, element] = GetParam();
  const IsaGuard guard(isa);
  std::mt19937 random(7);
  const std::string tails[] = {":row:fp32", ":g32:e8m0", ":g16:e4m3", ":g64:fp16", ":g48:bf16", ":g1024:fp16"};
  int tail = 0;
  // Whole blocks, ragged rows and columns, a last group of less than a unit, and segments inside of a group.
  for (const auto& [n, k] :
       {std::pair<int64_t, int64_t>{32, 128}, {19, 83}, {1, 1}, {48, 208}, {17, 330}, {16, 1300}}) {
    const Format format = Format::parse(element + tails[tail++]);
    Matrix w = test::random_matrix(format, n, k, random);
    std::vector<float> bias(static_cast<size_t>(n));
    for (float& b : bias) b = std::uniform_real_distribution<float>(-1, 1)(random);
    for (const Activations activations : kRounded) {
      for (const int64_t m : {1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 100}) {
        if (m > 9 && n != 19) continue;  // more than one pass over the rows, or tiles
        const DType dtype = m % 3 == 0 ? DType::f16 : m % 2 == 0 ? DType::bf16 : DType::f32;
        const auto& added = m % 2 == 0 ? bias : std::vector<float>{};
        Rows x = random_activations(dtype, m, k, random);
        const Rows y = run(w, x, added, dtype, activations);
        EXPECT_LE(worst_ratio(w, rounded(x, activations), y, added), 1.0)
            << format.str() << " M=" << m << " N=" << n << " K=" << k << " " << activations_name(activations);
        // The last row by itself.
        Rows last(dtype, 1, k);
        const size_t bytes = static_cast<size_t>(k) * dtype_bytes(dtype);
        std::memcpy(last.bytes.data(), x.bytes.data() + static_cast<size_t>(m - 1) * bytes, bytes);
        const Rows alone = run(w, last, added, dtype, activations);
        for (int64_t col = 0; col < n; ++col) ASSERT_EQ(alone.read(0, col), y.read(m - 1, col)) << format.str();
      }
    }
  }
}

// Sums at the ends of what 16 and 32 bits hold.
TEST_P(IntegerTest, TheLargestSumsFit) {
  const auto& [isa, element] = GetParam();
  const IsaGuard guard(isa);
  const Format format = Format::parse(element + ":g1024:fp32");
  const std::array<float, 256> values = element_values(format.element);
  const auto end = values.begin() + format.element.codes();
  const auto smallest = static_cast<int>(std::min_element(values.begin(), end) - values.begin());
  const auto largest = static_cast<int>(std::max_element(values.begin(), end) - values.begin());
  for (const int code : {smallest, largest}) {
    for (const int zero : {0, format.element.codes() - 1}) {
      Matrix w(format, 16, 520);
      for (int64_t row = 0; row < w.rows; ++row) {
        w.set_scale(row, 0, 1.0f);
        for (int64_t col = 0; col < w.cols; ++col) w.set_code(row, col, code);
      }
      std::fill(w.zeros.begin(), w.zeros.end(), static_cast<uint8_t>(zero));
      for (const Activations activations : kRounded) {
        for (const int64_t m : {1, 6}) {
          Rows x(DType::f32, m, w.cols);
          for (int64_t row = 0; row < m; ++row) {
            for (int64_t col = 0; col < w.cols; ++col) x.set(row, col, row % 2 == 0 ? 1.0f : -1.0f);
          }
          const Rows y = run(w, x, {}, DType::f32, activations);
          EXPECT_LE(worst_ratio(w, rounded(x, activations), y, {}), 1.0)
              << activations_name(activations) << " code " << code << " zero point " << zero << " M=" << m;
        }
      }
    }
  }
}

class IntegerIsaTest : public testing::TestWithParam<Isa> {};
INSTANTIATE_TEST_SUITE_P(All, IntegerIsaTest, testing::ValuesIn(test::supported_isas()),
                         [](const auto& suite) { return std::string(isa_name(suite.param)); });

TEST_P(IntegerIsaTest, TheSameBitsAsPortableForAnyThreads) {
  std::mt19937 random(3);
  const auto one = make_pool(1);
  const auto two = make_pool(2);
  for (const char* name :
       {"fp6_e2m3:g128:fp16", "int4:g16:e4m3", "uint8:g64:bf16", "fp5_e2m2:row:fp32", "int7:g32:e8m0"}) {
    Matrix w = test::random_matrix(Format::parse(name), 150, 530, random);
    for (const Activations activations : kRounded) {
      for (const int64_t m : {1, 4, 98, 257}) {
        Rows x = random_activations(DType::f32, m, w.cols, random, 3.0f);
        Rows expected(DType::f32, 0, 0);
        {
          const IsaGuard guard(Isa::portable);
          expected = run(w, x, {}, DType::f32, activations, *one);
        }
        const IsaGuard guard(GetParam());
        EXPECT_EQ(run(w, x, {}, DType::f32, activations, *one).bytes, expected.bytes) << name << " M=" << m;
        EXPECT_EQ(run(w, x, {}, DType::f32, activations, *two).bytes, expected.bytes) << name << " M=" << m;
      }
    }
  }
}

TEST_P(IntegerIsaTest, ExtremeScalesAndActivations) {
  const IsaGuard guard(GetParam());
  std::mt19937 random(5);
  for (const char* name : {"fp6_e2m3:g32:fp32", "int4:g16:fp32", "fp4_e2m1:g32:e8m0", "uint8:g64:fp32"}) {
    for (const float scale : {1e-40f, 1e-30f, 1e25f}) {
      for (const float size : {1e-38f, 1e-20f, 1.0f}) {
        Matrix w = test::random_matrix(Format::parse(name), 18, 70, random, scale);
        Rows x = random_activations(DType::f32, 5, 70, random, size);
        for (const Activations activations : kRounded) {
          const Rows y = run(w, x, {}, DType::f32, activations);
          EXPECT_LE(worst_ratio(w, rounded(x, activations), y, {}), 1.0) << name << " " << scale << " x " << size;
        }
      }
    }
  }
}

TEST_P(IntegerIsaTest, PlantedFaultsBreakTheBound) {
  const IsaGuard guard(GetParam());
  std::mt19937 random(13);
  for (const Activations activations : kRounded) {
    for (const int64_t m : {1, 6}) {
      const int64_t n = 33;
      const int64_t k = 203;
      Matrix w = test::random_matrix(Format::parse("fp6_e2m3:g64:fp16"), n, k, random);
      Rows x = random_activations(DType::f32, m, k, random);
      for (int64_t i = 0; i < m; ++i) x.set(i, k - 1, 1.0f);
      const Rows given = rounded(x, activations);
      const auto ratio = [&](Matrix& matrix, Rows& input) {
        return worst_ratio(w, given, run(matrix, input, {}, DType::f32, activations), {});
      };
      ASSERT_LE(ratio(w, x), 1.0);

      Matrix one_code = w;
      one_code.set_code(n - 1, k - 1, w.code(n - 1, k - 1) ^ 1);
      EXPECT_GT(ratio(one_code, x), 1.0) << "the last code off by its last bit";
      Matrix negated = w;
      negated.set_code(n - 1, 100, w.code(n - 1, 100) ^ 33);
      EXPECT_GT(ratio(negated, x), 1.0) << "an element's sign and last bit";
      Matrix swapped = w;
      swapped.set_scale(3, 0, w.scale(3, 64));
      swapped.set_scale(3, 64, w.scale(3, 0));
      EXPECT_GT(ratio(swapped, x), 1.0) << "two scales swapped";
      Rows moved = x;
      moved.set(
          m - 1, 7,
          static_cast<float>(given.values[static_cast<size_t>((m - 1) * k + 7)]) + step_of(x, m - 1, activations));
      EXPECT_GT(ratio(w, moved), 1.0) << "an activation off by a step";
    }
    Matrix w = test::random_matrix(Format::parse("uint4:g64:fp16"), 20, 130, random);
    Rows x = random_activations(DType::f32, 2, 130, random);
    Matrix zero = w;
    zero.zeros[zero.group_index(19, 129)] ^= 1;
    EXPECT_GT(worst_ratio(w, rounded(x, activations), run(zero, x, {}, DType::f32, activations), {}), 1.0)
        << "a zero point off by one";
  }
}

TEST_P(IntegerIsaTest, NanAndInfMakeTheirRowsNan) {
  const IsaGuard guard(GetParam());
  std::mt19937 random(17);
  Matrix w = test::random_matrix(Format::parse("fp6_e2m3:g32:e8m0"), 20, 70, random);
  w.scales[w.group_index(7, 0)] = 255;  // e8m0 NaN
  const float inf = std::numeric_limits<float>::infinity();
  for (const float bad : {inf, -inf, std::numeric_limits<float>::quiet_NaN()}) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (const int64_t m : {2, 9}) {
        Rows x = random_activations(dtype, m, 70, random);
        x.set(1, 69, bad);
        for (const Activations activations : kRounded) {
          const Rows y = run(w, x, {}, dtype, activations);
          for (int64_t row = 0; row < m; ++row) {
            for (int64_t col = 0; col < 20; ++col) EXPECT_EQ(std::isnan(y.read(row, col)), row == 1 || col == 7);
          }
        }
      }
    }
  }
}

TEST(Integer, RefusesElementsThatAreNone) {
  for (const char* name : {"nf4", "fp8", "fp6_e3m2", "fp4_e3m0:g32:bf16", "fp8_e2m5", "fp5_e3m1"}) {
    Matrix w(Format::parse(name), 4, 8);
    Rows x(DType::f32, 1, 8);
    for (const Activations activations : kRounded) {
      EXPECT_THROW(run(w, x, {}, DType::f32, activations), InvalidArgument) << name;
      EXPECT_THROW(cpu_linear_plan(1, w.format, 4, 8, activations), InvalidArgument) << name;
    }
    EXPECT_NO_THROW(run(w, x, {}, DType::f32));
  }
  EXPECT_EQ(parse_activations("int16"), Activations::int16);
  EXPECT_THROW(parse_activations("int4"), InvalidArgument);
}

TEST(Integer, EmptyShapes) {
  for (const Activations activations : kRounded) {
    Matrix w(Format::parse("fp6"), 3, 0);
    Rows x(DType::f32, 2, 0);
    EXPECT_EQ(run(w, x, {1.0f, 2.0f, 3.0f}, DType::f32, activations).read(1, 2), 3.0);
    Matrix no_rows(Format::parse("fp6"), 0, 8);
    Rows some(DType::f32, 2, 8);
    EXPECT_NO_THROW(run(no_rows, some, {}, DType::f32, activations));
    Matrix whole(Format::parse("fp6"), 3, 8);
    Rows none(DType::f32, 0, 8);
    EXPECT_NO_THROW(run(whole, none, {1.0f, 2.0f, 3.0f}, DType::f32, activations));
  }
}

TEST(Integer, PlansSayHowRowsAreTaken) {
  const Format format = Format::parse("fp6");
  const CpuLinearPlan few = cpu_linear_plan(3, format, 4096, 4096, Activations::int8);
  EXPECT_TRUE(few.direct);
  EXPECT_EQ(few.x_rows, 3);
  EXPECT_EQ(few.isa, isa());
  const CpuLinearPlan many = cpu_linear_plan(100, format, 4096, 4096, Activations::int16);
  EXPECT_FALSE(many.direct);
  EXPECT_EQ(many.x_rows, isa() == Isa::amx ? 8 : 4);
  EXPECT_EQ(many.passes, isa() == Isa::amx ? 1 : 2);
}

}  // namespace
}  // namespace ng
