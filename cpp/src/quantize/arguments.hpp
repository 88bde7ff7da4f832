// What quantize and dequantize check in their arguments and derive from a Format, on the CPU and on GPUs alike.
#pragma once

#include <span>
#include <string>

#include "narrowgauge/quantize.hpp"
#include "quantize/codec.hpp"

namespace ng::codec {

// Throw InvalidArgument. Arrays are only compared with null.
void check_format(const Format& format);
void check_canonical(const CanonicalView& matrix);
Source source_of(DType dtype, const char* name);
// `tensor` as a matrix of the shape of `matrix`.
MatrixView check_dense(const TensorView& tensor, const char* name, const CanonicalView& matrix);

// The peers of dequantize_sum.
void check_peers(std::span<const CanonicalView> peers);

// What is said of an element that is NaN or infinite.
std::string not_finite(int64_t row, int64_t col, int64_t index, float value);

Element element_of(const ng::Element& e, bool full_range);
ScaleRule scale_rule(const Format& format, bool ceil, float global);

}  // namespace ng::codec
