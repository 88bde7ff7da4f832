// The packed layout of GPUs: what the kernels of sm80_fpx_linear_*.cu stream.
//
// A matrix [rows, cols] is cut into tiles of 64 rows, and a tile into stages of 64 columns; both are padded to 64 with
// code 0. What a tile has in a stage is 512 * bits bytes, and its stages follow each other along the columns:
//
//   packed = [codes: tile, stage, unit] [records: tile, group] [row scales: f32] [specials: f32] [global scale: f32]
//            each section starts on 128 bytes
//
// A unit is 16 rows of a stage, 128 * bits bytes: the words of 32 lanes, `bits` for each, in the order of the A
// operands of mma.m16n8k16 (lane_order.hpp). Row and column of operand 0 of a slice of 16 columns, by lane; operand 1
// is 8 rows below, operands 2 and 3 are 8 columns to the right of them:
//
//              col 0,1   2,3   4,5   6,7
//      row 0   lane 0     1     2     3
//      row 1        4     5     6     7
//      ...
//      row 7       28    29    30    31
//
// A lane reads its words by 16, 8 and 4 bytes. Words 0 to 3 of all lanes come first, then 4 to 7 or 4 and 5, then the
// last of an odd number, for 6 bits:
//
//      | lane 0: words 0 1 2 3 | lane 1: 0 1 2 3 | ... | lane 31 |    512 bytes
//      | lane 0: words 4 5 | lane 1: 4 5 | ... | lane 31 |            256 bytes
//
// Codes of intN are stored with the sign bit flipped: the value plus 2^(N-1). A record is what a group has of 64 rows:
// scales in their type, but not those of whole rows, then zero points. Row 16 b + 8 h + g is entry 8 g + 2 b + h, so
// that the rows of a lane are neighbours. Row scales are fp32 whatever their type. Specials are 0, or NaN for a row
// that has a code without a finite value: the row's results are NaN. There are specials only for elements with such
// codes.
#pragma once

#include <cstdint>

#include "lane_order.hpp"
#include "narrowgauge/quantize.hpp"

namespace ng {

inline constexpr int kCudaTileRows = 64;
inline constexpr int kCudaStageCols = 64;
inline constexpr int kCudaAlignment = 128;

// Sizes and section offsets, in bytes where not said otherwise.
struct CudaLayout {
  int64_t tiles = 0;   // of 64 rows
  int64_t stages = 0;  // of 64 columns, per row
  int64_t groups = 0;  // per row
  int64_t unit_bytes = 0;
  int64_t record_bytes = 0;  // 0 if groups have no scale and no zero point
  int64_t record_zeros = 0;  // where zero points start in a record
  int64_t records = 0;
  int64_t row_scales = 0;  // each of these is as long as up to the next one
  int64_t specials = 0;
  int64_t global_scale = 0;
  int64_t total = 0;

  CudaLayout() = default;
  // Throws InvalidArgument as canonical_bytes() does.
  CudaLayout(const Format& format, int64_t rows, int64_t cols);

  int64_t stage_bytes() const noexcept { return 4 * unit_bytes; }
};

// Whether some codes of the element have no finite value.
constexpr bool has_special_codes(const Element& element) noexcept {
  return element.kind == ElementKind::fp && element.bits == 8 &&
         (element.exponent_bits == 4 || element.exponent_bits == 5);
}

// By so many bits the finished words of an element are rotated left.
constexpr int cuda_base(const Element& element) noexcept {
  return element.kind == ElementKind::fp ? 10 - element.mantissa_bits : 0;
}

// What is flipped in the codes.
constexpr unsigned cuda_flip(const Element& element) noexcept {
  return element.kind == ElementKind::signed_int ? 1u << (element.bits - 1) : 0u;
}

namespace codec {

// What pack_cuda and unpack_cuda check on the host and on a device alike, and the layout that both have. Throw
// InvalidArgument.
CudaLayout check_pack_cuda(const CanonicalView& matrix, const uint8_t* packed);
CudaLayout check_unpack_cuda(const PackedView& packed, const CanonicalView& out);

}  // namespace codec
}  // namespace ng
