// Binds the pools of narrowgauge/memory.hpp, and Tensor of narrowgauge/tensor.hpp with DLPack in both directions.
//
// What DLPack hands out holds a share of the memory in C++, not the Python object: it can be released by any thread,
// without the GIL, and after the interpreter has ended.
#include "narrowgauge/memory.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "dlpack.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/tensor.hpp"
#include "pool.hpp"
#include "tensor_view.hpp"

namespace ng::python {
namespace {

// --- Tensor -------------------------------------------------------------------------------------------------

constexpr const char* kVersionedName = "dltensor_versioned";
constexpr const char* kLegacyName = "dltensor";

struct PyTensor {
  Tensor tensor;
  bool read_only = false;
};

nb::tuple shape_of(const PyTensor& self) {
  nb::list shape;
  for (int axis = 0; axis < self.tensor->ndim; ++axis) shape.append(self.tensor->shape[static_cast<size_t>(axis)]);
  return nb::tuple(shape);
}

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

void describe(const TensorView& view, dlpack::Tensor& out) {
  const DLType dtype = dtype_dlpack(view.dtype);
  out = {.data = view.data,
         .device = {dlpack::kCpu, 0},
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
  describe(out->tensor.view(), out->managed.tensor);
  PyObject* capsule = PyCapsule_New(&out->managed, name, destroy);
  if (capsule == nullptr) nb::raise_python_error();
  (void)out.release();
  return nb::steal(capsule);
}

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

Tensor dense_copy(const TensorView& from) {
  TensorView view = from;
  int64_t stride = 1;
  for (auto axis = static_cast<size_t>(from.ndim); axis-- > 0;) {
    view.strides[axis] = stride;
    stride *= from.shape[axis];
  }
  auto buffer = std::make_shared<Buffer>(static_cast<size_t>(from.bytes()));
  view.data = buffer->data();
  if (from.is_contiguous()) {
    if (from.numel() > 0) std::memcpy(buffer->data(), from.data, buffer->size());
  } else {
    std::byte* target = buffer->data();
    copy_axis(from, 0, static_cast<const std::byte*>(from.data), target);
  }
  return {view, std::move(buffer)};
}

[[noreturn]] void throw_buffer_error(const std::string& message) { throw nb::buffer_error(message.c_str()); }

nb::object to_dlpack(const PyTensor& self, nb::handle stream, std::optional<std::tuple<int, int>> max_version,
                     std::optional<std::tuple<int, int>> device, std::optional<bool> copy) {
  NG_CHECK(stream.is_none(), InvalidArgument, "stream is given, but a tensor in host memory has none; expected None");
  if (device && *device != std::tuple(int{dlpack::kCpu}, 0)) {
    throw_buffer_error(concat("a tensor in host memory cannot be exported to DLPack device (", std::get<0>(*device),
                              ", ", std::get<1>(*device), ")"));
  }
  const bool copied = copy.value_or(false);
  Tensor tensor = copied ? dense_copy(self.tensor.view()) : self.tensor.share();
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
  return {view_of(managed->tensor, "the array"), std::move(owner)};
}

PyTensor from_dlpack(nb::handle array) {
  if (!nb::hasattr(array, "__dlpack__") || !nb::hasattr(array, "__dlpack_device__")) {
    const std::string name = nb::inst_name(array).c_str();
    throw nb::type_error(concat("expected an array with __dlpack__, got a ", name).c_str());
  }
  const auto [device, index] = nb::cast<std::tuple<int, int>>(array.attr("__dlpack_device__")());
  NG_CHECK(device == dlpack::kCpu || device == dlpack::kCudaHost, InvalidArgument, "the array is on DLPack device (",
           device, ", ", index, "), expected host memory");
  nb::object capsule;
  try {
    nb::dict arguments;
    arguments["max_version"] = nb::make_tuple(static_cast<int>(dlpack::kMajorVersion), 0);
    capsule = array.attr("__dlpack__")(**arguments);
  } catch (nb::python_error& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = array.attr("__dlpack__")();  // a producer before version 1
  }
  if (PyCapsule_IsValid(capsule.ptr(), kVersionedName) == 0) {
    return {consume<dlpack::LegacyManagedTensor>(capsule, kLegacyName, "used_dltensor"), false};
  }
  const auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), kVersionedName));
  NG_CHECK(managed->version.major == dlpack::kMajorVersion, InvalidArgument, "the array speaks DLPack ",
           managed->version.major, ", expected ", dlpack::kMajorVersion);
  const bool read_only = (managed->flags & dlpack::kReadOnly) != 0;
  return {consume<dlpack::ManagedTensor>(capsule, kVersionedName, "used_dltensor_versioned"), read_only};
}

