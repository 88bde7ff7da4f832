// linear with bf16 activations in the tiles of AMX: between the boundary (linear.cpp) and the kernels.
#pragma once

#include "../quantize/layout.hpp"
#include "cpu/kernels.hpp"
#include "narrowgauge/executor.hpp"
#include "narrowgauge/linear_plan.hpp"
#include "narrowgauge/tensor.hpp"

namespace ng {

// Whether exact products of such x run in tiles: on the instruction set in use, with elements that bf16 holds. fp16 and
// fp32 would have to be rounded.
bool runs_in_tiles(DType x, const Element& element, int64_t cols);

// out's data is row 0 of the output. pre: runs_in_tiles()
void tile_linear(const MatrixView& x, const cpu::Weights& w, const cpu::Output& out, Executor& executor);

CpuLinearPlan tile_plan(int64_t rows, const PackedLayout& layout);

}  // namespace ng
