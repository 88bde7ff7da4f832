// Borrowing arrays from Python; see tensor_view.hpp.
#include "tensor_view.hpp"

#include <nanobind/stl/tuple.h>

#include <array>
#include <atomic>
#include <mutex>
#include <tuple>

#include "narrowgauge/error.hpp"
#include "tensor.hpp"

namespace ng::python {
namespace {

// Looks the table up on the type, so that subclasses inherit it. Null, with no error set, if there is none.
const dlpack::ExchangeApi* find_exchange_api(PyTypeObject* type) noexcept {
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  const dlpack::ExchangeApi* api = nullptr;
  if (capsule != nullptr) {
    api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  if (api == nullptr || api->header.version.major != dlpack::kMajorVersion) return nullptr;
  return api->view_from_object != nullptr ? api : nullptr;
}

// The tables of the types seen first. Entries are written once under the lock, `api` before `type`, and never
// change, so that a reader who sees its type sees the right table. A full cache only means the slower look-up.
struct CacheEntry {
  std::atomic<PyTypeObject*> type{nullptr};
  const dlpack::ExchangeApi* api = nullptr;
};
constexpr size_t kCacheEntries = 16;
std::array<CacheEntry, kCacheEntries> cache;
std::mutex cache_mutex;

std::string class_name(nb::handle object) { return nb::inst_name(object).c_str(); }

// What the message of a TypeError calls a DLPack type.
std::string dlpack_name(dlpack::DataType type) {
  static constexpr std::array kCodes = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  const char* code = type.code < kCodes.size() ? kCodes[type.code] : "type code ";
  return type.code < kCodes.size() ? concat(code, int{type.bits}) : concat(code, int{type.code});
}

[[noreturn]] void throw_type_error(const std::string& message) { throw nb::type_error(message.c_str()); }

}  // namespace

Device device_of(dlpack::Device device, const char* name) {
  if (device.type == dlpack::kCpu || device.type == dlpack::kCudaHost) return {};
  NG_CHECK(device.type == dlpack::kCuda && device.id >= 0, InvalidArgument, name, " is on a device of DLPack type ",
           device.type, ", expected host memory or a CUDA device");
  return {device.id};
}

TensorView view_of(const dlpack::Tensor& tensor, const char* name) {
  TensorView view;
  NG_CHECK(tensor.ndim <= kMaxDims, InvalidArgument, name, " has ", tensor.ndim, " axes, at most ", kMaxDims,
           " are supported");
  try {
    view.dtype = dtype_from_dlpack({tensor.dtype.code, tensor.dtype.bits});
  } catch (const InvalidArgument&) {
    throw_type_error(concat(name, " has dtype ", dlpack_name(tensor.dtype), ", which is not supported"));
  }
  if (tensor.dtype.lanes != 1) throw_type_error(concat(name, " has a vector dtype, which is not supported"));
  view.ndim = tensor.ndim;
  int64_t dense_stride = 1;
  for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
    const auto at = static_cast<size_t>(axis);
    view.shape[at] = tensor.shape[at];
    view.strides[at] = tensor.strides != nullptr ? tensor.strides[at] : dense_stride;
    dense_stride *= tensor.shape[at];
  }
  if (tensor.data != nullptr) view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  NG_CHECK(view.data != nullptr || dense_stride == 0, InvalidArgument, name,
           " has no memory behind it (a fake or meta tensor?)");
  return view;
}

const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) noexcept {
  for (const CacheEntry& entry : cache) {
    PyTypeObject* seen = entry.type.load(std::memory_order_acquire);
    if (seen == type) return entry.api;
    if (seen == nullptr) break;
  }
  const dlpack::ExchangeApi* api = find_exchange_api(type);
  const std::lock_guard lock(cache_mutex);
  for (CacheEntry& entry : cache) {
    PyTypeObject* seen = entry.type.load(std::memory_order_relaxed);
    if (seen == type) break;
    if (seen == nullptr) {
      Py_INCREF(reinterpret_cast<PyObject*>(type));  // so that its address is never another type's
      entry.api = api;
      entry.type.store(type, std::memory_order_release);
      break;
    }
  }
  return api;
}

