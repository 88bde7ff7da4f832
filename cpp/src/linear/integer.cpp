// Rounds rows of x to integers, lays them out in the order in which the kernels find the weights' columns, and cuts the
// work: few rows go past the weights as these are decoded, more in passes over weights decoded into the cache.
#include "integer.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "work.hpp"

namespace ng {
namespace {

// The kernels of an instruction set, and how they want rows (cpu::IntegerRows).
struct Kernels {
  cpu::FindIntegerFn find;
  Isa isa;
  int64_t tile_rows;
  int64_t max_rows;  // in a pass
  int64_t step_quads;
  int planes;

  bool amx() const noexcept { return isa == Isa::amx; }
};

Kernels kernels(bool wide) {
  constexpr int64_t kTile = cpu::kIntegerTile;
#if defined(__x86_64__)
  const int planes = wide ? 2 : 1;
#if defined(NARROWGAUGE_AMX)
  if (isa() >= Isa::amx) {
    return {cpu::kAmxInteger, Isa::amx, cpu::kAmxRows / planes, cpu::kMaxAmxRows, 4 * cpu::kByteStepUnits, planes};
  }
#endif
  if (isa() >= Isa::avx512) return {cpu::kAvx512Integer, Isa::avx512, kTile, cpu::kMaxIntegerRows, 1, planes};
  if (isa() >= Isa::avx2) return {cpu::kAvx2Integer, Isa::avx2, kTile, cpu::kMaxIntegerRows, 1, 1};
#endif
  return {cpu::kPortableInteger, Isa::portable, kTile, cpu::kMaxIntegerRows, 1, 1};
}

// The step that makes integers of at most `limit` of the element's values; 0 if there is none.
float integer_step(const Element& element) {
  if (element.kind == ElementKind::nf4) return 0;
  if (element.kind != ElementKind::fp) return 1;
  const float step = element_min_subnormal(element);
  // Elements of 4 bits and less are added up four at a time in 16 bits, with an offset: at most 32.
  const float limit = element.bits <= 4 ? 16 : 127;
  return element_max(element) / step <= limit ? step : 0;
}

// Columns of a unit in the order of the kernels' quads (kernels.hpp).
std::array<uint8_t, kUnitCols> quad_columns(UnitOrder order, int64_t unit_bytes, bool wide) {
  std::array<uint8_t, kUnitCols> columns{};
  const bool nibbles = unit_bytes == kUnitCodes / 2;
  for (int i = 0; i < kUnitCols; ++i) {
    const int quad = i / 4;
    // int16: the two even bytes of a 32-bit lane, then the odd ones.
    const int byte = wide ? i % 4 % 2 * 2 + i % 4 / 2 : i % 4;
    int column = i / 4 * 4 + byte;
    if (order == UnitOrder::nibble && nibbles) {
      column = quad / 2 * 8 + quad % 2 * 2 + byte / 2 + byte % 2 * 4;
    } else if (order == UnitOrder::nibble) {
      column = quad * 2 + byte / 2 + byte % 2 * 8;
    }
    columns[static_cast<size_t>(i)] = static_cast<uint8_t>(column);
  }
  return columns;
}

int64_t segments_of(const cpu::Weights& w) {
  if (w.groups == 0) return 0;
  const int64_t whole = ceil_div(std::min(w.units_per_group, w.units), cpu::kSegmentUnits);
  const int64_t last = w.units - (w.groups - 1) * w.units_per_group;
  return (w.groups - 1) * whole + ceil_div(last, cpu::kSegmentUnits);
}

// --- rounding -------------------------------------------------------------------------------------------------------

// The bits of the largest magnitude: floats without their sign are ordered as integers, NaN and infinity last.
uint32_t largest_magnitude(const float* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, values + i, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  return largest;
}

struct Rounding {
  float step;     // NaN: the row holds NaN or infinity
  float inverse;  // what x is multiplied by
};

Rounding rounding_of(uint32_t largest, int limit) {
  constexpr uint32_t kInfinity = 0x7f800000;
  if (largest >= kInfinity) return {std::numeric_limits<float>::quiet_NaN(), 0};
  float amax = 0;
  std::memcpy(&amax, &largest, sizeof amax);
  constexpr float kMinStep = 0x1p-100f;
  const auto steps = static_cast<float>(limit);
  const float step = amax / steps;
  if (step >= kMinStep) return {step, steps / amax};
  return {kMinStep, 1 / kMinStep};
}

// out = values * inverse to the nearest integer, the even one of two. pre: |values * inverse| < 2^22
void round_values(const float* values, int64_t count, float inverse, int32_t* out) {
  // Added to such a number, this leaves the integer in the low bits.
  constexpr float kRounder = 0x1.8p23f;
  constexpr int32_t kRounderBits = 0x4b400000;
  for (int64_t i = 0; i < count; ++i) {
    const float sum = values[i] * inverse + kRounder;
    int32_t bits = 0;
    std::memcpy(&bits, &sum, sizeof bits);
    out[i] = bits - kRounderBits;
  }
}

// What a pass over the weights reads: values, steps and sums, in memory that each calling thread keeps.
class Pass {
 public:
  Pass(const IntegerRowsOf& source, const cpu::Weights& w, UnitOrder order, const Kernels& kernels, int64_t max_rows)
      : source_(source),
        w_(w),
        kernels_(kernels),
        columns_(quad_columns(order, w.unit_bytes, source.wide && kernels.planes == 1)),
        segments_(segments_of(w)),
        steps_of_tile_(kernels.amx() ? tile_steps(w, cpu::kByteStepUnits) : w.units * kUnitCols / 4) {
    thread_local Buffer buffer;
    const auto rows = static_cast<size_t>(max_rows < kernels.tile_rows ? max_rows : whole_tiles(max_rows));
    const size_t values = rows * static_cast<size_t>(tile_row_values()) * (source.wide ? 2 : 1);
    const size_t sums = sizeof(int32_t) * rows * static_cast<size_t>(segments_);
    const size_t total = values + sums + sizeof(float) * rows;
    if (buffer.size() < total) buffer = Buffer(total);
    values_ = buffer.data();
    sums_ = reinterpret_cast<int32_t*>(values_ + values);
    steps_ = reinterpret_cast<float*>(values_ + values + sums);
  }

