// linear and its gradient: checks, blocking and threads around the kernels of an instruction set.
//
// Few rows of x: each thread streams its blocks of the weights through one or two tiles of rows (direct). Many rows: a
// panel of weights is decoded into the cache once per kRowsPerPass rows and multiplied by all of them.
#include "narrowgauge/linear.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "../quantize/layout.hpp"
#include "cpu/kernels.hpp"
#include "integer.hpp"
#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/linear_plan.hpp"
#include "tiles.hpp"
#include "work.hpp"

namespace ng {
namespace {

// A multiple of every tile_rows; also bounds the scratch.
constexpr int64_t kRowsPerPass = 96;

const cpu::LinearKernels& kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::amx:
    case Isa::avx512: return cpu::kAvx512Linear;
    case Isa::avx2: return cpu::kAvx2Linear;
#endif
    default: return cpu::kPortableLinear;
  }
}

// --- element tables -----------------------------------------------------------------------------------------

std::unique_ptr<cpu::ElementTables> make_tables(const Element& element) {
  auto tables = std::make_unique<cpu::ElementTables>();
  const std::array<float, 256> values = element_values(element);
  const auto mask = static_cast<size_t>(element.codes() - 1);
  for (size_t i = 0; i < values.size(); ++i) tables->value[i] = values[i & mask];
  for (size_t i = 0; i < std::size(tables->low); ++i) {
    // Exact for what is looked up as bf16: elements of 5 to 7 bits, and fp8 (magnitudes here).
    const uint16_t bits = to_bf16(tables->value[i]).bits;
    tables->low[i] = static_cast<uint8_t>(bits & 0xff);
    tables->high[i] = static_cast<uint8_t>(bits >> 8);
  }
  tables->bits = element.bits;
  tables->exponent_bits = element.exponent_bits;
  tables->is_fp = element.kind == ElementKind::fp;
  tables->is_signed = element.kind == ElementKind::signed_int;
  tables->nan_code = std::isnan(values[0x7f]) && element.exponent_bits == 4;
  fill_integers(element, *tables);
  return tables;
}

// Tables live as long as the process.
const cpu::ElementTables& element_tables(const Element& element) {
  // kind (4), bits (9), exponent bits (8): small enough to index directly.
  static std::array<std::unique_ptr<cpu::ElementTables>, 4 * 9 * 8> tables;
  static std::array<std::once_flag, 4 * 9 * 8> flags;
  const size_t index = (static_cast<size_t>(element.kind) * 9 + element.bits) * 8 + element.exponent_bits;
  std::call_once(flags[index], [&] { tables[index] = make_tables(element); });
  return *tables[index];
}

// --- boundary -----------------------------------------------------------------------------------------------

cpu::Real real_type(DType dtype, const char* name) {
  switch (dtype) {
    case DType::f32: return cpu::Real::f32;
    case DType::f16: return cpu::Real::f16;
    case DType::bf16: return cpu::Real::bf16;
    default: throw InvalidArgument(concat(name, " is ", dtype_name(dtype), "; expected float32, float16 or bfloat16"));
  }
}

cpu::Scale scale_kind(ScaleType type) {
  switch (type) {
    case ScaleType::fp32: return cpu::Scale::fp32;
    case ScaleType::fp16: return cpu::Scale::fp16;
    case ScaleType::bf16: return cpu::Scale::bf16;
    case ScaleType::e8m0: return cpu::Scale::e8m0;
    case ScaleType::e4m3: return cpu::Scale::e4m3;
  }
  throw Error("unknown scale type");
}