BorrowedTensor::BorrowedTensor(nb::handle object, const char* name, Access access, Where where) {
  if (const PyTensor* tensor = nullptr; nb::try_cast(object, tensor, false) && tensor != nullptr) {
    borrow_tensor(*tensor, name, access);
  } else if (const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
    borrow_exchanged(*api, object, name);
  } else {
    borrow_array(object, name, access);
  }
  NG_CHECK(device_.is_cpu() || where == Where::anywhere, InvalidArgument, name, " is on ", device_.str(),
           ", expected host memory");
}

void BorrowedTensor::borrow_tensor(const PyTensor& tensor, const char* name, Access access) {
  if (access == Access::write && tensor.read_only) throw_type_error(concat(name, " is read-only"));
  view_ = tensor.tensor.view();
  device_ = tensor.tensor.device();
  if (!device_.is_cpu()) stream_ = current_stream(device_.gpu);
}

void BorrowedTensor::borrow_exchanged(const dlpack::ExchangeApi& api, nb::handle object, const char* name) {
  dlpack::Tensor tensor;
  if (api.view_from_object(object.ptr(), &tensor) != 0) nb::raise_python_error();
  device_ = device_of(tensor.device, name);
  view_ = view_of(tensor, name);
  if (device_.is_cpu()) return;
  void* stream = nullptr;
  if (api.current_work_stream(tensor.device.type, tensor.device.id, &stream) != 0) nb::raise_python_error();
  stream_ = {device_.gpu, static_cast<CUstream_st*>(stream)};
}

void BorrowedTensor::borrow_array(nb::handle object, const char* name, Access access) {
  if (nb::hasattr(object, "__dlpack_device__")) {
    const auto [type, id] = nb::cast<std::tuple<int32_t, int32_t>>(object.attr("__dlpack_device__")());
    if (!device_of({type, id}, name).is_cpu()) {
      PyTensor tensor = from_dlpack(object);
      borrow_tensor(tensor, name, access);
      shared_ = std::move(tensor.tensor);
      return;
    }
  }
  // Exact matches only: a conversion would make a copy, and writing to a copy would lose the result.
  if (access == Access::read) {
    if (!nb::try_cast(object, owner_, false)) {
      throw_type_error(concat(name, " is a ", class_name(object), ", expected a tensor or an array"));
    }
  } else {
    nb::ndarray<> writable;
    if (!nb::try_cast(object, writable, false)) {
      throw_type_error(concat(name, " is a ", class_name(object), ", expected a writable tensor or array"));
    }
    owner_ = nb::ndarray<nb::ro>(writable);
  }
  NG_CHECK(owner_.ndim() <= kMaxDims, InvalidArgument, name, " has ", owner_.ndim(), " axes, at most ", kMaxDims,
           " are supported");
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> strides{};
  for (size_t axis = 0; axis < owner_.ndim(); ++axis) {
    shape[axis] = static_cast<int64_t>(owner_.shape(axis));
    strides[axis] = owner_.stride(axis);
  }
  const nb::dlpack::dtype dtype = owner_.dtype();
  const dlpack::Device device{owner_.device_type(), owner_.device_id()};
  device_ = device_of(device, name);
  view_ = view_of({.data = const_cast<void*>(static_cast<const void*>(owner_.data())),
                   .device = device,
                   .ndim = static_cast<int32_t>(owner_.ndim()),
                   .dtype = {dtype.code, dtype.bits, dtype.lanes},
                   .shape = shape.data(),
                   .strides = strides.data(),
                   .byte_offset = 0},
                  name);
}

void require_device(const BorrowedTensor& tensor, Device device, const char* name) {
  NG_CHECK(tensor.device() == device, InvalidArgument, name, " is on ", tensor.device().str(), ", expected ",
           device.str());
}

void require_float(const TensorView& view, const char* name) {
  if (view.dtype == DType::f32 || view.dtype == DType::f16 || view.dtype == DType::bf16) return;
  throw_type_error(concat(name, " has dtype ", dtype_name(view.dtype), ", expected float32, float16 or bfloat16"));
}

uint8_t* dense_bytes(const TensorView& view, const char* name, int64_t bytes) {
  NG_CHECK(view.is_contiguous(), InvalidArgument, name, " is not contiguous");
  NG_CHECK(view.bytes() == bytes, InvalidArgument, name, " has ", view.bytes(), " bytes, expected ", bytes);
  return static_cast<uint8_t*>(view.data);
}

}  // namespace ng::python
