// Where codes lie in the words of a lane, and words and scales in memory, in the packed layout of GPUs
// (cuda_layout.hpp): read by the packers on both sides and by the kernels, so it includes C headers only.
//
// A lane has 32 codes of a unit, which is `bits` words of 32 bits. They are 16 pairs, those of the lane's operands of
// mma.m16n8k16 over four slices of 16 columns: pair 4 * slice + operand. The two codes of a pair lie 16 bits apart, as
// the two halves of an operand do, so that all that follows is said of 16 bits and holds for both.
//
// A half holds 16 / bits whole codes; what is left over in the halves of all words is cut into pieces of the last
// pairs. Whole codes of 6 bits, and what is left:
//
//   bit    15 14 13 12 | 11 10  9  8  7  6 |  5  4  3  2  1  0
//   word 0   pair 12   |      pair 1       |      pair 0         low 4 bits of pair 12
//   word 1   pair 13   |      pair 3       |      pair 2         of 13
//   word 2   pair 14   |      pair 5       |      pair 4         of 14
//   word 3   pair 15   |      pair 7       |      pair 6         of 15
//   word 4  13  |  12  |      pair 9       |      pair 8         high 2 bits of each
//   word 5  15  |  14  |      pair 11      |      pair 10        high 2 bits of each
//
// The whole word is then rotated left by the element's base: the bit where the last bit of its magnitude stands in an
// fp16 number, 10 - mantissa bits, or 0 for integers. So a rotation right brings any piece into its place, and a mask
// leaves it.
#pragma once

#include <stdint.h>

namespace ng::lane_order {

inline constexpr int kLanes = 32;
inline constexpr int kPairs = 16;
inline constexpr int kUnitRows = 16;
inline constexpr int kUnitCols = 64;

// `bits` bits of a code from bit `target` on; they start at bit `source` of the halves of `word`.
struct Piece {
  int word;
  int source;
  int target;
  int bits;
};

struct Pieces {
  int count;
  Piece piece[8];
};

constexpr int whole_codes(int bits) { return 16 / bits; }            // of a half
constexpr int left_over(int bits) { return 16 - 16 / bits * bits; }  // bits of a half, and pairs that are cut up

// The pieces of a pair's codes.
constexpr Pieces pieces_of(int bits, int pair) {
  const int whole = whole_codes(bits);
  const int rest = left_over(bits);
  if (pair < whole * bits) return {1, {{pair / whole, pair % whole * bits, 0, bits}}};
  const int index = pair - whole * bits;
  const int full = bits / rest;  // pieces that are all that is left over in a word
  const int last = bits % rest;
  Pieces pieces{};
  for (int i = 0; i < full; ++i) pieces.piece[pieces.count++] = {index * full + i, whole * bits, i * rest, rest};
  if (last > 0) {
    pieces.piece[pieces.count++] = {rest * full + index * last / rest, whole * bits + index * last % rest, full * rest,
                                    last};
  }
  return pieces;
}

// The pieces of all pairs. Codebooks are looked up by four neighbouring nibbles at a time: word = slice, nibble
// 2 * operand + half.
struct Order {
  Pieces pair[kPairs];
  int half_step;  // bits from the first code of a pair to the second
};

constexpr Order order_of(int bits, bool codebook) {
  Order order{{}, codebook ? 4 : 16};
  for (int pair = 0; pair < kPairs; ++pair) {
    order.pair[pair] = codebook ? Pieces{1, {{pair / 4, pair % 4 * 8, 0, bits}}} : pieces_of(bits, pair);
  }
  return order;
}

// Row and column, in the unit, of the first code of a lane's pair; the second is in the next column.
constexpr int code_row(int lane, int pair) { return lane / 4 + pair % 2 * 8; }
constexpr int code_col(int lane, int pair) { return pair / 4 * 16 + pair / 2 % 2 * 8 + lane % 4 * 2; }

// Byte of a lane's word in its unit: words lie together as the lane reads them, by 4, then 2, then 1.
constexpr int word_place(int bits, int lane, int word) {
  const int fours = bits / 4 * 4;
  const int first = word < fours ? word / 4 * 4 : word < fours + bits % 4 / 2 * 2 ? fours : bits - 1;
  const int together = word < fours ? 4 : first == bits - 1 ? 1 : 2;
  return first * kLanes * 4 + (lane * together + word - first) * 4;
}

// Where row `row` of a tile is in a record.
constexpr int record_entry(int row) { return row % 8 * 8 + row / 16 * 2 + row / 8 % 2; }

}  // namespace ng::lane_order
