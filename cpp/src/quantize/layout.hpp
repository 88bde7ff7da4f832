// The packed layout of the CPU: what linear streams.
//
// A matrix [rows, cols] is cut into blocks of 16 rows, and a block into units of 16 columns: 256 codes, 32 * bits
// bytes, dense. A block's units follow each other along the columns, so a thread that owns some blocks reads one
// sequential stream. Rows and columns are padded to 16 with code 0 and scale 0.
//
//   packed = [codes: block, unit] [scales: block, group, 16 rows] [zeros: likewise, u8] [global scale: f32]
//            each section starts on 64 bytes
//
// Inside a unit the codes are cut into bit planes of 8, 4, 2 and 1 bits (6 = 4 + 2, low bits first), each laid out
// so that shifts of whole registers line up the codes of 16 rows with the arithmetic (r = row, k = column, of 16):
//
//   nibble (2..4 bits)         lane r is 32 bits wide; a 4-bit plane has two registers k / 8, nibble
//                              (k % 2) * 4 + k / 2 % 4; 2- and 1-bit planes one, field (k % 2) * 8 + k / 2: a shift
//                              leaves a column's codes in the low bits of 16 lanes, for a 16-entry look-up
//   pair (5..7 bits, fp8)      register k / 4 of 64 bytes, byte r / 4 * 16 + k / 2 % 2 * 8 + r % 4 * 2 + k % 2:
//                              after a byte look-up, interleaving low and high bytes gives (k, k + 1) bf16 pairs
//   quad (int8, uint8)         register k / 4, byte r * 4 + k % 4: four columns a 32-bit lane, as dot-product
//                              instructions read them
#pragma once

#include <array>
#include <cstdint>

#include "narrowgauge/quantize.hpp"

namespace ng {

inline constexpr int kBlockRows = 16;
inline constexpr int kUnitCols = 16;
inline constexpr int kUnitCodes = kBlockRows * kUnitCols;

enum class UnitOrder : uint8_t { nibble, pair, quad };

constexpr UnitOrder unit_order(const Element& element) noexcept {
  if (element.bits <= 4) return UnitOrder::nibble;
  return element.bits == 8 && element.kind != ElementKind::fp ? UnitOrder::quad : UnitOrder::pair;
}

// Where the bits of code [row * 16 + col] lie in a unit.
struct UnitMap {
  struct Plane {
    int bits = 0;       // width of the field
    int first_bit = 0;  // of the code
    std::array<uint8_t, kUnitCodes> byte{};
    std::array<uint8_t, kUnitCodes> shift{};
  };
  int bits = 0;
  int planes = 0;
  std::array<Plane, 3> plane{};

  static constexpr UnitMap make(UnitOrder order, int bits) noexcept;
  // One built for the element at first use; lives as long as the process. Thread-safe.
  static const UnitMap& of(const Element& element);
};

constexpr UnitMap UnitMap::make(UnitOrder order, int bits) noexcept {
  UnitMap map;
  map.bits = bits;
  int first_bit = 0;
  int base = 0;  // byte where the plane starts
  for (const int width : {8, 4, 2, 1}) {
    if (first_bit + width > bits) continue;
    Plane& plane = map.plane[static_cast<size_t>(map.planes++)];
    plane.bits = width;
    plane.first_bit = first_bit;
    for (int row = 0; row < kBlockRows; ++row) {
      for (int col = 0; col < kUnitCols; ++col) {
        int bit = 0;  // inside the plane
        if (order == UnitOrder::nibble) {
          const int field = width == 4 ? col % 2 * 4 + col / 2 % 4 : col % 2 * 8 + col / 2;
          const int lane_bits = width == 1 ? 16 : 32;
          bit = (width == 4 ? col / 8 * 512 : 0) + row * lane_bits + field * width;
        } else {
          const int reg = col / 4;
          const int byte =
              order == UnitOrder::quad ? row * 4 + col % 4 : row / 4 * 16 + col / 2 % 2 * 8 + row % 4 * 2 + col % 2;
          if (width == 8) {
            bit = (reg * 64 + byte) * 8;
          } else if (width == 4) {
            bit = (reg / 2 * 64 + byte) * 8 + reg % 2 * 4;
          } else if (width == 2) {
            bit = byte * 8 + reg * 2;
          } else {
            bit = byte % 32 * 8 + byte / 32 * 4 + reg;
          }
        }
        const auto index = static_cast<size_t>(row * kUnitCols + col);
        plane.byte[index] = static_cast<uint8_t>(base + bit / 8);
        plane.shift[index] = static_cast<uint8_t>(bit % 8);
      }
    }
    first_bit += width;
    base += width * kUnitCodes / 8;
  }
  return map;
}

// Sizes and section offsets of a packed matrix, in bytes where not said otherwise.
struct PackedLayout {
  int64_t blocks = 0;           // of 16 rows
  int64_t units = 0;            // of 16 columns, per block
  int64_t groups = 0;           // per row
  int64_t units_per_group = 0;  // the last group may have fewer
  int64_t unit_bytes = 0;
  int64_t scales = 0;
  int64_t zeros = 0;
  int64_t global_scale = 0;
  int64_t total = 0;

  PackedLayout() = default;
  // Throws InvalidArgument as canonical_bytes() does.
  PackedLayout(const Format& format, int64_t rows, int64_t cols);

  int64_t block_bytes() const noexcept { return units * unit_bytes; }
};

}  // namespace ng