  cpu::IntegerRows round(int64_t first, int64_t rows, Executor& executor) {
    // A row is a task where it has some microseconds of work.
    const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(w_.units * kUnitCols, 1));
    executor.parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t tile = row / kernels_.tile_rows * kernels_.tile_rows;
        const bool whole = kernels_.amx() && rows > kernels_.tile_rows;
        const int64_t tile_rows = whole ? kernels_.tile_rows : std::min(rows - tile, kernels_.tile_rows);
        if (kernels_.planes == 2) {
          round_row<int8_t, 2>(first + row, row, tile, tile_rows);
        } else if (source_.wide) {
          round_row<int16_t, 1>(first + row, row, tile, tile_rows);
        } else {
          round_row<int8_t, 1>(first + row, row, tile, tile_rows);
        }
      }
    });
    return {values_, steps_, sums_, segments_, columns_.data(), static_cast<int>(rows), steps_of_tile_};
  }

 private:
  static constexpr int64_t kWindow = 512;  // columns

  int64_t whole_tiles(int64_t rows) const { return ceil_div(rows, kernels_.tile_rows) * kernels_.tile_rows; }
  // Values of a row, with those that pad steps.
  int64_t tile_row_values() const { return steps_of_tile_ * kernels_.step_quads * 4; }

  // Columns [col, col + count) of a row of x, zeros past the last.
  void load(int64_t row, int64_t col, int64_t count, float* out) const {
    const MatrixView& x = source_.x;
    const int64_t valid = std::clamp<int64_t>(x.cols - col, 0, count);
    const int64_t at = (row * x.row_stride + col) * static_cast<int64_t>(dtype_bytes(x.dtype));
    source_.load_row(static_cast<const std::byte*>(x.data) + at, source_.type, valid, out);
    std::fill(out + valid, out + count, 0.0f);
  }

  // Row `from` of x, which is row `row` of the pass.
  template <typename T, int kPlanes>
  void round_row(int64_t from, int64_t row, int64_t tile, int64_t tile_rows) {
    const int64_t cols = w_.units * kUnitCols;
    std::array<float, kWindow> floats;
    std::array<int32_t, kWindow> integers{};
    uint32_t largest = 0;
    for (int64_t col = 0; col < cols; col += kWindow) {
      const int64_t count = std::min(kWindow, cols - col);
      load(from, col, count, floats.data());
      largest = std::max(largest, largest_magnitude(floats.data(), count));
    }
    const auto [step, inverse] = rounding_of(largest, source_.wide ? cpu::kInt16Limit : cpu::kInt8Limit);
    steps_[row] = step * w_.tables->integer_step;

    const int64_t step_quads = kernels_.step_quads;
    const int64_t plane = tile_rows * step_quads * 4;
    T* values = reinterpret_cast<T*>(values_) + tile * tile_row_values() * kPlanes + (row - tile) * step_quads * 4;
    int64_t quad = 0;
    const auto next_quad = [&] {
      T* out = values + quad / step_quads * plane * kPlanes + quad % step_quads * 4;
      ++quad;
      return out;
    };
    const auto put = [&](T* out, int32_t value) {
      *out = static_cast<T>(value);
      if constexpr (kPlanes == 2) out[plane] = static_cast<T>((value - *out) / 256);
    };
    const auto end_step = [&] {
      const int64_t rest = quad % step_quads;
      for (int64_t gap = rest == 0 ? 0 : step_quads - rest; gap > 0; --gap) {
        T* out = next_quad();
        for (int i = 0; i < 4; ++i) put(out + i, 0);
      }
    };
    int32_t* sums = sums_ + tile * segments_ + row - tile;
    int64_t segment_end = 0;
    for (int64_t unit = 0; unit < w_.units; ++unit) {
      const int64_t at = unit * kUnitCols % kWindow;
      if (at == 0 && !std::isnan(step)) {
        const int64_t count = std::min(kWindow, cols - unit * kUnitCols);
        load(from, unit * kUnitCols, count, floats.data());
        round_values(floats.data(), count, inverse, integers.data());
      }
      if (unit == segment_end) {
        const int64_t group_end = (unit / w_.units_per_group + 1) * w_.units_per_group;
        segment_end = std::min(group_end, unit + cpu::kSegmentUnits);
        if (unit > 0) sums += tile_rows;
        *sums = 0;
        end_step();
      }
      for (size_t i = 0; i < kUnitCols; i += 4) {
        T* out = next_quad();
        for (size_t j = 0; j < 4; ++j) {
          const int32_t value = integers[static_cast<size_t>(at) + columns_[i + j]];
          put(out + j, value);
          *sums += value;
        }
      }
    }
    end_step();
  }

  const IntegerRowsOf& source_;
  const cpu::Weights& w_;
  const Kernels& kernels_;
  std::array<uint8_t, kUnitCols> columns_;
  int64_t segments_;
  int64_t steps_of_tile_;
  std::byte* values_;
  int32_t* sums_;
  float* steps_;
};

}  // namespace

