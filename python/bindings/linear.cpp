// Binds narrowgauge/linear.hpp: the call that is made for every layer and token, so the one whose overhead counts.
#include "narrowgauge/linear.hpp"

#include <optional>

#include "bindings.hpp"
#include "packed.hpp"

namespace ng::python {
namespace {

using namespace nb::literals;

// Below this many multiplications the arithmetic is shorter than giving the GIL away and taking it back.
constexpr int64_t kKeepGilBelow = 1 << 16;

// Raises what a framework's allocator reports.
void set_python_error(void*, const char* kind, const char* message) {
  PyErr_SetString(std::string_view(kind) == "MemoryError" ? PyExc_MemoryError : PyExc_RuntimeError, message);
}

struct Allocated {
  nb::object object;
  TensorView view;
};

// A new array of the framework whose table is given, with `like`'s dtype and leading axes and `cols` columns.
Allocated allocate(const dlpack::ExchangeApi& api, const TensorView& like, int64_t cols) {
  TensorView view = like;
  view.shape[static_cast<size_t>(like.ndim - 1)] = cols;
  int64_t stride = 1;
  for (auto axis = static_cast<size_t>(like.ndim); axis-- > 0;) {
    view.strides[axis] = stride;
    stride *= view.shape[axis];
  }
  const DLType dtype = dtype_dlpack(like.dtype);
  dlpack::Tensor prototype{.data = nullptr,
                           .device = {dlpack::kCpu, 0},
                           .ndim = like.ndim,
                           .dtype = {dtype.code, dtype.bits, 1},
                           .shape = view.shape.data(),
                           .strides = nullptr,
                           .byte_offset = 0};
  dlpack::ManagedTensor* managed = nullptr;
  if (api.allocate(&prototype, &managed, nullptr, set_python_error) != 0) nb::raise_python_error();
  if (managed->tensor.data != nullptr)
    view.data = static_cast<char*>(managed->tensor.data) + managed->tensor.byte_offset;
  void* object = nullptr;
  if (api.managed_to_object(managed, &object) != 0) nb::raise_python_error();
  return {nb::steal(static_cast<PyObject*>(object)), view};
}

// Whether the leading axes flatten to one stride and the rows are dense, as the core demands.
bool is_matrix(const TensorView& view) noexcept {
  if (view.ndim == 0) return false;
  if (view.is_contiguous()) return true;
  const auto last = static_cast<size_t>(view.ndim - 1);
  if (view.strides[last] != 1 && view.shape[last] > 1) return false;
  for (size_t axis = 0; axis + 1 < last; ++axis) {
    if (view.strides[axis] != view.shape[axis + 1] * view.strides[axis + 1]) return false;
  }
  return true;
}

using Function = void (*)(const TensorView& in, const PackedView& weights, const TensorView* bias,
                          const TensorView& out);

nb::object apply(Function function, nb::handle in_object, const char* in_name, const PackedMatrix& weights,
                 nb::handle bias_object, nb::handle out_object, const char* out_name, int64_t out_cols) {
  const BorrowedTensor packed(weights.array(), "packed");
  const BorrowedTensor in(in_object, in_name);
  require_float(in.view(), in_name);
  std::optional<BorrowedTensor> bias;
  if (!bias_object.is_none()) {
    bias.emplace(bias_object, "bias");
    require_float(bias->view(), "bias");
  }
  std::optional<Allocated> allocated;
  std::optional<BorrowedTensor> out;
  if (out_object.is_none()) {
    const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(in_object.ptr()));
    NG_CHECK(api != nullptr && in->ndim > 0, InvalidArgument, out_name, " is missing");
    allocated.emplace(allocate(*api, in.view(), out_cols));
  } else {
    out.emplace(out_object, out_name, Access::write);
    require_float(out->view(), out_name);
  }
  const TensorView& result = allocated ? allocated->view : out->view();

  const PackedView view = weights.view(packed);
  const TensorView* bias_view = bias ? &bias->view() : nullptr;
  if (in->numel() * out_cols < kKeepGilBelow) {
    function(in.view(), view, bias_view, result);
  } else {
    const nb::gil_scoped_release release;
    function(in.view(), view, bias_view, result);
  }
  return allocated ? std::move(allocated->object) : nb::borrow(out_object);
}

}  // namespace

void bind_linear(nb::module_& module) {
  module.def(
      "linear",
      [](nb::handle x, const PackedMatrix& weights, nb::handle bias, nb::handle out) {
        return apply([](const TensorView& in, const PackedView& w, const TensorView* b,
                        const TensorView& y) { linear(in, w, b, y, default_executor()); },
                     x, "x", weights, bias, out, "out", weights.rows());
      },
      "x"_a, "weights"_a, "bias"_a.none() = nb::none(), "out"_a.none() = nb::none(),
      "y = x @ w.T + bias. `out` may be left out where x's framework can allocate by DLPack (torch).");

  module.def(
      "linear_backward_input",
      [](nb::handle dy, const PackedMatrix& weights, nb::handle out) {
        return apply([](const TensorView& in, const PackedView& w, const TensorView*,
                        const TensorView& dx) { linear_backward_input(in, w, dx, default_executor()); },
                     dy, "dy", weights, nb::none(), out, "out", weights.cols());
      },
      "dy"_a, "weights"_a, "out"_a.none() = nb::none(), "dx = dy @ w. `out` as for linear.");

  module.def(
      "is_matrix", [](nb::handle array, const char* name) { return is_matrix(BorrowedTensor(array, name).view()); },
      "array"_a, "name"_a = "array",
      "Whether linear takes the array as it is: dense rows, leading axes that flatten to one stride.");
}

}  // namespace ng::python
