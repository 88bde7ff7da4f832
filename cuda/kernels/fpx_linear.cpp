// linear on a device: checks, and launches of the kernels of sm80_fpx_linear_*.cu.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>

#include "driver/kernel.hpp"
#include "driver/pointer.hpp"
#include "kernels/fpx_args.hpp"
#include "kernels/fpx_plan.hpp"
#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/linear.hpp"
#include "narrowgauge/linear_plan.hpp"
#include "quantize/cuda_layout.hpp"

namespace ng {

namespace cuda::images {
extern const Image sm80_fpx_linear_fp_f16;
extern const Image sm80_fpx_linear_fp_bf16;
extern const Image sm80_fpx_linear_int_f16;
extern const Image sm80_fpx_linear_int_bf16;
extern const Image sm80_fpx_linear_nf4;
}  // namespace cuda::images

namespace {

using cuda::ContextScope;
using cuda::FpxArgs;
using cuda::FpxReal;
using cuda::FpxScale;
using Operand = cuda::FpxOperand;

// --- kernels -------------------------------------------------------------------------------------------------------

// What multiplies x with the element.
Operand operand_of(const Element& element, DType x) {
  NG_CHECK(x == DType::f16 || x == DType::bf16, InvalidArgument, "x is ", dtype_name(x),
           " on a device; expected float16 or bfloat16");
  return cuda::fpx_operand(element, x == DType::bf16);
}

const cuda::Image& image_of(const Element& element, Operand operand) {
  using namespace cuda::images;
  if (element.kind == ElementKind::nf4) return sm80_fpx_linear_nf4;
  const bool is_f16 = operand == Operand::f16;
  if (element.kind == ElementKind::fp) return is_f16 ? sm80_fpx_linear_fp_f16 : sm80_fpx_linear_fp_bf16;
  return is_f16 ? sm80_fpx_linear_int_f16 : sm80_fpx_linear_int_bf16;
}

// A kernel's name, which lives for ever, and how much dynamic shared memory it was allowed on each device.
struct Kernel {
  std::string name;
  std::array<std::atomic<size_t>, 64> shared_bytes{};
};

constexpr size_t kElements = 3 * 9;  // fp, int and nf4 by width

Kernel& kernel_of(const Element& element, Operand operand, int tile) {
  static constexpr std::array kOperands{"f16", "bf16", "f16_wide"};
  static constexpr std::array kKinds{"fp", "int", "nf"};
  using Kernels = std::array<Kernel, kElements * kOperands.size() * cuda::kTileCount>;
  static Kernels& kernels = *[] {
    auto* made = new Kernels;
    for (size_t i = 0; i < made->size(); ++i) {
      const size_t rest = i / cuda::kTileCount;
      (*made)[i].name = concat("fpx_linear_", kOperands[rest / kElements], '_', kKinds[rest % kElements / 9], rest % 9,
                               "_m", cuda::kTiles[i % cuda::kTileCount].x_rows);
    }
    return made;
  }();
  const size_t kind = element.kind == ElementKind::fp ? 0 : element.kind == ElementKind::nf4 ? 2 : 1;
  const size_t index = static_cast<size_t>(operand) * kElements + kind * 9 + element.bits;
  return kernels[index * cuda::kTileCount + static_cast<size_t>(tile)];
}

void launch_product(Kernel& kernel, const cuda::Image& image, cuda::Dim3 grid, const cuda::FpxTile& tile, int bits,
                    const FpxArgs& args, const Stream& stream) {
  constexpr size_t kAlwaysAllowed = size_t{48} << 10;
  const auto bytes = static_cast<size_t>(tile.shared_bytes(bits, args.record_bytes));
  const cuda::Function function = cuda::find_kernel(image, kernel.name, stream.device());
  std::atomic<size_t>& allowed = kernel.shared_bytes[static_cast<size_t>(stream.device()) % kernel.shared_bytes.size()];
  if (bytes + static_cast<size_t>(tile.scratch_bytes()) > kAlwaysAllowed && bytes > allowed.load()) {
    cuda::allow_shared_bytes(function, bytes);
    allowed.store(bytes);
  }
  cuda::launch({.name = kernel.name.c_str(),
                .kernel = function,
                .grid = grid,
                .block = {static_cast<unsigned>(tile.threads()), 1, 1},
                .shared_bytes = bytes},
               stream, args);
}

// --- decoding ------------------------------------------------------------------------------------------------------

constexpr uint32_t twice(uint32_t half) { return (half & 0xffffu) * 0x10001u; }

// The entries of a codebook as sums of halves; for fp16 scaled so that the last terms are not subnormal.
void fill_table(const Element& element, bool bf16_terms, float scale, FpxArgs& args) {
  const std::array<float, 256> values = element_values(element);
  std::array<float, 16> rest{};
  for (size_t i = 0; i < rest.size(); ++i) rest[i] = values[i] * scale;
  for (auto& table : args.table) {
    for (uint32_t i = 0; i < rest.size(); ++i) {
      const uint32_t half = bf16_terms ? to_bf16(rest[i]).bits : to_f16(rest[i]).bits;
      rest[i] -= bf16_terms ? to_float(bf16{static_cast<uint16_t>(half)}) : to_float(f16{static_cast<uint16_t>(half)});
      table[i / 4] |= (half & 0xffu) << i % 4 * 8;
      table[4 + i / 4] |= (half >> 8) << i % 4 * 8;
    }
  }
}

// Fills in what decoding needs, and returns the power of two that decoded weights lack (fpx_decode.cuh).
float fill_constants(const Element& e, bool is_bf16, FpxArgs& args) {
  if (e.kind == ElementKind::nf4) {
    const float scale = is_bf16 ? 1.0f : 256.0f;
    fill_table(e, is_bf16, scale, args);
    return 1 / scale;
  }
  if (e.kind != ElementKind::fp) return is_bf16 ? 0x1p6f : 0x1p24f;
  const int mantissa = is_bf16 ? 7 : 10;  // bits of a half's
  const int base = mantissa - e.mantissa_bits, sign = mantissa + e.exponent_bits;
  const int bias = (1 << (e.exponent_bits - 1)) - 1;
  const int rest = lane_order::left_over(e.bits);
  for (int piece = 0, target = 0; rest > 0 && target < e.bits; ++piece, target += rest) {
    const int width = std::min(rest, e.bits - target);
    args.mask[piece] = twice(((1u << width) - 1u) << (target + base));
  }
  args.whole = twice(((1u << e.bits) - 1u) << base);
  args.sign = twice(1u << sign);
  args.sign_factor = (1u << (15 - sign)) - 1u;
  args.multiplier = twice(static_cast<uint32_t>(254 - bias) << 7);
  return is_bf16 ? 1.0f : std::ldexp(1.0f, 15 - bias);
}

// --- arguments -----------------------------------------------------------------------------------------------------

FpxReal real_type(DType dtype, const char* name) {
  switch (dtype) {
    case DType::f32: return FpxReal::f32;
    case DType::f16: return FpxReal::f16;
    case DType::bf16: return FpxReal::bf16;
    default: throw InvalidArgument(concat(name, " is ", dtype_name(dtype), "; expected float32, float16 or bfloat16"));
  }
}

FpxScale scale_type(const Format& format) {
  if (format.group == 0) return FpxScale::row;
  switch (format.scale) {
    case ScaleType::fp32: return FpxScale::f32;
    case ScaleType::fp16: return FpxScale::f16;
    case ScaleType::bf16: return FpxScale::bf16;
    case ScaleType::e8m0: return FpxScale::e8m0;
    case ScaleType::e4m3: return FpxScale::e4m3;
  }
  throw Error("unknown scale type");
}

void set_weights(const PackedView& packed, bool is_bf16, FpxArgs& args) {
  const Format& format = packed.format;
  const CudaLayout layout(format, packed.rows, packed.cols);
  args.tiles = static_cast<int32_t>(layout.tiles);
  args.stages = static_cast<int32_t>(layout.stages);
  args.groups = static_cast<int32_t>(layout.groups);
  args.quantum = static_cast<int32_t>(cuda::fpx_quantum(format));
  args.group_slices = format.group == 0 ? 1 << 28 : format.group / cuda::kSliceCols;
  args.record_bytes = static_cast<int32_t>(layout.record_bytes);
  args.zeros = format.element.has_zero_point() ? static_cast<int32_t>(layout.record_zeros) : -1;
  args.scale = scale_type(format);
  const float factor = fill_constants(format.element, is_bf16, args);
  args.fold = format.group == 0 ? 1.0f : factor;
  args.out.factor = format.group == 0 ? factor : 1.0f;
  if (packed.cols == 0) return;
  const auto section = [&](int64_t offset) { return reinterpret_cast<const float*>(packed.data + offset); };
  args.codes = packed.data;
  args.records = packed.data + layout.records;
  if (format.group == 0) args.out.row_scales = section(layout.row_scales);
  if (has_special_codes(format.element)) args.out.row_specials = section(layout.specials);
  if (format.has_global_scale()) args.out.global_scale = section(layout.global_scale);
}

void set_x(const MatrixView& x, FpxArgs& args) {
  args.x = x.data;
  args.x_stride = x.rows > 1 ? x.row_stride : 0;
  args.x_aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && args.x_stride % 8 == 0 ? 1 : 0;
  args.out.m = static_cast<int32_t>(x.rows);
  args.k = static_cast<int32_t>(x.cols);
}

void set_residual(const TensorView& tensor, const MatrixView& y, cuda::FpxOutput& out) {
  const MatrixView residual = as_residual(tensor, y);
  out.residual = residual.data;
  out.residual_stride = residual.row_stride;
  out.residual_type = real_type(residual.dtype, "residual");
}

// Asked once of the driver.
int multiprocessors(int device) {
  static std::array<std::atomic<int>, 64> known{};
  if (device < 0 || static_cast<size_t>(device) >= known.size()) return cuda_device(device).multiprocessors;
  std::atomic<int>& count = known[static_cast<size_t>(device)];
  if (count.load(std::memory_order_relaxed) == 0) count.store(cuda_device(device).multiprocessors);
  return count.load(std::memory_order_relaxed);
}

unsigned blocks(int64_t elements, int64_t each) { return static_cast<unsigned>((elements + each - 1) / each); }

int64_t workspace_bytes(const cuda::FpxPlan& plan, int64_t rows, int64_t n) {
  return plan.splits == 1 ? 0 : plan.splits * rows * n * static_cast<int64_t>(sizeof(float));
}

}  // namespace

// --- public --------------------------------------------------------------------------------------------------------

CudaLinearPlan cuda_linear_plan(int64_t rows, const Format& format, int64_t n, int64_t k, DType x,
                                int multiprocessors) {
  NG_CHECK(rows > 0 && n > 0 && k > 0, InvalidArgument, "a product of [", rows, ", ", k, "] by [", n, ", ", k,
           "]; expected sizes of at least 1");
  NG_CHECK(multiprocessors > 0, InvalidArgument, multiprocessors, " multiprocessors; expected at least 1");
  const Operand operand = operand_of(format.element, x);
  const CudaLayout layout(format, n, k);
  const cuda::FpxPlan plan = cuda::fpx_plan(rows, n, k, format, operand, multiprocessors);
  const cuda::FpxTile& tile = cuda::kTiles[plan.tile];
  const auto record_bytes = static_cast<int>(layout.record_bytes);
  const int64_t quantum = cuda::fpx_quantum(format);
  return {.kernel = kernel_of(format.element, operand, plan.tile).name,
          .x_rows = tile.x_rows,
          .weight_rows = tile.weight_rows(),
          .threads = tile.threads(),
          .stages = tile.stages,
          .stage_bytes = tile.stage_bytes(format.element.bits, record_bytes),
          .teams = tile.teams,
          .shared_bytes = tile.shared_bytes(format.element.bits, record_bytes) + tile.scratch_bytes(),
          .resident = tile.resident(cuda::fpx_terms(format.element, operand)),
          .splits = plan.splits,
          .blocks = int64_t{blocks(n, tile.weight_rows())} * blocks(rows, tile.x_rows) * plan.splits,
          .block_stages = std::min(layout.stages,
                                   blocks(blocks(layout.stages, quantum), int64_t{plan.splits} * tile.teams) * quantum),
          .workspace_bytes = workspace_bytes(plan, rows, n)};
}

int64_t linear_workspace_bytes(int64_t rows, const Format& format, int64_t n, int64_t k, int device) {
  canonical_bytes(format, n, k);  // checks n and k
  NG_CHECK(rows >= 0, InvalidArgument, "linear_workspace_bytes: ", rows, " rows; expected at least 0");
  if (rows == 0 || n == 0 || k == 0) return 0;
  const auto bytes = [&](bool is_bf16) {
    const Operand operand = cuda::fpx_operand(format.element, is_bf16);
    return workspace_bytes(cuda::fpx_plan(rows, n, k, format, operand, multiprocessors(device)), rows, n);
  };
  return std::max(bytes(false), bytes(true));
}

void linear(const TensorView& x_tensor, const PackedView& packed, const TensorView* bias, const TensorView* residual,
            const TensorView& y_tensor, void* workspace, const Stream& stream) {
  const MatrixView x = as_matrix(x_tensor, "x");
  const MatrixView y = as_matrix(y_tensor, "y");
  const Operand operand = operand_of(packed.format.element, x.dtype);
  NG_CHECK(x.cols == packed.cols, InvalidArgument, "x has shape ", x_tensor.shape_str(), "; expected [.., ",
           packed.cols, "] for weights [", packed.rows, ", ", packed.cols, "]");
  NG_CHECK(y.rows == x.rows && y.cols == packed.rows, InvalidArgument, "y has shape ", y_tensor.shape_str(),
           "; expected [", x.rows, ", ", packed.rows, "]");
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
  NG_CHECK(x.rows <= int64_t{65535} * 64 && packed.rows <= kMost && packed.cols <= kMost, InvalidArgument,
           "linear on a device of [", x.rows, ", ", packed.cols, "] by [", packed.rows, ", ", packed.cols,
           "]; expected at most ", int64_t{65535} * 64, " rows of x, and ", kMost, " rows and columns of weights");
  FpxArgs args{};
  args.out.y_type = real_type(y.dtype, "y");
  if (bias != nullptr) {
    args.out.bias_type = real_type(bias->dtype, "bias");
    NG_CHECK(bias->ndim == 1 && bias->shape[0] == packed.rows, InvalidArgument, "bias has shape ", bias->shape_str(),
             "; expected [", packed.rows, "]");
    NG_CHECK(bias->is_contiguous(), InvalidArgument, "bias is strided; expected dense elements");
    args.out.bias = bias->data;
  }
  if (residual != nullptr) set_residual(*residual, y, args.out);
  const int device = stream.device();
  const ContextScope context(device);
  cuda::check_pointer(x.data, "x", device, dtype_bytes(x.dtype));
  cuda::check_pointer(y.data, "y", device, dtype_bytes(y.dtype));
  cuda::check_pointer(packed.data, "weights", device, kCudaAlignment);
  if (bias != nullptr) cuda::check_pointer(bias->data, "bias", device, dtype_bytes(bias->dtype));
  if (residual != nullptr) cuda::check_pointer(residual->data, "residual", device, dtype_bytes(residual->dtype));
  if (x.rows == 0 || packed.rows == 0) return;

  const Element& element = packed.format.element;
  args.out.y = y.data;
  args.out.y_stride = y.row_stride;
  args.out.n = static_cast<int32_t>(packed.rows);
  set_x(x, args);
  set_weights(packed, operand != Operand::f16, args);
  cuda::FpxPlan plan;
  if (packed.cols > 0) {
    NG_CHECK(packed.data != nullptr, InvalidArgument, "linear: the packed weights are null");
    plan = cuda::fpx_plan(x.rows, packed.rows, packed.cols, packed.format, operand, multiprocessors(device));
  }
  if (plan.splits > 1) {
    NG_CHECK(workspace != nullptr, InvalidArgument, "linear: the workspace is null; expected ",
             linear_workspace_bytes(x.rows, packed.format, packed.rows, packed.cols, device), " bytes");
    cuda::check_pointer(workspace, "workspace", device, sizeof(float));
    args.partial = static_cast<float*>(workspace);
  }
  const cuda::FpxTile& tile = cuda::kTiles[plan.tile];
  const cuda::Dim3 grid{blocks(packed.rows, tile.weight_rows()), blocks(x.rows, tile.x_rows),
                        static_cast<unsigned>(plan.splits)};
  launch_product(kernel_of(element, operand, plan.tile), image_of(element, operand), grid, tile, element.bits, args,
                 stream);
  if (plan.splits > 1) {
    constexpr unsigned kThreads = 256;
    const cuda::FpxReduceArgs reduce{.partial = args.partial, .splits = plan.splits, .out = args.out};
    const cuda::Function function = cuda::find_kernel(cuda::images::sm80_fpx_linear_nf4, "fpx_reduce", device);
    const auto rows = static_cast<unsigned>(std::min<int64_t>(x.rows, 65535));
    cuda::launch({.name = "fpx_reduce",
                  .kernel = function,
                  .grid = {blocks(packed.rows, kThreads), rows, 1},
                  .block = {kThreads, 1, 1}},
                 stream, reduce);
  }
}

}  // namespace ng
