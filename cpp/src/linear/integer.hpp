// linear with activations that are rounded to integers: between the boundary (linear.cpp) and the kernels.
#pragma once

#include "../quantize/layout.hpp"
#include "cpu/kernels.hpp"
#include "narrowgauge/executor.hpp"
#include "narrowgauge/linear_plan.hpp"
#include "narrowgauge/tensor.hpp"

namespace ng {

// Sets integers, bytes, their step and offsets of the tables.
void fill_integers(const Element& element, cpu::ElementTables& tables);

// x before it is rounded.
struct IntegerRowsOf {
  const MatrixView& x;
  cpu::Real type;
  decltype(cpu::LinearKernels::load_row) load_row;
  bool wide;  // to int16
};

// out's data is row 0 of the output. pre: the element holds integers.
void integer_linear(const IntegerRowsOf& rows, const cpu::Weights& w, UnitOrder order, const cpu::Output& out,
                    Executor& executor);

CpuLinearPlan integer_plan(int64_t rows, const PackedLayout& layout, bool wide);

}  // namespace ng
