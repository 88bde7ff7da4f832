// quantize and dequantize: between floats and canonical codes, bit for bit as the CPU's (quantize/cpu/codec.inl).
//
// A warp takes a tile of up to 1024 elements at a time: it reads the floats once, finds the ranges of the groups with
// shuffles, makes one scale a lane, and writes codes and scales once. Where the row is the group a block takes a row,
// and keeps what its warps hold in registers; longer rows are read twice. Nothing is allocated, and blocks do not wait
// for each other. What is wrong with the input is noted in `found`; what is written of that matrix is undefined then.
#include "kernels/element.cuh"

// Read by the host, by name. The least of what was found since it was last taken.
extern "C" {
__device__ unsigned long long found = ~0ull;
__device__ unsigned long long taken;
}

namespace ng::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr unsigned long long kNothing = ~0ull;

// --- ranges --------------------------------------------------------------------------------------------------------

// Elements' highest and lowest, or where there is no zero point their magnitude and nothing. Lows are negated, so that
// all ranges grow; they include 0. NaN stays.
struct Range {
  float high = 0;
  float low = 0;

  __device__ bool finite() const { return is_finite(high) && is_finite(low); }
  // Infinite if NaN or Inf is in it.
  __device__ double width() const {
    return finite() ? static_cast<double>(high) + static_cast<double>(low) : static_cast<double>(INFINITY);
  }
};

__device__ Range join(const Range& a, const Range& b) { return {max_nan(a.high, b.high), max_nan(a.low, b.low)}; }
__device__ Range shuffle(const Range& range, int lane) {
  return {__shfl_sync(kAll, range.high, lane), __shfl_sync(kAll, range.low, lane)};
}

// Of the lane's two units.
__device__ void unit_ranges(const float (&x)[kLaneElements], bool zeros, Range (&unit)[2]) {
  if (zeros) {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) unit[i / kUnit] = join(unit[i / kUnit], {x[i], -x[i]});
  } else {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) unit[i / kUnit].high = max_nan(unit[i / kUnit].high, fabsf(x[i]));
  }
}

// Makes the range of every group's first unit that of the group, by doubling the units that each has seen.
__device__ void group_ranges(Range (&unit)[2], int group_units, const int (&group)[2], int lane) {
  if (group_units == 1) return;
  const int end[2] = {(group[0] + 1) * group_units, (group[1] + 1) * group_units};
  const Range next = shuffle(unit[0], (lane + 1) & 31);
  const Range first = unit[1];
  if (2 * lane + 2 < end[1]) unit[1] = join(unit[1], next);
  if (2 * lane + 1 < end[0]) unit[0] = join(unit[0], first);
  for (int step = 2; step < group_units; step *= 2) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const Range other = shuffle(unit[u], (lane + step / 2) & 31);
      if (2 * lane + u + step < end[u]) unit[u] = join(unit[u], other);
    }
  }
}

__device__ Range warp_range(Range range) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) range = join(range, shuffle(range, threadIdx.x % kLanes ^ step));
  return range;
}

// --- tiles of floats -----------------------------------------------------------------------------------------------

// Reads a tile, and makes all finite if it is to.
template <Source kType>
__device__ void load(const QuantizeArgs& args, int64_t row, int tile, uint4* staged, int lane,
                     float (&x)[kLaneElements]) {
  const int64_t begin = int64_t{tile} * args.shape.tile_elements;
  const auto n = static_cast<int>(min(int64_t{args.shape.tile_elements}, args.shape.cols - begin));
  const auto* from = static_cast<const uint8_t*>(args.weights) + (row * args.shape.stride + begin) * kSize<kType>;
  stage_floats<kType>(from, n, staged, lane);
  read_floats<kType>(staged, lane, x);
  // sync: before codes, the next tile, or floats that are staged with 32 bits; stochastic codes of f32 have a later one
  __syncwarp();
  if (args.saturate) {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      const float clamped = fminf(fmaxf(x[i], -kLargest), kLargest);
      x[i] = x[i] == x[i] ? clamped : 0.0f;
    }
  }
}

