// linear: y = x @ w.T + b with narrow weights, on the CPU.
//
// x [.., K], w a packed matrix [N, K], y [.., N]. Weights are decoded in registers next to the arithmetic; no
// dequantised copy of the matrix is made. Accumulation is fp32 with the activations exactly as given, whatever
// their type, in blocks short enough that for every element
//   |y - y64| <= 2^-24 (16 + K/16) sum|x||w| + u(y) |y64| + 2^-126 sum(|w_k| + s_k)
// where y64 is the float64 result, u(y) the unit roundoff of y's type and s_k the scale of w_k's group; results below
// the normal range add half a subnormal of y's type and, per 16 columns, of fp32.
#pragma once

#include "narrowgauge/executor.hpp"
#include "narrowgauge/quantize.hpp"
#include "narrowgauge/tensor.hpp"

namespace ng {

// x and y: f32, f16 or bf16 with dense rows (leading axes flatten); y may differ from x in type. bias: null, or
// N elements of f32, f16 or bf16, dense. M = 0 or N = 0 do nothing; K = 0 gives the bias or zeros. x and y must not
// overlap. Scratch of the calling thread is kept for the next call: at most 96 x K floats.
void linear(const TensorView& x, const PackedView& weights, const TensorView* bias, const TensorView& y,
            Executor& executor);

// dx = dy @ w, the gradient for x: dy [.., N] -> dx [.., K]; types as above.
void linear_backward_input(const TensorView& dy, const PackedView& weights, const TensorView& dx, Executor& executor);

}  // namespace ng
