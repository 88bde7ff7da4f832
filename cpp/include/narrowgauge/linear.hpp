// linear: y = x @ w.T + b with narrow weights, on the CPU and on GPUs.
//
// x [.., K], w a packed matrix [N, K], y [.., N]. Weights are decoded in registers next to the arithmetic; no
// dequantised copy of the matrix is made. Accumulation is fp32 with the activations exactly as given, whatever
// their type, in blocks short enough that for every element
//   |y - y64| <= 2^-24 (16 + K/16) sum|x||w| + u(y) |y64| + 2^-126 sum(|w_k| + s_k)
// where y64 is the float64 result, u(y) the unit roundoff of y's type and s_k the scale of w_k's group; results below
// the normal range add half a subnormal of y's type and, per 16 columns, of fp32.
#pragma once

#include <string_view>

#include "narrowgauge/executor.hpp"
#include "narrowgauge/quantize.hpp"
#include "narrowgauge/stream.hpp"
#include "narrowgauge/tensor.hpp"

namespace ng {

// What the arithmetic makes of x.
//
//   exact        nothing, as above
//   int16, int8  every row of x is rounded to integers q times a step of its own, step = max |x| / limit (32512, which
//                two signed bytes hold; 127), at least 2^-100: x' = q step, |x - x'| <= 0.51 step. With y64 and |x| of
//                x' the same bound holds. Sums of 256 columns, or of a group if it has fewer, are exact; then four
//                roundings follow, so that y has the same bits on every CPU, whatever the other rows. A row with NaN
//                or Inf gives NaN. For Formats whose elements are integers times a power of two (check_activations);
//                on the CPU only. AVX-512 CPUs run the AVX2 kernels.
enum class Activations : uint8_t { exact, int16, int8 };

std::string_view activations_name(Activations activations) noexcept;
// Throws InvalidArgument that names the choices.
Activations parse_activations(std::string_view name);

// Throws InvalidArgument unless the elements of the Format are such: intN, uintN, fpN_e1mY, fp3_e2m0, fp4_e2m1,
// fp5_e2m2, fp6_e2m3 and fp7_e2m4, with any group and scale. Anything goes with exact.
void check_activations(Activations activations, const Format& format);

// x and y: f32, f16 or bf16 with dense rows (leading axes flatten); y may differ from x in type. bias: null, or
// N elements of f32, f16 or bf16, dense. residual: null, or r [.., N] of f32, f16 or bf16 with dense rows, y itself or
// apart from it: it is added before the result is rounded to y's type, and adds 2^-24 |b| to the bound. M = 0 or N = 0
// do nothing; K = 0 gives b + r or zeros. x and y must not overlap. Scratch of the calling thread is kept for the next
// call: at most 96 x K floats; in AMX's tiles 256 x K values of two bytes, where the columns of a group are filled up
// to 32 (to 64 where they are rounded). Throws InvalidArgument.
void linear(const TensorView& x, const PackedView& weights, const TensorView* bias, const TensorView* residual,
            const TensorView& y, Executor& executor, Activations activations = Activations::exact);

// y = x @ w.T + b + r on the stream's device, by Tensor Cores; within the same bound. All pointers are memory of that
// device: x (f16 or bf16) and y, weights that pack_cuda made (aligned to 128 bytes), bias, residual, and the workspace
// of linear_workspace_bytes() for the same shapes, null where that is 0; its contents do not matter, and
// calls on one stream may share it. The same bits every time. Nothing is allocated and nothing waits, so that it may be
// captured into a graph, once a first call with this Format has loaded its kernels. A row of weights with a NaN or Inf
// code gives NaN; where a group's scale is above 2^103 and activations are f16, it is taken as the largest float over
// 2^24. Throws InvalidArgument, CudaError.
void linear(const TensorView& x, const PackedView& weights, const TensorView* bias, const TensorView* residual,
            const TensorView& y, void* workspace, const Stream& stream);

// Bytes for `rows` rows of x on cuda:`device`. Throws CudaError, InvalidArgument.
int64_t linear_workspace_bytes(int64_t rows, const Format& format, int64_t n, int64_t k, int device);

// dx = dy @ w, the gradient for x: dy [.., N] -> dx [.., K]; types as above, dy exactly as given.
void linear_backward_input(const TensorView& dy, const PackedView& weights, const TensorView& dx, Executor& executor);

}  // namespace ng
