// pack_cuda and unpack_cuda on a device: checks, and launches of the kernels of sm80_pack.cu.
#include <algorithm>
#include <array>
#include <limits>

#include "driver/kernel.hpp"
#include "driver/pointer.hpp"
#include "kernels/arrays.hpp"
#include "kernels/pack_args.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/quantize.hpp"
#include "narrowgauge/stream.hpp"
#include "quantize/arguments.hpp"
#include "quantize/cuda_layout.hpp"

namespace ng {

namespace cuda::images {
extern const Image sm80_pack;
}

namespace {

using cuda::ContextScope;
using cuda::DevicePtr;
using cuda::PackArgs;

constexpr int kThreads = 32 * cuda::kWarps;

// Names of kernels, which live for ever.
struct Names {
  std::array<const char*, 9> codes;  // by the bits of a code; the first: of a codebook
  const char* records;
  const char* row_scales;
};
#define NG_NAMES(name)                                                                                   \
  Names{{name "_codes_nf4", nullptr, name "_codes_2", name "_codes_3", name "_codes_4", name "_codes_5", \
         name "_codes_6", name "_codes_7", name "_codes_8"},                                             \
        name "_records",                                                                                 \
        name "_row_scales"}
constexpr Names kPack = NG_NAMES("pack");
constexpr Names kUnpack = NG_NAMES("unpack");
#undef NG_NAMES

// Checks what both take; the arrays' sizes come from the Format.
PackArgs arguments(const CanonicalView& matrix, const uint8_t* packed, const CudaLayout& layout, int device) {
  const Format& format = matrix.format;
  cuda::check_pointer(packed, "the packed block", device, kCudaAlignment);
  const auto section = [&](int64_t offset) { return const_cast<uint8_t*>(packed) + offset; };
  PackArgs args{};
  args.canonical = cuda::arrays_of(matrix, device);
  args.codes = section(0);
  if (layout.record_bytes != 0) args.records = section(layout.records);
  if (format.group == 0) args.row_scales = reinterpret_cast<uint32_t*>(section(layout.row_scales));
  if (has_special_codes(format.element)) args.specials = reinterpret_cast<uint32_t*>(section(layout.specials));
  args.rows = matrix.rows;
  args.cols = matrix.cols;
  args.row_bytes = format.row_bytes(matrix.cols);
  args.groups = layout.groups;
  args.stages = layout.stages;
  args.tiles = layout.tiles;
  args.record_bytes = static_cast<int32_t>(layout.record_bytes);
  args.record_zeros = static_cast<int32_t>(layout.record_zeros);
  args.scale = static_cast<codec::Scale>(format.scale);
  args.base = cuda_base(format.element);
  args.flip = cuda_flip(format.element) * 0x01010101u;
  args.special = static_cast<uint32_t>(codec::element_of(format.element, false).fp.special);
  return args;
}

// `count` blocks in y and z, `along` in x.
cuda::Dim3 grid_of(int64_t along, int64_t count) {
  const int64_t y = std::min<int64_t>(count, 65535), z = (count + y - 1) / y;
  NG_CHECK(along <= std::numeric_limits<int32_t>::max() && z <= 65535, InvalidArgument, "a packed matrix of ", along,
           " by ", count, " blocks is too large for a device");
  return {static_cast<unsigned>(along), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

int64_t blocks(int64_t count, int64_t each) { return (count + each - 1) / each; }

void launch_all(const Names& names, const Element& element, const PackArgs& args, const Stream& stream) {
  if (args.rows == 0 || args.cols == 0) return;
  const auto launch = [&](const char* name, cuda::Dim3 grid) {
    const cuda::Function kernel = cuda::find_kernel(cuda::images::sm80_pack, name, stream.device());
    cuda::launch({.name = name, .kernel = kernel, .grid = grid, .block = {kThreads, 1, 1}}, stream, args);
  };
  const size_t codes = element.kind == ElementKind::nf4 ? 0 : element.bits;
  constexpr int64_t kUnits = kCudaTileRows / lane_order::kUnitRows;
  launch(names.codes[codes], grid_of(blocks(args.cols, cuda::kPackCols), args.tiles * kUnits));
  if (args.records != nullptr) launch(names.records, grid_of(blocks(args.groups, cuda::kPackGroups), args.tiles));
  if (args.row_scales != nullptr) launch(names.row_scales, grid_of(blocks(args.rows, kThreads), 1));
}

void copy_global_scale(void* to, const void* from, const Stream& stream) {
  NG_CUDA(cuda::require_driver(), cuMemcpyAsync(reinterpret_cast<DevicePtr>(to), reinterpret_cast<DevicePtr>(from),
                                                sizeof(float), cuda::handle_of(stream)));
}

}  // namespace

void pack_cuda(const CanonicalView& matrix, uint8_t* packed, const Stream& stream) {
  const CudaLayout layout = codec::check_pack_cuda(matrix, packed);
  if (layout.total == 0) return;
  const ContextScope context(stream.device());
  const PackArgs args = arguments(matrix, packed, layout, stream.device());
  const int64_t codes_end = layout.tiles * layout.stages * layout.stage_bytes();
  NG_CUDA(context.driver(), cuMemsetD8Async(reinterpret_cast<DevicePtr>(packed + codes_end), 0,
                                            static_cast<size_t>(layout.total - codes_end), cuda::handle_of(stream)));
  launch_all(kPack, matrix.format.element, args, stream);
  if (args.canonical.global_scale != nullptr) {
    copy_global_scale(packed + layout.global_scale, args.canonical.global_scale, stream);
  }
}

void unpack_cuda(const PackedView& packed, const CanonicalView& out, const Stream& stream) {
  const CudaLayout layout = codec::check_unpack_cuda(packed, out);
  if (layout.total == 0) return;
  const ContextScope context(stream.device());
  const PackArgs args = arguments(out, packed.data, layout, stream.device());
  launch_all(kUnpack, out.format.element, args, stream);
  if (args.canonical.global_scale != nullptr) {
    copy_global_scale(args.canonical.global_scale, packed.data + layout.global_scale, stream);
  }
}

}  // namespace ng
