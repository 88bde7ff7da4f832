// quantize and dequantize on a device: checks, and launches of the kernels of sm80_quantize.cu.
#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <map>
#include <memory>
#include <mutex>

#include "driver/kernel.hpp"
#include "driver/pointer.hpp"
#include "kernels/arrays.hpp"
#include "kernels/quantize_args.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/quantize.hpp"
#include "narrowgauge/stream.hpp"
#include "quantize/arguments.hpp"
#include "quantize/sum.hpp"

namespace ng {

namespace cuda::images {
extern const Image sm80_quantize;
}

namespace {

using cuda::arrays_of;
using cuda::ContextScope;
using cuda::images::sm80_quantize;

// --- what kernels find ---------------------------------------------------------------------------------------------

// Reads, on every synchronize() of a device that has quantized, whether a kernel met NaN or Inf, and throws what the
// CPU would have thrown. The kernels' one number has an index but not the length of rows, which is remembered here.
class FoundCheck : public cuda::DeviceCheck {
 public:
  // The origin of a launch on rows of `cols` elements.
  uint64_t origin(int64_t cols, int device) {
    const std::lock_guard lock(mutex_);
    used_[static_cast<size_t>(device)] = true;
    if (lengths_.size() < kUnknown) lengths_.try_emplace(cols, lengths_.size());
    const auto known = lengths_.find(cols);
    return (known == lengths_.end() ? kUnknown : known->second) << (cuda::kFoundIndexBits + 2);
  }

  void operator()(int device) override {
    const std::lock_guard lock(mutex_);
    if (!used_[static_cast<size_t>(device)]) return;
    std::unique_ptr<Stream>& stream = streams_[static_cast<size_t>(device)];
    if (stream == nullptr) stream = std::make_unique<Stream>(Stream::create(device));
    if (read("found", *stream) == kNothing) return;
    const cuda::Function take = cuda::find_kernel(sm80_quantize, "take_found", device);
    cuda::launch({.name = "take_found", .kernel = take, .grid = {}, .block = {}}, *stream);
    const uint64_t found = read("taken", *stream);
    if (found != kNothing) raise(found);
  }

 private:
  static constexpr uint64_t kNothing = ~uint64_t{0};
  // All row lengths beyond so many.
  static constexpr uint64_t kUnknown = (uint64_t{1} << (64 - cuda::kFoundIndexBits - 2)) - 1;

  static uint64_t read(const char* variable, const Stream& stream) {
    const cuda::Driver& driver = cuda::require_driver();
    const cuda::DevicePtr address = cuda::find_variable(sm80_quantize, variable, stream.device());
    uint64_t value = kNothing;
    NG_CUDA(driver, cuMemcpyDtoHAsync_v2(&value, address, sizeof value, cuda::handle_of(stream)));
    NG_CUDA(driver, cuStreamSynchronize(cuda::handle_of(stream)));
    return value;
  }

  [[noreturn]] void raise(uint64_t found) const {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    constexpr std::array kValues{std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity};
    const float value = kValues[std::min<size_t>(found & 3, 2)];
    const auto index = static_cast<int64_t>(found >> 2 & ((uint64_t{1} << cuda::kFoundIndexBits) - 1));
    const uint64_t origin = found >> (cuda::kFoundIndexBits + 2);
    for (const auto& [cols, number] : lengths_) {
      if (number == origin) throw InvalidArgument(codec::not_finite(index / cols, index % cols, index, value));
    }
    throw InvalidArgument(codec::not_finite(0, index, index, value));  // as if the matrix were one row
  }

