// Tiles and ranges of columns that products get on devices of different sizes.
#include "kernels/fpx_plan.hpp"

#include <gtest/gtest.h>

#include <algorithm>

namespace ng {
namespace {

using cuda::fpx_plan;
using cuda::FpxOperand;
using cuda::FpxPlan;
using cuda::kTiles;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

TEST(FpxPlan, TheTileHasAllRowsOfXUpTo128) {
  const Format format = Format::parse("fp6");
  for (int64_t m = 1; m <= 300; ++m) {
    const int rows = kTiles[fpx_plan(m, 4096, 4096, format, FpxOperand::f16, 108).tile].x_rows;
    EXPECT_EQ(rows, m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : m <= 64 ? 64 : 128) << m;
  }
}

// f16_wide has no tiles of 16 and 128 rows, codebooks in bf16 none of 32: the next larger one, or the largest, is
// taken.
TEST(FpxPlan, TilesWithoutAKernelAreNotChosen) {
  const Format wide = Format::parse("fp6_e5m0:row:fp32"), nf4 = Format::parse("nf4");
  const auto rows = [](int64_t m, const Format& format, FpxOperand operand) {
    return kTiles[fpx_plan(m, 4096, 4096, format, operand, 108).tile].x_rows;
  };
  for (int64_t m = 1; m <= 300; ++m) {
    EXPECT_EQ(rows(m, wide, FpxOperand::f16_wide), m <= 8 ? 8 : m <= 32 ? 32 : 64) << m;
    EXPECT_EQ(rows(m, nf4, FpxOperand::bf16), m <= 8 ? 8 : m <= 16 ? 16 : m <= 64 ? 64 : 128) << m;
  }
  EXPECT_EQ(cuda::fpx_operand(wide.element, false), FpxOperand::f16_wide);
  EXPECT_EQ(cuda::fpx_operand(wide.element, true), FpxOperand::bf16);
  EXPECT_EQ(cuda::fpx_operand(Format::parse("fp8_e5m2").element, false), FpxOperand::f16);
}

// Llama-2-70B's layers: most multiprocessors of an A100 have work, and no range is too short.
TEST(FpxPlan, FillsTheDevice) {
  const Format format = Format::parse("fp6");
  for (const auto& [n, k] : {std::pair{10240, 8192}, {8192, 8192}, {57344, 8192}, {8192, 28672}, {1024, 8192}}) {
    for (const int64_t m : {1, 8, 16, 32, 64, 128, 1024}) {
      const FpxPlan plan = fpx_plan(m, n, k, format, FpxOperand::f16, 108);
      const auto& tile = kTiles[plan.tile];
      const int64_t blocks = ceil_div(n, tile.weight_rows()) * ceil_div(m, tile.x_rows) * plan.splits;
      EXPECT_GE(blocks, std::min<int64_t>(87, ceil_div(k, 64) / tile.teams / 4)) << n << ' ' << k << ' ' << m;
      EXPECT_GE(ceil_div(k, 64) / (plan.splits * tile.teams), 4) << n << ' ' << k << ' ' << m;
    }
  }
}

// Where one block a multiprocessor would leave some of them with twice as much work as others, ranges even it out.
TEST(FpxPlan, NoMultiprocessorHasMuchMoreThanItsShare) {
  const Format format = Format::parse("fp6");
  for (const int multiprocessors : {108, 132}) {
    for (const auto& [n, k] : {std::pair{10240, 8192}, {8192, 8192}, {57344, 8192}, {8192, 28672}, {9216, 9216}}) {
      for (const int64_t m : {1, 8, 16}) {
        const FpxPlan plan = fpx_plan(m, n, k, format, FpxOperand::f16, multiprocessors);
        const int64_t blocks = n / kTiles[plan.tile].weight_rows() * plan.splits;
        const auto most = static_cast<double>(ceil_div(blocks, multiprocessors));
        EXPECT_LE(most * multiprocessors / static_cast<double>(blocks), 1.36)
            << n << ' ' << k << ' ' << m << ' ' << multiprocessors;
      }
    }
  }
}

TEST(FpxPlan, LargeProductsAreNotSplit) {
  EXPECT_EQ(fpx_plan(1024, 8192, 8192, Format::parse("fp6"), FpxOperand::f16, 108).splits, 1);
  EXPECT_EQ(fpx_plan(1, 1 << 20, 4096, Format::parse("int4"), FpxOperand::f16, 132).splits, 1);
}

TEST(FpxPlan, SmallProductsAreNotSplit) {
  EXPECT_EQ(fpx_plan(1, 64, 64, Format::parse("fp6"), FpxOperand::f16, 108).splits, 1);
  EXPECT_EQ(fpx_plan(8, 64, 512, Format::parse("fp6"), FpxOperand::f16, 108).splits, 1);
}

// Ranges start where groups do.
TEST(FpxPlan, QuantumIsAMultipleOfGroups) {
  for (int group = 16; group <= 1024; group += 16) {
    Format format = Format::parse("fp6");
    format.group = group;
    const int64_t quantum = cuda::fpx_quantum(format);
    EXPECT_EQ(quantum * 64 % group, 0);
    EXPECT_LE(quantum * 64, 4 * group);
  }
  EXPECT_EQ(cuda::fpx_quantum(Format::parse("fp8")), 1);
}

TEST(FpxPlan, IsAFunctionOfItsArguments) {
  for (int64_t m = 1; m < 200; m += 13) {
    const FpxPlan a = fpx_plan(m, 4096, 14336, Format::parse("nf4"), FpxOperand::f16, 132);
    const FpxPlan b = fpx_plan(m, 4096, 14336, Format::parse("nf4"), FpxOperand::f16, 132);
    EXPECT_EQ(a.tile, b.tile);
    EXPECT_EQ(a.splits, b.splits);
  }
}

}  // namespace
}  // namespace ng
