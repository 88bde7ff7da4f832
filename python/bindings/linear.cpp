// Binds narrowgauge/linear.hpp: the call that is made for every layer and token, so the one whose overhead counts.
#include "narrowgauge/linear.hpp"

#include <nanobind/stl/string_view.h>

#include <memory>
#include <optional>
#include <utility>

#include "bindings.hpp"
#include "narrowgauge/memory.hpp"
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

// A new array of the framework whose table is given, dense, of the prototype's dtype, shape and device.
Allocated allocate(const dlpack::ExchangeApi& api, TensorView prototype, Device device) {
  int64_t stride = 1;
  for (auto axis = static_cast<size_t>(prototype.ndim); axis-- > 0;) {
    prototype.strides[axis] = stride;
    stride *= prototype.shape[axis];
  }
  const DLType dtype = dtype_dlpack(prototype.dtype);
  const auto place = device.is_cpu() ? dlpack::Device{dlpack::kCpu, 0} : dlpack::Device{dlpack::kCuda, device.gpu};
  dlpack::Tensor wanted{.data = nullptr,
                        .device = place,
                        .ndim = prototype.ndim,
                        .dtype = {dtype.code, dtype.bits, 1},
                        .shape = prototype.shape.data(),
                        .strides = nullptr,
                        .byte_offset = 0};
  dlpack::ManagedTensor* managed = nullptr;
  if (api.allocate(&wanted, &managed, nullptr, set_python_error) != 0) nb::raise_python_error();
  auto* data = static_cast<char*>(managed->tensor.data);
  prototype.data = data == nullptr ? nullptr : data + managed->tensor.byte_offset;
  void* object = nullptr;
  if (api.managed_to_object(managed, &object) != 0) nb::raise_python_error();
  return {nb::steal(static_cast<PyObject*>(object)), prototype};
}

// What the kernels of a GPU need beside their arguments, for one call. From the allocator of x's framework, so that
// the graphs that it captures keep it, else from the default pool; given back in the stream's order.
class Workspace {
 public:
  Workspace(const dlpack::ExchangeApi* api, int64_t bytes, const Stream& stream) {
    if (bytes == 0) return;
    if (api != nullptr) {
      theirs_ = allocate(*api, {nullptr, DType::u8, {bytes}}, {stream.device()});
    } else {
      auto pool = std::make_shared<StreamPool>(default_device_pool(stream.device()), stream);
      ours_ = Tensor::empty(std::move(pool), {&bytes, 1}, DType::u8);
    }
  }
  void* data() const noexcept { return theirs_.object.is_valid() ? theirs_.view.data : ours_->data; }

 private:
  Allocated theirs_;
  Tensor ours_;
};

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

// linear or its gradient, and what the argument is called.
struct Product {
  const char* in;
  void (*on_cpu)(const TensorView& in, const PackedView& weights, const TensorView* bias, const TensorView* residual,
                 const TensorView& out, Activations activations);
  // Null: it has no kernels there.
  void (*on_gpu)(const TensorView& in, const PackedView& weights, const TensorView* bias, const TensorView* residual,
                 const TensorView& out, void* workspace, const Stream& stream);
};

int64_t rows_of(const TensorView& view) noexcept {
  int64_t rows = 1;
  for (size_t axis = 0; axis + 1 < static_cast<size_t>(view.ndim); ++axis) rows *= view.shape[axis];
  return rows;
}