  std::mutex mutex_;
  std::map<int64_t, uint64_t> lengths_;
  std::array<bool, 64> used_{};
  std::array<std::unique_ptr<Stream>, 64> streams_;
};

FoundCheck& found_check() {
  static auto* check = [] {
    auto* made = new FoundCheck;  // never destroyed: streams may be waited for at exit
    cuda::register_check(*made);
    return made;
  }();
  return *check;
}

// --- arguments of kernels ------------------------------------------------------------------------------------------

cuda::Shape shape_of(const CanonicalView& matrix, int64_t stride) {
  const Format& format = matrix.format;
  cuda::Shape shape{};
  shape.rows = matrix.rows;
  shape.cols = matrix.cols;
  shape.stride = stride;
  shape.row_bytes = format.row_bytes(matrix.cols);
  shape.groups = format.groups(matrix.cols);
  shape.group_units = format.group == 0 ? cuda::kTileUnits : format.group / cuda::kUnit;
  shape.group_magic = 65536 / shape.group_units + 1;  // good for units below kTileUnits
  shape.tile_groups = cuda::kTileUnits / shape.group_units;
  shape.group_step = format.group == 0 ? 0 : shape.tile_groups;
  shape.tile_elements = shape.tile_groups * shape.group_units * cuda::kUnit;
  const int64_t tiles = (matrix.cols - 1) / shape.tile_elements + 1;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - cuda::kWarps;
  NG_CHECK(matrix.rows <= kMost && tiles <= kMost, InvalidArgument, "a matrix of ", matrix.rows, " x ", matrix.cols,
           " elements has too many rows or columns for a device");
  shape.tiles = static_cast<int32_t>(tiles);
  while ((1 << shape.warps_along) < std::min(shape.tiles, cuda::kWarps)) ++shape.warps_along;
  return shape;
}

// Blocks for a warp a tile, rows in y and z.
cuda::Dim3 grid_of(const cuda::Shape& shape) {
  const int64_t along = int64_t{1} << shape.warps_along, rows = cuda::kWarps >> shape.warps_along;
  const int64_t blocks = (shape.rows + rows - 1) / rows, y = std::min<int64_t>(blocks, 65535);
  return {static_cast<unsigned>((shape.tiles + along - 1) / along), static_cast<unsigned>(y),
          static_cast<unsigned>((blocks + y - 1) / y)};
}

cuda::ScaleCoding scale_coding(const Format& format, bool ceil) {
  const codec::ScaleRule rule = codec::scale_rule(format, ceil, 1.0f);
  struct Type {
    int mantissa_bits, least;
    double most;
  };
  constexpr std::array<Type, 5> kTypes{
      {{23, -126, 0x1.fffffep127}, {10, -14, 65504.0}, {7, -126, 0x1.fep127}, {}, {3, -6, 448.0}}};
  const Type& type = kTypes[static_cast<size_t>(format.scale)];
  return {
      .type = rule.type,
      .ceil = ceil,
      .few_bits = format.scale != ScaleType::fp32 && !format.has_global_scale(),
      .shift = 52 - type.mantissa_bits,
      .least = int64_t{type.least + 1023} << 52,
      .most = type.most,
      .divisor = rule.divisor,
      .nan = rule.nan,
  };
}

// --- launches ------------------------------------------------------------------------------------------------------

using Names = std::array<const char*, 3>;  // by codec::Source
#define NG_NAMES(name) Names{name "_f32", name "_f16", name "_bf16"}
constexpr Names kQuantizeGroups = NG_NAMES("quantize_groups");
constexpr Names kQuantizeRows = NG_NAMES("quantize_rows");
constexpr Names kQuantizeGroupsStochastic = NG_NAMES("quantize_groups_stochastic");
constexpr Names kQuantizeRowsStochastic = NG_NAMES("quantize_rows_stochastic");
constexpr Names kMatrixRange = NG_NAMES("matrix_range");
constexpr Names kDequantize = NG_NAMES("dequantize");
constexpr Names kDequantizeSum = NG_NAMES("dequantize_sum");
#undef NG_NAMES

template <typename Arguments>
void launch(const char* name, cuda::Dim3 grid, unsigned threads, const Stream& stream, const Arguments& arguments) {
  const cuda::Function kernel = cuda::find_kernel(sm80_quantize, name, stream.device());
  cuda::launch({.name = name, .kernel = kernel, .grid = grid, .block = {threads, 1, 1}}, stream, arguments);
}

constexpr unsigned kThreads = 32 * cuda::kWarps;

void find_global_scale(const cuda::QuantizeArgs& args, size_t type, const Stream& stream) {
  const auto address = reinterpret_cast<cuda::DevicePtr>(args.out.global_scale);
  NG_CUDA(cuda::require_driver(), cuMemsetD8Async(address, 0, sizeof(float), cuda::handle_of(stream)));
  const bool zeros = args.out.zeros != nullptr;
  // Enough to fill a device; each block then has several rows.
  const cuda::Dim3 all{static_cast<unsigned>(std::min((args.shape.tiles - 1) / cuda::kWarps + 1, 1024)),
                       static_cast<unsigned>(std::min<int64_t>(args.shape.rows, 4096)), 1};
  launch(kMatrixRange[type], zeros ? cuda::Dim3{} : all, kThreads, stream, args);
  if (!zeros) launch("finish_global_scale", {}, 1, stream, args);
}

void launch_dequantize(const Names& names, std::span<const CanonicalView> peers, int divisor, const TensorView& out,
                       const Stream& stream) {
  const CanonicalView& first = peers[0];
  const codec::Source type = codec::source_of(out.dtype, "out");
  const MatrixView dense = codec::check_dense(out, "out", first);
  const ContextScope context(stream.device());
  cuda::check_pointer(out.data, "out", stream.device(), dtype_bytes(out.dtype));
  cuda::DequantizeArgs args{};
  for (const CanonicalView& peer : peers) args.peer[args.peers++] = arrays_of(peer, stream.device());
  if (dense.rows == 0 || dense.cols == 0) return;
  args.out = dense.data;
  args.shape = shape_of(first, dense.row_stride);
  args.element = codec::element_of(first.format.element, false);
  args.scale = static_cast<codec::Scale>(first.format.scale);
  args.divisor = static_cast<float>(divisor);
  launch(names[static_cast<size_t>(type)], grid_of(args.shape), kThreads, stream, args);
}

}  // namespace

// --- public --------------------------------------------------------------------------------------------------------

void quantize(const TensorView& weights, const CanonicalView& out, const QuantizeOptions& options,
              const Stream& stream) {
  codec::check_canonical(out);
  const auto type = static_cast<size_t>(codec::source_of(weights.dtype, "weights"));
  const MatrixView matrix = codec::check_dense(weights, "weights", out);
  NG_CHECK(options.search == ScaleSearch::absmax, InvalidArgument,
           "search=\"mse\" is not done on a device; quantize on the CPU, or with search=\"absmax\"");
  const Format& format = out.format;
  const int device = stream.device();
  const ContextScope context(device);
  cuda::check_pointer(weights.data, "weights", device, dtype_bytes(weights.dtype));
  cuda::QuantizeArgs args{};
  args.out = arrays_of(out, device);
  if (matrix.rows == 0 || matrix.cols == 0) {
    if (args.out.global_scale == nullptr) return;
    const auto address = reinterpret_cast<cuda::DevicePtr>(args.out.global_scale);
    NG_CUDA(context.driver(), cuMemsetD8Async(address, 0, sizeof(float), cuda::handle_of(stream)));
    return;
  }
  args.weights = matrix.data;
  args.shape = shape_of(out, matrix.row_stride);
  args.element = codec::element_of(format.element, options.full_range);
  args.scale = scale_coding(format, options.e8m0_ceil);
  args.saturate = options.nan == NanPolicy::saturate;
  args.keep = options.nan == NanPolicy::keep;
  args.seed = options.seed;
  args.first_index = options.first_index;
  args.origin = found_check().origin(matrix.cols, device);

  if (format.has_global_scale()) find_global_scale(args, type, stream);
  if (format.group != 0) {
    const Names& names = options.stochastic ? kQuantizeGroupsStochastic : kQuantizeGroups;
    launch(names[type], grid_of(args.shape), kThreads, stream, args);
  } else {
    const Names& names = options.stochastic ? kQuantizeRowsStochastic : kQuantizeRows;
    const auto warps = static_cast<unsigned>(std::min(args.shape.tiles, cuda::kWarps));
    launch(names[type], {static_cast<unsigned>(matrix.rows), 1, 1}, 32 * warps, stream, args);
  }
}

void dequantize(const CanonicalView& matrix, const TensorView& out, const Stream& stream) {
  codec::check_canonical(matrix);
  launch_dequantize(kDequantize, std::span(&matrix, 1), 1, out, stream);
}

void codec::dequantize_sum(std::span<const CanonicalView> peers, int divisor, const TensorView& out,
                           const Stream& stream) {
  check_peers(peers);
  NG_CHECK(peers.size() <= cuda::kMostPeers, InvalidArgument, "dequantize_sum of ", peers.size(),
           " matrices on a device; expected at most ", cuda::kMostPeers);
  launch_dequantize(kDequantizeSum, peers, divisor, out, stream);
}

void dequantize_sum(std::span<const CanonicalView> peers, const TensorView& out, const Stream& stream) {
  codec::dequantize_sum(peers, 1, out, stream);
}

}  // namespace ng
