// The C interface: the same results as the C++ one, a status and a message for everything that is wrong.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "narrowgauge/device.hpp"
#include "narrowgauge/io.hpp"
#include "narrowgauge/linear.hpp"
#include "narrowgauge/narrowgauge.h"

namespace {

constexpr int64_t kRows = 19;
constexpr int64_t kCols = 70;

class CApi : public testing::Test {
 protected:
  CApi() {
    for (size_t i = 0; i < weights_.size(); ++i) weights_[i] = std::sin(static_cast<float>(i));
  }
  ~CApi() override { ng_qtensor_free(q_); }

  ng_tensor weights() { return {weights_.data(), NG_F32, 2, shape_, nullptr}; }

  void quantize(const char* format) {
    const ng_tensor view = weights();
    ASSERT_EQ(ng_quantize(&view, format, nullptr, &q_), NG_OK) << ng_last_error();
  }

  std::vector<float> dequantized() {
    std::vector<float> values(weights_.size());
    const ng_tensor out = {values.data(), NG_F32, 2, shape_, nullptr};
    EXPECT_EQ(ng_dequantize(q_, &out), NG_OK) << ng_last_error();
    return values;
  }

  const int64_t shape_[2] = {kRows, kCols};
  std::vector<float> weights_ = std::vector<float>(kRows * kCols);
  ng_qtensor* q_ = nullptr;
};

TEST_F(CApi, NamesTheBuildAndTheMachine) {
  EXPECT_STREQ(ng_version(), NARROWGAUGE_VERSION);
  EXPECT_EQ(ng_isa(), ng::isa_name(ng::isa()));
  EXPECT_EQ(ng_threads(), ng::default_executor().threads());
}

TEST_F(CApi, DescribesAHandle) {
  quantize("fp6_e2m3:g32");
  EXPECT_STREQ(ng_qtensor_format(q_), "fp6_e2m3:g32:bf16");
  ASSERT_EQ(ng_qtensor_ndim(q_), 2);
  EXPECT_EQ(ng_qtensor_shape(q_)[0], kRows);
  EXPECT_EQ(ng_qtensor_shape(q_)[1], kCols);
  EXPECT_EQ(ng_qtensor_nbytes(q_), kRows * (53 + 3 * 2));  // 70 codes of 6 bits in 53 bytes, 3 groups
  EXPECT_EQ(ng_qtensor_is_packed(q_), 0);
}

TEST_F(CApi, PackingKeepsTheValues) {
  for (const char* format : {"fp6", "int4:g32", "uint4:g16", "nf4", "nvfp4"}) {
    SCOPED_TRACE(format);
    quantize(format);
    const std::vector<float> before = dequantized();
    ASSERT_EQ(ng_pack(q_), NG_OK) << ng_last_error();
    ASSERT_EQ(ng_pack(q_), NG_OK) << ng_last_error();
    EXPECT_EQ(ng_qtensor_is_packed(q_), 1);
    EXPECT_EQ(dequantized(), before);
    ASSERT_EQ(ng_unpack(q_), NG_OK) << ng_last_error();
    EXPECT_EQ(ng_qtensor_is_packed(q_), 0);
    EXPECT_EQ(dequantized(), before);
    ng_qtensor_free(q_);
    q_ = nullptr;
  }
}

TEST_F(CApi, LinearEqualsTheCxxCall) {
  quantize("fp6");
  ASSERT_EQ(ng_pack(q_), NG_OK);
  constexpr int64_t batch = 3;
  std::vector<float> x(batch * kCols);
  std::vector<float> bias(kRows);
  std::vector<float> y(batch * kRows);
  std::vector<float> expected(batch * kRows);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::cos(static_cast<float>(i));
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(i);

  const int64_t x_shape[] = {batch, kCols};
  const int64_t y_shape[] = {batch, kRows};
  const ng_tensor x_view = {x.data(), NG_F32, 2, x_shape, nullptr};
  const ng_tensor bias_view = {bias.data(), NG_F32, 1, shape_, nullptr};
  const ng_tensor y_view = {y.data(), NG_F32, 2, y_shape, nullptr};
  ASSERT_EQ(ng_linear(&x_view, q_, &bias_view, nullptr, &y_view), NG_OK) << ng_last_error();

  const auto packed = ng::pack(
      ng::QTensor::quantize(ng::TensorView(weights_.data(), ng::DType::f32, {kRows, kCols}), ng::Format::parse("fp6")));
  const ng::TensorView cxx_bias(bias.data(), ng::DType::f32, {kRows});
  ng::linear(ng::TensorView(x.data(), ng::DType::f32, {batch, kCols}), packed.packed_view(), &cxx_bias, nullptr,
             ng::TensorView(expected.data(), ng::DType::f32, {batch, kRows}), ng::default_executor());
  EXPECT_EQ(y, expected);

  // y is its own residual: fp32, so that the sum is rounded once as here.
  ASSERT_EQ(ng_linear(&x_view, q_, &bias_view, &y_view, &y_view), NG_OK) << ng_last_error();
  const ng::TensorView cxx_y(expected.data(), ng::DType::f32, {batch, kRows});
  ng::linear(ng::TensorView(x.data(), ng::DType::f32, {batch, kCols}), packed.packed_view(), &cxx_bias, &cxx_y, cxx_y,
             ng::default_executor());
  EXPECT_EQ(y, expected);
  EXPECT_EQ(ng_linear(&x_view, q_, &bias_view, &x_view, &y_view), NG_INVALID_ARGUMENT) << "residual [.., K]";

  ASSERT_EQ(ng_linear_rounded(&x_view, q_, &bias_view, nullptr, &y_view, NG_INT8), NG_OK) << ng_last_error();
  EXPECT_NE(y, expected);
  ng::linear(ng::TensorView(x.data(), ng::DType::f32, {batch, kCols}), packed.packed_view(), &cxx_bias, nullptr,
             ng::TensorView(expected.data(), ng::DType::f32, {batch, kRows}), ng::default_executor(),
             ng::Activations::int8);
  EXPECT_EQ(y, expected);
  EXPECT_EQ(ng_linear_rounded(&x_view, q_, &bias_view, nullptr, &y_view, 3), NG_INVALID_ARGUMENT);
}

TEST_F(CApi, StridesAreElements) {
  std::vector<float> wide(kRows * 2 * kCols, std::nanf(""));
  for (size_t row = 0; row < kRows; ++row) {
    std::memcpy(&wide[row * 2 * kCols], &weights_[row * kCols], kCols * sizeof(float));
  }
  const int64_t strides[] = {2 * kCols, 1};
  const ng_tensor view = {wide.data(), NG_F32, 2, shape_, strides};
  ASSERT_EQ(ng_quantize(&view, "fp6", nullptr, &q_), NG_OK) << ng_last_error();
  const std::vector<float> strided = dequantized();
  ng_qtensor_free(q_);
  quantize("fp6");
  EXPECT_EQ(dequantized(), strided);
}

TEST_F(CApi, CopiesCanonicalArrays) {
  const int64_t shape[] = {1, 16};
  const std::vector<uint8_t> codes = {0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe};
  const float scale = 0.5F;
  const std::vector<uint8_t> zeros = {8};
  ASSERT_EQ(ng_qtensor_copy_of("uint4:row", 2, shape, codes.data(), &scale, zeros.data(), nullptr, &q_), NG_OK)
      << ng_last_error();
  std::vector<float> values(16);
  const ng_tensor out = {values.data(), NG_F32, 2, shape, nullptr};
  ASSERT_EQ(ng_dequantize(q_, &out), NG_OK) << ng_last_error();
  for (int i = 0; i < 16; ++i) EXPECT_EQ(values[static_cast<size_t>(i)], static_cast<float>(i - 8) * scale);
}

TEST_F(CApi, OptionsReachTheQuantizer) {
  weights_[3] = std::nanf("");
  const ng_tensor view = weights();
  EXPECT_EQ(ng_quantize(&view, "fp6", nullptr, &q_), NG_INVALID_ARGUMENT);
  ng_quantize_options options = {};
  options.nan = NG_NAN_SATURATE;
  EXPECT_EQ(ng_quantize(&view, "fp6", &options, &q_), NG_OK) << ng_last_error();
  EXPECT_EQ(dequantized()[3], 0);
  ng_qtensor_free(q_);
  q_ = nullptr;
  options.nan = NG_NAN_KEEP;
  EXPECT_EQ(ng_quantize(&view, "fp6", &options, &q_), NG_OK) << ng_last_error();
  EXPECT_TRUE(std::isnan(dequantized()[3]));
  ng_qtensor_free(q_);
  q_ = nullptr;
  options.nan = static_cast<ng_nan_policy>(3);
  EXPECT_EQ(ng_quantize(&view, "fp6", &options, &q_), NG_INVALID_ARGUMENT);
  EXPECT_NE(std::string(ng_last_error()).find("nan is 3; expected NG_NAN_ERROR"), std::string::npos);
}

TEST_F(CApi, FilesKeepTheMatrix) {
  const std::string path = testing::TempDir() + "narrowgauge_capi_test.safetensors";
  for (const char* format : {"fp6", "uint4:g16:fp32", "nvfp4", "mxfp4"}) {
    SCOPED_TRACE(format);
    quantize(format);
    const std::vector<float> before = dequantized();
    const std::string full_format = ng_qtensor_format(q_);
    ASSERT_EQ(ng_pack(q_), NG_OK) << ng_last_error();
    ASSERT_EQ(ng_save(q_, path.c_str(), "layer \"0\""), NG_OK) << ng_last_error();
    ng_qtensor_free(q_);
    q_ = nullptr;
    EXPECT_EQ(ng_load(path.c_str(), "layer 1", &q_), NG_INVALID_ARGUMENT);
    ASSERT_EQ(ng_load(path.c_str(), nullptr, &q_), NG_OK) << ng_last_error();
    EXPECT_EQ(ng_qtensor_format(q_), full_format);
    EXPECT_EQ(dequantized(), before);
    ng_qtensor_free(q_);
    q_ = nullptr;
  }
  EXPECT_EQ(ng_load((path + ".absent").c_str(), nullptr, &q_), NG_SYSTEM_ERROR);
  const auto refused = [&](int64_t length, const char* metadata, ng_status status) {
    const std::byte byte{0};
    ng::write_safetensors(
        path, std::vector<ng::FileTensor>{{"w.codes", "U8", {length, length}, {&byte, static_cast<size_t>(length)}}},
        {{"narrowgauge", metadata}});
    EXPECT_EQ(ng_load(path.c_str(), nullptr, &q_), status) << metadata;
    EXPECT_EQ(q_, nullptr);
  };
  refused(1, "not JSON", NG_FILE_CORRUPT);
  refused(1, R"({"version": 2, "tensors": {}})", NG_INVALID_ARGUMENT);
  refused(1, R"({"version": 1, "tensors": {}})", NG_INVALID_ARGUMENT);
  refused(1, R"({"version": 1, "tensors": {"w": {"format": "int8", "shape": [1, 1]}}})", NG_FILE_CORRUPT);
  refused(0, R"({"version": 1, "tensors": {"w": {"format": "int8", "shape": [1, 1]}}})", NG_FILE_CORRUPT);
  refused(1, R"({"version": 1, "tensors": {"w": {"format": "int8", "shape": []}}})", NG_FILE_CORRUPT);
  refused(1, R"({"version": 1, "tensors": {"w": {"format": "int8", "shape": [-1, 1]}}})", NG_FILE_CORRUPT);
  refused(1, R"({"version": 1, "tensors": {"w": {"format": "int9", "shape": [1, 1]}}})", NG_INVALID_ARGUMENT);
  (void)std::remove(path.c_str());
}

// Each refusal leaves the output alone and says which argument was wrong.
TEST_F(CApi, RefusesWhatDoesNotFit) {
  const auto refused = [&](const ng_tensor& view, const char* format, const char* message) {
    EXPECT_EQ(ng_quantize(&view, format, nullptr, &q_), NG_INVALID_ARGUMENT);
    EXPECT_EQ(q_, nullptr);
    EXPECT_NE(std::string(ng_last_error()).find(message), std::string::npos) << ng_last_error();
  };
  ng_tensor view = weights();
  refused(view, "fp9", "fp9");
  refused(view, nullptr, "format is null");
  view.dtype = 17;
  refused(view, "fp6", "weights has dtype 17");
  view = weights();
  view.ndim = 0;
  refused(view, "fp6", "weights has 0 axes");
  view = weights();
  view.shape = nullptr;
  refused(view, "fp6", "weights.shape is null");
  view = weights();
  view.data = nullptr;
  refused(view, "fp6", "weights");
  const int64_t negative[] = {-1, kCols};
  view = weights();
  view.shape = negative;
  refused(view, "fp6", "negative size -1");
  const int64_t huge[] = {int64_t{1} << 40, int64_t{1} << 40};
  view.shape = huge;
  refused(view, "fp6", "more elements");

  const ng_tensor good = weights();
  EXPECT_EQ(ng_quantize(&good, "fp6", nullptr, nullptr), NG_INVALID_ARGUMENT);
  EXPECT_EQ(ng_quantize(nullptr, "fp6", nullptr, &q_), NG_INVALID_ARGUMENT);
  EXPECT_EQ(ng_pack(nullptr), NG_INVALID_ARGUMENT);
  EXPECT_EQ(ng_unpack(nullptr), NG_INVALID_ARGUMENT);
  EXPECT_EQ(ng_dequantize(nullptr, &good), NG_INVALID_ARGUMENT);
  EXPECT_EQ(ng_set_threads(0), NG_INVALID_ARGUMENT);

  quantize("fp6");
  EXPECT_EQ(ng_linear(&good, q_, nullptr, nullptr, &good), NG_INVALID_ARGUMENT) << "the matrix is not packed";
  EXPECT_EQ(ng_dequantize(q_, nullptr), NG_INVALID_ARGUMENT);
}

}  // namespace
