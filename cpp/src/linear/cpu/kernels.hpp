// The table of functions that each instruction set fills for the linear room, and the plain data they work on.
//
// Included by instruction-set files, so: plain structs, no functions, no C++ library.
#pragma once

#include <cstdint>

namespace ng::cpu {

inline constexpr int kPanelUnits = 16;     // units of 16 that a panel holds along the reduction
inline constexpr int kMaxPanelBlocks = 2;  // blocks of 16 that a panel holds across

// What a code means, in the forms that the decoders look up.
struct ElementTables {
  alignas(64) float value[256];   // repeated so that bits above the code's do not matter
  alignas(64) uint8_t high[128];  // upper and lower byte of the value as bf16, of codes 0..127, repeated likewise
  alignas(64) uint8_t low[128];
  int bits;
  int exponent_bits;  // fp only, else 0
  bool is_signed;     // an integer in two's complement
  bool is_fp;
  bool nan_code;  // fp8_e4m3: the all-ones magnitude is NaN

  // Elements that are whole numbers of `integer_step`, a power of two (0: not such an element; fill_integers() in
  // integer.cpp). Of up to 4 bits: (value / step + integer_offset) of code i, repeated; of fp of 5 to 7 bits: the
  // magnitude over step, by the code without its sign; of others unused, they need no look-up.
  alignas(64) uint8_t integers[64];
  float integer_step;
  // What the numbers that a decoder makes are above value / step.
  int integer_offset;
  // With AVX-512: value / step + byte_offset of codes 0..127, repeated, as signed bytes; elements of 8 bits need no
  // look-up.
  alignas(64) uint8_t bytes[128];
  int byte_offset;
};

enum class Scale : uint8_t { fp32, fp16, bf16, e8m0, e4m3 };
enum class Real : uint8_t { f32, f16, bf16 };

// A packed matrix (quantize/layout.hpp).
struct Weights {
  const uint8_t* codes;
  const void* scales;
  const uint8_t* zeros;  // null: none
  const ElementTables* tables;
  int64_t blocks;
  int64_t units;
  int64_t groups;
  int64_t units_per_group;
  int64_t unit_bytes;
  float global_scale;
  Scale scale;
};

// Rows of an output with what is added to them.
struct Output {
  void* data;
  int64_t row_stride;  // elements
  int64_t cols;        // valid columns
  Real type;
  const float* bias;        // padded to 16 columns; null: none
  const void* residual;     // null: none; may be data
  int64_t residual_stride;  // elements
  Real residual_type;
};

// For blocks [begin, end): out[m, block * 16 ..] = x . w for `rows` rows. x is [padded K][tile], tile the smallest of
// 1, 2, 4, 8 that holds the rows, missing rows zero.
// pre: rows <= direct_rows.
using DirectFn = void (*)(const Weights& w, const float* x, int rows, const Output& out, int64_t begin, int64_t end);

// Decodes units [unit, unit + count) of `panel_blocks` blocks from `block` into panel[col][panel_blocks * 16] without
// their scales, and the scales into scales[unit][panel_blocks * 16]. Blocks past the last are zero.
using PanelFn = void (*)(const Weights& w, int64_t block, int64_t unit, int count, float* panel, float* scales);

// The transposed panel, scaled: rows [block * 16, (block + count) * 16) by the columns of `panel_blocks` units from
// `unit` into panel[row][panel_blocks * 16]. Units past the last are zero.
using TransposedPanelFn = void (*)(const Weights& w, int64_t block, int64_t unit, int count, float* panel);

struct DecodedKernels {
  DirectFn direct;
  PanelFn panel;
  TransposedPanelFn transposed_panel;
};

struct LinearKernels {
  // For the element of the tables; zeros says whether a zero point is subtracted.
  DecodedKernels (*decoded)(const ElementTables& tables, bool zeros);

  // sums[tile][panel_blocks * 16] += x . panel for one tile of `tile_rows` rows: x [count * 16][tile_rows], panel as
  // above; each unit's sum is multiplied by scales[unit] (null: 1).
  void (*multiply_panel)(const float* x, const float* panel, const float* scales, int count, float* sums);
  int direct_rows;    // the most that a direct kernel takes
  int two_tile_rows;  // the most that take two of them rather than a panel; at most twice direct_rows
  int tile_rows;
  int panel_blocks;