// Notes the lane's first element that is not finite.
__device__ void report(const QuantizeArgs& args, int64_t row, int tile, int lane, const float (&x)[kLaneElements]) {
  if (args.keep) return;
  const int64_t index = row * args.shape.cols + int64_t{tile} * args.shape.tile_elements + lane * kLaneElements;
  unsigned long long first = kNothing;
#pragma unroll
  for (int i = kLaneElements - 1; i >= 0; --i) {
    const auto what = x[i] != x[i] ? Found::nan : x[i] > 0 ? Found::infinity : Found::minus_infinity;
    if (!is_finite(x[i])) first = static_cast<uint64_t>(index + i) << 2 | static_cast<uint32_t>(what);
  }
  if (first != kNothing) atomicMin(&found, args.origin | first);
}

// What a lane divides by, and its zero points.
struct Scales {
  Divisor unit[2];
  int zero[2] = {};
  bool fast;  // of all lanes
};

// Codes of a tile whose scales are known.
template <bool kStochastic>
__device__ void encode(const QuantizeArgs& args, int64_t row, int tile, uint4* staged, int lane, const Scales& scales,
                       float (&x)[kLaneElements]) {
  const Shape& shape = args.shape;
  const Element& element = args.element;
  const int64_t begin = int64_t{tile} * shape.tile_elements;
  const auto n = static_cast<int>(min(int64_t{shape.tile_elements}, shape.cols - begin));
  if (!scales.fast) {
    divide_slowly(x, scales.unit, staged, lane);
  } else if (args.scale.few_bits) {
    divide_all<true>(x, scales.unit);
  } else {
    divide_all<false>(x, scales.unit);
  }
  uint32_t quad[kQuads] = {};
  if constexpr (kStochastic) {
    const int64_t index = args.first_index + row * shape.cols + begin + lane * kLaneElements;
    stochastic_codes(x, scales.zero, element, index, args.seed, staged, lane, quad);
  } else {
    nearest_codes(x, scales.zero, element, quad);
  }
#pragma unroll
  for (int j = 0; j < kQuads; ++j) quad[j] = scales.unit[j / (kQuads / 2)].empty ? 0 : quad[j];
  if (n < kTile) {
    // Bits beyond the last code are zero.
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const int codes = min(max(n - lane * kLaneElements - 4 * j, 0), 4);
      quad[j] = codes == 0 ? 0 : quad[j] << (32 - codes * element.bits) >> (32 - codes * element.bits);
    }
  }
  if (kStochastic || !scales.fast) __syncwarp();  // elements were read from shared memory again
  write_stream(element.bits, quad, staged, lane);
  unstage_codes(staged, n, element.bits,
                args.out.codes + row * shape.row_bytes + int64_t{tile} * (shape.tile_elements / 8 * element.bits),
                lane);
}

__device__ float global_scale(const Arrays& arrays) {
  return arrays.global_scale == nullptr ? 1.0f : *arrays.global_scale;
}

// --- quantize ------------------------------------------------------------------------------------------------------

