// y = x @ w.T + b + r for narrow weights: the kernel, for any decoder, activation type and tile.
//
// A block has a tile of rows of weights and rows of x, and a range of columns; so does each team of its warps. A stage
// of 64 columns goes from global to shared memory by asynchronous copies, some stages ahead: weights in the order in
// which lanes read them, x in rows whose 16-byte chunks are exchanged so that ldmatrix meets no bank twice. Weights are
// the A operand, so that with few rows of x no Tensor Core works in vain; they are decoded in registers, a slice of 16
// columns ahead of the multiplication. Every weight is read once by a block.
//
// Scales never touch weights: a group's sums are multiplied by its scale in fp32 as they are added to the total. So
// weights are exact, and a scale costs at most 4 fma for 16 x 16 weights and 8 rows of x, once a group. Sums of more
// than kChainSlices slices are cut as if the group ended: Tensor Cores truncate when they add, perhaps twice in an
// instruction, which over 8 slices of growing sums is at most 9 * 2^-23 of the last one; that and the roundings of the
// total, K/128 or one a group, stay below the 16 + K/16 roundings of linear.hpp. Group scales are multiplied by the
// decoder's power of two (`fold`) in fp32; what overflows there is taken as the largest float, which only scales above
// 2^103 do. Scales of rows, and the decoder's power with them, are applied to the result, one after the other.
//
// The ranges of blocks in z are added by fpx_reduce, in their order, from a workspace: the same bits every time.
#pragma once

#include "kernels/fpx_decode.cuh"

namespace ng::cuda {

// --- results -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float load_real(const void* from, int64_t index, FpxReal type) {
  if (type == FpxReal::f32) return static_cast<const float*>(from)[index];
  const uint32_t bits = static_cast<const uint16_t*>(from)[index];
  return type == FpxReal::f16 ? ptx::from_f16(bits) : ptx::from_bf16(bits);
}

__device__ __forceinline__ void store_result(const FpxOutput& out, int64_t m, int n, float sum) {
  float value = sum * out.factor;
  if (out.row_scales != nullptr) value *= out.row_scales[n];
  if (out.global_scale != nullptr) value *= *out.global_scale;
  if (out.row_specials != nullptr) value += out.row_specials[n];
  if (out.bias != nullptr) value += load_real(out.bias, n, out.bias_type);
  if (out.residual != nullptr) value += load_real(out.residual, m * out.residual_stride + n, out.residual_type);
  const int64_t index = m * out.y_stride + n;
  if (out.y_type == FpxReal::f32) {
    static_cast<float*>(out.y)[index] = value;
  } else {
    static_cast<uint16_t*>(out.y)[index] = out.y_type == FpxReal::f16 ? ptx::to_f16(value) : ptx::to_bf16(value);
  }
}

// --- the product ---------------------------------------------------------------------------------------------------

// 1, 2 or a multiple of 4 words of shared memory, aligned to their size.
template <int kWords>
__device__ __forceinline__ void read_shared(const uint8_t* from, uint32_t* out) {
  if constexpr (kWords >= 4) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const auto four = *reinterpret_cast<const uint4*>(from + 4 * i);
      out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
  } else if constexpr (kWords == 2) {
    const auto two = *reinterpret_cast<const uint2*>(from);
    out[0] = two.x, out[1] = two.y;
  } else {
    out[0] = *reinterpret_cast<const uint32_t*>(from);
  }
}

template <typename Decoder, typename X, int kTileIndex>
class FpxLinear {
 public:
  static constexpr FpxTile kTile = kTiles[kTileIndex];
  static constexpr int kBits = Decoder::kBits;
  static constexpr int kBlocks = kTile.blocks;
  static constexpr int kXTiles = kTile.x_rows / 8;
  static constexpr int kThreads = kTile.warps * 32;  // of a team
  static constexpr int kStages = kTile.stages;
  static constexpr int kWeightTiles = kTile.weight_rows() / kTileRows;
  static constexpr int kUnitBytes = 128 * kBits;  // 16 rows, 64 columns
  static constexpr int kCodeBytes = kTile.weight_rows() / 16 * kUnitBytes;
  static constexpr int kXBytes = kTile.x_rows * kStageCols * 2;
  static constexpr int kUnitsPerTile = kTileRows / 16;
  static constexpr int kTileCodes = kUnitsPerTile * kUnitBytes;  // bytes, of a stage
  static constexpr int kRows = kTile.weight_rows();
  static constexpr int kPitch = kTile.sum_pitch();
  static constexpr int kWarpRows = kBlocks * 16;
  static constexpr int kLaneRows = kBlocks * 2;
  static constexpr int kScratch = kTile.scratch_bytes() / 4;
  static constexpr int kBlockThreads = kTile.threads();