std::string_view activations_name(Activations activations) noexcept {
  switch (activations) {
    case Activations::exact: return "exact";
    case Activations::int16: return "int16";
    case Activations::int8: return "int8";
  }
  return "?";
}

Activations parse_activations(std::string_view name) {
  for (const Activations each : {Activations::exact, Activations::int16, Activations::int8}) {
    if (activations_name(each) == name) return each;
  }
  throw InvalidArgument(concat("activations are '", name, "'; expected 'exact', 'int16' or 'int8'"));
}

void check_activations(Activations activations, const Format& format) {
  NG_CHECK(activations == Activations::exact || integer_step(format.element) > 0, InvalidArgument, "activations are ",
           activations_name(activations), ", but the elements of ", format.str(),
           " are not integers of 8 bits times a power of two; expected intN, uintN, fpN_e1mY, fp3_e2m0, fp4_e2m1, "
           "fp5_e2m2, fp6_e2m3 or fp7_e2m4, or exact activations");
}

void fill_integers(const Element& element, cpu::ElementTables& tables) {
  tables.integer_step = integer_step(element);
  tables.integer_offset = 0;
  if (tables.integer_step == 0) return;
  // Decoders make numbers without a sign of up to 7 bits, and with one of int8 and of fp from 5 bits on.
  if (element.kind == ElementKind::unsigned_int) {
    tables.integer_offset = element.bits == 8 ? -128 : 0;
  } else if (element.kind == ElementKind::signed_int) {
    tables.integer_offset = element.bits == 8 ? 0 : 1 << (element.bits - 1);
  } else if (element.bits <= 4) {
    tables.integer_offset = static_cast<int>(element_max(element) / tables.integer_step);
  }
  const std::array<float, 256> values = element_values(element);
  const size_t magnitudes = element.bits <= 4 ? size_t{1} << element.bits : size_t{1} << (element.bits - 1);
  const int offset = element.bits <= 4 ? tables.integer_offset : 0;
  for (size_t i = 0; i < std::size(tables.integers); ++i) {
    const auto value = static_cast<int>(values[i % magnitudes] / tables.integer_step);
    tables.integers[i] = static_cast<uint8_t>(value + offset);
  }
  tables.byte_offset = element.kind == ElementKind::unsigned_int && element.bits == 8 ? -128 : 0;
  if (element.bits == 8) return;
  for (size_t i = 0; i < std::size(tables.bytes); ++i) {
    const float value = values[i % static_cast<size_t>(element.codes())];
    tables.bytes[i] = static_cast<uint8_t>(static_cast<int>(value / tables.integer_step));
  }
}