template <Source kType, bool kStochastic>
__device__ void quantize_tile(const QuantizeArgs& args, int64_t row, int tile, uint4* staged, int lane, float global) {
  const Shape& shape = args.shape;
  const bool zeros = args.out.zeros != nullptr;
  float x[kLaneElements];
  load<kType>(args, row, tile, staged, lane, x);
  Range range[2];
  unit_ranges(x, zeros, range);
  if (!(range[0].finite() && range[1].finite())) report(args, row, tile, lane, x);

  const int group[2] = {(2 * lane * shape.group_magic) >> 16, ((2 * lane + 1) * shape.group_magic) >> 16};
  group_ranges(range, shape.group_units, group, lane);

  // Lane g makes the scale of group g, and of group 32 + g where groups are single units.
  const int64_t first = row * shape.groups + int64_t{tile} * shape.group_step;
  const auto groups =
      static_cast<int>(min(int64_t{shape.tile_groups}, shape.groups - int64_t{tile} * shape.group_step));
  Stored stored[2];
  int zero[2] = {};
  bool fast = true;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (r * kLanes >= groups) break;
    const int g = r * kLanes + lane, unit = g * shape.group_units;
    const Range even = shuffle(range[0], unit / 2 & 31), odd = shuffle(range[1], unit / 2 & 31);
    const Range mine = unit % 2 == 0 ? even : odd;
    stored[r] = make_scale(g < groups ? mine.width() : 0.0, args.scale, global);
    fast = fast && (stored[r].divisor.fast || stored[r].divisor.empty);
    if (zeros) zero[r] = zero_point(-mine.low, stored[r], args.element);
    if (g < groups) {
      store_scale(args.out.scales, first + g, args.scale.type, stored[r].bits);
      if (zeros) args.out.zeros[first + g] = static_cast<uint8_t>(zero[r]);
    }
  }
  Scales scales;
  scales.fast = __all_sync(kAll, fast);
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const auto fetch = [&](auto low, auto high) {
      const auto a = __shfl_sync(kAll, low, group[u] & 31);
      if (groups <= kLanes) return a;
      const auto b = __shfl_sync(kAll, high, group[u] & 31);
      return group[u] < kLanes ? a : b;
    };
    const Divisor &low = stored[0].divisor, &high = stored[1].divisor;
    scales.unit[u].value = fetch(low.value, high.value);
    scales.unit[u].inverse = fetch(low.inverse, high.inverse);
    scales.unit[u].inverse_low = fetch(low.inverse_low, high.inverse_low);
    scales.unit[u].empty = fetch(static_cast<int>(low.empty), static_cast<int>(high.empty)) != 0;
    if (zeros) scales.zero[u] = fetch(zero[0], zero[1]);
  }
  encode<kStochastic>(args, row, tile, staged, lane, scales, x);
}

// A warp's place where each has a tile of its own; false if there is none for it.
__device__ bool find_tile(const Shape& shape, int64_t& row, int& tile) {
  const int warp = threadIdx.x / kLanes, along = shape.warps_along;
  tile = static_cast<int>(blockIdx.x << along) + (warp & ((1 << along) - 1));
  row = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * (kWarps >> along) + (warp >> along);
  return tile < shape.tiles && row < shape.rows;
}

template <Source kType, bool kStochastic>
__device__ void quantize_groups(const QuantizeArgs& args) {
  __shared__ uint4 staged[kWarps][kPieces<Source::f32>];
  int64_t row;
  int tile;
  if (!find_tile(args.shape, row, tile)) return;
  quantize_tile<kType, kStochastic>(args, row, tile, staged[threadIdx.x / kLanes], threadIdx.x % kLanes,
                                    global_scale(args.out));
}

// The range of all warps' ranges.
__device__ Range block_range(Range range, Range* shared) {
  const int warps = blockDim.x / kLanes;
  range = warp_range(range);
  if (threadIdx.x % kLanes == 0) shared[threadIdx.x / kLanes] = range;
  __syncthreads();
  for (int i = 0; i < warps; ++i) range = join(range, shared[i]);
  return range;
}

template <Source kType, bool kStochastic>
__device__ void quantize_rows(const QuantizeArgs& args) {
  __shared__ uint4 staged[kWarps][kPieces<Source::f32>];
  __shared__ Range ranges[kWarps];
  const Shape& shape = args.shape;
  const bool zeros = args.out.zeros != nullptr;
  const int warps = blockDim.x / kLanes, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const float global = global_scale(args.out);
  const int64_t row = blockIdx.x;
  float x[kLaneElements];
  Range range;
#pragma unroll 1
  for (int tile = warp; tile < shape.tiles; tile += warps) {
    load<kType>(args, row, tile, staged[warp], lane, x);
    Range unit[2];
    unit_ranges(x, zeros, unit);
    const Range both = join(unit[0], unit[1]);
    if (!both.finite()) report(args, row, tile, lane, x);
    range = join(range, both);
  }
  range = block_range(range, ranges);
  const Stored stored = make_scale(range.width(), args.scale, global);
  Scales scales;
  scales.unit[0] = scales.unit[1] = stored.divisor;
  scales.fast = stored.divisor.fast;
  if (zeros) scales.zero[0] = scales.zero[1] = zero_point(-range.low, stored, args.element);
  if (threadIdx.x == 0) {
    store_scale(args.out.scales, row, args.scale.type, stored.bits);
    if (zeros) args.out.zeros[row] = static_cast<uint8_t>(scales.zero[0]);
  }
#pragma unroll 1
  for (int tile = warp; tile < shape.tiles; tile += warps) {
    if (shape.tiles > warps) load<kType>(args, row, tile, staged[warp], lane, x);
    encode<kStochastic>(args, row, tile, staged[warp], lane, scales, x);
    __syncwarp();
  }
}

