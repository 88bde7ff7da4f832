// Binds Tensor of narrowgauge/tensor.hpp, with DLPack in both directions and CUDA's array interface.
//
// What DLPack hands out holds a share of the memory in C++, not the Python object: it can be released by any thread,
// without the GIL, and after the interpreter has ended. On a GPU both sides agree on an order: what a consumer does in
// the stream that it names comes after what was given to this thread's current stream.
#include "tensor.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstring>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "dlpack.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"
#include "tensor_view.hpp"

namespace ng::python {
namespace {

constexpr const char* kVersionedName = "dltensor_versioned";
constexpr const char* kLegacyName = "dltensor";

[[noreturn]] void throw_type_error(const std::string& message) { throw nb::type_error(message.c_str()); }
[[noreturn]] void throw_buffer_error(const std::string& message) { throw nb::buffer_error(message.c_str()); }

nb::tuple shape_of(const PyTensor& self) {
  nb::list shape;
  for (int axis = 0; axis < self.tensor->ndim; ++axis) shape.append(self.tensor->shape[static_cast<size_t>(axis)]);
  return nb::tuple(shape);
}

// --- copies ------------------------------------------------------------------------------------------------------

void copy_axis(const TensorView& from, size_t axis, const std::byte* source, std::byte*& target) {
  const size_t width = dtype_bytes(from.dtype);
  if (axis == static_cast<size_t>(from.ndim)) {
    std::memcpy(target, source, width);
    target += width;
    return;
  }
  for (int64_t i = 0; i < from.shape[axis]; ++i) {
    copy_axis(from, axis + 1, source + i * from.strides[axis] * static_cast<int64_t>(width), target);
  }
}

// A view of the same shape with dense strides and no data.
TensorView dense_like(const TensorView& from) {
  TensorView view = from;
  view.data = nullptr;
  int64_t stride = 1;
  for (auto axis = static_cast<size_t>(from.ndim); axis-- > 0;) {
    view.strides[axis] = stride;
    stride *= from.shape[axis];
  }
  return view;
}

// Host memory from the heap, for what copies from a GPU and bytes become.
class HeapPool final : public Pool {
 public:
  void* allocate(size_t bytes) override {
    void* block = ::operator new(bytes, kAlignment, std::nothrow);
    NG_CHECK(block != nullptr, OutOfMemory, "cannot allocate ", bytes, " bytes of host memory");
    return block;
  }
  void deallocate(void* block, size_t) noexcept override { ::operator delete(block, kAlignment); }