// --- HostPool -----------------------------------------------------------------------------------------------

// An object of Python with put(key, view) and get(key, view). Called with or without the GIL.
class PySink final : public PageSink {
 public:
  explicit PySink(nb::object object) : object_(std::move(object)) {}
  ~PySink() override {
    // A pool that still sleeps when the interpreter ends leaves the object to it.
    if (!nb::is_alive()) {
      (void)object_.release();
      return;
    }
    const nb::gil_scoped_acquire acquire;
    object_.reset();
  }

  void put(uint64_t key, std::span<const std::byte> bytes) override {
    call<const uint8_t>("put", key, bytes.data(), bytes.size());
  }
  void get(uint64_t key, std::span<std::byte> bytes) override { call<uint8_t>("get", key, bytes.data(), bytes.size()); }

 private:
  template <typename Byte>
  void call(const char* method, uint64_t key, const std::byte* data, size_t bytes) {
    const nb::gil_scoped_acquire acquire;
    const nb::ndarray<nb::memview, Byte, nb::ndim<1>> array(const_cast<std::byte*>(data), {bytes}, nb::handle());
    const nb::object view = nb::cast(array, nb::rv_policy::reference);
    object_.attr(method)(key, view);
    view.attr("release")();  // so that a view that the sink keeps says why it cannot be used
  }

  nb::object object_;
};

// The pool as Python has it: host memory, perhaps with a limit, with counts.
class PyHostPool {
 public:
  PyHostPool(std::optional<size_t> limit, bool huge_pages, std::optional<int> numa_node)
      : limit_(limit), host_(std::make_shared<HostPool>(HostPoolOptions{huge_pages, numa_node.value_or(-1)})) {
    // The limit is outermost, so that its error shows the peak.
    pool_ = std::make_shared<StatisticsPool>(host_);
    if (limit) pool_ = std::make_shared<LimitPool>(std::move(pool_), *limit);
  }

  HostPool& host() const noexcept { return *host_; }
  const std::shared_ptr<Pool>& pool() const noexcept { return pool_; }
  std::optional<size_t> limit() const noexcept { return limit_; }

 private:
  std::optional<size_t> limit_;
  std::shared_ptr<HostPool> host_;
  std::shared_ptr<Pool> pool_;
};

DType dtype_named(std::string_view name) {
  std::string known;
  for (const DType each : {DType::f32, DType::f16, DType::bf16, DType::f64, DType::u8, DType::i8, DType::u16,
                           DType::i16, DType::u32, DType::i32, DType::u64, DType::i64, DType::boolean}) {
    if (dtype_name(each) == name) return each;
    known.append(known.empty() ? "" : ", ").append(dtype_name(each));
  }
  throw nb::type_error(concat("unknown dtype '", name, "', expected one of ", known).c_str());
}

}  // namespace

nb::dict statistics_of(const Pool& pool) {
  PoolStatistics counts;
  {
    const nb::gil_scoped_release release;
    counts = pool.statistics();
  }
  nb::dict out;
  out["in_use"] = counts.in_use;
  out["blocks"] = counts.blocks;
  out["peak"] = counts.peak;
  out["reserved"] = counts.reserved;
  out["cached"] = counts.cached;
  out["largest_free"] = counts.largest_free;
  out["bad_frees"] = counts.bad_frees;
  out["fragmentation"] = counts.fragmentation();
  return out;
}

