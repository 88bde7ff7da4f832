// pack_cuda and unpack_cuda on a device: between canonical codes and scales and the layout that the kernels of
// sm80_fpx_linear_*.cu stream (quantize/cuda_layout.hpp), bit for bit as quantize/cuda_pack.cpp does it.
//
// Codes: a block takes 16 rows by 1024 columns through a window in shared memory with a code a byte. On one side of the
// window a warp has a row, as quantize has; on the other it has a unit, each lane the 32 codes that lane_order.hpp
// gives it. Scales and zero points: a block transposes those of 64 rows by 32 groups. Both sides are read and written
// in whole sectors where rows are aligned, without bank conflicts.
//
// What the packed block has beyond the matrix is 0: codes are written here, all else is cleared before.
#include <utility>

#include "kernels/pack_args.hpp"
#include "kernels/tile.cuh"
#include "quantize/lane_order.hpp"

namespace ng::cuda {
namespace {

using codec::Scale;
using lane_order::kPairs;
using lane_order::kUnitCols;
using lane_order::kUnitRows;

constexpr int kTileRows = 64;
constexpr uint32_t kNan = 0x7fc00000u;

// --- the window ----------------------------------------------------------------------------------------------------

// A row is a tile of 8-bit codes as tile.cuh stages it. The next row starts 4 banks on, so that the 8 rows of a lane
// order do not meet.
struct Window {
  uint4 row[kUnitRows][kPackCols / 16 + 1];

  // Two neighbouring codes; col is even.
  __device__ uint16_t& pair(int at, int col) {
    return *reinterpret_cast<uint16_t*>(reinterpret_cast<uint8_t*>(row[at]) + code_byte(col, 8));
  }
};

// Four codes of kBits in the lowest bits, and a byte each.
template <int kBits>
__device__ uint32_t to_bytes(uint32_t quad) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  return (quad & kMask) | (quad >> kBits & kMask) << 8 | (quad >> 2 * kBits & kMask) << 16 |
         (quad >> 3 * kBits & kMask) << 24;
}
template <int kBits>
__device__ uint32_t from_bytes(uint32_t bytes) {
  return (bytes & 0xffu) | (bytes >> 8 & 0xffu) << kBits | (bytes >> 16 & 0xffu) << 2 * kBits |
         (bytes >> 24) << 3 * kBits;
}

// Ones in the bytes of the lane's quad j that are among the n elements of the row.
__device__ uint32_t existing(int n, int lane, int j) {
  const int codes = min(max(n - lane * kLaneElements - 4 * j, 0), 4);
  return codes == 0 ? 0u : 0xffffffffu >> (32 - 8 * codes);
}

// The block's place. It has rows whether the matrix has them or not.
struct Place {
  int64_t unit_row = int64_t{blockIdx.z} * gridDim.y + blockIdx.y;
  int64_t first_col = int64_t{blockIdx.x} * kPackCols;
  int64_t first_stage = first_col / kUnitCols;
  int warp = threadIdx.x / kLanes;
  int lane = threadIdx.x % kLanes;