 private:
  static constexpr std::align_val_t kAlignment{kPoolAlignment};
};

// Contents undefined. On a GPU the memory is used in the order of the current stream.
Tensor empty(std::span<const int64_t> shape, DType dtype, Device device) {
  if (!device.is_cpu()) {
    auto pool = std::make_shared<StreamPool>(default_device_pool(device.gpu), current_stream(device.gpu));
    return Tensor::empty(std::move(pool), shape, dtype);
  }
  return Tensor::empty(std::make_shared<HeapPool>(), shape, dtype);
}

Tensor empty_like(const TensorView& like, Device device) {
  return empty({like.shape.data(), static_cast<size_t>(like.ndim)}, like.dtype, device);
}

Tensor copy_on_host(const TensorView& from) {
  Tensor copy = empty_like(from, {});
  if (from.numel() == 0) return copy;
  if (from.is_contiguous()) {
    std::memcpy(copy->data, from.data, static_cast<size_t>(from.bytes()));
  } else {
    auto* target = static_cast<std::byte*>(copy->data);
    copy_axis(from, 0, static_cast<const std::byte*>(from.data), target);
  }
  return copy;
}

void require_dense(const TensorView& view, const char* name) {
  NG_CHECK(view.is_contiguous(), InvalidArgument, name, " of shape ", view.shape_str(),
           " is not contiguous; copies between devices take dense tensors");
}

// In the order of the GPU's current stream. Waits unless `in_background`, which leaves it to the caller to keep both
// until it is done.
void copy_across(const Tensor& from, const Tensor& to, bool in_background) {
  NG_CHECK(from->dtype == to->dtype && from->shape_str() == to->shape_str(), InvalidArgument, "a tensor of ",
           dtype_name(from->dtype), from->shape_str(), " is copied into one of ", dtype_name(to->dtype),
           to->shape_str());
  require_dense(from.view(), "the source");
  require_dense(to.view(), "the target");
  const nb::gil_scoped_release release;
  if (from.device().is_cpu() && to.device().is_cpu()) {
    if (from->numel() > 0) std::memmove(to->data, from->data, static_cast<size_t>(from->bytes()));
    return;
  }
  const Stream stream = current_stream(to.device().is_cpu() ? from.device().gpu : to.device().gpu);
  copy(to->data, from->data, static_cast<size_t>(from->bytes()), stream);
  if (!in_background) stream.synchronize();
}

Tensor clone(const Tensor& from, Device device, bool in_background) {
  if (from.device().is_cpu()) {
    if (device.is_cpu()) return copy_on_host(from.view());
    if (!from->is_contiguous()) return clone(copy_on_host(from.view()), device, false);
  }
  Tensor out = empty_like(from.view(), device);
  copy_across(from, out, in_background);
  return out;
}

PyTensor to_device(const PyTensor& self, std::string_view name, bool in_background) {
  const Device device = Device::parse(name);
  if (device == self.tensor.device()) return {self.tensor.share(), self.read_only};
  return {clone(self.tensor, device, in_background)};
}

PyTensor reshape(const PyTensor& self, const std::vector<int64_t>& shape) {
  require_dense(self.tensor.view(), "the tensor");
  NG_CHECK(shape.size() <= kMaxDims, InvalidArgument, "shape has ", shape.size(), " axes, at most ", kMaxDims,
           " are supported");
  TensorView view = self.tensor.view();
  view.ndim = static_cast<int>(shape.size());
  view.shape = {};
  std::copy(shape.begin(), shape.end(), view.shape.begin());
  bool fits = true;
  int64_t numel = 1;
  for (const int64_t length : shape) fits = fits && length >= 0 && !__builtin_mul_overflow(numel, length, &numel);
  NG_CHECK(fits && numel == self.tensor->numel(), InvalidArgument, "a tensor of shape ", self.tensor->shape_str(),
           " cannot be reshaped to ", view.shape_str());
  view.strides = dense_like(view).strides;
  return {Tensor(view, self.tensor.owner(), self.tensor.device()), self.read_only};
}

// The same memory read as a dtype of the same width.
PyTensor view_as(const PyTensor& self, std::string_view name) {
  TensorView view = self.tensor.view();
  view.dtype = dtype_named(name);
  NG_CHECK(dtype_bytes(view.dtype) == dtype_bytes(self.tensor->dtype), InvalidArgument, "a tensor of ",
           dtype_name(self.tensor->dtype), " cannot be read as ", name, ", which has another width");
  return {Tensor(view, self.tensor.owner(), self.tensor.device()), self.read_only};
}

// --- DLPack out --------------------------------------------------------------------------------------------------

// What a DLPack struct points to, and the struct itself.
template <typename Managed>
struct Export {
  Managed managed;
  Tensor tensor;
};

template <typename Managed>
void release(Managed* managed) {
  delete static_cast<Export<Managed>*>(managed->context);
}

// A capsule that nobody consumed frees what it holds; a consumer has renamed it.
template <typename Managed>
void destroy_capsule(PyObject* capsule, const char* name) {
  if (PyCapsule_IsValid(capsule, name) == 0) return;
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
  if (managed->deleter != nullptr) managed->deleter(managed);
}

dlpack::Device dlpack_device(Device device) {
  return device.is_cpu() ? dlpack::Device{dlpack::kCpu, 0} : dlpack::Device{dlpack::kCuda, device.gpu};
}

void describe(const Tensor& tensor, dlpack::Tensor& out) {
  const TensorView& view = tensor.view();
  const DLType dtype = dtype_dlpack(view.dtype);
  out = {.data = view.data,
         .device = dlpack_device(tensor.device()),
         .ndim = view.ndim,
         .dtype = {dtype.code, dtype.bits, 1},
         .shape = const_cast<int64_t*>(view.shape.data()),
         .strides = const_cast<int64_t*>(view.strides.data()),
         .byte_offset = 0};
}

template <typename Managed>
nb::object capsule_of(Tensor tensor, const char* name, PyCapsule_Destructor destroy, uint64_t flags) {
  auto out = std::make_unique<Export<Managed>>();
  out->tensor = std::move(tensor);
  if constexpr (std::is_same_v<Managed, dlpack::ManagedTensor>) {
    out->managed.version = {dlpack::kMajorVersion, 0};
    out->managed.flags = flags;
  }
  out->managed.context = out.get();
  out->managed.deleter = &release<Managed>;
  describe(out->tensor, out->managed.tensor);
  PyObject* capsule = PyCapsule_New(&out->managed, name, destroy);
  if (capsule == nullptr) nb::raise_python_error();
  (void)out.release();
  return nb::steal(capsule);
}

// The array API's numbers for CUDA streams: 1 the legacy default stream, 2 the thread's; else an address.
constexpr intptr_t kNoOrder = -1;
constexpr intptr_t kDefaultStream = 1;

// Lets the consumer's stream come after what has been given to the current one.
void order_consumer(Device device, nb::handle stream) {
  if (device.is_cpu()) {
    NG_CHECK(stream.is_none(), InvalidArgument, "stream is given, but a tensor in host memory has none; expected None");
    return;
  }
  const auto number = stream.is_none() ? kDefaultStream : nb::cast<intptr_t>(stream);
  NG_CHECK(number > 0 || number == kNoOrder, InvalidArgument, "stream is ", number,
           ", expected -1 (no order), 1 (the default stream), 2 (the thread's) or a stream's address");
  if (number == kNoOrder) return;
  const Stream ours = current_stream(device.gpu);
  const Stream theirs(device.gpu, number == kDefaultStream ? nullptr : reinterpret_cast<CUstream_st*>(number));
  if (theirs.handle() == ours.handle()) return;
  const nb::gil_scoped_release release;
  Event event(device.gpu);
  event.record(ours);
  theirs.wait(event);
}

nb::object to_dlpack(const PyTensor& self, nb::handle stream, std::optional<std::tuple<int, int>> max_version,
                     std::optional<std::tuple<int, int>> target, std::optional<bool> copied_or_not) {
  const Device device = self.tensor.device();
  order_consumer(device, stream);
  const dlpack::Device own = dlpack_device(device);
  const bool to_host = target == std::tuple(int{dlpack::kCpu}, 0) && !device.is_cpu();
  if (target && !to_host && *target != std::tuple(int{own.type}, int{own.id})) {
    throw_buffer_error(concat("a tensor on ", device.str(), " cannot be exported to DLPack device (",
                              std::get<0>(*target), ", ", std::get<1>(*target), ")"));
  }
  if (to_host && copied_or_not == false) throw_buffer_error("a tensor on a GPU reaches the host by a copy only");
  const bool copied = to_host || copied_or_not.value_or(false);
  Tensor tensor = copied ? clone(self.tensor, to_host ? Device{} : device, !to_host) : self.tensor.share();
  const bool read_only = self.read_only && !copied;
  if (max_version && std::get<0>(*max_version) >= static_cast<int>(dlpack::kMajorVersion)) {
    const uint64_t flags = uint64_t{read_only} * dlpack::kReadOnly + uint64_t{copied} * dlpack::kIsCopied;
    return capsule_of<dlpack::ManagedTensor>(
        std::move(tensor), kVersionedName,
        [](PyObject* capsule) { destroy_capsule<dlpack::ManagedTensor>(capsule, kVersionedName); }, flags);
  }
  if (read_only) throw_buffer_error("a read-only tensor cannot be exported by DLPack before version 1");
  return capsule_of<dlpack::LegacyManagedTensor>(
      std::move(tensor), kLegacyName,
      [](PyObject* capsule) { destroy_capsule<dlpack::LegacyManagedTensor>(capsule, kLegacyName); }, 0);
}

// --- DLPack in ---------------------------------------------------------------------------------------------------

// Takes what a capsule holds; the tensor keeps it alive.
template <typename Managed>
Tensor consume(nb::handle capsule, const char* name, const char* used_name) {
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (managed == nullptr) nb::raise_python_error();
  if (PyCapsule_SetName(capsule.ptr(), used_name) != 0) nb::raise_python_error();
  // From here on the producer's memory is ours to release, whatever follows.
  std::shared_ptr<void> owner(managed, [](void* held) {
    auto* self = static_cast<Managed*>(held);
    if (self->deleter != nullptr) self->deleter(self);
  });
  const Device device = device_of(managed->tensor.device, "the array");
  return {view_of(managed->tensor, "the array"), std::move(owner), device};
}

// The array's capsule. A producer before version 1 takes no max_version.
nb::object capsule_from(nb::handle array, Device device) {
  nb::dict arguments;
  if (!device.is_cpu()) {
    const auto handle = reinterpret_cast<intptr_t>(current_stream(device.gpu).handle());
    arguments["stream"] = handle == 0 ? kDefaultStream : handle;
  }
  arguments["max_version"] = nb::make_tuple(static_cast<int>(dlpack::kMajorVersion), 0);
  try {
    return array.attr("__dlpack__")(**arguments);
  } catch (nb::python_error& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    nb::del(arguments["max_version"]);
    return array.attr("__dlpack__")(**arguments);
  }
}

// --- CUDA's array interface, version 3 ---------------------------------------------------------------------------

nb::dict cuda_array_interface(const PyTensor& self) {
  const Tensor& tensor = self.tensor;
  if (tensor.device().is_cpu()) throw nb::attribute_error("a tensor in host memory has no __cuda_array_interface__");
  const DLType type = dtype_dlpack(tensor->dtype);
  constexpr std::array kKinds = {'i', 'u', 'f'};  // by DLPack's code
  if (tensor->dtype != DType::boolean && type.code >= kKinds.size()) {
    throw nb::attribute_error("bfloat16 has no name in __cuda_array_interface__");
  }
  const char kind = tensor->dtype == DType::boolean ? 'b' : kKinds[type.code];
  nb::list strides;
  for (size_t axis = 0; axis < static_cast<size_t>(tensor->ndim); ++axis) {
    strides.append(tensor->strides[axis] * static_cast<int64_t>(dtype_bytes(tensor->dtype)));
  }
  const auto stream = reinterpret_cast<intptr_t>(current_stream(tensor.device().gpu).handle());
  nb::dict out;
  out["version"] = 3;
  out["shape"] = shape_of(self);
  out["typestr"] = concat(type.bits == 8 ? '|' : '<', kind, type.bits / 8);
  out["data"] = nb::make_tuple(reinterpret_cast<uintptr_t>(tensor->data), self.read_only);
  out["strides"] = nb::tuple(strides);
  out["stream"] = stream == 0 ? kDefaultStream : stream;
  return out;
}

}  // namespace

DType dtype_named(std::string_view name) {
  std::string known;
  for (const DType each : {DType::f32, DType::f16, DType::bf16, DType::f64, DType::u8, DType::i8, DType::u16,
                           DType::i16, DType::u32, DType::i32, DType::u64, DType::i64, DType::boolean}) {
    if (dtype_name(each) == name) return each;
    known.append(known.empty() ? "" : ", ").append(dtype_name(each));
  }
  throw_type_error(concat("unknown dtype '", name, "', expected one of ", known));
}

PyTensor from_dlpack(nb::handle array) {
  if (!nb::hasattr(array, "__dlpack__") || !nb::hasattr(array, "__dlpack_device__")) {
    const std::string name = nb::inst_name(array).c_str();
    throw_type_error(concat("expected an array with __dlpack__, got a ", name));
  }
  const auto [type, index] = nb::cast<std::tuple<int, int>>(array.attr("__dlpack_device__")());
  const nb::object capsule = capsule_from(array, device_of({type, index}, "the array"));
  if (PyCapsule_IsValid(capsule.ptr(), kVersionedName) == 0) {
    return {consume<dlpack::LegacyManagedTensor>(capsule, kLegacyName, "used_dltensor"), false};
  }
  const auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), kVersionedName));
  NG_CHECK(managed->version.major == dlpack::kMajorVersion, InvalidArgument, "the array speaks DLPack ",
           managed->version.major, ", expected ", dlpack::kMajorVersion);
  const bool read_only = (managed->flags & dlpack::kReadOnly) != 0;
  return {consume<dlpack::ManagedTensor>(capsule, kVersionedName, "used_dltensor_versioned"), read_only};
}

