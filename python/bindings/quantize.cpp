// Binds narrowgauge/quantize.hpp over arrays that the caller made.
#include "narrowgauge/quantize.hpp"

#include <nanobind/stl/string_view.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "bindings.hpp"
#include "packed.hpp"

namespace ng::python {
namespace {

using namespace nb::literals;

// A canonical matrix in Python arrays, borrowed for one call; all on one device.
class BorrowedCanonical {
 public:
  BorrowedCanonical(const Format& format, int64_t rows, int64_t cols, nb::handle codes, nb::handle scales,
                    nb::handle zeros, nb::handle global_scale, Access access, Where where = Where::host)
      : codes_(codes, "codes", access, where), scales_(scales, "scales", access, where) {
    require_device(scales_, device(), "scales");
    const CanonicalBytes bytes = canonical_bytes(format, rows, cols);
    view_ = {.format = format, .rows = rows, .cols = cols};
    view_.codes = dense_bytes(codes_.view(), "codes", bytes.codes);
    view_.scales = dense_bytes(scales_.view(), "scales", bytes.scales);
    NG_CHECK(reinterpret_cast<uintptr_t>(view_.scales) % scale_bytes(format.scale) == 0, InvalidArgument,
             "scales are not aligned to their type, ", scale_bytes(format.scale), " bytes");
    view_.zeros = optional(zeros_, zeros, "zeros", format.element.has_zero_point(), bytes.zeros, access);
    view_.global_scale = reinterpret_cast<float*>(
        optional(global_scale_, global_scale, "global_scale", format.has_global_scale(), bytes.global_scale, access));
  }

  const CanonicalView& view() const noexcept { return view_; }
  Device device() const noexcept { return codes_.device(); }
  const Stream& stream() const noexcept { return codes_.stream(); }

 private:
  uint8_t* optional(std::optional<BorrowedTensor>& borrowed, nb::handle array, const char* name, bool expected,
                    int64_t bytes, Access access) const {
    NG_CHECK(array.is_none() != expected, InvalidArgument, name, expected ? " is missing" : " is given",
             ", but the format has ", expected ? "one" : "none");
    if (!expected) return nullptr;
    borrowed.emplace(array, name, access, device().is_cpu() ? Where::host : Where::anywhere);
    require_device(*borrowed, device(), name);
    return dense_bytes(borrowed->view(), name, bytes);
  }

