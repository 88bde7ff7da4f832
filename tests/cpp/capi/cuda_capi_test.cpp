// The C interface's entries for GPUs: the CPU's bytes, and a status for what is wrong.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "narrowgauge/device.hpp"
#include "narrowgauge/dtype.hpp"
#include "narrowgauge/memory.hpp"
#include "narrowgauge/narrowgauge.h"
#include "narrowgauge/quantize.hpp"
#include "narrowgauge/stream.hpp"

namespace {

constexpr int64_t kShape[] = {5, 100};
constexpr const char* kFormat = "uint4:g32:fp16";

TEST(CudaCApi, QuantizesAndDequantizes) {
  if (*ng_why_no_cuda() != '\0') GTEST_SKIP() << ng_why_no_cuda();
  if (ng::cuda_architectures().empty()) GTEST_SKIP() << "this build has no kernels";
  std::vector<float> weights(500);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = std::sin(static_cast<float>(i));
  int64_t bytes[4];
  ASSERT_EQ(ng_canonical_bytes(kFormat, 5, 100, bytes), NG_OK);
  ng::DevicePool pool(0);
  const ng::Stream stream(0, nullptr);
  const auto memory = [&](int64_t size) { return pool.allocate(static_cast<size_t>(size)); };
  const ng_tensor source = {memory(2000), NG_F32, 2, kShape, nullptr};
  const ng_tensor target = {memory(2000), NG_F32, 2, kShape, nullptr};
  const ng_canonical matrix = {
      5,      100, static_cast<uint8_t*>(memory(bytes[0])), memory(bytes[1]), static_cast<uint8_t*>(memory(bytes[2])),
      nullptr};
  ng::copy(source.data, weights.data(), 2000, stream);
  ASSERT_EQ(ng_cuda_quantize(&source, kFormat, nullptr, &matrix, 0, nullptr), NG_OK) << ng_last_error();
  ASSERT_EQ(ng_cuda_dequantize(kFormat, &matrix, &target, 0, nullptr), NG_OK) << ng_last_error();
  ASSERT_EQ(ng_cuda_synchronize(0, nullptr), NG_OK) << ng_last_error();

  const ng_tensor host = {weights.data(), NG_F32, 2, kShape, nullptr};
  ng_qtensor* q = nullptr;
  ASSERT_EQ(ng_quantize(&host, kFormat, nullptr, &q), NG_OK);
  std::vector<float> expected(500), got(500);
  const ng_tensor out = {expected.data(), NG_F32, 2, kShape, nullptr};
  ASSERT_EQ(ng_dequantize(q, &out), NG_OK);
  ng_qtensor_free(q);
  ng::copy(got.data(), target.data, 2000, stream);
  ASSERT_EQ(ng_cuda_synchronize(0, nullptr), NG_OK);
  EXPECT_EQ(std::memcmp(got.data(), expected.data(), 2000), 0);

  // Host memory, the scale search, and NaN, which the wait reports.
  EXPECT_EQ(ng_cuda_quantize(&host, kFormat, nullptr, &matrix, 0, nullptr), NG_INVALID_ARGUMENT);
  EXPECT_NE(std::strstr(ng_last_error(), "host memory"), nullptr) << ng_last_error();
  ng_quantize_options search{};
  search.search_mse = 1;
  EXPECT_EQ(ng_cuda_quantize(&source, kFormat, &search, &matrix, 0, nullptr), NG_INVALID_ARGUMENT);
  weights[7] = NAN;
  ng::copy(source.data, weights.data(), 2000, stream);
  EXPECT_EQ(ng_cuda_quantize(&source, kFormat, nullptr, &matrix, 0, nullptr), NG_OK);
  EXPECT_EQ(ng_cuda_synchronize(0, nullptr), NG_INVALID_ARGUMENT);
  EXPECT_EQ(ng_cuda_synchronize(0, nullptr), NG_OK);
  EXPECT_EQ(ng_cuda_synchronize(1000, nullptr), NG_INVALID_ARGUMENT);
}

// x of 0, 1/4, .. 3/4 and weights of -2 .. 2 with scales of 1, so that products and sums are exact on both sides.
TEST(CudaCApi, Multiplies) {
  if (*ng_why_no_cuda() != '\0') GTEST_SKIP() << ng_why_no_cuda();
  if (ng::cuda_architectures().empty()) GTEST_SKIP() << "this build has no kernels";
  constexpr const char* kExact = "int8:row:fp32";
  constexpr int64_t kN = 64, kK = 4096;
  constexpr int64_t kX[] = {3, kK}, kW[] = {kN, kK}, kY[] = {3, kN}, kBias[] = {kN};
  std::vector<uint8_t> codes(kN * kK);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(static_cast<int>(i * 7 % 5) - 2);
  const std::vector<float> scales(kN, 1.0f);
  std::vector<uint16_t> x(3 * kK);
  for (size_t i = 0; i < x.size(); ++i) x[i] = ng::to_f16(static_cast<float>(i % 11 % 4) * 0.25f).bits;
  std::vector<float> bias(kN), expected(3 * kN), got(3 * kN);
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(i);

  ng_qtensor* q = nullptr;
  ASSERT_EQ(ng_qtensor_copy_of(kExact, 2, kW, codes.data(), scales.data(), nullptr, nullptr, &q), NG_OK);
  int64_t block_bytes = 0, workspace_bytes = 0;
  ASSERT_EQ(ng_cuda_packed_bytes(kExact, kN, kK, &block_bytes), NG_OK);
  std::vector<uint8_t> block(static_cast<size_t>(block_bytes));
  ASSERT_EQ(ng_cuda_pack(q, block.data()), NG_OK) << ng_last_error();
  ASSERT_EQ(ng_cuda_linear_workspace_bytes(3, kExact, kN, kK, 0, &workspace_bytes), NG_OK) << ng_last_error();
  ASSERT_GT(workspace_bytes, 0);

  ng::DevicePool pool(0);
  const ng::Stream stream(0, nullptr);
  const auto upload = [&](const void* data, size_t bytes) {
    void* memory = pool.allocate(bytes);
    ng::copy(memory, data, bytes, stream);
    return memory;
  };
  const ng_cuda_packed weights = {kN, kK, static_cast<uint8_t*>(upload(block.data(), block.size()))};
  const ng_tensor x_there = {upload(x.data(), 2 * x.size()), NG_F16, 2, kX, nullptr};
  const ng_tensor bias_there = {upload(bias.data(), 4 * bias.size()), NG_F32, 1, kBias, nullptr};
  const ng_tensor y_there = {pool.allocate(4 * got.size()), NG_F32, 2, kY, nullptr};
  void* workspace = pool.allocate(static_cast<size_t>(workspace_bytes));
  for (const ng_tensor* residual : {static_cast<const ng_tensor*>(nullptr), &y_there}) {
    ASSERT_EQ(ng_cuda_linear(&x_there, kExact, &weights, &bias_there, residual, &y_there, workspace, 0, nullptr), NG_OK)
        << ng_last_error();
  }
  ng::copy(got.data(), y_there.data, 4 * got.size(), stream);
  ASSERT_EQ(ng_cuda_synchronize(0, nullptr), NG_OK) << ng_last_error();

  const ng_tensor x_here = {x.data(), NG_F16, 2, kX, nullptr}, y_here = {expected.data(), NG_F32, 2, kY, nullptr};
  const ng_tensor bias_here = {bias.data(), NG_F32, 1, kBias, nullptr};
  // What is packed for the CPU is not packed for a GPU.
  ASSERT_EQ(ng_pack(q), NG_OK);
  EXPECT_EQ(ng_cuda_pack(q, block.data()), NG_INVALID_ARGUMENT);
  for (const ng_tensor* residual : {static_cast<const ng_tensor*>(nullptr), &y_here}) {
    ASSERT_EQ(ng_linear(&x_here, q, &bias_here, residual, &y_here), NG_OK) << ng_last_error();
  }
  ng_qtensor_free(q);
  EXPECT_EQ(got, expected);

  EXPECT_EQ(ng_cuda_linear(&x_there, kExact, &weights, nullptr, nullptr, &y_there, nullptr, 0, nullptr),
            NG_INVALID_ARGUMENT);
  EXPECT_NE(std::strstr(ng_last_error(), "workspace is null"), nullptr) << ng_last_error();
  EXPECT_EQ(ng_cuda_linear(&x_here, kExact, &weights, nullptr, nullptr, &y_there, workspace, 0, nullptr),
            NG_INVALID_ARGUMENT);
  EXPECT_NE(std::strstr(ng_last_error(), "x lies in host memory"), nullptr) << ng_last_error();
  EXPECT_EQ(ng_cuda_linear(&x_there, kExact, nullptr, nullptr, nullptr, &y_there, workspace, 0, nullptr),
            NG_INVALID_ARGUMENT);
  EXPECT_EQ(ng_cuda_linear(&x_there, nullptr, &weights, nullptr, nullptr, &y_there, workspace, 0, nullptr),
            NG_INVALID_ARGUMENT);
  EXPECT_EQ(ng_cuda_synchronize(0, nullptr), NG_OK) << ng_last_error();
}

TEST(CudaCApi, WithoutADriverEveryEntrySaysSo) {
  if (*ng_why_no_cuda() == '\0') GTEST_SKIP() << "there is a driver";
  EXPECT_EQ(ng_cuda_synchronize(0, nullptr), NG_CUDA_ERROR);
  EXPECT_NE(std::strstr(ng_last_error(), ng_why_no_cuda()), nullptr) << ng_last_error();
  int64_t bytes = 0;
  EXPECT_EQ(ng_cuda_linear_workspace_bytes(1, kFormat, 64, 4096, 0, &bytes), NG_CUDA_ERROR);
}

TEST(CudaCApi, PacksWithoutADriver) {
  int64_t bytes = 0;
  ASSERT_EQ(ng_cuda_packed_bytes(kFormat, 5, 100, &bytes), NG_OK);
  EXPECT_EQ(bytes, ng::cuda_packed_bytes(ng::Format::parse(kFormat), 5, 100));
  EXPECT_EQ(ng_cuda_packed_bytes(kFormat, -5, 100, &bytes), NG_INVALID_ARGUMENT);
  EXPECT_EQ(ng_cuda_packed_bytes(kFormat, 5, 100, nullptr), NG_INVALID_ARGUMENT);
  std::vector<float> weights(500, 1.0f);
  const ng_tensor host = {weights.data(), NG_F32, 2, kShape, nullptr};
  ng_qtensor* q = nullptr;
  ASSERT_EQ(ng_quantize(&host, kFormat, nullptr, &q), NG_OK);
  EXPECT_EQ(ng_cuda_pack(q, nullptr), NG_INVALID_ARGUMENT);
  EXPECT_EQ(ng_cuda_pack(nullptr, nullptr), NG_INVALID_ARGUMENT);
  ng_qtensor_free(q);
}

TEST(CudaCApi, BytesOfAMatrix) {
  int64_t bytes[4];
  ASSERT_EQ(ng_canonical_bytes("nvfp4", 3, 20, bytes), NG_OK);
  EXPECT_EQ(bytes[0], 30);
  EXPECT_EQ(bytes[1], 6);
  EXPECT_EQ(bytes[2], 0);
  EXPECT_EQ(bytes[3], 4);
  EXPECT_EQ(ng_canonical_bytes("fp9", 3, 20, bytes), NG_INVALID_ARGUMENT);
  EXPECT_EQ(ng_canonical_bytes("fp6", -3, 20, bytes), NG_INVALID_ARGUMENT);
  EXPECT_EQ(ng_canonical_bytes("fp6", 3, 20, nullptr), NG_INVALID_ARGUMENT);
}

}  // namespace