  // Row of a matrix to float; float sums of 16 columns from `col` on, plus bias, to a row of the output.
  void (*load_row)(const void* row, Real type, int64_t count, float* out);
  void (*store_columns)(const float* sums, const Output& out, int64_t row, int64_t col);
};

// Rows of x as integers times a step of their row, for weights that are integers (ElementTables::integers).
//
// Rows lie in tiles of kIntegerTile, the last as narrow as its rows: a tile is [unit][quad of 4][row][4], int8 or
// int16, and columns[4 * quad + i] says which of a unit's 16 columns that is: the order in which the decoders find
// them. VNNI and AMX have int16 as two planes of bytes, low and high (value = 256 high + low, both signed): VNNI
// [unit][quad of 4][plane][row][4]. AMX has tiles of kAmxRows tile rows, all planes together, of 16 quads (a step):
// [step][plane][row][quad of 4][4]; a segment starts a step, and what its last one lacks is zero. If there is more than
// one tile, rows that the last lacks are any.
struct IntegerRows {
  const void* values;
  const float* steps;   // [row], times integer_step; NaN: all of the row's results are
  const int32_t* sums;  // of the values of a segment: by tile [segment][row]
  int64_t segments;     // in a row: every kSegmentUnits units, anew at every group
  const uint8_t* columns;
  int rows;
  int64_t tile_steps;  // of a tile; AMX
};

inline constexpr int kIntegerTile = 4;
inline constexpr int kMaxIntegerRows = 96;
// Units whose products of int16 and 8 bits, zero point included, an int32 holds.
inline constexpr int kSegmentUnits = 16;
inline constexpr int kInt8Limit = 127;
inline constexpr int kInt16Limit = 127 * 256;  // what two signed bytes hold

// For blocks [begin, end): out = steps * sum over segments of (integers . integers) * scale, each segment's product
// exact, converted, multiplied by the step, by the scale, and added, rounding each time: the same bits everywhere.
using IntegerFn = void (*)(const Weights& w, const IntegerRows& x, const Output& out, int64_t begin, int64_t end);

// For the element of the tables; wide: x is int16. pre: the element has integers.
using FindIntegerFn = IntegerFn (*)(const ElementTables& tables, bool wide);

// Rows of x in bf16 for AMX, in tiles of tile_rows, the smaller of kAmxRows and `rows`: [step of 32 columns][row][32].
// A segment, which is two units to a step and at most four steps of a group, starts a step; what its last one lacks is
// zero. If there is more than one tile, rows that the last lacks are any.
struct TileRows {
  const void* values;
  int64_t tile_steps;
  int rows;
  int tile_rows;
};

inline constexpr int kAmxRows = 16;
inline constexpr int kAmxBlocks = 4;  // of weights that share a tile of x
inline constexpr int kMaxAmxRows = 256;
inline constexpr int kByteStepUnits = 4;
inline constexpr int kBf16StepUnits = 2;

// For blocks [begin, end): out = x . w, by the bound of linear.hpp. pre: the elements are bf16 numbers; w.units > 0.
using Bf16Fn = void (*)(const Weights& w, const TileRows& x, const Output& out, int64_t begin, int64_t end);

// For the element of the tables; zeros says whether a zero point is subtracted.
using FindBf16Fn = Bf16Fn (*)(const ElementTables& tables, bool zeros);

// Names a decoder type in a call (see kernel.inl).
template <typename D>
struct Tag {
  using Decoder = D;
};

extern const LinearKernels kPortableLinear;
extern const FindIntegerFn kPortableInteger;
#if defined(__x86_64__)
extern const LinearKernels kAvx2Linear;
extern const FindIntegerFn kAvx2Integer;
extern const LinearKernels kAvx512Linear;  // what AMX runs too, but for exact products of bf16
extern const FindIntegerFn kAvx512Integer;
extern const FindIntegerFn kAmxInteger;  // where NARROWGAUGE_AMX is defined: the assembler knows it
extern const FindBf16Fn kAmxBf16;
#endif

}  // namespace ng::cpu
