// What pack.cpp hands to the kernels of sm80_pack.cu.
#pragma once

#include "kernels/quantize_args.hpp"

namespace ng::cuda {

// Columns that a block takes of 16 rows: 16 units.
inline constexpr int kPackCols = 1024;
// Groups that a block takes of a tile.
inline constexpr int kPackGroups = 32;

// A canonical matrix and the sections of its packed block (quantize/cuda_layout.hpp); either is read, the other
// written.
struct PackArgs {
  Arrays canonical;
  uint8_t* codes;
  uint8_t* records;      // null if there are none
  uint32_t* row_scales;  // float bits; null where groups have scales
  uint32_t* specials;    // null if all codes have a finite value
  int64_t rows;
  int64_t cols;
  int64_t row_bytes;  // of canonical codes
  int64_t groups;     // per row
  int64_t stages;     // per row
  int64_t tiles;
  int32_t record_bytes;
  int32_t record_zeros;
  codec::Scale scale;
  int32_t base;      // of the element's words
  uint32_t flip;     // in each byte: what is flipped in a code
  uint32_t special;  // magnitudes of 8-bit codes from here on have no finite value
};

}  // namespace ng::cuda
