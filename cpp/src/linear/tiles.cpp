// Lays rows of x out as tiles and cuts the work: passes of up to 256 rows over the weights, each thread a few strips of
// four blocks.
#include "tiles.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "narrowgauge/device.hpp"
#include "work.hpp"

namespace ng {
namespace {

constexpr int64_t kStepCols = cpu::kBf16StepUnits * kUnitCols;

// Copies row `from` of x to row `row` of a tile: the columns of a group start a step, the rest of its last one is zero.
[[maybe_unused]] void load_tile_row(const MatrixView& x, int64_t from, const cpu::Weights& w, int64_t tile_rows,
                                    uint16_t* out) {
  const auto* source = static_cast<const uint16_t*>(x.data) + from * x.row_stride;
  const int64_t group_cols = std::min(w.units_per_group, w.units) * kUnitCols;
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t end = std::min((group + 1) * group_cols, w.units * kUnitCols);
    for (int64_t col = group * group_cols; col < end; col += kStepCols) {
      const int64_t valid = std::clamp<int64_t>(std::min(end, x.cols) - col, 0, kStepCols);
      std::memcpy(out, source + col, static_cast<size_t>(valid) * sizeof *out);
      std::fill(out + valid, out + kStepCols, uint16_t{0});
      out += tile_rows * kStepCols;
    }
  }
}

}  // namespace

bool runs_in_tiles(DType x, const Element& element, int64_t cols) {
#if defined(NARROWGAUGE_AMX)
  return isa() >= Isa::amx && x == DType::bf16 && element.kind != ElementKind::nf4 && cols > 0;
#else
  static_cast<void>(x), static_cast<void>(element), static_cast<void>(cols);
  return false;
#endif
}

CpuLinearPlan tile_plan(int64_t rows, const PackedLayout& layout) {
  CpuLinearPlan plan;
  plan.isa = isa();
  plan.direct = rows <= cpu::kAmxRows;
  plan.x_rows = std::min<int64_t>(rows, cpu::kAmxRows);
  plan.pass_rows = std::min<int64_t>(rows, cpu::kMaxAmxRows);
  plan.passes = ceil_div(rows, plan.pass_rows);
  const int64_t grain = cpu::kAmxBlocks * task_grain(layout.units * cpu::kAmxBlocks, plan.pass_rows);
  plan.task_rows = grain * kBlockRows;
  plan.tasks = ceil_div(layout.blocks, grain) * plan.passes;
  return plan;
}

void tile_linear([[maybe_unused]] const MatrixView& x, [[maybe_unused]] const cpu::Weights& w,
                 [[maybe_unused]] const cpu::Output& out, [[maybe_unused]] Executor& executor) {
#if defined(NARROWGAUGE_AMX)
  const cpu::Bf16Fn multiply = cpu::kAmxBf16(*w.tables, w.zeros != nullptr);
  const int64_t pass_rows = std::min<int64_t>(x.rows, cpu::kMaxAmxRows);
  const int64_t tile_rows = std::min<int64_t>(pass_rows, cpu::kAmxRows);
  const int64_t steps = tile_steps(w, cpu::kBf16StepUnits);
  const int64_t tile_values = steps * tile_rows * kStepCols;
  thread_local Buffer buffer;
  const auto bytes = static_cast<size_t>(ceil_div(pass_rows, tile_rows) * tile_values) * sizeof(uint16_t);
  if (buffer.size() < bytes) buffer = Buffer(bytes);
  auto* values = reinterpret_cast<uint16_t*>(buffer.data());
  for (int64_t first = 0; first < x.rows; first += pass_rows) {
    const int64_t rows = std::min(pass_rows, x.rows - first);
    // A row is a task where it has some microseconds of work.
    executor.parallel_for(rows, std::max<int64_t>(1, 65536 / x.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        uint16_t* tile = values + row / tile_rows * tile_values;
        load_tile_row(x, first + row, w, tile_rows, tile + row % tile_rows * kStepCols);
      }
    });
    const cpu::TileRows tiles{values, steps, static_cast<int>(rows), static_cast<int>(tile_rows)};
    const cpu::Output target = rows_from(out, first);
    for_each_block(w.blocks, cpu::kAmxBlocks, w.units, rows, executor,
                   [&](int64_t begin, int64_t end) { multiply(w, tiles, target, begin, end); });
  }
#endif
}

}  // namespace ng