  __device__ bool exists(const PackArgs& args) const { return unit_row < args.tiles * (kTileRows / kUnitRows); }
  __device__ int64_t row(int r) const { return unit_row * kUnitRows + r; }
  __device__ int cols(const PackArgs& args) const {
    return static_cast<int>(min(args.cols - first_col, int64_t{kPackCols}));
  }
  __device__ int stages(const PackArgs& args) const {
    return static_cast<int>(min(args.stages - first_stage, int64_t{kPackCols / kUnitCols}));
  }
  template <int kBits>
  __device__ uint8_t* codes(const PackArgs& args, int r) const {
    return args.canonical.codes + row(r) * args.row_bytes + first_col / 8 * kBits;
  }
  template <int kBits>
  __device__ uint8_t* unit(const PackArgs& args, int stage) const {
    constexpr int kUnits = kTileRows / kUnitRows;
    const int64_t index = (unit_row / kUnits * args.stages + first_stage + stage) * kUnits + unit_row % kUnits;
    return args.codes + index * (kLanes * 4 * kBits);
  }
};

// --- lane order ----------------------------------------------------------------------------------------------------

template <int kBits, bool kCodebook>
inline constexpr lane_order::Order kOrder = lane_order::order_of(kBits, kCodebook);

// Calls f<pair, piece>() for the pieces of all pairs.
template <int kBits, bool kCodebook, int kPair, typename F>
__device__ __forceinline__ void for_pieces(const F& f) {
  [&]<int... kPiece>(std::integer_sequence<int, kPiece...>) {
    (f.template operator()<kPair, kPiece>(), ...);
  }(std::make_integer_sequence<int, kOrder<kBits, kCodebook>.pair[kPair].count>());
}
template <typename F>
__device__ __forceinline__ void for_pairs(const F& f) {
  [&]<int... kPair>(std::integer_sequence<int, kPair...>) {
    (f.template operator()<kPair>(), ...);
  }(std::make_integer_sequence<int, kPairs>());
}

// A piece of both codes of a pair.
template <int kBits, bool kCodebook, int kPair, int kPiece>
struct PieceOf {
  static constexpr lane_order::Piece kThis = kOrder<kBits, kCodebook>.pair[kPair].piece[kPiece];
  static constexpr int kWord = kThis.word;
  static constexpr int kSource = kThis.source;
  static constexpr int kTarget = kThis.target;
  static constexpr uint32_t kMask = ((1u << kThis.bits) - 1u) * (1u + (1u << kOrder<kBits, kCodebook>.half_step));
};

// The lane's words of a unit, in place or out of it.
template <int kBits, typename F>
__device__ __forceinline__ void for_words(int lane, const F& f) {
#pragma unroll
  for (int word = 0; word < kBits;) {
    const int together = kBits - word >= 4 ? 4 : kBits - word >= 2 ? 2 : 1;
    f(word, together, lane_order::word_place(kBits, lane, word));
    word += together;
  }
}

template <int kBits, bool kCodebook>
__device__ void pack_unit(const PackArgs& args, Window& window, int first_col, int lane, uint8_t* unit) {
  constexpr int kStep = kOrder<kBits, kCodebook>.half_step;
  uint32_t words[kBits] = {};
  for_pairs([&]<int kPair>() {
    const uint32_t two = window.pair(lane_order::code_row(lane, kPair), first_col + lane_order::code_col(lane, kPair));
    const uint32_t apart = (two & 0xffu) | (two >> 8) << kStep;
    for_pieces<kBits, kCodebook, kPair>([&]<int, int kPiece>() {
      using Piece = PieceOf<kBits, kCodebook, kPair, kPiece>;
      words[Piece::kWord] |= (apart >> Piece::kTarget & Piece::kMask) << Piece::kSource;
    });
  });
#pragma unroll
  for (uint32_t& word : words) word = __funnelshift_l(word, word, args.base);
  for_words<kBits>(lane, [&](int word, int together, int place) {
    uint8_t* to = unit + place;
    if (together == 4) *reinterpret_cast<uint4*>(to) = {words[word], words[word + 1], words[word + 2], words[word + 3]};
    if (together == 2) *reinterpret_cast<uint2*>(to) = {words[word], words[word + 1]};
    if (together == 1) *reinterpret_cast<uint32_t*>(to) = words[word];
  });
}

template <int kBits, bool kCodebook>
__device__ void unpack_unit(const PackArgs& args, Window& window, int first_col, int lane, const uint8_t* unit) {
  constexpr int kStep = kOrder<kBits, kCodebook>.half_step;
  uint32_t words[kBits];
  for_words<kBits>(lane, [&](int word, int together, int place) {
    const uint8_t* from = unit + place;
    if (together == 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      words[word] = four.x;
      words[word + 1] = four.y;
      words[word + 2] = four.z;
      words[word + 3] = four.w;
    } else if (together == 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      words[word] = two.x;
      words[word + 1] = two.y;
    } else {
      words[word] = *reinterpret_cast<const uint32_t*>(from);
    }
  });
#pragma unroll
  for (uint32_t& word : words) word = __funnelshift_r(word, word, args.base);
  for_pairs([&]<int kPair>() {
    uint32_t apart = 0;
    for_pieces<kBits, kCodebook, kPair>([&]<int, int kPiece>() {
      using Piece = PieceOf<kBits, kCodebook, kPair, kPiece>;
      apart |= (words[Piece::kWord] >> Piece::kSource & Piece::kMask) << Piece::kTarget;
    });
    window.pair(lane_order::code_row(lane, kPair), first_col + lane_order::code_col(lane, kPair)) =
        static_cast<uint16_t>((apart & ((1u << kStep) - 1u) & 0xffu) | apart >> kStep << 8);
  });
}

// --- codes ---------------------------------------------------------------------------------------------------------

template <int kBits, bool kCodebook>
__device__ void pack_codes(const PackArgs& args) {
  __shared__ Window window;
  __shared__ uint4 staged[kWarps][kTile / 128 * kBits];
  const Place place;
  if (!place.exists(args)) return;
  const int n = place.cols(args), lane = place.lane;
  for (int r = place.warp; r < kUnitRows; r += kWarps) {
    uint32_t quad[kQuads] = {};
    if (place.row(r) < args.rows) {
      stage_codes(place.codes<kBits>(args, r), n, kBits, staged[place.warp], lane);
      read_stream<kBits>(staged[place.warp], lane, quad);
      __syncwarp();
      uint32_t special = 0;
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        quad[j] = to_bytes<kBits>(quad[j]) ^ (args.flip & existing(n, lane, j));
        // The sign of a byte that reaches `special`.
        if constexpr (kBits == 8) special |= (quad[j] & 0x7f7f7f7fu) + (128 - args.special) * 0x01010101u;
      }
      if (kBits == 8 && args.specials != nullptr && (special & 0x80808080u) != 0) {
        atomicOr(args.specials + place.row(r), kNan);
      }
    }
    write_stream<8>(quad, window.row[r], lane);
  }
  __syncthreads();
  for (int stage = place.warp; stage < place.stages(args); stage += kWarps) {
    pack_unit<kBits, kCodebook>(args, window, stage * kUnitCols, lane, place.unit<kBits>(args, stage));
  }
}

