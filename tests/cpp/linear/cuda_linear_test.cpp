// linear on a device, the simulated one or a real one, against float64: the packer, the host's constants and arguments,
// and the kernels together. All elements are tested through the kernels alone (tests/simgpu/tests/test_fpx_linear.py).
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_memory.hpp"
#include "kernels/fpx_plan.hpp"
#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/linear.hpp"
#include "reference.hpp"

namespace ng {
namespace {

using test::Matrix;

float as_float(const std::byte* at, DType dtype) {
  float wide = 0;
  uint16_t half = 0;
  std::memcpy(&half, at, sizeof half);
  if (dtype == DType::f32) std::memcpy(&wide, at, sizeof wide);
  return dtype == DType::f32 ? wide : dtype == DType::f16 ? to_float(f16{half}) : to_float(bf16{half});
}

std::vector<std::byte> as_bytes(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * dtype_bytes(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t half = dtype == DType::f16 ? to_f16(values[i]).bits : to_bf16(values[i]).bits;
    if (dtype == DType::f32) {
      std::memcpy(&bytes[4 * i], &values[i], 4);
    } else {
      std::memcpy(&bytes[2 * i], &half, 2);
    }
  }
  return bytes;
}

class CudaLinearTest : public CudaKernelTest {
 protected:
  std::byte* reserve(size_t bytes, unsigned char fill = 0xff) {
    std::byte* at = next_;
    next_ += (bytes + 255) / 256 * 256;
    EXPECT_LE(next_, memory_->data() + memory_->bytes());
    CudaMemory::fill(at, fill, bytes, *stream_);
    return at;
  }
  std::byte* put(const std::vector<std::byte>& bytes) {
    std::byte* at = reserve(bytes.size());
    CudaMemory::upload(at, bytes, *stream_);
    return at;
  }
  PackedView put(Matrix& matrix) {
    std::vector<std::byte> packed(static_cast<size_t>(cuda_packed_bytes(matrix.format, matrix.rows, matrix.cols)));
    pack_cuda(matrix.view(), reinterpret_cast<uint8_t*>(packed.data()), default_executor());
    return {matrix.format, matrix.rows, matrix.cols, reinterpret_cast<const uint8_t*>(put(packed))};
  }

  std::vector<float> normal(int64_t count) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = distribution(random_);
    return values;
  }

  // Multiplies m rows of x by a random matrix, and checks every element.
  void run(const std::string& name, int64_t m, int64_t n, int64_t k, DType x_type, DType y_type, bool with_bias) {
    SCOPED_TRACE(name + " " + std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k));
    next_ = memory_->data();
    const Format format = Format::parse(name);
    Matrix matrix = test::random_matrix(format, n, k, random_);
    const PackedView weights = put(matrix);
    const std::vector<std::byte> x = as_bytes(normal(m * k), x_type), bias = as_bytes(normal(n), DType::f32);
    const TensorView x_view(put(x), x_type, {m, k}), bias_view(put(bias), DType::f32, {n});
    const size_t y_bytes = static_cast<size_t>(m * n) * dtype_bytes(y_type);
    const TensorView y_view(reserve(y_bytes), y_type, {m, n});
    const int64_t bytes = linear_workspace_bytes(m, format, n, k, 0);
    void* workspace = bytes == 0 ? nullptr : reserve(static_cast<size_t>(bytes));
    linear(x_view, weights, with_bias ? &bias_view : nullptr, nullptr, y_view, workspace, *stream_);
    const std::vector<std::byte> y = CudaMemory::download(static_cast<std::byte*>(y_view.data), y_bytes, *stream_);
    stream_->synchronize();

    const std::vector<double> w = matrix.weights();
    std::vector<double> row(static_cast<size_t>(k)), scales(static_cast<size_t>(k));
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t i = 0; i < k; ++i) scales[static_cast<size_t>(i)] = static_cast<double>(matrix.scale(j, i));
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t c = 0; c < k; ++c) {
          const auto at = static_cast<size_t>(i * k + c) * dtype_bytes(x_type);
          row[static_cast<size_t>(c)] = static_cast<double>(as_float(&x[at], x_type));
        }
        const double b = with_bias ? static_cast<double>(as_float(&bias[static_cast<size_t>(j) * 4], DType::f32)) : 0;
        const test::Bound bound =
            test::linear_bound(&w[static_cast<size_t>(j * k)], scales.data(), row.data(), k, b, y_type);
        const auto at = static_cast<size_t>(i * n + j) * dtype_bytes(y_type);
        const auto got = static_cast<double>(as_float(&y[at], y_type));
        ASSERT_LE(std::abs(got - bound.y64), bound.tolerance) << i << ' ' << j << ' ' << got << ' ' << bound.y64;
      }
    }
  }

  std::mt19937 random_{7};
};

