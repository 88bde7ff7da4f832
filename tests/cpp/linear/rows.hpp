// Rows of activations in every type, products of them with a random matrix, and how far these are from float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "narrowgauge/linear.hpp"
#include "reference.hpp"

namespace ng::test {

inline Buffer packed_copy(Matrix& matrix) {
  Buffer packed(static_cast<size_t>(packed_bytes(matrix.format, matrix.rows, matrix.cols)));
  pack(matrix.view(), reinterpret_cast<uint8_t*>(packed.data()), default_executor());
  return packed;
}

inline PackedView view_of(const Matrix& matrix, const Buffer& packed) {
  return {matrix.format, matrix.rows, matrix.cols, reinterpret_cast<const uint8_t*>(packed.data())};
}

// Activations in their own type, with the doubles that they stand for.
struct Rows {
  DType dtype;
  int64_t rows, cols;
  std::vector<std::byte> bytes;
  std::vector<double> values;

  Rows(DType type, int64_t r, int64_t c) : dtype(type), rows(r), cols(c) {
    bytes.resize(static_cast<size_t>(r * c) * dtype_bytes(type));
    values.resize(static_cast<size_t>(r * c));
  }
  void set(int64_t row, int64_t col, float value) {
    const auto at = static_cast<size_t>(row * cols + col);
    switch (dtype) {
      case DType::f32: std::memcpy(&bytes[at * 4], &value, 4); break;
      case DType::f16: {
        const f16 narrow = to_f16(value);
        std::memcpy(&bytes[at * 2], &narrow, 2);
        value = to_float(narrow);
        break;
      }
      default: {
        const bf16 narrow = to_bf16(value);
        std::memcpy(&bytes[at * 2], &narrow, 2);
        value = to_float(narrow);
      }
    }
    values[at] = static_cast<double>(value);
  }
  double read(int64_t row, int64_t col) const {
    const auto at = static_cast<size_t>(row * cols + col);
    if (dtype == DType::f32) {
      float value = 0;
      std::memcpy(&value, &bytes[at * 4], 4);
      return static_cast<double>(value);
    }
    uint16_t bits = 0;
    std::memcpy(&bits, &bytes[at * 2], 2);
    return static_cast<double>(dtype == DType::f16 ? to_float(f16{bits}) : to_float(bf16{bits}));
  }
  TensorView view() { return {bytes.data(), dtype, {rows, cols}}; }
};

inline Rows random_activations(DType dtype, int64_t rows, int64_t cols, std::mt19937& random, float scale = 1.0f) {
  Rows x(dtype, rows, cols);
  std::normal_distribution<float> normal(0.0f, scale);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) x.set(row, col, normal(random));
  }
  return x;
}

// The effective scale of every weight.
inline std::vector<double> scales_of(const Matrix& w) {
  std::vector<double> scales;
  for (int64_t row = 0; row < w.rows; ++row) {
    for (int64_t col = 0; col < w.cols; ++col) scales.push_back(static_cast<double>(w.scale(row, col)));
  }
  return scales;
}

// Largest error over tolerance.
inline double worst_ratio(const Matrix& w, const Rows& x, const Rows& y, const std::vector<float>& bias) {
  const std::vector<double> weights = w.weights();
  const std::vector<double> scales = scales_of(w);
  double worst = 0;
  for (int64_t m = 0; m < x.rows; ++m) {
    for (int64_t n = 0; n < w.rows; ++n) {
      const double b = bias.empty() ? 0.0 : static_cast<double>(bias[static_cast<size_t>(n)]);
      const test::Bound bound = test::linear_bound(weights.data() + n * w.cols, scales.data() + n * w.cols,
                                                   x.values.data() + m * x.cols, w.cols, b, y.dtype);
      const double error = std::abs(y.read(m, n) - bound.y64);
      worst = std::max(worst, error == 0 ? 0.0 : error / bound.tolerance);
      if (std::isnan(error)) return std::numeric_limits<double>::infinity();
    }
  }
  return worst;
}

inline Rows run(Matrix& w, Rows& x, const std::vector<float>& bias, DType y_type,
                Activations activations = Activations::exact, Executor& executor = default_executor(),
                const TensorView* residual = nullptr) {
  const Buffer packed = packed_copy(w);
  Rows y(y_type, x.rows, w.rows);
  TensorView bias_view;
  if (!bias.empty()) {
    bias_view = TensorView(const_cast<float*>(bias.data()), DType::f32, {static_cast<int64_t>(bias.size())});
  }
  linear(x.view(), view_of(w, packed), bias.empty() ? nullptr : &bias_view, residual, y.view(), executor, activations);
  return y;
}

}  // namespace ng::test
