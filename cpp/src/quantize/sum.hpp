// dequantize_sum with a mean.
#pragma once

#include <span>

#include "narrowgauge/quantize.hpp"

namespace ng::codec {

// As dequantize_sum, and divides the sums by `divisor`, in f32, before they are rounded to the output's type.
void dequantize_sum(std::span<const CanonicalView> peers, int divisor, const TensorView& out, Executor& executor);
void dequantize_sum(std::span<const CanonicalView> peers, int divisor, const TensorView& out, const Stream& stream);

}  // namespace ng::codec