TEST_F(CudaLinearTest, Fp16Activations) {
  run("fp6_e2m3:g128:fp16", 3, 70, 336, DType::f16, DType::f32, true);
  run("fp6_e2m3:g128:fp16", 9, 64, 128, DType::f16, DType::f16, false);
  run("fp8_e5m2:row:fp32", 8, 64, 130, DType::f16, DType::f16, true);
  run("fp4_e2m1:g16:e4m3", 1, 65, 200, DType::f16, DType::f32, false);
}

TEST_F(CudaLinearTest, Bf16Activations) {
  run("fp6_e3m2:g32:e8m0", 8, 64, 192, DType::bf16, DType::bf16, true);
  run("fp3_e1m1:row:bf16", 65, 64, 64, DType::bf16, DType::f32, false);
}

TEST_F(CudaLinearTest, Integers) {
  run("uint4:g64:fp16", 5, 64, 130, DType::f16, DType::f32, true);
  run("int8:row:fp32", 8, 70, 64, DType::f16, DType::f16, false);
  run("uint5:row:fp32", 2, 64, 100, DType::f16, DType::f32, false);
}

TEST_F(CudaLinearTest, Codebooks) {
  run("nf4:g64:fp16", 4, 64, 200, DType::f16, DType::f32, false);
  run("nf4:row:fp32", 4, 64, 200, DType::bf16, DType::f32, false);
}

TEST_F(CudaLinearTest, RangesOfColumnsAreAddedInOrder) {
  const Format format = Format::parse("nf4:g64:fp16");
  ASSERT_GT(linear_workspace_bytes(2, format, 64, 4096, 0), 0);
  run("nf4:g64:fp16", 2, 64, 4096, DType::f16, DType::f32, true);
}

TEST_F(CudaLinearTest, RowsWithSpecialCodesGiveNan) {
  for (const char* element : {"fp8_e4m3", "fp8_e5m2"}) {
    for (const DType dtype : {DType::f16, DType::bf16}) {
      next_ = memory_->data();
      Matrix matrix = test::random_matrix(Format::parse(std::string(element) + ":g32:fp16"), 70, 100, random_);
      matrix.set_code(66, 99, 0x7f);
      const TensorView x(put(as_bytes(normal(2 * 100), dtype)), dtype, {2, 100});
      const TensorView y(reserve(2 * 70 * 4), DType::f32, {2, 70});
      linear(x, put(matrix), nullptr, nullptr, y, nullptr, *stream_);
      const std::vector<std::byte> bytes = CudaMemory::download(static_cast<std::byte*>(y.data), 2 * 70 * 4, *stream_);
      stream_->synchronize();
      for (size_t i = 0; i < 140; ++i) EXPECT_EQ(std::isnan(as_float(&bytes[4 * i], DType::f32)), i % 70 == 66) << i;
    }
  }
}

// Of y itself as of another tensor, with columns split or not: one more sum of the same bits.
TEST_F(CudaLinearTest, ResidualsAreAdded) {
  for (const int64_t k : {128, 4096}) {
    next_ = memory_->data();
    const Format format = Format::parse("nf4:g64:fp16");
    Matrix matrix = test::random_matrix(format, 70, k, random_);
    const PackedView weights = put(matrix);
    const int64_t bytes = linear_workspace_bytes(2, format, 70, k, 0);
    ASSERT_EQ(bytes > 0, k == 4096);
    void* workspace = bytes == 0 ? nullptr : reserve(static_cast<size_t>(bytes));
    const TensorView x(put(as_bytes(normal(2 * k), DType::f16)), DType::f16, {2, k});
    const TensorView bias(put(as_bytes(normal(70), DType::bf16)), DType::bf16, {70});
    const std::vector<std::byte> halves = as_bytes(normal(2 * 80), DType::f16);
    std::vector<float> residuals(2 * 70);
    for (size_t i = 0; i < residuals.size(); ++i) {
      residuals[i] = as_float(&halves[2 * (i / 70 * 80 + i % 70)], DType::f16);
    }
    TensorView apart(put(halves), DType::f16, {2, 70});
    apart.strides[0] = 80;
    const TensorView plain(reserve(2 * 70 * 4), DType::f32, {2, 70}), sum(reserve(2 * 70 * 4), DType::f32, {2, 70});
    const TensorView in_place(put(as_bytes(residuals, DType::f32)), DType::f32, {2, 70});
    linear(x, weights, &bias, nullptr, plain, workspace, *stream_);
    linear(x, weights, &bias, &apart, sum, workspace, *stream_);
    linear(x, weights, &bias, &in_place, in_place, workspace, *stream_);
    const auto download = [&](const TensorView& y) {
      return CudaMemory::download(static_cast<std::byte*>(y.data), 2 * 70 * 4, *stream_);
    };
    const std::vector<std::byte> expected = download(plain), got = download(sum), got_in_place = download(in_place);
    stream_->synchronize();
    for (size_t i = 0; i < residuals.size(); ++i) {
      const float value = as_float(&expected[4 * i], DType::f32) + residuals[i];
      ASSERT_EQ(as_float(&got[4 * i], DType::f32), value) << k << ' ' << i;
      ASSERT_EQ(as_float(&got_in_place[4 * i], DType::f32), value) << k << ' ' << i;
    }
  }
}