CpuLinearPlan integer_plan(int64_t rows, const PackedLayout& layout, bool wide) {
  const Kernels k = kernels(wide);
  CpuLinearPlan plan;
  plan.isa = k.isa;
  plan.direct = rows <= k.tile_rows;
  plan.x_rows = std::min<int64_t>(rows, k.tile_rows);
  plan.pass_rows = std::min<int64_t>(rows, k.max_rows);
  plan.passes = ceil_div(rows, plan.pass_rows);
  const int64_t strip = k.amx() ? cpu::kAmxBlocks : 1;
  const int64_t grain = strip * task_grain(layout.units * strip, plan.pass_rows);
  plan.task_rows = grain * kBlockRows;
  plan.tasks = ceil_div(layout.blocks, grain) * plan.passes;
  return plan;
}

void integer_linear(const IntegerRowsOf& source, const cpu::Weights& w, UnitOrder order, const cpu::Output& out,
                    Executor& executor) {
  const Kernels k = kernels(source.wide);
  const cpu::IntegerFn multiply = k.find(*w.tables, source.wide);
  const int64_t pass_rows = std::min<int64_t>(source.x.rows, k.max_rows);
  Pass pass(source, w, order, k, pass_rows);
  for (int64_t first = 0; first < source.x.rows; first += pass_rows) {
    const int64_t rows = std::min(pass_rows, source.x.rows - first);
    const cpu::IntegerRows x = pass.round(first, rows, executor);
    const cpu::Output target = rows_from(out, first);
    for_each_block(w.blocks, k.amx() ? cpu::kAmxBlocks : 1, w.units, rows, executor,
                   [&](int64_t begin, int64_t end) { multiply(w, x, target, begin, end); });
  }
}

}  // namespace ng
