// What quantize.cpp hands to the kernels of sm80_quantize.cu: plain structs that both compilers read.
#pragma once

#include <stdint.h>

#include "quantize/codec.hpp"

namespace ng::cuda {

// A warp works on a tile at a time: up to 1024 consecutive elements of a row, whole groups where there are groups, 32
// of them in each lane. A unit is 16 elements, which share a scale.
inline constexpr int kUnit = 16;
inline constexpr int kTileUnits = 64;
inline constexpr int kTile = kTileUnits * kUnit;
inline constexpr int kWarps = 8;  // of a block, at most
inline constexpr int kMostPeers = 64;

// A matrix of floats with strided rows beside a canonical one, and how its rows are cut.
struct Shape {
  int64_t rows;
  int64_t cols;
  int64_t stride;     // elements from a row of floats to the next
  int64_t row_bytes;  // of codes
  int64_t groups;     // of a row
  int32_t tiles;      // of a row
  int32_t tile_elements;
  int32_t tile_groups;  // of a full tile
  int32_t group_step;   // groups from a tile to the next: tile_groups, or 0 where the row is the group
  int32_t group_units;  // a multiple of it is a group's first unit; kTileUnits where the row is the group
  int32_t group_magic;  // unit * group_magic >> 16 is a unit's group in its tile
  int32_t warps_along;  // log2 of the warps of a block that share a row; the others have the next rows
};

struct Arrays {
  uint8_t* codes;
  void* scales;
  uint8_t* zeros;
  float* global_scale;
};

// How scales are made: codec::ScaleRule as numbers.
struct ScaleCoding {
  codec::Scale type;
  bool ceil;
  bool few_bits;   // codec::Division
  int32_t shift;   // 52 - mantissa bits
  int64_t least;   // bits of the smallest normal double that is a normal scale
  double most;     // the largest scale
  double divisor;  // before the global scale
  uint32_t nan;    // bits of a scale that is NaN
};

// What a kernel found in its input is one number, the smallest of all: where it was launched from, the element's index,
// and what it is.
inline constexpr int kFoundIndexBits = 46;
enum class Found : uint32_t { nan, infinity, minus_infinity };

struct QuantizeArgs {
  const void* weights;
  Arrays out;
  Shape shape;
  codec::Element element;
  ScaleCoding scale;
  bool saturate;  // NaN and Inf are replaced
  bool keep;      // or make their group NaN; else they are reported
  uint64_t seed;
  int64_t first_index;
  uint64_t origin;  // the upper bits of what is found
};

struct DequantizeArgs {
  void* out;
  Shape shape;
  codec::Element element;
  codec::Scale scale;
  float divisor;  // of sums
  int32_t peers;
  Arrays peer[kMostPeers];
};

}  // namespace ng::cuda
