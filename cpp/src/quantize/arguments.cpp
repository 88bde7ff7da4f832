// Checks of arguments, and constants of formats.
#include "quantize/arguments.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "narrowgauge/error.hpp"

namespace ng::codec {
namespace {

void check_array(const void* array, int64_t bytes, const char* name, const Format& format) {
  NG_CHECK(array != nullptr || bytes == 0, InvalidArgument, "the matrix has no ", name, "; format ", format.str(),
           " needs ", bytes, " bytes of them");
}

Floating floating(const ng::Element& e) {
  const int bias = (1 << (e.exponent_bits - 1)) - 1;
  const int specials = e.bits == 8 && e.exponent_bits == 4 ? 0x7f : e.bits == 8 && e.exponent_bits == 5 ? 0x7c : 1 << 8;
  return {e.bits,  e.mantissa_bits, std::bit_cast<int32_t>(element_max(e)), (1 - bias + 127) << 23, (127 - bias) << 23,
          specials};
}

}  // namespace

void check_format(const Format& format) {
  const ng::Element& e = format.element;
  const bool element_fits = e.kind == ElementKind::fp    ? e.bits >= 3 && e.bits <= 8 && e.exponent_bits >= 1 &&
                                                               1 + e.exponent_bits + e.mantissa_bits == e.bits
                            : e.kind == ElementKind::nf4 ? e.bits == 4
                                                         : e.bits >= 2 && e.bits <= 8;
  const bool group_fits = format.group == 0 || (format.group % 16 == 0 && format.group >= 16 && format.group <= 1024);
  NG_CHECK(element_fits && group_fits && format.scale <= ScaleType::e4m3, InvalidArgument, "'", format.str(),
           "' is not a format; make formats with Format::parse");
}

Source source_of(DType dtype, const char* name) {
  switch (dtype) {
    case DType::f32: return Source::f32;
    case DType::f16: return Source::f16;
    case DType::bf16: return Source::bf16;
    default: throw InvalidArgument(concat(name, " is ", dtype_name(dtype), "; expected float32, float16 or bfloat16"));
  }
}

void check_canonical(const CanonicalView& matrix) {
  const CanonicalBytes bytes = canonical_bytes(matrix.format, matrix.rows, matrix.cols);
  check_array(matrix.codes, bytes.codes, "codes", matrix.format);
  check_array(matrix.scales, bytes.scales, "scales", matrix.format);
  check_array(matrix.zeros, bytes.zeros, "zeros", matrix.format);
  check_array(matrix.global_scale, bytes.global_scale, "global_scale", matrix.format);
}

MatrixView check_dense(const TensorView& tensor, const char* name, const CanonicalView& matrix) {
  const MatrixView view = as_matrix(tensor, name);
  NG_CHECK(view.rows == matrix.rows && view.cols == matrix.cols, InvalidArgument, name, " has shape ",
           tensor.shape_str(), ", a matrix of ", view.rows, " x ", view.cols, "; expected ", matrix.rows, " x ",
           matrix.cols);
  return view;
}

std::string not_finite(int64_t row, int64_t col, int64_t index, float value) {
  return concat("weights[", row, ", ", col, "] (element ", index, ") is ", value,
                "; expected finite numbers, or nan=\"saturate\"");
}

Element element_of(const ng::Element& e, bool full_range) {
  Element out{};
  out.bits = e.bits;
  switch (e.kind) {
    case ElementKind::fp:
      out.kind = Kind::fp;
      out.fp = floating(e);
      break;
    case ElementKind::signed_int:
      out.kind = Kind::signed_int;
      out.high = e.codes() / 2 - 1;
      out.low = -out.high - (full_range ? 1 : 0);
      break;
    case ElementKind::unsigned_int:
      out.kind = Kind::unsigned_int;
      out.high = e.codes() - 1;
      break;
    case ElementKind::nf4: {
      out.kind = Kind::nf4;
      const auto values = element_values(e);
      std::copy_n(values.begin(), 16, out.values);
      for (size_t i = 0; i < 15; ++i) {
        // Exact in double. A tie goes to the even index.
        const double middle = (static_cast<double>(values[i]) + static_cast<double>(values[i + 1])) / 2;
        auto least = static_cast<float>(middle);
        if (least < middle || (least == middle && i % 2 == 0)) {
          least = std::nextafter(least, std::numeric_limits<float>::infinity());
        }
        out.thresholds[i] = least;
      }
      break;
    }
  }
  return out;
}

ScaleRule scale_rule(const Format& format, bool ceil, float global) {
  ScaleRule rule{static_cast<Scale>(format.scale), ceil, element_max(format.element), 1.0f,
                 scale_encode(format.scale, std::numeric_limits<float>::quiet_NaN())};
  if (format.scale == ScaleType::e8m0 && !ceil) rule.divisor = std::exp2(std::floor(std::log2(rule.divisor)));
  if (format.has_global_scale()) {
    rule.divisor *= global;
    rule.global = global;
  }
  return rule;
}

}  // namespace ng::codec
