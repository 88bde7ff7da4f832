// The C interface's entries for GPUs: the CPU's bytes, and a status for what is wrong.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "narrowgauge/device.hpp"
#include "narrowgauge/memory.hpp"
#include "narrowgauge/narrowgauge.h"
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

TEST(CudaCApi, WithoutADriverEveryEntrySaysSo) {
  if (*ng_why_no_cuda() == '\0') GTEST_SKIP() << "there is a driver";
  EXPECT_EQ(ng_cuda_synchronize(0, nullptr), NG_CUDA_ERROR);
  EXPECT_NE(std::strstr(ng_last_error(), ng_why_no_cuda()), nullptr) << ng_last_error();
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
