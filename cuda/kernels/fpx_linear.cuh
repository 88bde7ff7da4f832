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
  static constexpr int kLaneEntries = kWarpRows > 32 ? kWarpRows / 32 : 1;  // of scales that a lane decodes
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
        group_slices_(args.group_slices),
        shared_(ptx::shared_address(shared) + team_ * kStages * stage_bytes_),
        scratch_(ptx::shared_address(scratch) + threadIdx.x / 32 * 2 * kWarpRows * 4) {}

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

  // Copies stage `index` of the range to a place of shared memory; groups that start in it with their records.
  __device__ __forceinline__ void copy(int index, uint32_t to) {
    if (index < count_) {
      copy_codes(to);
      copy_x(to);
      if (args_.record_bytes != 0) copy_records(to);
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
    const int group = first_ * kStageSlices / group_slices_;
    const int record_tile = blockIdx.x * kWeightTiles + thread_ / 32;
    has_record_ = record_tile < args_.tiles;
    records_ = args_.records + lane_ * 16 +
               (static_cast<int64_t>(has_record_ ? record_tile : 0) * args_.groups + group) * args_.record_bytes;
    copies_record_ = ptx::kept(thread_ / 32 < kWeightTiles && lane_ * 16 < args_.record_bytes ? 1 : 0);
    groups_to_copy_ = groups_left_ = args_.groups - group;
  }

  // Calls function with 0, kStep, ... as constants below kEnd.
  template <int kEnd, int kStep, typename Function>
  __device__ __forceinline__ static void each(const Function& function) {
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
      (function(std::integral_constant<int, kIndex * kStep>{}), ...);
    }(std::make_integer_sequence<int, (kEnd + kStep - 1) / kStep>());
  }

  // Each warp copies the codes that it will decode; those past the last row become zeros.
  __device__ __forceinline__ void copy_codes(uint32_t to) {
    constexpr int kBytes = kBlocks * kUnitBytes;
    const uint32_t place = to + words_at_;
    each<kBytes, 512>([&](auto byte) {
      if (byte + 512 > kBytes && lane_ * 16 >= kBytes - byte) return;
      if constexpr (kWeightTiles == 1) {
        ptx::copy_async<byte, byte>(place, codes_);
      } else {
        ptx::copy_async<byte>(place, codes_ + byte, has_weights_ ? 16 : 0);
      }
    });
    codes_ += kTileCodes;
  }

  // Rows and columns that x does not have become zeros. Chunk i of 8 columns of a row lies at i ^ row % 8.
  __device__ __forceinline__ void copy_x(uint32_t to) {
    constexpr int kRowsAtOnce = kThreads / 8;
    static_assert(kRowsAtOnce == 4 || kRowsAtOnce % 8 == 0);
    const int present = min(max(cols_left_, 0), 8);
    const uint32_t place = to + x_to_;
    if (args_.x_aligned) {
      const uint16_t* from = x_from_;
      each<kTile.x_rows, kRowsAtOnce>([&](auto i) {
        ptx::copy_async<i * 128>(i % 8 == 0 ? place : place ^ 64, from, i < rows_left_ ? present * 2 : 0);
        from += kRowsAtOnce * args_.x_stride;
      });
    } else {
#pragma unroll 1
      for (int i = 0; i < kTile.x_rows; i += kRowsAtOnce) {
        const int count = i < rows_left_ ? present : 0;
#pragma unroll 1
        for (int j = 0; j < 8; ++j) {
          const uint16_t value = j < count ? x_from_[i * args_.x_stride + j] : uint16_t{0};
          ptx::store_shared_u16((i % 8 == 0 ? place : place ^ 64) + i * 128 + 2 * j, value);
        }
      }
    }
    x_from_ += kStageCols;
    cols_left_ -= kStageCols;
  }

  // Each warp copies the records of one tile of weights, one after the other in a stage.
  __device__ __forceinline__ void copy_records(uint32_t to) {
    uint32_t place = to + record_to_;
#pragma unroll 1
    for (; next_start_ < kStageSlices; next_start_ = --groups_to_copy_ > 0 ? next_start_ + group_slices_ : kEndless) {
      if (copies_record_ != 0) ptx::copy_async(place, records_, kWeightTiles == 1 || has_record_ ? 16 : 0);
      records_ += args_.record_bytes;
      place += record_step_;
    }
    next_start_ -= kStageSlices;
  }

  // --- groups ---

  __device__ __forceinline__ int scale_bytes() const {
    return args_.scale == FpxScale::f32 ? 4 : args_.scale == FpxScale::f16 || args_.scale == FpxScale::bf16 ? 2 : 1;
  }

  // The scales that the lane decodes of a record, from the first of them on.
  __device__ __forceinline__ void decode_scales(float (&out)[kLaneEntries]) const {
    if (args_.scale == FpxScale::f16) {
      each<kLaneEntries, 1>([&](auto i) { out[i] = ptx::from_f16(ptx::load_shared_u16<2 * i>(scale_from_)); });
    } else if (args_.scale == FpxScale::bf16) {
      each<kLaneEntries, 1>([&](auto i) { out[i] = ptx::from_bf16(ptx::load_shared_u16<2 * i>(scale_from_)); });
    } else if (args_.scale == FpxScale::f32) {
      ptx::load_shared<kLaneEntries>(scale_from_, out);
    } else {
      each<kLaneEntries, 1>([&](auto i) { out[i] = decode_byte(ptx::load_shared_u8<i>(scale_from_)); });
    }
  }

  __device__ __forceinline__ float decode_byte(uint32_t code) const {
    if (args_.scale == FpxScale::e8m0) {  // 2^(code - 127), 255 is NaN
      return __uint_as_float(code == 0 ? 0x00400000u : code == 255 ? 0x7fc00000u : code << 23);
    }
    const float magnitude =
        (code & 0x7f) == 0x7f ? __uint_as_float(0x7fc00000u) : __uint_as_float((code & 0x7f) << 20) * 0x1p120f;
    return (code & 0x80) != 0 ? -magnitude : magnitude;
  }

  // Of the group that starts: the warp decodes the scales of its rows into memory of its own, each lane some of them,
  // and the lanes take those of their rows from there. What was there two groups ago has been read before the barrier
  // of the last one. pre: load_zeros() for the same group.
  __device__ __forceinline__ void start_group() {
    if (args_.scale == FpxScale::row) return;
    if (kWarpRows >= 32 || lane_ < kWarpRows) {
      float decoded[kLaneEntries];
      decode_scales(decoded);
      for (float& scale : decoded) scale = ptx::min_nan(scale * args_.fold, 0x1.fffffep127f);
      ptx::store_shared<kLaneEntries>(scratch_to_, decoded);
    }
    __syncwarp();
    float scales[kLaneRows];
    each<kLaneRows, 4>(
        [&](auto i) { ptx::load_shared < kLaneRows<4 ? kLaneRows : 4, 4 * i>(scratch_from_, scales + i); });
    each_row([&](int block, int half) { scale_[block][half] = scales[2 * block + half]; });
    scratch_to_ ^= kWarpRows * 4;
    scratch_from_ ^= kWarpRows * 4;
    scale_from_ += record_step_;
  }

  __device__ __forceinline__ void load_zeros() {
    if constexpr (Decoder::kZeros) {
      if (args_.zeros < 0) return;
      uint32_t bits[kBlocks == 4 ? 2 : 1];
      if constexpr (kBlocks == 1) {
        bits[0] = ptx::load_shared_u16(zeros_from_);
      } else {
        ptx::load_shared<kBlocks / 2>(zeros_from_, bits);
      }
      each_row([&](int block, int half) {
        const int byte = 2 * block + half;
        zero_[block][half] = Decoder::addend(bits[byte / 4] >> byte % 4 * 8 & 0xff);
      });
      zeros_from_ += record_step_;
    }
  }

  template <typename Function>
  __device__ __forceinline__ static void each_sum(const Function& function) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int tile = 0; tile < kXTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) function(block, tile, i);
      }
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
  __device__ __forceinline__ void end_chain(bool starts_group) {
    each_sum([&](int block, int tile, int i) {
      total_[block][tile][i] = fmaf(part_[block][tile][i], scale_[block][i / 2], total_[block][tile][i]);
    });
    if (starts_group) start_group();
    each_sum([&](int block, int tile, int i) { part_[block][tile][i] = ptx::zero(); });
  }

  // --- the pipeline ---

  __device__ __forceinline__ void read_words(uint32_t stage) {
    constexpr int kFours = kBits / 4 * 4;
    const uint32_t fours = stage + words_at_;
    each<kBlocks, 1>([&](auto block) {
      constexpr int kUnit = block * kUnitBytes;
      uint32_t* const words = words_[block];
      each<kFours, 4>([&](auto i) { ptx::load_shared<4, kUnit + i * 128>(fours, words + i); });
      if constexpr (kBits % 4 >= 2) ptx::load_shared<2, kUnit + kFours * 128>(fours - lane_ * 8, words + kFours);
      if constexpr (kBits % 2 == 1)
        ptx::load_shared<1, kUnit + (kBits - 1) * 128>(fours - lane_ * 12, words + kBits - 1);
    });
  }

  template <int kSlice>
  __device__ __forceinline__ void decode_slice() {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      decode<kSlice>(decoder_, words_[block], zero_[block], weights_[kSlice % 2][block]);
    }
  }

  // x of a slice as B operands; with 8 rows of x, of the next slice too. A place starts at a multiple of 128 bytes, so
  // that the exchange of chunks is one of bits of the address.
  template <int kSlice>
  __device__ __forceinline__ void read_x(uint32_t stage) {
    const uint32_t from = stage + x_at_ ^ kSlice * 32;
    if constexpr (kXTiles == 1) {
      if constexpr (kSlice % 2 == 0) {
        uint32_t out[4];
        ptx::load_matrices<kCodeBytes>(out, from);
        set_x<0>(0, out[0], out[1]);
        set_x<1>(0, out[2], out[3]);
      }
    } else {
      each<kXTiles, 2>([&](auto tile) {
        uint32_t out[4];
        ptx::load_matrices<kCodeBytes + tile * 8 * 128>(out, from);
        set_x<0>(tile, out[0], out[1]);
        set_x<0>(tile + 1, out[2], out[3]);
      });
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
        group_left_ = --groups_left_ > 0 ? group_slices_ : kEndless;
      }
      chain_left_ = min(group_left_, kChainSlices);
      group_left_ -= chain_left_;
    }
    return step;
  }

  // The stage's groups from now on.
  __device__ __forceinline__ void enter(uint32_t stage) {
    read_words(stage);
    if constexpr (Decoder::kZeros) zeros_from_ = stage + zeros_at_;
    scale_from_ = stage + scale_at_;
  }

  template <int kSlice>
  __device__ __forceinline__ void slice(int index, uint32_t& stage) {
    read_x<kSlice>(stage);
    Step step;
    if constexpr (kSlice + 1 < kStageSlices) {
      step = next_slice();
      if (step.starts_group) load_zeros();
      decode_slice<kSlice + 1>();
    } else if (index + 1 < count_) {
      // All of this stage is in registers: its place is free for the stage that comes kStages later.
      ptx::wait_copies<kStages - 2>();
      sync();
      copy(index + kStages, stage);
      stage += stage_bytes_;
      if (stage == shared_ + kStages * stage_bytes_) stage = shared_;
      enter(stage);
      step = next_slice();
      if (step.starts_group) load_zeros();
      decode_slice<0>();
    }
    multiply_slice<kSlice>();
    if (step.ends_chain) {
      end_chain(step.starts_group);
    }
  }

  __device__ __forceinline__ void multiply_range() {
    each_sum([&](int block, int tile, int i) { part_[block][tile][i] = total_[block][tile][i] = 0; });
    if constexpr (Decoder::kZeros) {
      each_row([&](int block, int half) { zero_[block][half] = Decoder::default_addend(); });
    }
    each_row([&](int block, int half) { scale_[block][half] = 1; });
    if (count_ > 0) {
      find_sources();
      group_left_ = --groups_left_ > 0 ? group_slices_ : kEndless;
      chain_left_ = min(group_left_, kChainSlices);
      group_left_ -= chain_left_;
#pragma unroll 1
      for (int i = 0; i < kStages; ++i) copy(i, shared_ + i * stage_bytes_);
      ptx::wait_copies<kStages - 1>();
      sync();
      uint32_t stage = shared_;
      enter(stage);
      load_zeros();
      start_group();
      decode_slice<0>();
      for (int index = 0; index < count_; ++index) {
        slice<0>(index, stage);
        slice<1>(index, stage);
        slice<2>(index, stage);
        slice<3>(index, stage);
      }
      end_chain(false);
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
  const int group_slices_;
  const uint32_t shared_;   // of the team, as all addresses here in shared memory
  const uint32_t scratch_;  // of the warp: scales of its rows

  // Where a stage has what the lane copies or reads.
  static constexpr int kRecords = kCodeBytes + kXBytes;
  const uint32_t words_at_ = ptx::kept(unit_ * kUnitBytes + lane_ * 16);
  const uint32_t x_to_ = ptx::kept(kCodeBytes + thread_ / 8 * 128 + (thread_ % 8 ^ thread_ / 8 % 8) * 16);
  const uint32_t x_at_ =
      ptx::kept(kXTiles == 1 ? lane_ % 8 * 128 + (lane_ / 8 ^ lane_ % 8) * 16
                             : (lane_ / 16 * 8 + lane_ % 8) * 128 + (lane_ / 8 % 2 ^ lane_ % 8) * 16);
  const uint32_t record_to_ = ptx::kept(kRecords + thread_ / 32 * args_.record_bytes + lane_ * 16);
  const uint32_t record_step_ = ptx::kept(kWeightTiles * args_.record_bytes);  // to the next group's
  const uint32_t record_at_ = kRecords + unit_ / kUnitsPerTile * args_.record_bytes;
  // A record has all rows of a tile; these are the first scale that the lane decodes, and the zero points of its rows.
  const uint32_t scale_at_ =
      ptx::kept(record_at_ + scale_bytes() * (kBlocks == 4 ? lane_ * kLaneEntries
                                                           : lane_ / kLaneRows * 2 * kUnitsPerTile +
                                                                 unit_ % kUnitsPerTile * 2 + lane_ % kLaneRows));
  const uint32_t zeros_at_ =
      ptx::kept(record_at_ + args_.zeros + lane_ / 4 * 2 * kUnitsPerTile + unit_ % kUnitsPerTile * 2);
  // In scratch, which has room for two groups: where the lane's decoded scales go, and those of its rows.
  uint32_t scratch_to_ = scratch_ + lane_ * kLaneEntries * 4;
  uint32_t scratch_from_ = scratch_ + lane_ / 4 * kLaneRows * 4;

  const uint8_t* codes_ = nullptr;  // of the next stage that is copied
  const uint16_t* x_from_ = nullptr;
  const uint8_t* records_ = nullptr;
  bool has_weights_ = true;
  bool has_record_ = true;
  uint32_t copies_record_ = 1;
  int rows_left_ = 0;  // from the lane's first row of x on
  int cols_left_ = 0;

  int first_ = 0;  // stages of the range
  int count_ = 0;
  int next_start_ = 0;       // slices into the next stage: where the group starts of which the record is copied next
  int groups_to_copy_ = 0;   // it and those behind it
  int groups_left_ = 0;      // behind the current one
  uint32_t scale_from_ = 0;  // of the group that starts next
  uint32_t zeros_from_ = 0;
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
  __shared__ __align__(512) float scratch[Linear::kScratch];
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