cpu::Weights weights_of(const PackedView& packed, const PackedLayout& layout) {
  if (layout.total > 0) {
    NG_CHECK(packed.data != nullptr, InvalidArgument, "linear: the packed weights are null");
    NG_CHECK(reinterpret_cast<uintptr_t>(packed.data) % 64 == 0, InvalidArgument,
             "linear: the packed weights are not aligned to 64 bytes");
  }
  cpu::Weights w{};
  w.codes = packed.data;
  w.scales = packed.data + layout.scales;
  w.zeros = packed.format.element.has_zero_point() ? packed.data + layout.zeros : nullptr;
  w.tables = &element_tables(packed.format.element);
  w.blocks = layout.blocks;
  w.units = layout.units;
  w.groups = layout.groups;
  w.units_per_group = std::max<int64_t>(layout.units_per_group, 1);
  w.unit_bytes = layout.unit_bytes;
  w.global_scale = 1.0f;
  if (packed.format.has_global_scale()) {
    std::memcpy(&w.global_scale, packed.data + layout.global_scale, sizeof(float));
  }
  w.scale = scale_kind(packed.format.scale);
  return w;
}

// Floats kept by each calling thread between calls; contents undefined.
float* scratch(size_t slot, size_t count) {
  thread_local std::array<Buffer, 2> buffers;
  Buffer& buffer = buffers[slot];
  if (buffer.size() < count * sizeof(float)) buffer = Buffer(count * sizeof(float));
  return reinterpret_cast<float*>(buffer.data());
}

int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

// Rows [first, first + rows) of x as floats in tiles: out[tile][padded_cols][tile_rows], missing rows and columns zero.
void load_tiles(const cpu::LinearKernels& k, const MatrixView& x, cpu::Real type, int64_t first, int64_t rows,
                int64_t tile_rows, int64_t padded_cols, float* out, Executor& executor) {
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  const int64_t width = static_cast<int64_t>(dtype_bytes(x.dtype));
  constexpr int64_t kWindow = 512;
  const int64_t windows = (padded_cols + kWindow - 1) / kWindow;
  // A whole task is a window of a tile; a few thousand floats are not worth another thread.
  const int64_t grain = std::max<int64_t>(1, 16384 / (kWindow * tile_rows));
  executor.parallel_for(tiles * windows, grain, [&](int64_t begin, int64_t end) {
    std::array<float, kWindow> row_values;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task / windows;
      const int64_t col = task % windows * kWindow;
      const int64_t count = std::min(kWindow, padded_cols - col);
      const int64_t valid = std::clamp<int64_t>(x.cols - col, 0, count);
      float* target = out + (tile * padded_cols + col) * tile_rows;
      for (int64_t m = 0; m < tile_rows; ++m) {
        const int64_t row = tile * tile_rows + m;
        const bool present = row < rows;
        if (present) {
          const auto* source = static_cast<const std::byte*>(x.data) + ((first + row) * x.row_stride + col) * width;
          if (tile_rows == 1) {
            k.load_row(source, type, valid, target);
            std::fill(target + valid, target + count, 0.0f);
            continue;
          }
          k.load_row(source, type, valid, row_values.data());
        }
        std::fill(row_values.begin() + (present ? valid : 0), row_values.begin() + count, 0.0f);
        for (int64_t i = 0; i < count; ++i) target[i * tile_rows + m] = row_values[static_cast<size_t>(i)];
      }
    }
  });
}

// The smallest tile of a direct kernel that holds the rows.
int64_t direct_tile(int64_t rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : 8; }

CpuLinearPlan plan_of(const cpu::LinearKernels& k, int64_t rows, const PackedLayout& layout) {
  CpuLinearPlan plan;
  plan.direct = rows <= k.two_tile_rows;
  int64_t grain = 0;  // blocks
  if (plan.direct) {
    // Two tiles at the most: the second finds a task's weights in the cache.
    plan.x_rows = direct_tile(std::min<int64_t>(rows, k.direct_rows));
    plan.second_x_rows = rows > k.direct_rows ? direct_tile(rows - k.direct_rows) : 0;
    plan.pass_rows = rows;
    grain = task_grain(layout.units, rows);
  } else {
    plan.x_rows = k.tile_rows;
    plan.pass_rows = std::min(rows, kRowsPerPass);
    grain = k.panel_blocks * task_grain(layout.units * k.panel_blocks, plan.pass_rows);
  }
  plan.passes = ceil_div(rows, plan.pass_rows);
  plan.task_rows = grain * kBlockRows;
  plan.tasks = ceil_div(layout.blocks, grain) * plan.passes;
  return plan;
}