  __device__ __forceinline__ FpxLinear(const FpxArgs& args, uint8_t* shared, float* scratch)
      : args_(args),
        decoder_(args),
        lane_(threadIdx.x % 32),
        team_(threadIdx.x / kThreads),
        thread_(threadIdx.x % kThreads),
        unit_(thread_ / 32 * kBlocks),
        stage_bytes_(kCodeBytes + kXBytes + kWeightTiles * kRecordSlots * args.record_bytes),
        shared_(shared + team_ * kStages * stage_bytes_),
        scratch_(scratch + threadIdx.x / 32 * kRecordSlots * kWarpRows) {}

  __device__ __forceinline__ void run(uint8_t* block_shared) {
    find_range();
    multiply_range();
    store(block_shared);
  }

 private:
  // --- ranges ---

  __device__ __forceinline__ void find_range() {
    const int parts = gridDim.z * kTile.teams;
    const int part = blockIdx.z * kTile.teams + team_;
    const int quanta = (args_.stages + args_.quantum - 1) / args_.quantum;
    // Not past int: a row has fewer than 2^25 stages, and there are at most 64 parts.
    first_ = min(quanta * part / parts * args_.quantum, args_.stages);
    count_ = min(quanta * (part + 1) / parts * args_.quantum, args_.stages) - first_;
  }

  __device__ __forceinline__ void sync() const {
    if constexpr (kTile.warps == 1) {
      __syncwarp();
    } else {
      static_assert(kTile.teams == 1);
      __syncthreads();
    }
  }

  // --- copies ---

  // Copies stage `index` of the range into its place; groups that start in it with their records.
  __device__ __forceinline__ void copy(int index, int slot) {
    if (index < count_) {
      uint8_t* to = shared_ + slot * stage_bytes_;
      copy_codes(to);
      copy_x(to + kCodeBytes);
      if (args_.record_bytes != 0) copy_records(to + kCodeBytes + kXBytes);
    }
    ptx::commit_copies();
  }

  // Where the lane's copies come from, in the first stage.
  __device__ __forceinline__ void find_sources() {
    const int tile = blockIdx.x * kWeightTiles + unit_ / kUnitsPerTile;
    has_weights_ = tile < args_.tiles;
    codes_ = args_.codes + (static_cast<int64_t>(has_weights_ ? tile : 0) * args_.stages + first_) * kTileCodes +
             unit_ % kUnitsPerTile * kUnitBytes + lane_ * 16;
    const int row = blockIdx.y * kTile.x_rows + thread_ / 8;
    x_from_ = static_cast<const uint16_t*>(args_.x) + row * args_.x_stride + first_ * kStageCols + thread_ % 8 * 8;
    rows_left_ = args_.out.m - row;
    cols_left_ = args_.k - first_ * kStageCols - thread_ % 8 * 8;
  }

  // Each warp copies the codes that it will decode; those past the last row become zeros.
  __device__ __forceinline__ void copy_codes(uint8_t* to) {
    constexpr int kBytes = kBlocks * kUnitBytes;
    const uint32_t place = ptx::shared_address(to + unit_ * kUnitBytes + lane_ * 16);
#pragma unroll
    for (int byte = 0; byte < kBytes; byte += 512) {
      if (byte + 512 > kBytes && lane_ * 16 >= kBytes - byte) break;
      if constexpr (kWeightTiles == 1) {
        ptx::copy_async(place + byte, codes_ + byte);
      } else {
        ptx::copy_async(place + byte, codes_ + byte, has_weights_ ? 16 : 0);
      }
    }
    codes_ += kTileCodes;
  }