// --- the global scale ----------------------------------------------------------------------------------------------

__device__ float global_of(const Range& range, const QuantizeArgs& args) {
  return static_cast<float>((range.finite() ? range.width() : 0.0) / (args.scale.divisor * 448.0));
}

// The bits of the matrix's largest magnitude, in the place of the global scale, which starts as 0. With zero points
// there are two numbers to find and no place for them: one block does it all.
template <Source kType>
__device__ void matrix_range(const QuantizeArgs& args) {
  __shared__ uint4 staged[kWarps][kPieces<kType>];
  __shared__ Range ranges[kWarps];
  const Shape& shape = args.shape;
  const bool zeros = args.out.zeros != nullptr;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  Range range;
  for (int64_t row = blockIdx.y; row < shape.rows; row += gridDim.y) {
    for (int64_t first = int64_t{blockIdx.x} * kWarps; first < shape.tiles; first += int64_t{gridDim.x} * kWarps) {
      const auto tile = static_cast<int>(first) + warp;
      if (tile >= shape.tiles) break;
      float x[kLaneElements];
      load<kType>(args, row, tile, staged[warp], lane, x);
      if (args.keep) {
#pragma unroll
        for (float& element : x) element = is_finite(element) ? element : 0.0f;
      }
      Range unit[2];
      unit_ranges(x, zeros, unit);
      const Range both = join(unit[0], unit[1]);
      if (!both.finite()) report(args, row, tile, lane, x);
      range = join(range, both);
    }
  }
  range = block_range(range, ranges);
  if (threadIdx.x != 0) return;
  if (zeros) {
    *args.out.global_scale = global_of(range, args);
  } else if (range.finite()) {
    atomicMax(reinterpret_cast<int*>(args.out.global_scale), __float_as_int(range.high));
  }
}

// --- dequantize ----------------------------------------------------------------------------------------------------

// Calls f(i, value) for the lane's elements of a tile.
template <typename F>
__device__ void decode(const DequantizeArgs& args, const Arrays& from, int64_t row, int tile, int n, uint4* staged,
                       int lane, const F& f) {
  const Shape& shape = args.shape;
  const int bits = args.element.bits;
  const bool zeros = from.zeros != nullptr;
  const int64_t first = row * shape.groups + int64_t{tile} * shape.group_step;
  const auto groups =
      static_cast<int>(min(int64_t{shape.tile_groups}, shape.groups - int64_t{tile} * shape.group_step));
  float scale[2] = {};
  int zero[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int g = r * kLanes + lane;
    if (g >= groups) break;
    scale[r] = load_scale(from.scales, first + g, args.scale);
    if (zeros) zero[r] = from.zeros[first + g];
  }
  stage_codes(from.codes + row * shape.row_bytes + int64_t{tile} * (shape.tile_elements / 8 * bits), n, bits, staged,
              lane);
  uint32_t quad[kQuads];
  read_stream(bits, staged, lane, quad);
  __syncwarp();

  const float global = global_scale(from);
  float unit_scale[2];
  int unit_zero[2] = {};
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const int group = ((2 * lane + u) * shape.group_magic) >> 16;
    const auto fetch = [&](auto low, auto high) {
      const auto a = __shfl_sync(kAll, low, group & 31);
      if (groups <= kLanes) return a;
      const auto b = __shfl_sync(kAll, high, group & 31);
      return group < kLanes ? a : b;
    };
    unit_scale[u] = fetch(scale[0], scale[1]) * global;
    if (zeros) unit_zero[u] = fetch(zero[0], zero[1]);
  }
  values_of(quad, unit_zero, args.element, lane, [&](int i, float value) { f(i, value * unit_scale[i / kUnit]); });
}