// Sums of panels for one tile of rows after another, shared by the forward and backward passes.
struct Panels {
  alignas(64) std::array<float, cpu::kPanelUnits * 16 * cpu::kMaxPanelBlocks * 16> panel;
  alignas(64) std::array<float, cpu::kPanelUnits * cpu::kMaxPanelBlocks * 16> scales;
  alignas(64) std::array<float, kRowsPerPass * cpu::kMaxPanelBlocks * 16> sums;
};

// out += tiles . panels for the strip of panel_blocks * 16 output columns that starts at block `strip`:
// decode(unit, count, panels) fills `count` <= kPanelUnits units of the reduction; `scaled` says whether it fills
// scales.
template <typename Decode>
void multiply_strip(const cpu::LinearKernels& k, Panels& p, const float* x_tiles, int64_t rows, int64_t units,
                    bool scaled, const Decode& decode) {
  const int64_t panel_cols = k.panel_blocks * 16;
  const int64_t tiles = (rows + k.tile_rows - 1) / k.tile_rows;
  std::fill(p.sums.begin(), p.sums.begin() + tiles * k.tile_rows * panel_cols, 0.0f);
  for (int64_t unit = 0; unit < units; unit += cpu::kPanelUnits) {
    const int count = static_cast<int>(std::min<int64_t>(cpu::kPanelUnits, units - unit));
    decode(unit, count);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      k.multiply_panel(x_tiles + (tile * units + unit) * 16 * k.tile_rows, p.panel.data(),
                       scaled ? p.scales.data() : nullptr, count, p.sums.data() + tile * k.tile_rows * panel_cols);
    }
  }
}

// Runs `strip(panels, index)` for every strip of `blocks` blocks of output columns, each a reduction over `units`.
template <typename Strip>
void for_each_strip(const cpu::LinearKernels& k, int64_t blocks, int64_t units, int64_t rows, Executor& executor,
                    const Strip& strip) {
  const int64_t strips = (blocks + k.panel_blocks - 1) / k.panel_blocks;
  executor.parallel_for(strips, task_grain(units * k.panel_blocks, rows), [&](int64_t begin, int64_t end) {
    Panels panels;
    for (int64_t i = begin; i < end; ++i) strip(panels, i);
  });
}

void store_sums(const cpu::LinearKernels& k, const Panels& p, const cpu::Output& out, int64_t rows, int64_t strip) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t b = 0; b < k.panel_blocks; ++b) {
      const int64_t col = (strip * k.panel_blocks + b) * 16;
      if (col >= out.cols) break;
      k.store_columns(p.sums.data() + (m * k.panel_blocks + b) * 16, out, m, col);
    }
  }
}

std::byte* row_of(const MatrixView& matrix, int64_t row) {
  return static_cast<std::byte*>(matrix.data) +
         row * matrix.row_stride * static_cast<int64_t>(dtype_bytes(matrix.dtype));
}

// residual: null, or of y's shape.
cpu::Output output_rows(const MatrixView& y, const float* bias, const MatrixView* residual, int64_t first) {
  cpu::Output out{};
  out.data = row_of(y, first);
  out.row_stride = y.row_stride;
  out.cols = y.cols;
  out.type = real_type(y.dtype, "y");
  out.bias = bias;
  if (residual != nullptr) {
    out.residual = row_of(*residual, first);
    out.residual_stride = residual->row_stride;
    out.residual_type = real_type(residual->dtype, "residual");
  }
  return out;
}