  // Rows and columns that x does not have become zeros.
  __device__ __forceinline__ void copy_x(uint8_t* to) {
    constexpr int kRowsAtOnce = kThreads / 8;
    const int row = thread_ / 8;
    const int present = min(max(cols_left_, 0), 8);
#pragma unroll
    for (int i = 0; i < kTile.x_rows; i += kRowsAtOnce) {
      const int count = i < rows_left_ ? present : 0;
      const uint16_t* from = count > 0 ? x_from_ + i * args_.x_stride : static_cast<const uint16_t*>(args_.x);
      uint8_t* const at = to + (row + i) * 128 + (thread_ % 8 ^ (row + i) % 8) * 16;
      if (args_.x_aligned) {
        ptx::copy_async(ptx::shared_address(at), from, count * 2);
      } else {
#pragma unroll 1
        for (int j = 0; j < 8; ++j) reinterpret_cast<uint16_t*>(at)[j] = j < count ? from[j] : uint16_t{0};
      }
    }
    x_from_ += kStageCols;
    cols_left_ -= kStageCols;
  }

  // Each warp copies the records of one tile of weights.
  __device__ __forceinline__ void copy_records(uint8_t* to) {
    for (; next_start_ < kStageSlices && next_group_ < args_.groups; next_start_ += args_.group_slices, ++next_group_) {
      const int tile = thread_ / 32;
      const int weight_tile = blockIdx.x * kWeightTiles + tile;
      if (tile >= kWeightTiles || lane_ * 16 >= args_.record_bytes) continue;
      const bool exists = weight_tile < args_.tiles;
      const int64_t record = static_cast<int64_t>(exists ? weight_tile : 0) * args_.groups + next_group_;
      uint8_t* place = to + (next_group_ % kRecordSlots * kWeightTiles + tile) * args_.record_bytes;
      ptx::copy_async(ptx::shared_address(place + lane_ * 16), args_.records + record * args_.record_bytes + lane_ * 16,
                      exists ? 16 : 0);
    }
    next_start_ -= kStageSlices;
  }

  // --- groups ---

  // The record of a group, for the tile that the warp's rows are in.
  __device__ __forceinline__ const uint8_t* record(const uint8_t* stage, int group) const {
    const int tile = unit_ / kUnitsPerTile;
    return stage + kCodeBytes + kXBytes + (group % kRecordSlots * kWeightTiles + tile) * args_.record_bytes;
  }

  __device__ __forceinline__ float decode_scale(const uint8_t* from, int index) const {
    if (args_.scale == FpxScale::f32) return reinterpret_cast<const float*>(from)[index];
    if (args_.scale == FpxScale::f16) return ptx::from_f16(reinterpret_cast<const uint16_t*>(from)[index]);
    if (args_.scale == FpxScale::bf16) return ptx::from_bf16(reinterpret_cast<const uint16_t*>(from)[index]);
    const uint32_t code = from[index];
    if (args_.scale == FpxScale::e8m0) {  // 2^(code - 127), 255 is NaN
      return __uint_as_float(code == 0 ? 0x00400000u : code == 255 ? 0x7fc00000u : code << 23);
    }
    const float magnitude =
        (code & 0x7f) == 0x7f ? __uint_as_float(0x7fc00000u) : __uint_as_float((code & 0x7f) << 20) * 0x1p120f;
    return (code & 0x80) != 0 ? -magnitude : magnitude;
  }

  // Decodes the scales of the groups that start in a stage which has arrived, or of the first of the range: each warp
  // those of its rows, into memory of its own.
  __device__ __forceinline__ void decode_scales(const uint8_t* stage) {
    if (args_.scale == FpxScale::row) return;
    // What was there has been read: before sync() that let the stage arrive.
#pragma unroll 1
    for (; scale_start_ < kStageSlices && scale_group_ < args_.groups;
         scale_start_ += args_.group_slices, ++scale_group_) {
      const uint8_t* from = record(stage, scale_group_);
      float* to = scratch_ + scale_group_ % kRecordSlots * kWarpRows;
#pragma unroll
      for (int entry = 0; entry < kWarpRows; entry += 32) {
        const int mine = entry + lane_;
        if (kWarpRows < 32 && mine >= kWarpRows) break;
        const int row = mine / kLaneRows * 2 * kUnitsPerTile + unit_ % kUnitsPerTile * 2 + mine % kLaneRows;
        to[mine] = ptx::min_nan(decode_scale(from, row) * args_.fold, 0x1.fffffep127f);
      }
    }
    scale_start_ -= kStageSlices;
    __syncwarp();
  }