template <int kBits, bool kCodebook>
__device__ void unpack_codes(const PackArgs& args) {
  __shared__ Window window;
  __shared__ uint4 staged[kWarps][kTile / 128 * kBits];
  const Place place;
  if (!place.exists(args)) return;
  const int n = place.cols(args), lane = place.lane;
  for (int stage = place.warp; stage < place.stages(args); stage += kWarps) {
    unpack_unit<kBits, kCodebook>(args, window, stage * kUnitCols, lane, place.unit<kBits>(args, stage));
  }
  __syncthreads();
  for (int r = place.warp; r < kUnitRows && place.row(r) < args.rows; r += kWarps) {
    if (lane * kLaneElements < n) {
      uint32_t quad[kQuads];
      read_stream<8>(window.row[r], lane, quad);
#pragma unroll
      for (int j = 0; j < kQuads; ++j) quad[j] = from_bytes<kBits>((quad[j] ^ args.flip) & existing(n, lane, j));
      write_stream<kBits>(quad, staged[place.warp], lane);
    }
    unstage_codes(staged[place.warp], n, kBits, place.codes<kBits>(args, r), lane);
    __syncwarp();
  }
}

// --- scales and zero points ----------------------------------------------------------------------------------------

__device__ int width_of(Scale type) {
  return type == Scale::fp32 ? 4 : type == Scale::fp16 || type == Scale::bf16 ? 2 : 1;
}

__device__ uint32_t load_bits(const void* from, int64_t index, int width) {
  if (width == 4) return static_cast<const uint32_t*>(from)[index];
  return width == 2 ? static_cast<const uint16_t*>(from)[index] : static_cast<const uint8_t*>(from)[index];
}
__device__ void store_bits(void* to, int64_t index, int width, uint32_t bits) {
  if (width == 4) static_cast<uint32_t*>(to)[index] = bits;
  if (width == 2) static_cast<uint16_t*>(to)[index] = static_cast<uint16_t>(bits);
  if (width == 1) static_cast<uint8_t*>(to)[index] = static_cast<uint8_t>(bits);
}

// What a tile has of 32 groups, scales in one and zero points in the other, each as in a record.
struct Records {
  uint32_t part[2][kTileRows][kPackGroups + 1];
};

// Calls move(canonical array, index in it, record's part, index there, width, the place between) for what the block
// has, with lanes along the groups of a row or along the rows of a group.
template <bool kAlongGroups, typename F>
__device__ void for_records(const PackArgs& args, Records& records, const F& move) {
  const int64_t tile = int64_t{blockIdx.z} * gridDim.y + blockIdx.y;
  const int64_t first_group = int64_t{blockIdx.x} * kPackGroups;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int width = args.record_zeros / kTileRows;  // of a scale; none where the row is the group
  const auto at = [&](int row, int g) {
    const int64_t canonical_row = tile * kTileRows + row, group = first_group + g;
    if (tile >= args.tiles || canonical_row >= args.rows || group >= args.groups) return;
    const int entry = lane_order::record_entry(row);
    const int64_t index = canonical_row * args.groups + group;
    uint8_t* record = args.records + (tile * args.groups + group) * args.record_bytes;
    if (width != 0) move(args.canonical.scales, index, record, entry, width, records.part[0][entry][g]);
    if (args.canonical.zeros != nullptr) {
      move(args.canonical.zeros, index, record + args.record_zeros, entry, 1, records.part[1][entry][g]);
    }
  };
  if constexpr (kAlongGroups) {
    for (int row = warp; row < kTileRows; row += kWarps) at(row, lane);
  } else {
    for (int g = warp; g < kPackGroups; g += kWarps) {
      // Neighbouring lanes have neighbouring entries: the row of entry 8 g + 2 b + h is 16 b + 8 h + g.
      for (int entry = lane; entry < kTileRows; entry += kLanes) {
        at(entry % 8 / 2 * 16 + entry % 2 * 8 + entry / 8, g);
      }
    }
  }
}