  BorrowedTensor codes_;
  BorrowedTensor scales_;
  std::optional<BorrowedTensor> zeros_;
  std::optional<BorrowedTensor> global_scale_;
  CanonicalView view_;
};

// The choice whose name is `text`; InvalidArgument naming all of them otherwise.
template <typename Choice>
Choice choose(std::string_view text, const char* name,
              std::initializer_list<std::pair<std::string_view, Choice>> choices) {
  std::string names;
  for (const auto& [known, choice] : choices) {
    if (text == known) return choice;
    names += concat(names.empty() ? "'" : " or '", known, "'");
  }
  throw InvalidArgument(concat(name, " is '", text, "', expected ", names));
}

void quantize_into(nb::handle weights, const Format& format, int64_t rows, int64_t cols, nb::handle codes,
                   nb::handle scales, nb::handle zeros, nb::handle global_scale, std::string_view search,
                   std::string_view nan, bool stochastic, uint64_t seed, bool full_range, bool e8m0_ceil) {
  const QuantizeOptions options{
      .search = choose<ScaleSearch>(search, "search", {{"absmax", ScaleSearch::absmax}, {"mse", ScaleSearch::mse}}),
      .nan = choose<NanPolicy>(
          nan, "nan", {{"error", NanPolicy::error}, {"saturate", NanPolicy::saturate}, {"keep", NanPolicy::keep}}),
      .full_range = full_range,
      .e8m0_ceil = e8m0_ceil,
      .stochastic = stochastic,
      .seed = seed};
  const BorrowedTensor input(weights, "weights", Access::read, Where::anywhere);
  require_float(input.view(), "weights");
  const BorrowedCanonical out(format, rows, cols, codes, scales, zeros, global_scale, Access::write, Where::anywhere);
  require_device(input, out.device(), "weights");
  const nb::gil_scoped_release release;
  if (out.device().is_cpu()) {
    quantize(input.view(), out.view(), options, default_executor());
  } else {
    quantize(input.view(), out.view(), options, input.stream());
  }
}

void dequantize_into(const Format& format, int64_t rows, int64_t cols, nb::handle codes, nb::handle scales,
                     nb::handle zeros, nb::handle global_scale, nb::handle out) {
  const BorrowedCanonical matrix(format, rows, cols, codes, scales, zeros, global_scale, Access::read, Where::anywhere);
  const BorrowedTensor output(out, "out", Access::write, Where::anywhere);
  require_float(output.view(), "out");
  require_device(output, matrix.device(), "out");
  const nb::gil_scoped_release release;
  if (matrix.device().is_cpu()) {
    dequantize(matrix.view(), output.view(), default_executor());
  } else {
    dequantize(matrix.view(), output.view(), matrix.stream());
  }
}

// All on one device.
PackedMatrix pack_into(const Format& format, int64_t rows, int64_t cols, nb::handle codes, nb::handle scales,
                       nb::handle zeros, nb::handle global_scale, nb::object packed) {
  const BorrowedCanonical matrix(format, rows, cols, codes, scales, zeros, global_scale, Access::read, Where::anywhere);
  PackedMatrix result(packed, format, rows, cols);
  const BorrowedTensor output(packed, "packed", Access::write, Where::anywhere);
  require_device(output, matrix.device(), "packed");
  auto* data = const_cast<uint8_t*>(result.view(output).data);
  const nb::gil_scoped_release release;
  if (matrix.device().is_cpu()) {
    pack(matrix.view(), data, default_executor());
  } else {
    pack_cuda(matrix.view(), data, matrix.stream());
  }
  return result;
}

void unpack_into(const PackedMatrix& matrix, nb::handle codes, nb::handle scales, nb::handle zeros,
                 nb::handle global_scale) {
  const BorrowedTensor packed(matrix.array(), "packed", Access::read, Where::anywhere);
  const BorrowedCanonical out(matrix.format(), matrix.rows(), matrix.cols(), codes, scales, zeros, global_scale,
                              Access::write, Where::anywhere);
  require_device(packed, out.device(), "packed");
  const PackedView view = matrix.view(packed);
  const nb::gil_scoped_release release;
  if (out.device().is_cpu()) {
    unpack(view, out.view(), default_executor());
  } else {
    unpack_cuda(view, out.view(), out.stream());
  }
}

void gather_rows_into(const PackedMatrix& matrix, nb::handle indices, nb::handle out) {
  const BorrowedTensor packed(matrix.array(), "packed");
  const BorrowedTensor index(indices, "indices");
  NG_CHECK(index->dtype == DType::i64, InvalidArgument, "indices have dtype ", dtype_name(index->dtype),
           ", expected int64");
  NG_CHECK(index->is_contiguous(), InvalidArgument, "indices are not contiguous");
  const BorrowedTensor output(out, "out", Access::write);
  require_float(output.view(), "out");
  const nb::gil_scoped_release release;
  gather_rows(matrix.view(packed), static_cast<const int64_t*>(index->data), index->numel(), output.view(),
              default_executor());
}

}  // namespace

void bind_quantize(nb::module_& module) {
  nb::class_<PackedMatrix>(module, "PackedMatrix", nb::is_final(),
                           "A packed block in a u8 array, with its format and size; in the layout of the array's "
                           "device, aligned to 64 bytes, on a GPU to 128.")
      .def(nb::init<nb::object, const Format&, int64_t, int64_t>(), "array"_a, "format"_a, "rows"_a, "cols"_a)
      .def_prop_ro("array", &PackedMatrix::array)
      .def_prop_ro("format", &PackedMatrix::format)
      .def_prop_ro("rows", &PackedMatrix::rows)
      .def_prop_ro("cols", &PackedMatrix::cols);

  module.def(
      "canonical_bytes",
      [](const Format& format, int64_t rows, int64_t cols) {
        const CanonicalBytes bytes = canonical_bytes(format, rows, cols);
        return nb::make_tuple(bytes.codes, bytes.scales, bytes.zeros, bytes.global_scale);
      },
      "format"_a, "rows"_a, "cols"_a, "Bytes of (codes, scales, zeros, global_scale).");
  module.def(
      "packed_bytes",
      [](const Format& format, int64_t rows, int64_t cols, std::string_view device) {
        return packed_bytes(format, rows, cols, Device::parse(device));
      },
      "format"_a, "rows"_a, "cols"_a, "device"_a = "cpu", "Bytes of a block that is packed for a device.");

  module.def("quantize", &quantize_into, "weights"_a, "format"_a, "rows"_a, "cols"_a, "codes"_a, "scales"_a,
             "zeros"_a.none(), "global_scale"_a.none(), "search"_a, "nan"_a, "stochastic"_a, "seed"_a, "full_range"_a,
             "e8m0_ceil"_a);
  module.def("dequantize", &dequantize_into, "format"_a, "rows"_a, "cols"_a, "codes"_a, "scales"_a, "zeros"_a.none(),
             "global_scale"_a.none(), "out"_a);
  module.def("pack", &pack_into, "format"_a, "rows"_a, "cols"_a, "codes"_a, "scales"_a, "zeros"_a.none(),
             "global_scale"_a.none(), "packed"_a);
  module.def("unpack", &unpack_into, "matrix"_a, "codes"_a, "scales"_a, "zeros"_a.none(), "global_scale"_a.none());
  module.def("gather_rows", &gather_rows_into, "matrix"_a, "indices"_a, "out"_a);
}

}  // namespace ng::python