TEST_F(CudaLinearTest, SameBitsEveryTime) {
  const Format format = Format::parse("fp6");
  Matrix matrix = test::random_matrix(format, 64, 4096, random_);
  const PackedView weights = put(matrix);
  const TensorView x(put(as_bytes(normal(4096), DType::f16)), DType::f16, {1, 4096});
  void* workspace = reserve(static_cast<size_t>(linear_workspace_bytes(1, format, 64, 4096, 0)));
  std::vector<std::byte> first;
  for (int i = 0; i < 2; ++i) {
    const TensorView y(reserve(64 * 4), DType::f32, {1, 64});
    linear(x, weights, nullptr, nullptr, y, workspace, *stream_);
    const std::vector<std::byte> bytes = CudaMemory::download(static_cast<std::byte*>(y.data), 64 * 4, *stream_);
    stream_->synchronize();
    if (i == 0) first = bytes;
    EXPECT_EQ(bytes, first);
  }
}

TEST_F(CudaLinearTest, EmptyProducts) {
  run("nf4:g64:fp16", 3, 70, 0, DType::f16, DType::f32, true);
  run("nf4:g64:fp16", 0, 64, 64, DType::f16, DType::f16, false);
  run("nf4:g64:fp16", 2, 0, 64, DType::f16, DType::f16, false);
}

TEST_F(CudaLinearTest, RefusesWhatDoesNotFit) {
  const Format format = Format::parse("nf4:g64:fp16");
  Matrix matrix = test::random_matrix(format, 64, 128, random_);
  const PackedView weights = put(matrix);
  const TensorView x(reserve(2 * 128 * 2), DType::f16, {2, 128}), y(reserve(2 * 64 * 2), DType::f16, {2, 64});
  const TensorView x32(x.data, DType::f32, {1, 128}), short_x(x.data, DType::f16, {2, 64});
  EXPECT_THROW(linear(x32, weights, nullptr, nullptr, y, nullptr, *stream_), InvalidArgument);
  EXPECT_THROW(linear(short_x, weights, nullptr, nullptr, y, nullptr, *stream_), InvalidArgument);
  EXPECT_THROW(linear(x, weights, nullptr, nullptr, x, nullptr, *stream_), InvalidArgument);
  const TensorView narrow(y.data, DType::f16, {2, 63}), y_as_bf16(y.data, DType::bf16, {2, 64});
  EXPECT_THROW(linear(x, weights, nullptr, &narrow, y, nullptr, *stream_), InvalidArgument);
  EXPECT_THROW(linear(x, weights, nullptr, &y_as_bf16, y, nullptr, *stream_), InvalidArgument);
  std::vector<uint16_t> host(256);
  const TensorView host_x(host.data(), DType::f16, {2, 128});
  EXPECT_THROW(linear(host_x, weights, nullptr, nullptr, y, nullptr, *stream_), InvalidArgument);
  Matrix wide = test::random_matrix(format, 64, 8192, random_);
  ASSERT_GT(linear_workspace_bytes(2, format, 64, 8192, 0), 0);
  const TensorView wide_x(reserve(2 * 8192 * 2), DType::f16, {2, 8192});
  EXPECT_THROW(linear(wide_x, put(wide), nullptr, nullptr, y, nullptr, *stream_), InvalidArgument);
}

}  // namespace
}  // namespace ng
