// Binds narrowgauge/io.hpp: safetensors files and the file tier. Bytes cross without a copy; what they mean is the
// Python layer's matter.
#include "narrowgauge/io.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <filesystem>
#include <optional>

#include "bindings.hpp"
#include "narrowgauge/error.hpp"

namespace ng::python {
namespace {

using ReadOnlyBytes = nb::ndarray<nb::memview, const uint8_t, nb::ndim<1>>;
using AnyArray = nb::ndarray<nb::ro, nb::device::cpu>;
using WritableArray = nb::ndarray<nb::device::cpu>;
using TensorArgument = std::tuple<std::string, std::string, std::vector<int64_t>, AnyArray>;
using Metadata = std::map<std::string, std::string>;

const FileTensor& tensor_named(const SafetensorsFile& file, const std::string& name) {
  const FileTensor* tensor = file.find(name);
  if (tensor == nullptr) throw nb::key_error(concat("no tensor named '", name, "' in ", file.path()).c_str());
  return *tensor;
}

nb::tuple info(const SafetensorsFile& file, const std::string& name) {
  const FileTensor& tensor = tensor_named(file, name);
  nb::list shape;
  for (const int64_t length : tensor.shape) shape.append(length);
  return nb::make_tuple(tensor.dtype, nb::tuple(shape), tensor.bytes.size());
}

ReadOnlyBytes bytes(nb::handle_t<SafetensorsFile> self, const std::string& name) {
  const FileTensor& tensor = tensor_named(nb::cast<const SafetensorsFile&>(self), name);
  const size_t shape[] = {tensor.bytes.size()};
  return {tensor.bytes.data(), 1, shape, self};
}

template <typename Array>
bool is_contiguous(const Array& array) {
  int64_t dense = 1;
  for (size_t axis = array.ndim(); axis-- > 0;) {
    if (array.shape(axis) != 1 && array.size() > 0 && array.stride(axis) != dense) return false;
    dense *= static_cast<int64_t>(array.shape(axis));
  }
  return true;
}

void write(const std::filesystem::path& path, const std::vector<TensorArgument>& arguments, const Metadata& metadata) {
  std::vector<FileTensor> tensors;
  tensors.reserve(arguments.size());
  for (const auto& [name, dtype, shape, array] : arguments) {
    NG_CHECK(is_contiguous(array), InvalidArgument, "the array of tensor '", name, "' is not contiguous");
    const auto* data = static_cast<const std::byte*>(array.data());
    NG_CHECK(data != nullptr || array.nbytes() == 0, InvalidArgument, "the array of tensor '", name, "' has no memory");
    tensors.push_back({name, dtype, shape, {data, array.nbytes()}});
  }
  const nb::gil_scoped_release release;
  write_safetensors(path.string(), tensors, metadata);
}

// The whole of a dense array.
template <typename Byte, typename Array>
std::span<Byte> bytes_of(const Array& array) {
  NG_CHECK(is_contiguous(array), InvalidArgument, "array is not contiguous");
  auto* data = static_cast<Byte*>(array.data());
  NG_CHECK(data != nullptr || array.nbytes() == 0, InvalidArgument, "array has no memory");
  return {data, array.nbytes()};
}

void bind_file_tier(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<FileTier, PageSink>(
      module, "FileTier",
      "Memory's slow tier: arrays' bytes on a scratch file, each under an integer key.\n\n"
      "The file is new (FileExistsError) and its name goes at once, so that nothing is left behind; "
      "limit is the most bytes that it takes on disk. Transfers go past the page cache where the "
      "file system can. Thread-safe, and the GIL is released. Not for a child process.")
      .def(
          "__init__",
          [](FileTier* self, const std::filesystem::path& path, std::optional<uint64_t> limit) {
            const nb::gil_scoped_release release;
            new (self) FileTier(path.string(), limit.value_or(FileTier::kNoLimit));
          },
          "path"_a, "limit"_a = nb::none())
      .def(
          "put",
          [](FileTier& self, uint64_t key, const AnyArray& array) {
            const std::span<const std::byte> data = bytes_of<const std::byte>(array);
            const nb::gil_scoped_release release;
            self.put(key, data);
          },
          "key"_a, "array"_a,
          "Keep a copy of a dense array's bytes in place of what was there. MemoryError beyond the limit, OSError.")
      .def(
          "get",
          [](FileTier& self, uint64_t key, const WritableArray& array) {
            const std::span<std::byte> data = bytes_of<std::byte>(array);
            const nb::gil_scoped_release release;
            self.get(key, data);
          },
          "key"_a, "array"_a,
          "Fill a dense array of as many bytes as were put. ValueError if there are none or not as many, OSError.")
      .def("drop", &FileTier::drop, "key"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Forget what is under a key, if anything is.")
      .def_prop_ro("in_use", &FileTier::in_use, "Bytes taken on disk.")
      .def("close", &FileTier::close, nb::call_guard<nb::gil_scoped_release>(),
           "Give the space back. Later calls raise ValueError.")
      .def("__enter__", [](nb::handle self) { return nb::borrow(self); })
      .def(
          "__exit__", [](FileTier& self, nb::handle, nb::handle, nb::handle) { self.close(); }, "type"_a.none(),
          "value"_a.none(), "traceback"_a.none());
}

}  // namespace

void bind_io(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<SafetensorsFile>(module, "SafetensorsFile",
                              "A memory-mapped safetensors file, fully checked when it is opened. Thread-safe.\n\n"
                              "OSError if it cannot be opened, FileCorrupt if it is not a valid safetensors file.")
      .def(
          "__init__",
          [](SafetensorsFile* self, const std::filesystem::path& path) {
            const nb::gil_scoped_release release;
            new (self) SafetensorsFile(path.string());
          },
          "path"_a)
      .def_prop_ro("path", [](const SafetensorsFile& self) { return std::filesystem::path(self.path()); })
      .def_prop_ro("metadata", &SafetensorsFile::metadata, "The file's __metadata__: a new dict of str to str.")
      .def(
          "names",
          [](const SafetensorsFile& self) {
            std::vector<std::string> names;
            for (const FileTensor& tensor : self.tensors()) names.push_back(tensor.name);
            return names;
          },
          "Names of the tensors in file order.")
      .def("info", &info, "name"_a,
           "(dtype, shape, nbytes); dtype is safetensors' own name, such as 'BF16'. KeyError if there is none.")
      .def("bytes", &bytes, "name"_a,
           "The tensor's bytes as a read-only memoryview into the mapping, which lives as long as any view. They need "
           "not be aligned in a file that others wrote. KeyError if there is none.");

  module.def("write_safetensors", &write, "path"_a, "tensors"_a, "metadata"_a,
             "Write a safetensors file atomically: on any failure the old file is intact.\n\n"
             "tensors: (name, dtype, shape, array) each; dtype is safetensors' name, array any contiguous array or "
             "buffer in host memory of exactly the bytes that dtype and shape take, whatever its own dtype. The GIL is "
             "released while writing. OSError, ValueError.");

  bind_file_tier(module);
  module.def("why_no_io_uring", &why_no_io_uring,
             "Why files are transferred by threads and not by io_uring, or '' if it is io_uring.");
}

}  // namespace ng::python