__device__ void pack_records(const PackArgs& args) {
  __shared__ Records records;
  for_records<true>(args, records, [](const void* from, int64_t index, uint8_t*, int, int width, uint32_t& between) {
    between = load_bits(from, index, width);
  });
  __syncthreads();
  for_records<false>(args, records, [](const void*, int64_t, uint8_t* to, int entry, int width, uint32_t& between) {
    store_bits(to, entry, width, between);
  });
}

__device__ void unpack_records(const PackArgs& args) {
  __shared__ Records records;
  for_records<false>(args, records, [](void*, int64_t, const uint8_t* from, int entry, int width, uint32_t& between) {
    between = load_bits(from, entry, width);
  });
  __syncthreads();
  for_records<true>(args, records, [](void* to, int64_t index, uint8_t*, int, int width, uint32_t& between) {
    store_bits(to, index, width, between);
  });
}

// --- scales of rows ------------------------------------------------------------------------------------------------

// The bits of a scale as a float's, and back, NaN and Inf and all.
__device__ uint32_t widen(Scale type, uint32_t bits) {
  switch (type) {
    case Scale::fp32: return bits;
    case Scale::bf16: return bits << 16;
    case Scale::fp16: {
      const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
      if (magnitude >= 0x7c00u) return sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
      return sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f);
    }
    case Scale::e8m0: return bits == 0 ? 0x400000u : bits == 255 ? kNan : bits << 23;
    case Scale::e4m3: break;
  }
  const uint32_t sign = (bits & 0x80u) << 24, magnitude = bits & 0x7fu;
  return sign | (magnitude == 0x7fu ? kNan : __float_as_uint(__uint_as_float(magnitude << 20) * 0x1p120f));
}

// pre: widen() made them.
__device__ uint32_t narrow(Scale type, uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  const bool finite = magnitude < 0x7f800000u;
  switch (type) {
    case Scale::fp32: return bits;
    case Scale::bf16: return bits >> 16;
    case Scale::fp16: {
      const uint32_t half =
          finite ? __float_as_uint(__uint_as_float(magnitude) * 0x1p-112f) >> 13 : 0x7c00u | (magnitude >> 13 & 0x3ffu);
      return (bits >> 16 & 0x8000u) | half;
    }
    case Scale::e8m0: return magnitude >> 23;
    case Scale::e4m3: break;
  }
  return (bits >> 24 & 0x80u) | (finite ? __float_as_uint(__uint_as_float(magnitude) * 0x1p-120f) >> 20 : 0x7fu);
}

template <bool kPack>
__device__ void convert_row_scales(const PackArgs& args) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int width = width_of(args.scale);
  if (row >= args.rows) return;
  if constexpr (kPack) {
    args.row_scales[row] = widen(args.scale, load_bits(args.canonical.scales, row, width));
  } else {
    store_bits(args.canonical.scales, row, width, narrow(args.scale, args.row_scales[row]));
  }
}

}  // namespace
}  // namespace ng::cuda

// --- entries -------------------------------------------------------------------------------------------------------

// Three blocks on a multiprocessor: left to itself, ptxas spills for more.
#define NG_KERNEL(name, ...)                                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 3) name(const __grid_constant__ ng::cuda::PackArgs args) { \
    ng::cuda::__VA_ARGS__(args);                                                                               \
  }
#define NG_KERNELS(suffix, ...)                           \
  NG_KERNEL(pack_codes_##suffix, pack_codes<__VA_ARGS__>) \
  NG_KERNEL(unpack_codes_##suffix, unpack_codes<__VA_ARGS__>)

NG_KERNELS(2, 2, false)
NG_KERNELS(3, 3, false)
NG_KERNELS(4, 4, false)
NG_KERNELS(5, 5, false)
NG_KERNELS(6, 6, false)
NG_KERNELS(7, 7, false)
NG_KERNELS(8, 8, false)
NG_KERNELS(nf4, 4, true)
NG_KERNEL(pack_records, pack_records)
NG_KERNEL(unpack_records, unpack_records)
NG_KERNEL(pack_row_scales, convert_row_scales<true>)
NG_KERNEL(unpack_row_scales, convert_row_scales<false>)