  // Of the current group.
  __device__ __forceinline__ void load_scales() {
    if (args_.scale == FpxScale::row) return;
    uint32_t bits[kLaneRows];
    read_shared<kLaneRows>(
        reinterpret_cast<const uint8_t*>(scratch_ + group_ % kRecordSlots * kWarpRows + lane_ / 4 * kLaneRows), bits);
    each_row([&](int block, int half) { scale_[block][half] = __uint_as_float(bits[2 * block + half]); });
  }

  __device__ __forceinline__ void load_zeros(const uint8_t* stage) {
    if constexpr (Decoder::kZeros) {
      if (args_.zeros < 0) return;
      const uint8_t* from =
          record(stage, group_) + args_.zeros + lane_ / 4 * 2 * kUnitsPerTile + unit_ % kUnitsPerTile * 2;
      uint32_t bits[kBlocks == 4 ? 2 : 1];
      if constexpr (kBlocks == 1) {
        bits[0] = *reinterpret_cast<const uint16_t*>(from);
      } else {
        read_shared<kBlocks / 2>(from, bits);
      }
      each_row([&](int block, int half) {
        const int byte = 2 * block + half;
        zero_[block][half] = Decoder::addend(bits[byte / 4] >> byte % 4 * 8 & 0xff);
      });
    }
  }

  template <typename Function>
  __device__ __forceinline__ static void each_row(const Function& function) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) function(block, half);
    }
  }

  // Adds the sums of the chain, times its scales, to the total.
  __device__ __forceinline__ void end_chain() {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int tile = 0; tile < kXTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total_[block][tile][i] = fmaf(part_[block][tile][i], scale_[block][i / 2], total_[block][tile][i]);
          part_[block][tile][i] = 0;
        }
      }
    }
  }

  // --- the pipeline ---

  __device__ __forceinline__ void read_words(const uint8_t* stage) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const uint8_t* unit = stage + (unit_ + block) * kUnitBytes;
