// What fpx_linear.cpp hands to the kernels of sm80_fpx_linear.cu: plain structs that both compilers read, and the
// numbers that both must agree on.
#pragma once

#include <stdint.h>

namespace ng::cuda {

// A stage is 64 columns; a tile's weights are multiples of 64 rows.
inline constexpr int kStageCols = 64;
inline constexpr int kSliceCols = 16;
inline constexpr int kStageSlices = kStageCols / kSliceCols;
inline constexpr int kTileRows = 64;
inline constexpr int kRecordSlots = 4;  // groups that can start in a stage
inline constexpr int kChainSlices = 8;  // that Tensor Cores add up at most (fpx_linear.cuh)

enum class FpxReal : int32_t { f16, bf16, f32 };
enum class FpxScale : int32_t { row, f16, bf16, f32, e8m0, e4m3 };

// The tiles: rows of x, warps, and how many 16-row blocks of weights each warp has. The warps of a team share rows of x
// and have different weights; teams share the tile and have different columns.
struct FpxTile {
  int x_rows;
  int blocks;  // of 16 rows of weights, a warp
  int warps;   // of a team
  int teams;
  int stages;
  // Blocks that the registers of a multiprocessor must have room for, where weights are sums of so many terms.
  constexpr int resident(int terms) const {
    if (warps == 2) return 4;  // of 64 threads with as many registers as a thread can have
    const int room = terms > 1 || x_rows > 8 ? 2 : 3;
    return teams == 1 || (terms > 2 && x_rows > 8) ? 1 : room;
  }
  constexpr int threads() const { return warps * teams * 32; }
  constexpr int weight_rows() const { return warps * blocks * 16; }
  // Of static shared memory: scales of the rows of each warp, for two groups.
  constexpr int scratch_bytes() const { return warps * teams * 2 * blocks * 16 * 4; }
  // Of floats, from one row of x to the next where sums meet in shared memory: without bank conflicts.
  constexpr int sum_pitch() const { return weight_rows() + 4; }
  constexpr int stage_bytes(int bits, int record_bytes) const {
    return weight_rows() * kStageCols * bits / 8 + x_rows * kStageCols * 2 +
           weight_rows() / kTileRows * kRecordSlots * record_bytes;
  }
  constexpr int shared_bytes(int bits, int record_bytes) const {
    const int staged = teams * stages * stage_bytes(bits, record_bytes);
    const int sums = teams * x_rows * sum_pitch() * 4;
    return staged > sums ? staged : sums;
  }
};
inline constexpr FpxTile kTiles[] = {
    {8, 4, 1, 4, 3}, {16, 4, 1, 4, 3}, {32, 4, 2, 1, 3}, {64, 2, 8, 1, 3}, {128, 1, 8, 1, 3},
};
inline constexpr int kTileCount = 5;

// Where results go, and what is done to sums on the way.
struct FpxOutput {
  void* y;
  int64_t y_stride;         // elements
  const void* bias;         // null: none
  const void* residual;     // null: none; may be y
  int64_t residual_stride;  // elements
  // Null, or for every row of weights what its sums are multiplied by, and what is added: 0, or NaN for a row with a
  // special code.
  const float* row_scales;
  const float* row_specials;
  const float* global_scale;  // null: 1
  float factor;               // of all sums, before row_scales
  FpxReal y_type;
  FpxReal bias_type;
  FpxReal residual_type;
  int32_t m;
  int32_t n;
};

struct FpxArgs {
  const uint8_t* codes;
  const uint8_t* records;  // scales and zero points of the groups; null if there are none
  const void* x;
  int64_t x_stride;  // elements
  float* partial;    // [splits, m, n], null if the columns are not split
  FpxOutput out;

  int32_t k;
  int32_t stages;        // of a row: ceil(k / 64)
  int32_t tiles;         // of 64 rows
  int32_t quantum;       // stages; ranges of columns start at multiples of it, which are starts of groups
  int32_t groups;        // of a row
  int32_t group_slices;  // 2^28 if the row is the group
  int32_t record_bytes;  // of 64 rows
  int32_t zeros;         // bytes before the zero points of a record; -1 if there are none
  int32_t x_aligned;     // rows of x start at multiples of 16 bytes
  FpxScale scale;
  float fold;  // group scales are multiplied by it

  // Decoding. fp: masks of whole codes, of pieces and of signs where they lie after the rotation; what moves a sign
  // from there to bit 15; two bf16 multipliers. Codebooks: the low and high bytes of 16 halves, for each term.
  uint32_t mask[5];
  uint32_t whole;
  uint32_t sign;
  uint32_t sign_factor;
  uint32_t multiplier;
  uint32_t table[3][8];
};

struct FpxReduceArgs {
  const float* partial;
  int32_t splits;
  FpxOutput out;
};

}  // namespace ng::cuda