// Where the weights are; all else must be there too.
nb::object apply(const Product& product, nb::handle in_object, const PackedMatrix& weights, nb::handle bias_object,
                 nb::handle out_object, int64_t out_cols, Activations activations, nb::handle residual_object) {
  const Where where = product.on_gpu != nullptr ? Where::anywhere : Where::host;
  const BorrowedTensor packed(weights.array(), "packed", Access::read, where);
  const Device device = packed.device();
  const BorrowedTensor in(in_object, product.in, Access::read, where);
  require_float(in.view(), product.in);
  require_device(in, device, product.in);
  const auto borrow = [&](nb::handle object, const char* name) -> std::optional<BorrowedTensor> {
    if (object.is_none()) return std::nullopt;
    std::optional<BorrowedTensor> borrowed(std::in_place, object, name, Access::read, where);
    require_float(borrowed->view(), name);
    require_device(*borrowed, device, name);
    return borrowed;
  };
  const std::optional<BorrowedTensor> bias = borrow(bias_object, "bias");
  const std::optional<BorrowedTensor> residual = borrow(residual_object, "residual");
  const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(in_object.ptr()));
  std::optional<Allocated> allocated;
  std::optional<BorrowedTensor> out;
  if (out_object.is_none()) {
    NG_CHECK(api != nullptr && in->ndim > 0, InvalidArgument, "out is missing");
    TensorView prototype = in.view();
    prototype.shape[static_cast<size_t>(prototype.ndim - 1)] = out_cols;
    allocated.emplace(allocate(*api, prototype, device));
  } else {
    out.emplace(out_object, "out", Access::write, where);
    require_float(out->view(), "out");
    require_device(*out, device, "out");
  }
  const TensorView& result = allocated ? allocated->view : out->view();

  const PackedView view = weights.view(packed);
  const TensorView* bias_view = bias ? &bias->view() : nullptr;
  const TensorView* residual_view = residual ? &residual->view() : nullptr;
  if (!device.is_cpu()) {
    NG_CHECK(activations == Activations::exact, InvalidArgument, "activations are ", activations_name(activations),
             " on cuda:", device.gpu, "; expected exact, which is what GPUs have");
    const int64_t bytes =
        linear_workspace_bytes(rows_of(in.view()), weights.format(), weights.rows(), weights.cols(), device.gpu);
    const Workspace workspace(api, bytes, in.stream());
    const nb::gil_scoped_release release;
    product.on_gpu(in.view(), view, bias_view, residual_view, result, workspace.data(), in.stream());
  } else if (in->numel() * out_cols < kKeepGilBelow) {
    product.on_cpu(in.view(), view, bias_view, residual_view, result, activations);
  } else {
    const nb::gil_scoped_release release;
    product.on_cpu(in.view(), view, bias_view, residual_view, result, activations);
  }
  return allocated ? std::move(allocated->object) : nb::borrow(out_object);
}

constexpr Product kLinear{"x",
                          [](const TensorView& x, const PackedView& weights, const TensorView* bias,
                             const TensorView* residual, const TensorView& y, Activations activations) {
                            linear(x, weights, bias, residual, y, default_executor(), activations);
                          },
                          [](const TensorView& x, const PackedView& weights, const TensorView* bias,
                             const TensorView* residual, const TensorView& y, void* workspace,
                             const Stream& stream) { linear(x, weights, bias, residual, y, workspace, stream); }};

constexpr Product kBackward{
    "dy",
    [](const TensorView& dy, const PackedView& weights, const TensorView*, const TensorView*, const TensorView& dx,
       Activations) { linear_backward_input(dy, weights, dx, default_executor()); },
    nullptr};

}  // namespace

void bind_linear(nb::module_& module) {
  module.def(
      "linear",
      [](nb::handle x, const PackedMatrix& weights, nb::handle bias, nb::handle out, std::string_view activations,
         nb::handle residual) {
        return apply(kLinear, x, weights, bias, out, weights.rows(), parse_activations(activations), residual);
      },
      "x"_a, "weights"_a, "bias"_a.none() = nb::none(), "out"_a.none() = nb::none(), "activations"_a = "exact",
      "residual"_a.none() = nb::none(),
      "y = x @ w.T + bias + residual, where the weights are; on a GPU in the current stream of x's framework, and "
      "nothing waits. "
      "`out` may be left out where x's framework can allocate by DLPack (torch).");

  module.def(
      "linear_backward_input",
      [](nb::handle dy, const PackedMatrix& weights, nb::handle out) {
        return apply(kBackward, dy, weights, nb::none(), out, weights.cols(), Activations::exact, nb::none());
      },
      "dy"_a, "weights"_a, "out"_a.none() = nb::none(), "dx = dy @ w, on the CPU. `out` as for linear.");

  module.def(
      "check_activations",
      [](std::string_view activations, const Format& format) {
        check_activations(parse_activations(activations), format);
      },
      "activations"_a, "format"_a, "ValueError unless linear takes them with weights in the Format.");

  module.def(
      "is_matrix",
      [](nb::handle array, const char* name) {
        return is_matrix(BorrowedTensor(array, name, Access::read, Where::anywhere).view());
      },
      "array"_a, "name"_a = "array",
      "Whether linear takes the array as it is: dense rows, leading axes that flatten to one stride.");
}

}  // namespace ng::python
