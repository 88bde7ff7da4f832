// linear with activations that are rounded to integers: between the boundary (linear.cpp) and the kernels.
#pragma once

#include <algorithm>

#include "../quantize/layout.hpp"
#include "cpu/kernels.hpp"
#include "narrowgauge/executor.hpp"
#include "narrowgauge/linear_plan.hpp"
#include "narrowgauge/tensor.hpp"

namespace ng {

constexpr int64_t ceil_div(int64_t a, int64_t b) noexcept { return (a + b - 1) / b; }

// How many pieces of work make a task that is worth a hand-over between threads: some microseconds of arithmetic, at
// the rate of the fastest kernels (a unit takes about 8 ns to decode and 2.5 ns per row of x).
inline int64_t task_grain(int64_t units, int64_t rows) {
  constexpr double kTask = 4000;
  const double piece = static_cast<double>(std::max<int64_t>(units, 1)) * (8 + 2.5 * static_cast<double>(rows));
  return std::max<int64_t>(1, static_cast<int64_t>(kTask / piece));
}

// The same in blocks for AMX, which takes strips of four.
inline int64_t strip_grain(int64_t units, int64_t rows) { return 4 * task_grain(units * 4, rows); }

// Steps of `step_units` units in a row of an AMX tile: a segment of four starts anew at every group.
inline int64_t tile_steps(const cpu::Weights& w, int64_t step_units) {
  if (w.groups == 0) return 0;
  const int64_t last = w.units - (w.groups - 1) * w.units_per_group;
  return (w.groups - 1) * ceil_div(w.units_per_group, step_units) + ceil_div(last, step_units);
}

// The output from row `first` on.
inline cpu::Output rows_from(const cpu::Output& out, int64_t first) {
  cpu::Output rows = out;
  const auto width = [](cpu::Real type) { return type == cpu::Real::f32 ? 4 : 2; };
  rows.data = static_cast<std::byte*>(out.data) + first * out.row_stride * width(out.type);
  if (out.residual != nullptr) {
    rows.residual =
        static_cast<const std::byte*>(out.residual) + first * out.residual_stride * width(out.residual_type);
  }
  return rows;
}

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
