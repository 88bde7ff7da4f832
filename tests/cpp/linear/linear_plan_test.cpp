// Plans: what linear says that it will do.
#include "narrowgauge/linear_plan.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

const Format kFp6 = Format::parse("fp6");

TEST(CpuLinearPlan, FewRowsStreamTheWeightsOnce) {
  for (int64_t rows = 1; rows <= 4; ++rows) {
    const CpuLinearPlan plan = cpu_linear_plan(rows, kFp6, 4096, 4096);
    EXPECT_EQ(plan.isa, std::min(isa(), Isa::avx512));
    EXPECT_TRUE(plan.direct) << rows;
    EXPECT_EQ(plan.passes, 1) << rows;
    EXPECT_GE(plan.x_rows + plan.second_x_rows, rows);
    EXPECT_EQ(cpu_linear_plan(rows, kFp6, 4096, 4096, Activations::exact, DType::bf16).isa, isa());
    EXPECT_EQ(cpu_linear_plan(rows, Format::parse("nf4"), 64, 64, Activations::exact, DType::bf16).isa, plan.isa);
  }
}

TEST(CpuLinearPlan, ManyRowsTakePanelsInPasses) {
  const CpuLinearPlan plan = cpu_linear_plan(1000, kFp6, 4096, 4096);
  EXPECT_FALSE(plan.direct);
  EXPECT_EQ(plan.second_x_rows, 0);
  EXPECT_LT(plan.pass_rows * (plan.passes - 1), 1000);
  EXPECT_GE(plan.pass_rows * plan.passes, 1000);
}

TEST(CpuLinearPlan, TasksHaveAllRowsOfTheWeights) {
  for (const int64_t rows : {1, 9, 40, 200}) {
    for (const int64_t n : {1, 17, 4096}) {
      const CpuLinearPlan plan = cpu_linear_plan(rows, kFp6, n, 4096);
      EXPECT_GE(plan.tasks / plan.passes * plan.task_rows, n);
      EXPECT_LT((plan.tasks / plan.passes - 1) * plan.task_rows, n);
    }
  }
}

TEST(CudaLinearPlan, SaysWhatIsLaunched) {
  const CudaLinearPlan plan = cuda_linear_plan(1, kFp6, 8192, 8192, DType::f16, 108);
  EXPECT_EQ(plan.kernel, "fpx_linear_f16_fp6_m8");
  EXPECT_EQ(plan.x_rows, 8);
  EXPECT_EQ(plan.weight_rows, 64);
  EXPECT_EQ(plan.threads, 128);
  EXPECT_EQ(plan.blocks, 128 * plan.splits);
  // Codes, x, and the records of as many groups as can start in a stage.
  EXPECT_EQ(plan.stage_bytes, 64 * 64 * 6 / 8 + 8 * 64 * 2 + 4 * 128);
  EXPECT_EQ(plan.workspace_bytes, plan.splits == 1 ? 0 : plan.splits * 8192 * 4);
  // The ranges of all teams have the columns, which start where groups of 128 do.
  EXPECT_EQ(plan.block_stages % 2, 0);
  EXPECT_GE(plan.block_stages * plan.teams * plan.splits, 128);
  EXPECT_LT((plan.block_stages - 2) * plan.teams * plan.splits, 128);
}

TEST(CudaLinearPlan, ActivationsAndElementsChooseTheKernel) {
  EXPECT_EQ(cuda_linear_plan(16, kFp6, 64, 64, DType::bf16, 108).kernel, "fpx_linear_bf16_fp6_m16");
  EXPECT_EQ(cuda_linear_plan(17, Format::parse("fp8_e6m1"), 64, 64, DType::f16, 108).kernel,
            "fpx_linear_f16_wide_fp8_m32");
  EXPECT_EQ(cuda_linear_plan(300, Format::parse("uint4"), 64, 64, DType::f16, 108).kernel, "fpx_linear_f16_int4_m128");
  const Format nf4 = Format::parse("nf4");
  EXPECT_EQ(cuda_linear_plan(1, nf4, 64, 64, DType::bf16, 108).kernel, "fpx_linear_bf16_nf4_m8");
  // Three bf16 terms a weight leave room for fewer blocks than one.
  EXPECT_LT(cuda_linear_plan(9, nf4, 64, 64, DType::bf16, 108).resident,
            cuda_linear_plan(9, kFp6, 64, 64, DType::bf16, 108).resident);
}

TEST(CudaLinearPlan, HasTheStagesThatThereAre) {
  const CudaLinearPlan plan = cuda_linear_plan(1, kFp6, 64, 100, DType::f16, 108);
  EXPECT_EQ(plan.block_stages, 2);
  EXPECT_EQ(plan.workspace_bytes, 0);
}

TEST(LinearPlan, BadArgumentsAreNamed) {
  EXPECT_THROW(cpu_linear_plan(0, kFp6, 64, 64), InvalidArgument);
  EXPECT_THROW(cpu_linear_plan(1, kFp6, 0, 64), InvalidArgument);
  EXPECT_THROW(cuda_linear_plan(1, kFp6, 64, 0, DType::f16, 108), InvalidArgument);
  EXPECT_THROW(cuda_linear_plan(1, kFp6, 64, 64, DType::f16, 0), InvalidArgument);
  EXPECT_THROW(cuda_linear_plan(1, kFp6, 64, 64, DType::f32, 108), InvalidArgument);
}

}  // namespace
}  // namespace ng
