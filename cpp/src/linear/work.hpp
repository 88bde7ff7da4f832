// How a product is cut into work for threads, and what both forms of AMX tiles share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/kernels.hpp"
#include "narrowgauge/executor.hpp"

namespace ng {

constexpr int64_t ceil_div(int64_t a, int64_t b) noexcept { return (a + b - 1) / b; }

// How many pieces of work make a task that is worth a hand-over between threads: some microseconds of arithmetic, at
// the rate of the fastest kernels (a unit takes about 8 ns to decode and 2.5 ns per row of x).
inline int64_t task_grain(int64_t units, int64_t rows) {
  constexpr double kTask = 4000;
  const double piece = static_cast<double>(std::max<int64_t>(units, 1)) * (8 + 2.5 * static_cast<double>(rows));
  return std::max<int64_t>(1, static_cast<int64_t>(kTask / piece));
}

// Calls f(begin, end) for all blocks, in tasks of whole strips of so many (the last may be less), `rows` rows of x
// each.
template <typename F>
void for_each_block(int64_t blocks, int64_t strip, int64_t units, int64_t rows, Executor& executor, const F& f) {
  executor.parallel_for(ceil_div(blocks, strip), task_grain(units * strip, rows),
                        [&](int64_t begin, int64_t end) { f(begin * strip, std::min(end * strip, blocks)); });
}

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

}  // namespace ng
