// The C interface over the C++ one: it checks pointers, turns exceptions into statuses and does nothing else.
#include "narrowgauge/narrowgauge.h"

#include <new>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/linear.hpp"
#include "narrowgauge/quantize.hpp"
#include "narrowgauge/stream.hpp"

static_assert(NG_F32 == static_cast<int>(ng::DType::f32));
static_assert(NG_F16 == static_cast<int>(ng::DType::f16));
static_assert(NG_BF16 == static_cast<int>(ng::DType::bf16));
static_assert(NG_NAN_ERROR == static_cast<int>(ng::NanPolicy::error));
static_assert(NG_NAN_SATURATE == static_cast<int>(ng::NanPolicy::saturate));
static_assert(NG_NAN_KEEP == static_cast<int>(ng::NanPolicy::keep));

struct ng_qtensor {
  explicit ng_qtensor(ng::QTensor&& matrix) : tensor(std::move(matrix)), format(tensor.format().str()) {}

  ng::QTensor tensor;
  std::string format;
};

namespace {

using ng::InvalidArgument;

std::string& last_error() noexcept {
  thread_local std::string message;
  return message;
}

// The message is lost, not the status, if there is no memory left for it.
ng_status fail(ng_status status, const char* message) noexcept {
  try {
    last_error() = message;
  } catch (...) {
    last_error().clear();
  }
  return status;
}

template <typename Body>
ng_status guarded(const Body& body) noexcept {
  try {
    body();
    return NG_OK;
  } catch (const InvalidArgument& error) {
    return fail(NG_INVALID_ARGUMENT, error.what());
  } catch (const ng::OutOfMemory& error) {
    return fail(NG_OUT_OF_MEMORY, error.what());
  } catch (const ng::SystemError& error) {
    return fail(NG_SYSTEM_ERROR, error.what());
  } catch (const ng::FileCorrupt& error) {
    return fail(NG_FILE_CORRUPT, error.what());
  } catch (const ng::CudaError& error) {
    return fail(NG_CUDA_ERROR, error.what());
  } catch (const std::bad_alloc&) {
    return fail(NG_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(NG_INTERNAL, error.what());
  } catch (...) {
    return fail(NG_INTERNAL, "unknown error");
  }
}

template <typename T>
T& checked(T* pointer, const char* name) {
  NG_CHECK(pointer != nullptr, InvalidArgument, name, " is null");
  return *pointer;
}

ng::TensorView view_of(const ng_tensor* tensor, const char* name) {
  const ng_tensor& source = checked(tensor, name);
  NG_CHECK(source.dtype == NG_F32 || source.dtype == NG_F16 || source.dtype == NG_BF16, InvalidArgument, name,
           " has dtype ", source.dtype, "; expected NG_F32, NG_F16 or NG_BF16");
  NG_CHECK(source.ndim >= 1 && source.ndim <= ng::kMaxDims, InvalidArgument, name, " has ", source.ndim,
           " axes; expected 1 to ", ng::kMaxDims);
  checked(source.shape, ng::concat(name, ".shape").c_str());
  ng::TensorView view;
  view.data = source.data;
  view.dtype = static_cast<ng::DType>(source.dtype);
  view.ndim = source.ndim;
  int64_t dense = 1;
  for (int axis = view.ndim - 1; axis >= 0; --axis) {
    const auto i = static_cast<size_t>(axis);
    NG_CHECK(source.shape[axis] >= 0, InvalidArgument, name, " has the negative size ", source.shape[axis], " on axis ",
             axis);
    view.shape[i] = source.shape[axis];
    view.strides[i] = source.strides != nullptr ? source.strides[axis] : dense;
    NG_CHECK(!__builtin_mul_overflow(dense, source.shape[axis], &dense), InvalidArgument, name,
             " has more elements than an int64 counts");
  }
  return view;
}

// Of a tensor that may be null.
class OptionalView {
 public:
  OptionalView(const ng_tensor* tensor, const char* name) {
    if (tensor != nullptr) view_ = view_of(tensor, name);
  }
  const ng::TensorView* get() const { return view_ ? &*view_ : nullptr; }

 private:
  std::optional<ng::TensorView> view_;
};

ng::QuantizeOptions options_of(const ng_quantize_options* options) {
  if (options == nullptr) return {};
  const ng_nan_policy nan = options->nan;
  NG_CHECK(nan == NG_NAN_ERROR || nan == NG_NAN_SATURATE || nan == NG_NAN_KEEP, InvalidArgument, "nan is ",
           static_cast<int>(nan), "; expected NG_NAN_ERROR, NG_NAN_SATURATE or NG_NAN_KEEP");
  return {.search = options->search_mse != 0 ? ng::ScaleSearch::mse : ng::ScaleSearch::absmax,
          .nan = static_cast<ng::NanPolicy>(nan),
          .full_range = options->full_range != 0,
          .e8m0_ceil = options->e8m0_ceil != 0,
          .stochastic = options->stochastic != 0,
          .seed = options->seed};
}

ng::CanonicalView canonical_of(const char* format, const ng_canonical* matrix, const char* name) {
  const ng_canonical& source = checked(matrix, name);
  return {ng::Format::parse(&checked(format, "format")),
          source.rows,
          source.cols,
          source.codes,
          source.scales,
          source.zeros,
          source.global_scale};
}

ng::Stream stream_of(int32_t device, void* stream) { return {device, static_cast<CUstream_st*>(stream)}; }

}  // namespace

const char* ng_version(void) { return NARROWGAUGE_VERSION; }

const char* ng_isa(void) {
  const char* name = nullptr;
  (void)guarded([&] { name = ng::isa_name(ng::isa()).data(); });  // names are literals: terminated
  return name;
}

const char* ng_last_error(void) { return last_error().c_str(); }

int32_t ng_threads(void) { return ng::default_executor().threads(); }

ng_status ng_set_threads(int32_t threads) {
  return guarded([&] { ng::default_executor().set_threads(threads); });
}

ng_status ng_quantize(const ng_tensor* weights, const char* format, const ng_quantize_options* options,
                      ng_qtensor** out) {
  return guarded([&] {
    checked(out, "out");
    const auto parsed = ng::Format::parse(&checked(format, "format"));
    *out = new ng_qtensor(ng::QTensor::quantize(view_of(weights, "weights"), parsed, options_of(options)));
  });
}

ng_status ng_qtensor_copy_of(const char* format, int32_t ndim, const int64_t* shape, const uint8_t* codes,
                             const void* scales, const uint8_t* zeros, const float* global_scale, ng_qtensor** out) {
  return guarded([&] {
    checked(out, "out");
    NG_CHECK(ndim >= 1 && ndim <= ng::kMaxDims, InvalidArgument, "ndim is ", ndim, "; expected 1 to ", ng::kMaxDims);
    std::vector<int64_t> sizes(&checked(shape, "shape"), shape + ndim);
    ng::CanonicalView view;
    view.format = ng::Format::parse(&checked(format, "format"));
    view.cols = sizes.back();
    view.rows = 1;
    for (int axis = 0; axis + 1 < ndim; ++axis) {
      NG_CHECK(shape[axis] >= 0 && !__builtin_mul_overflow(view.rows, shape[axis], &view.rows), InvalidArgument,
               "shape has the size ", shape[axis], " on axis ", axis, ": negative, or too many rows for an int64");
    }
    // CanonicalView has no const twin; copy_of only reads.
    view.codes = const_cast<uint8_t*>(codes);
    view.scales = const_cast<void*>(scales);
    view.zeros = const_cast<uint8_t*>(zeros);
    view.global_scale = const_cast<float*>(global_scale);
    *out = new ng_qtensor(ng::QTensor::copy_of(view, std::move(sizes)));
  });
}

void ng_qtensor_free(ng_qtensor* tensor) { delete tensor; }

ng_status ng_pack(ng_qtensor* tensor) {
  return guarded([&] {
    ng::QTensor& matrix = checked(tensor, "tensor").tensor;
    matrix = ng::pack(std::move(matrix));
  });
}

ng_status ng_unpack(ng_qtensor* tensor) {
  return guarded([&] {
    ng::QTensor& matrix = checked(tensor, "tensor").tensor;
    matrix = ng::unpack(std::move(matrix));
  });
}

int32_t ng_qtensor_is_packed(const ng_qtensor* tensor) { return tensor->tensor.packed() ? 1 : 0; }

const char* ng_qtensor_format(const ng_qtensor* tensor) { return tensor->format.c_str(); }

int32_t ng_qtensor_ndim(const ng_qtensor* tensor) { return static_cast<int32_t>(tensor->tensor.shape().size()); }

const int64_t* ng_qtensor_shape(const ng_qtensor* tensor) { return tensor->tensor.shape().data(); }

int64_t ng_qtensor_nbytes(const ng_qtensor* tensor) { return tensor->tensor.nbytes(); }

ng_status ng_save(const ng_qtensor* tensor, const char* path, const char* name) {
  return guarded(
      [&] { ng::save(checked(tensor, "tensor").tensor, &checked(path, "path"), name == nullptr ? "weight" : name); });
}

ng_status ng_load(const char* path, const char* name, ng_qtensor** out) {
  return guarded([&] {
    checked(out, "out");
    *out = new ng_qtensor(ng::load(&checked(path, "path"), name == nullptr ? "" : name));
  });
}

ng_status ng_dequantize(const ng_qtensor* tensor, const ng_tensor* out) {
  return guarded([&] {
    const ng::QTensor& matrix = checked(tensor, "tensor").tensor;
    const ng::TensorView target = view_of(out, "out");
    if (!matrix.packed()) {
      ng::dequantize(matrix.canonical_view(), target, ng::default_executor());
      return;
    }
    std::vector<int64_t> rows(static_cast<size_t>(matrix.rows()));
    std::iota(rows.begin(), rows.end(), int64_t{0});
    ng::gather_rows(matrix.packed_view(), rows.data(), matrix.rows(), target, ng::default_executor());
  });
}

ng_status ng_linear(const ng_tensor* x, const ng_qtensor* weights, const ng_tensor* bias, const ng_tensor* residual,
                    const ng_tensor* y) {
  return ng_linear_rounded(x, weights, bias, residual, y, NG_EXACT);
}

ng_status ng_linear_rounded(const ng_tensor* x, const ng_qtensor* weights, const ng_tensor* bias,
                            const ng_tensor* residual, const ng_tensor* y, int32_t activations) {
  return guarded([&] {
    NG_CHECK(activations >= NG_EXACT && activations <= NG_INT8, InvalidArgument, "activations are ", activations,
             "; expected NG_EXACT, NG_INT16 or NG_INT8");
    const ng::TensorView input = view_of(x, "x");
    const ng::TensorView output = view_of(y, "y");
    const ng::PackedView packed = checked(weights, "weights").tensor.packed_view();
    const OptionalView bias_view(bias, "bias"), residual_view(residual, "residual");
    ng::linear(input, packed, bias_view.get(), residual_view.get(), output, ng::default_executor(),
               static_cast<ng::Activations>(activations));
  });
}

// --- on a GPU ----------------------------------------------------------------------------------------------------

const char* ng_why_no_cuda(void) {
  static const std::string reason = ng::why_no_cuda();
  return reason.c_str();
}

ng_status ng_canonical_bytes(const char* format, int64_t rows, int64_t cols, int64_t bytes[4]) {
  return guarded([&] {
    checked(bytes, "bytes");
    const ng::CanonicalBytes sizes = ng::canonical_bytes(ng::Format::parse(&checked(format, "format")), rows, cols);
    bytes[0] = sizes.codes;
    bytes[1] = sizes.scales;
    bytes[2] = sizes.zeros;
    bytes[3] = sizes.global_scale;
  });
}

ng_status ng_cuda_quantize(const ng_tensor* weights, const char* format, const ng_quantize_options* options,
                           const ng_canonical* out, int32_t device, void* stream) {
  return guarded([&] {
    ng::quantize(view_of(weights, "weights"), canonical_of(format, out, "out"), options_of(options),
                 stream_of(device, stream));
  });
}

ng_status ng_cuda_dequantize(const char* format, const ng_canonical* matrix, const ng_tensor* out, int32_t device,
                             void* stream) {
  return guarded(
      [&] { ng::dequantize(canonical_of(format, matrix, "matrix"), view_of(out, "out"), stream_of(device, stream)); });
}

ng_status ng_cuda_packed_bytes(const char* format, int64_t rows, int64_t cols, int64_t* bytes) {
  return guarded([&] {
    checked(bytes, "bytes") = ng::cuda_packed_bytes(ng::Format::parse(&checked(format, "format")), rows, cols);
  });
}

ng_status ng_cuda_pack(const ng_qtensor* tensor, uint8_t* packed) {
  return guarded(
      [&] { ng::pack_cuda(checked(tensor, "tensor").tensor.canonical_view(), packed, ng::default_executor()); });
}

ng_status ng_cuda_linear_workspace_bytes(int64_t rows, const char* format, int64_t n, int64_t k, int32_t device,
                                         int64_t* bytes) {
  return guarded([&] {
    checked(bytes, "bytes") =
        ng::linear_workspace_bytes(rows, ng::Format::parse(&checked(format, "format")), n, k, device);
  });
}

ng_status ng_cuda_linear(const ng_tensor* x, const char* format, const ng_cuda_packed* weights, const ng_tensor* bias,
                         const ng_tensor* residual, const ng_tensor* y, void* workspace, int32_t device, void* stream) {
  return guarded([&] {
    const ng::TensorView input = view_of(x, "x"), output = view_of(y, "y");
    const ng_cuda_packed& block = checked(weights, "weights");
    const ng::PackedView packed{ng::Format::parse(&checked(format, "format")), block.rows, block.cols, block.data};
    const OptionalView bias_view(bias, "bias"), residual_view(residual, "residual");
    ng::linear(input, packed, bias_view.get(), residual_view.get(), output, workspace, stream_of(device, stream));
  });
}

ng_status ng_cuda_synchronize(int32_t device, void* stream) {
  return guarded([&] { stream_of(device, stream).synchronize(); });
}
