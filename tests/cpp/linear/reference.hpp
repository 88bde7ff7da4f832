// The specification of linear in float64, its error bound, and random matrices in every Format.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "narrowgauge/device.hpp"
#include "narrowgauge/quantize.hpp"

namespace ng::test {

// A canonical matrix that owns its arrays.
struct Matrix {
  Format format;
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<uint8_t> codes, scales, zeros;
  std::vector<float> global_scale;

  Matrix(const Format& f, int64_t r, int64_t c) : format(f), rows(r), cols(c) {
    const CanonicalBytes bytes = canonical_bytes(f, r, c);
    codes.resize(static_cast<size_t>(bytes.codes));
    scales.resize(static_cast<size_t>(bytes.scales));
    zeros.resize(static_cast<size_t>(bytes.zeros));
    global_scale.resize(static_cast<size_t>(bytes.global_scale) / sizeof(float), 1.0f);
  }
  CanonicalView view() {
    return {format,
            rows,
            cols,
            codes.data(),
            scales.data(),
            zeros.empty() ? nullptr : zeros.data(),
            global_scale.empty() ? nullptr : global_scale.data()};
  }
  int code(int64_t row, int64_t col) const {
    const auto bits = static_cast<int64_t>(format.element.bits);
    int value = 0;
    for (int64_t b = 0; b < bits; ++b) {
      const int64_t bit = col * bits + b;
      const uint8_t byte = codes[static_cast<size_t>(row * format.row_bytes(cols) + bit / 8)];
      value |= ((byte >> (bit % 8)) & 1) << b;
    }
    return value;
  }
  void set_code(int64_t row, int64_t col, int code_value) {
    const auto bits = static_cast<int64_t>(format.element.bits);
    for (int64_t b = 0; b < bits; ++b) {
      const int64_t bit = col * bits + b;
      uint8_t& byte = codes[static_cast<size_t>(row * format.row_bytes(cols) + bit / 8)];
      byte = static_cast<uint8_t>((byte & ~(1 << (bit % 8))) | (((code_value >> b) & 1) << (bit % 8)));
    }
  }
  size_t group_index(int64_t row, int64_t col) const {
    const int64_t group = format.group == 0 ? 0 : col / format.group;
    return static_cast<size_t>(row * format.groups(cols) + group);
  }
  // The effective scale: the global one included.
  float scale(int64_t row, int64_t col) const {
    const size_t width = scale_bytes(format.scale);
    uint32_t bits = 0;
    std::memcpy(&bits, scales.data() + group_index(row, col) * width, width);
    const float value = scale_decode(format.scale, bits);
    return format.has_global_scale() ? value * global_scale[0] : value;
  }
  void set_scale(int64_t row, int64_t col, float value) {
    const size_t width = scale_bytes(format.scale);
    const uint32_t bits = scale_encode(format.scale, value);
    std::memcpy(scales.data() + group_index(row, col) * width, &bits, width);
  }
  double weight(int64_t row, int64_t col) const {
    auto value = static_cast<double>(element_values(format.element)[static_cast<size_t>(code(row, col))]);
    if (!zeros.empty()) value -= zeros[group_index(row, col)];
    return value * static_cast<double>(scale(row, col));
  }
  // weight() of all, row-major.
  std::vector<double> weights() const {
    const std::array<float, 256> values = element_values(format.element);
    std::vector<double> all(static_cast<size_t>(rows * cols));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < cols; ++col) {
        auto value = static_cast<double>(values[static_cast<size_t>(code(row, col))]);
        if (!zeros.empty()) value -= zeros[group_index(row, col)];
        all[static_cast<size_t>(row * cols + col)] = value * static_cast<double>(scale(row, col));
      }
    }
    return all;
  }
};

// Random codes (no NaN, no Inf), zero points, and scales around `scale` for elements up to 8, smaller for larger ones.
inline Matrix random_matrix(const Format& format, int64_t rows, int64_t cols, std::mt19937& random,
                            float scale = 0.02f) {
  Matrix matrix(format, rows, cols);
  const std::array<float, 256> values = element_values(format.element);
  std::uniform_int_distribution<int> any_code(0, format.element.codes() - 1);
  std::uniform_real_distribution<float> factor(0.5f, 2.0f);
  scale *= std::min(1.0f, 8 / element_max(format.element));
  for (float& global : matrix.global_scale) global = scale / 16;
  const float local = format.has_global_scale() ? 16.0f : scale;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      int code = any_code(random);
      while (!std::isfinite(values[static_cast<size_t>(code)])) code = any_code(random);
      matrix.set_code(row, col, code);
      if (format.group == 0 ? col == 0 : col % format.group == 0) {
        matrix.set_scale(row, col, local * factor(random));
        if (!matrix.zeros.empty()) {
          matrix.zeros[matrix.group_index(row, col)] = static_cast<uint8_t>(any_code(random));
        }
      }
    }
  }
  return matrix;
}

// Every element of the grammar.
inline std::vector<std::string> all_elements() {
  std::vector<std::string> names;
  for (int bits = 3; bits <= 8; ++bits) {
    for (int exponent = 1; exponent <= bits - 1; ++exponent) {
      names.push_back("fp" + std::to_string(bits) + "_e" + std::to_string(exponent) + "m" +
                      std::to_string(bits - 1 - exponent));
    }
  }
  for (int bits = 2; bits <= 8; ++bits) {
    names.push_back("int" + std::to_string(bits));
    names.push_back("uint" + std::to_string(bits));
  }
  names.emplace_back("nf4");
  return names;
}

inline std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (isa <= isa_supported()) isas.push_back(isa);
  }
  return isas;
}

// Restores the instruction set that a test forces.
class IsaGuard {
 public:
  explicit IsaGuard(Isa forced) : before_(isa()) { force_isa(forced); }
  ~IsaGuard() { force_isa(before_); }
  IsaGuard(const IsaGuard&) = delete;
  IsaGuard& operator=(const IsaGuard&) = delete;

 private:
  Isa before_;
};

inline double unit_roundoff(DType dtype) {
  return dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}

// y64 and the largest error that linear.hpp allows for one element. `weights` and `scales` are one row's.
struct Bound {
  double y64 = 0;
  double tolerance = 0;
};

inline Bound linear_bound(const double* weights, const double* scales, const double* x, int64_t cols, double bias,
                          DType y_type) {
  double magnitude = 0;
  double tiny = 0;
  Bound bound;
  for (int64_t k = 0; k < cols; ++k) {
    bound.y64 += x[k] * weights[k];
    magnitude += std::abs(x[k] * weights[k]);
    tiny += std::abs(weights[k]) + std::abs(scales[k]);
  }
  bound.y64 += bias;
  const double roundings = 16 + static_cast<double>(cols) / 16;
  const double half_min_subnormal = y_type == DType::f16 ? 0x1p-25 : y_type == DType::bf16 ? 0x1p-134 : 0x1p-150;
  bound.tolerance = 0x1p-24 * roundings * magnitude + unit_roundoff(y_type) * std::abs(bound.y64) + 0x1p-126 * tiny +
                    0x1p-150 * roundings + half_min_subnormal;
  return bound;
}

}  // namespace ng::test