#pragma unroll
      for (int i = 0; i + 4 <= kBits; i += 4) read_shared<4>(unit + i * 128 + lane_ * 16, words_[block] + i);
      constexpr int kFours = kBits / 4 * 4;
      if constexpr (kBits % 4 >= 2) read_shared<2>(unit + kFours * 128 + lane_ * 8, words_[block] + kFours);
      if constexpr (kBits % 2 == 1) read_shared<1>(unit + (kBits - 1) * 128 + lane_ * 4, words_[block] + kBits - 1);
    }
  }

  template <int kSlice>
  __device__ __forceinline__ void decode_slice() {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      decode<kSlice>(decoder_, words_[block], zero_[block], weights_[kSlice % 2][block]);
    }
  }

  // x of a slice as B operands; with 8 rows of x, of the next slice too.
  template <int kSlice>
  __device__ __forceinline__ void read_x(const uint8_t* stage) {
    const uint8_t* x = stage + kCodeBytes;
    if constexpr (kXTiles == 1) {
      if constexpr (kSlice % 2 == 0) {
        const int row = lane_ % 8;
        uint32_t out[4];
        ptx::load_matrices(out, ptx::shared_address(x + row * 128 + ((2 * kSlice + lane_ / 8) ^ row) * 16));
        set_x<0>(0, out[0], out[1]);
        set_x<1>(0, out[2], out[3]);
      }
    } else {
#pragma unroll
      for (int tile = 0; tile < kXTiles; tile += 2) {
        const int row = (tile + lane_ / 16) * 8 + lane_ % 8;
        uint32_t out[4];
        ptx::load_matrices(out, ptx::shared_address(x + row * 128 + ((2 * kSlice + lane_ / 8 % 2) ^ lane_ % 8) * 16));
        set_x<0>(tile, out[0], out[1]);
        set_x<0>(tile + 1, out[2], out[3]);
      }
    }
  }

  template <int kKept>
  __device__ __forceinline__ void set_x(int tile, uint32_t first, uint32_t second) {
    if constexpr (X::kTerms == 1) {
      x_[kKept][0][tile][0] = first;
      x_[kKept][0][tile][1] = second;
    } else {
      split_f16(first, x_[kKept][0][tile][0], x_[kKept][1][tile][0]);
      split_f16(second, x_[kKept][0][tile][1], x_[kKept][1][tile][1]);
    }
  }

  template <int kSlice>
  __device__ __forceinline__ void multiply_slice() {
    constexpr int kKept = kXTiles == 1 ? kSlice % 2 : 0;
#pragma unroll
    for (int term = 0; term < Decoder::kTerms; ++term) {
#pragma unroll
      for (int x_term = 0; x_term < X::kTerms; ++x_term) {
#pragma unroll
        for (int tile = 0; tile < kXTiles; ++tile) {
#pragma unroll
          for (int block = 0; block < kBlocks; ++block) {
            multiply<X>(part_[block][tile], weights_[kSlice % 2][block][term], x_[kKept][x_term][tile]);
          }
        }
      }
    }
  }

  // What is left of the chain and of the group before the slice after this one; whether it starts one.
  struct Step {
    bool ends_chain = false;
    bool starts_group = false;
  };

  __device__ __forceinline__ Step next_slice() {
    Step step;
    if (--chain_left_ == 0) {
      step.ends_chain = true;
      if (group_left_ == 0) {
        step.starts_group = true;
        ++group_;
        group_left_ = group_ + 1 < args_.groups ? args_.group_slices : kEndless;
      }
      chain_left_ = min(group_left_, kChainSlices);
      group_left_ -= chain_left_;
    }
    return step;
  }

  template <int kSlice>
  __device__ __forceinline__ void slice(int index, int& slot) {
    const uint8_t* stage = shared_ + slot * stage_bytes_;
    read_x<kSlice>(stage);
    Step step;
    if constexpr (kSlice + 1 < kStageSlices) {
      step = next_slice();
      if (step.starts_group) load_zeros(stage);
      decode_slice<kSlice + 1>();
    } else if (index + 1 < count_) {
      // All of this stage is in registers: its place is free for the stage that comes kStages later.
      ptx::wait_copies<kStages - 2>();
      sync();
      copy(index + kStages, slot);
      slot = slot + 1 == kStages ? 0 : slot + 1;
      stage = shared_ + slot * stage_bytes_;
      read_words(stage);
      decode_scales(stage);
      step = next_slice();
      if (step.starts_group) load_zeros(stage);
      decode_slice<0>();
    }
    multiply_slice<kSlice>();
    if (step.ends_chain) {
      end_chain();
      if (step.starts_group) load_scales();
    }
  }

  __device__ __forceinline__ void multiply_range() {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int tile = 0; tile < kXTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) part_[block][tile][i] = total_[block][tile][i] = 0;
      }
    }
    if constexpr (Decoder::kZeros) {
      each_row([&](int block, int half) { zero_[block][half] = Decoder::default_addend(); });
    }
    each_row([&](int block, int half) { scale_[block][half] = 1; });
    if (count_ > 0) {
      find_sources();
      group_ = first_ * kStageSlices / args_.group_slices;
      next_group_ = scale_group_ = group_;
      group_left_ = group_ + 1 < args_.groups ? args_.group_slices : kEndless;
      chain_left_ = min(group_left_, kChainSlices);
      group_left_ -= chain_left_;
#pragma unroll 1
      for (int i = 0; i < kStages; ++i) copy(i, i);
      ptx::wait_copies<kStages - 1>();
      sync();
      read_words(shared_);
      decode_scales(shared_);
      load_zeros(shared_);
      load_scales();
      decode_slice<0>();
      int slot = 0;
      for (int index = 0; index < count_; ++index) {
        slice<0>(index, slot);
        slice<1>(index, slot);
        slice<2>(index, slot);
        slice<3>(index, slot);
      }
      end_chain();
    }
  }

  // Sums of the teams meet in shared memory and leave it in rows.
  __device__ __forceinline__ void store(uint8_t* block_shared) const {
    auto* sums = reinterpret_cast<float*>(block_shared);
    __syncthreads();
    float* mine = sums + team_ * kTile.x_rows * kPitch;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int tile = 0; tile < kXTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = (unit_ + block) * 16 + i / 2 * 8 + lane_ / 4;
          mine[(tile * 8 + lane_ % 4 * 2 + i % 2) * kPitch + row] = total_[block][tile][i];
        }
      }
    }
    __syncthreads();
    const int first_m = blockIdx.y * kTile.x_rows, first_n = blockIdx.x * kRows;
    for (int i = threadIdx.x; i < kTile.x_rows * kRows; i += kBlockThreads) {
      const int m = i / kRows, n = i % kRows;
      if (first_m + m >= args_.out.m) break;
      if (first_n + n >= args_.out.n) continue;
      float sum = sums[m * kPitch + n];
#pragma unroll
      for (int team = 1; team < kTile.teams; ++team) sum += sums[(team * kTile.x_rows + m) * kPitch + n];
      if (args_.partial != nullptr) {
        args_.partial[(static_cast<int64_t>(blockIdx.z) * args_.out.m + first_m + m) * args_.out.n + first_n + n] = sum;
      } else {
        store_result(args_.out, first_m + m, first_n + n, sum);
      }
    }
  }

  static constexpr int kEndless = 1 << 28;

  const FpxArgs& args_;
  const Decoder decoder_;
  const int lane_;
  const int team_;
  const int thread_;  // of the team
  const int unit_;    // the warp's first 16 rows of weights
  const int stage_bytes_;
  uint8_t* const shared_;  // of the team
  float* const scratch_;   // of the warp: scales of its rows, for groups that start in a stage

  const uint8_t* codes_ = nullptr;  // of the next stage that is copied
  const uint16_t* x_from_ = nullptr;
  bool has_weights_ = true;
  int rows_left_ = 0;  // from the lane's first row of x on
  int cols_left_ = 0;

  int first_ = 0;  // stages of the range
  int count_ = 0;
  int next_group_ = 0;  // whose record is copied next; it starts next_start_ slices into the next stage
  int next_start_ = 0;
  int scale_group_ = 0;  // likewise, whose scales are decoded next
  int scale_start_ = 0;
  int group_ = 0;
  int chain_left_ = 0;  // slices
  int group_left_ = 0;  // after the chain

  uint32_t words_[kBlocks][kBits];
  uint32_t weights_[2][kBlocks][Decoder::kTerms][4];
  uint32_t x_[kXTiles == 1 ? 2 : 1][X::kTerms][kXTiles][2];
  uint32_t zero_[kBlocks][2];
  float scale_[kBlocks][2];
  float part_[kBlocks][kXTiles][4];
  float total_[kBlocks][kXTiles][4];
};

template <typename Decoder, typename X, int kTileIndex>
__device__ __forceinline__ void fpx_linear(const FpxArgs& args) {
  extern __shared__ __align__(128) uint8_t shared[];
  using Linear = FpxLinear<Decoder, X, kTileIndex>;
  __shared__ __align__(16) float scratch[Linear::kScratch];
  Linear(args, shared, scratch).run(shared);
}

// The sums of all ranges of columns, in their order, as results. A thread has an element; rows of y are in y.
__device__ __forceinline__ void fpx_reduce(const FpxReduceArgs& args) {
  const int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= args.out.n) return;
  for (int m = blockIdx.y; m < args.out.m; m += gridDim.y) {
    const int64_t step = static_cast<int64_t>(args.out.m) * args.out.n;
    const float* from = args.partial + static_cast<int64_t>(m) * args.out.n + n;
    float sum = from[0];
    for (int split = 1; split < args.splits; ++split) sum += from[split * step];
    store_result(args.out, m, n, sum);
  }
}

}  // namespace ng::cuda