// The bias as floats, padded to 16 columns; null if there is none.
const float* load_bias(const cpu::LinearKernels& k, const TensorView* bias, int64_t cols) {
  if (bias == nullptr) return nullptr;
  const cpu::Real type = real_type(bias->dtype, "bias");
  NG_CHECK(bias->ndim == 1 && bias->shape[0] == cols, InvalidArgument, "bias has shape ", bias->shape_str(),
           "; expected [", cols, "]");
  if (cols == 0) return nullptr;
  const MatrixView row = as_matrix(*bias, "bias");
  const int64_t padded = round_up(cols, 16);
  float* values = scratch(1, static_cast<size_t>(padded));
  k.load_row(row.data, type, cols, values);
  std::fill(values + cols, values + padded, 0.0f);
  return values;
}

}  // namespace

CpuLinearPlan cpu_linear_plan(int64_t rows, const Format& format, int64_t n, int64_t k, Activations activations,
                              DType x) {
  NG_CHECK(rows > 0 && n > 0 && k > 0, InvalidArgument, "a product of [", rows, ", ", k, "] by [", n, ", ", k,
           "]; expected sizes of at least 1");
  check_activations(activations, format);
  const PackedLayout layout(format, n, k);
  real_type(x, "x");
  if (activations != Activations::exact) return integer_plan(rows, layout, activations == Activations::int16);
  if (runs_in_tiles(x, format.element, k)) return tile_plan(rows, layout);
  CpuLinearPlan plan = plan_of(kernels(), rows, layout);
  plan.isa = std::min(isa(), Isa::avx512);
  return plan;
}

void linear(const TensorView& x_tensor, const PackedView& packed, const TensorView* bias_tensor,
            const TensorView* residual_tensor, const TensorView& y_tensor, Executor& executor,
            Activations activations) {
  const MatrixView x = as_matrix(x_tensor, "x");
  const MatrixView y = as_matrix(y_tensor, "y");
  const cpu::Real x_type = real_type(x.dtype, "x");
  real_type(y.dtype, "y");
  NG_CHECK(x.cols == packed.cols, InvalidArgument, "x has shape ", x_tensor.shape_str(), "; expected [.., ",
           packed.cols, "] for weights [", packed.rows, ", ", packed.cols, "]");
  NG_CHECK(y.rows == x.rows && y.cols == packed.rows, InvalidArgument, "y has shape ", y_tensor.shape_str(),
           "; expected [", x.rows, ", ", packed.rows, "]");
  check_activations(activations, packed.format);
  const PackedLayout layout(packed.format, packed.rows, packed.cols);
  const cpu::LinearKernels& k = kernels();
  const float* bias = load_bias(k, bias_tensor, packed.rows);
  std::optional<MatrixView> residual_rows;
  if (residual_tensor != nullptr) residual_rows = as_residual(*residual_tensor, y);
  const MatrixView* residual = residual_rows ? &*residual_rows : nullptr;
  if (residual != nullptr) real_type(residual->dtype, "residual");
  if (x.rows == 0 || packed.rows == 0) return;

  const cpu::Weights w = weights_of(packed, layout);
  if (activations != Activations::exact) {
    const IntegerRowsOf rows{x, x_type, k.load_row, activations == Activations::int16};
    integer_linear(rows, w, unit_order(packed.format.element), output_rows(y, bias, residual, 0), executor);
    return;
  }
  if (runs_in_tiles(x.dtype, packed.format.element, x.cols)) {
    tile_linear(x, w, output_rows(y, bias, residual, 0), executor);
    return;
  }
  const cpu::DecodedKernels decoded = k.decoded(*w.tables, w.zeros != nullptr);
  const int64_t padded_cols = layout.units * 16;

  const CpuLinearPlan plan = plan_of(k, x.rows, layout);

  if (plan.direct) {
    const int64_t first_rows = std::min<int64_t>(x.rows, k.direct_rows);
    const int64_t second_rows = x.rows - first_rows;
    const int64_t first_tile = plan.x_rows;
    const int64_t second_tile = plan.second_x_rows;
    float* first_x = scratch(0, static_cast<size_t>(padded_cols * (first_tile + second_tile)));
    float* second_x = first_x + padded_cols * first_tile;
    load_tiles(k, x, x_type, 0, first_rows, first_tile, padded_cols, first_x, executor);
    if (second_rows > 0) {
      load_tiles(k, x, x_type, first_rows, second_rows, second_tile, padded_cols, second_x, executor);
    }
    const cpu::Output first_out = output_rows(y, bias, residual, 0);
    const cpu::Output second_out = output_rows(y, bias, residual, first_rows);
    executor.parallel_for(layout.blocks, plan.task_rows / kBlockRows, [&](int64_t begin, int64_t end) {
      decoded.direct(w, first_x, static_cast<int>(first_rows), first_out, begin, end);
      if (second_rows > 0) decoded.direct(w, second_x, static_cast<int>(second_rows), second_out, begin, end);
    });
    return;
  }
  for (int64_t first = 0; first < x.rows; first += plan.pass_rows) {
    const int64_t rows = std::min(plan.pass_rows, x.rows - first);
    const int64_t padded_rows = round_up(rows, k.tile_rows);
    float* x_tiles = scratch(0, static_cast<size_t>(padded_rows * padded_cols));
    load_tiles(k, x, x_type, first, rows, k.tile_rows, padded_cols, x_tiles, executor);
    const cpu::Output out = output_rows(y, bias, residual, first);
    for_each_strip(k, layout.blocks, layout.units, rows, executor, [&](Panels& p, int64_t strip) {
      multiply_strip(k, p, x_tiles, rows, layout.units, true, [&](int64_t unit, int count) {
        decoded.panel(w, strip * k.panel_blocks, unit, count, p.panel.data(), p.scales.data());
      });
      store_sums(k, p, out, rows, strip);
    });
  }
}