void bind_tensor(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<PyTensor>(module, "Tensor",
                       "Memory with a dtype and a shape, on the host or a GPU. numpy.from_dlpack and torch.from_dlpack "
                       "share it without a copy; it goes back to its pool when the last of them is gone, from any "
                       "thread.")
      .def_prop_ro("shape", &shape_of)
      .def_prop_ro("dtype", [](const PyTensor& self) { return dtype_name(self.tensor->dtype); })
      .def_prop_ro("nbytes", [](const PyTensor& self) { return self.tensor->bytes(); })
      .def_prop_ro("device", [](const PyTensor& self) { return self.tensor.device().str(); })
      .def_prop_ro("read_only", [](const PyTensor& self) { return self.read_only; })
      .def_prop_ro("__cuda_array_interface__", &cuda_array_interface)
      .def("data_ptr", [](const PyTensor& self) { return reinterpret_cast<uintptr_t>(self.tensor->data); })
      .def("to", &to_device, "device"_a, nb::kw_only(), "non_blocking"_a = false,
           "The tensor on 'cpu', 'cuda' or 'cuda:1': itself, or a copy made in the order of the GPU's current stream. "
           "The call waits for it unless non_blocking, which leaves it to the caller to keep both until it is done. "
           "ValueError for an unknown device, CudaError, MemoryError.")
      .def(
          "copy_from",
          [](PyTensor& self, const PyTensor& source, bool in_background) {
            NG_CHECK(!self.read_only, InvalidArgument, "the tensor is read-only");
            copy_across(source.tensor, self.tensor, in_background);
          },
          "source"_a, nb::kw_only(), "non_blocking"_a = false,
          "Copies the elements of a tensor of the same shape and dtype, both dense, from any device; waits as to() "
          "does.")
      .def("is_contiguous", [](const PyTensor& self) { return self.tensor->is_contiguous(); })
      .def(
          "contiguous",
          [](const PyTensor& self) {
            if (self.tensor->is_contiguous()) return PyTensor{self.tensor.share(), self.read_only};
            return PyTensor{clone(self.tensor, self.tensor.device(), false)};
          },
          "The tensor if it is dense, else a dense copy; that of a tensor on a GPU is not made here.")
      .def("reshape", &reshape, "shape"_a, "The same memory in another shape; the tensor must be dense.")
      .def("view", &view_as, "dtype"_a, "The same memory read as a dtype of the same width.")
      .def("__repr__",
           [](const PyTensor& self) {
             return concat("Tensor(shape=", self.tensor->shape_str(), ", dtype=", dtype_name(self.tensor->dtype),
                           ", device=", self.tensor.device().str(), ")");
           })
      .def("__dlpack__", &to_dlpack, nb::kw_only(), "stream"_a = nb::none(), "max_version"_a = nb::none(),
           "dl_device"_a = nb::none(), "copy"_a = nb::none())
      .def("__dlpack_device__",
           [](const PyTensor& self) {
             const dlpack::Device device = dlpack_device(self.tensor.device());
             return nb::make_tuple(device.type, device.id);
           })
      .def_static("from_dlpack", &from_dlpack, "array"_a,
                  "The memory of another library's array, which stays alive as long as the tensor. On a GPU, work in "
                  "this thread's current stream comes after what its producer did. TypeError if it is no array or has "
                  "a dtype that is not supported, ValueError if it is neither in host memory nor on a CUDA device.");

  module.def(
      "device_name", [](std::string_view text) { return Device::parse(text).str(); }, "text"_a,
      "'cpu' or 'cuda:0'; ValueError.");
  module.def(
      "empty",
      [](const std::vector<int64_t>& shape, std::string_view dtype, std::string_view device) {
        return PyTensor{empty(shape, dtype_named(dtype), Device::parse(device))};
      },
      "shape"_a, "dtype"_a, "device"_a, "Contents undefined; on a GPU from its default pool.");
  module.def(
      "tensor_from_bytes",
      [](nb::handle data, std::string_view dtype, const std::vector<int64_t>& shape, std::string_view device) {
        const BorrowedTensor bytes(data, "data");
        Tensor out = empty(shape, dtype_named(dtype), Device::parse(device));
        dense_bytes(bytes.view(), "data", out->bytes());
        TensorView source = out.view();
        source.data = bytes->data;
        copy_across({source, nullptr}, out, false);
        return PyTensor{std::move(out)};
      },
      "data"_a, "dtype"_a, "shape"_a, "device"_a, "A dense tensor with a copy of the bytes of a buffer.");
}

}  // namespace ng::python