std::shared_ptr<PageSink> sink_of(nb::object object) {
  std::shared_ptr<PageSink> sink;
  if (!object.is_none() && !nb::try_cast(object, sink)) sink = std::make_shared<PySink>(std::move(object));
  return sink;
}

nb::object new_tensor(const std::shared_ptr<Pool>& pool, const std::vector<int64_t>& shape, std::string_view dtype) {
  const DType type = dtype_named(dtype);
  PyTensor tensor;
  {
    const nb::gil_scoped_release release;
    tensor.tensor = Tensor::empty(pool, shape, type);
  }
  return nb::cast(std::move(tensor));
}

namespace {

void sleep(const PyHostPool& self, nb::object sink) {
  std::shared_ptr<PageSink> target = sink_of(std::move(sink));
  const nb::gil_scoped_release release;
  if (target) {
    self.host().sleep(std::move(target));
  } else {
    self.host().sleep();
  }
}

}  // namespace

void bind_memory(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<PyTensor>(module, "Tensor",
                       "Memory with a dtype and a shape. numpy.from_dlpack and torch.from_dlpack share it without a "
                       "copy; it goes back to its pool when the last of them is gone, from any thread.")
      .def_prop_ro("shape", &shape_of)
      .def_prop_ro("dtype", [](const PyTensor& self) { return dtype_name(self.tensor->dtype); })
      .def_prop_ro("nbytes", [](const PyTensor& self) { return self.tensor->bytes(); })
      .def_prop_ro("device", [](const PyTensor&) { return "cpu"; })
      .def_prop_ro("read_only", [](const PyTensor& self) { return self.read_only; })
      .def("data_ptr", [](const PyTensor& self) { return reinterpret_cast<uintptr_t>(self.tensor->data); })
      .def("__repr__",
           [](const PyTensor& self) {
             return concat("Tensor(shape=", self.tensor->shape_str(), ", dtype=", dtype_name(self.tensor->dtype),
                           ", device=cpu)");
           })
      .def("__dlpack__", &to_dlpack, nb::kw_only(), "stream"_a = nb::none(), "max_version"_a = nb::none(),
           "dl_device"_a = nb::none(), "copy"_a = nb::none())
      .def("__dlpack_device__", [](const PyTensor&) { return nb::make_tuple(int{dlpack::kCpu}, 0); })
      .def_static("from_dlpack", &from_dlpack, "array"_a,
                  "The memory of another library's array, which stays alive as long as the tensor. TypeError if it is "
                  "no array or has a dtype that is not supported, ValueError if it is not in host memory.");

  nb::class_<PageSink>(module, "PageSink", "A native place for the contents of a sleeping pool.");

  nb::class_<PyHostPool>(module, "HostPool")
      .def(nb::init<std::optional<size_t>, bool, std::optional<int>>(), "limit"_a.none(), "huge_pages"_a,
           "numa_node"_a.none())
      .def_prop_ro("limit", &PyHostPool::limit)
      .def_prop_ro("is_asleep", [](const PyHostPool& self) { return self.host().is_asleep(); })
      .def(
          "empty",
          [](const PyHostPool& self, const std::vector<int64_t>& shape, std::string_view dtype) {
            return new_tensor(self.pool(), shape, dtype);
          },
          "shape"_a, "dtype"_a)
      .def("statistics", [](const PyHostPool& self) { return statistics_of(*self.pool()); })
      .def(
          "trim", [](const PyHostPool& self) { return self.host().trim(); }, nb::call_guard<nb::gil_scoped_release>())
      .def("sleep", &sleep, "sink"_a.none())
      .def(
          "wake", [](const PyHostPool& self) { self.host().wake(); }, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "huge_page_bytes", [](const PyHostPool& self) { return self.host().huge_page_bytes(); },
          nb::call_guard<nb::gil_scoped_release>());

  module.def("numa_nodes", &numa_nodes, "The NUMA nodes of this machine, rising.");
}

}  // namespace ng::python