void linear_backward_input(const TensorView& dy_tensor, const PackedView& packed, const TensorView& dx_tensor,
                           Executor& executor) {
  const MatrixView dy = as_matrix(dy_tensor, "dy");
  const MatrixView dx = as_matrix(dx_tensor, "dx");
  const cpu::Real dy_type = real_type(dy.dtype, "dy");
  real_type(dx.dtype, "dx");
  NG_CHECK(dy.cols == packed.rows, InvalidArgument, "dy has shape ", dy_tensor.shape_str(), "; expected [.., ",
           packed.rows, "] for weights [", packed.rows, ", ", packed.cols, "]");
  NG_CHECK(dx.rows == dy.rows && dx.cols == packed.cols, InvalidArgument, "dx has shape ", dx_tensor.shape_str(),
           "; expected [", dy.rows, ", ", packed.cols, "]");
  const PackedLayout layout(packed.format, packed.rows, packed.cols);
  if (dy.rows == 0 || packed.cols == 0) return;

  const cpu::LinearKernels& k = kernels();
  const cpu::Weights w = weights_of(packed, layout);
  const cpu::DecodedKernels decoded = k.decoded(*w.tables, w.zeros != nullptr);
  const int64_t padded_rows_of_w = layout.blocks * 16;
  for (int64_t first = 0; first < dy.rows; first += kRowsPerPass) {
    const int64_t rows = std::min(kRowsPerPass, dy.rows - first);
    const int64_t padded_rows = round_up(rows, k.tile_rows);
    float* dy_tiles = scratch(0, static_cast<size_t>(padded_rows * padded_rows_of_w));
    load_tiles(k, dy, dy_type, first, rows, k.tile_rows, padded_rows_of_w, dy_tiles, executor);
    const cpu::Output out = output_rows(dx, nullptr, nullptr, first);
    for_each_strip(k, layout.units, layout.blocks, rows, executor, [&](Panels& p, int64_t strip) {
      multiply_strip(k, p, dy_tiles, rows, layout.blocks, false, [&](int64_t block, int count) {
        decoded.transposed_panel(w, block, strip * k.panel_blocks, count, p.panel.data());
      });
      store_sums(k, p, out, rows, strip);
    });
  }
}

}  // namespace ng