template <Source kType, bool kSum>
__device__ void dequantize(const DequantizeArgs& args) {
  __shared__ uint4 all_staged[kWarps][kPieces<kType>];
  const Shape& shape = args.shape;
  const int lane = threadIdx.x % kLanes;
  uint4* staged = all_staged[threadIdx.x / kLanes];
  int64_t row;
  int tile;
  if (!find_tile(shape, row, tile)) return;
  const int64_t begin = int64_t{tile} * shape.tile_elements;
  const auto n = static_cast<int>(min(int64_t{shape.tile_elements}, shape.cols - begin));
  float x[kLaneElements];
  if constexpr (kSum) {
#pragma unroll
    for (float& sum : x) sum = -0.0f;  // which changes nothing that is added to it
#pragma unroll 1
    for (int p = 0; p < args.peers; ++p) {
      decode(args, args.peer[p], row, tile, n, staged, lane, [&](int i, float value) { x[i] += value; });
    }
    if (args.divisor != 1.0f) {
#pragma unroll
      for (float& sum : x) sum = __fdiv_rn(sum, args.divisor);
    }
  } else {
    decode(args, args.peer[0], row, tile, n, staged, lane, [&](int i, float value) { x[i] = value; });
  }
  write_floats<kType>(x, staged, lane);
  unstage_floats<kType>(staged, static_cast<uint8_t*>(args.out) + (row * shape.stride + begin) * kSize<kType>, n, lane);
}

}  // namespace
}  // namespace ng::cuda

// --- entries -------------------------------------------------------------------------------------------------------

// Registers of a thread are at most 65536 / (256 * blocks).
#define NG_KERNEL(name, type, blocks, Arguments, ...)                   \
  extern "C" __global__ void __launch_bounds__(256, blocks)             \
      name##_##type(const __grid_constant__ ng::cuda::Arguments args) { \
    constexpr auto kType = ng::codec::Source::type;                     \
    ng::cuda::__VA_ARGS__(args);                                        \
  }
#define NG_KERNELS(name, blocks, Arguments, ...)       \
  NG_KERNEL(name, f32, blocks, Arguments, __VA_ARGS__) \
  NG_KERNEL(name, f16, blocks, Arguments, __VA_ARGS__) \
  NG_KERNEL(name, bf16, blocks, Arguments, __VA_ARGS__)

NG_KERNELS(quantize_groups, 3, QuantizeArgs, quantize_groups<kType, false>)
NG_KERNELS(quantize_rows, 3, QuantizeArgs, quantize_rows<kType, false>)
NG_KERNELS(quantize_groups_stochastic, 2, QuantizeArgs, quantize_groups<kType, true>)
NG_KERNELS(quantize_rows_stochastic, 2, QuantizeArgs, quantize_rows<kType, true>)
NG_KERNELS(matrix_range, 3, QuantizeArgs, matrix_range<kType>)
NG_KERNELS(dequantize, 4, DequantizeArgs, dequantize<kType, false>)
NG_KERNELS(dequantize_sum, 2, DequantizeArgs, dequantize<kType, true>)

// After matrix_range: the global scale in the place of the range it is made of.
extern "C" __global__ void __launch_bounds__(1, 1)
    finish_global_scale(const __grid_constant__ ng::cuda::QuantizeArgs args) {
  *args.out.global_scale = ng::cuda::global_of({*args.out.global_scale, 0}, args);
}

// Moves what was found to where nothing else writes, for the host to read.
extern "C" __global__ void __launch_bounds__(1, 1) take_found() { taken = atomicExch(&found, ng::cuda::kNothing); }
