// Binds narrowgauge/checkpoint.hpp. Tensors cross as (address, bytes): what they are and that they live long enough is
// the Python layer's matter, which holds them until the save has ended.
#include "narrowgauge/checkpoint.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <tuple>

#include "bindings.hpp"
#include "tensor_view.hpp"

namespace ng::python {
namespace {

using ReadOnlyBytes = nb::ndarray<nb::memview, const uint8_t, nb::ndim<1>>;
using Bounds = std::vector<std::array<int64_t, 2>>;
// name, dtype, shape, flat, bounds, address, bytes, borrowed, in place, index of the GPU or -1, its stream
using Part = std::tuple<std::string, std::string, std::vector<int64_t>, bool, Bounds, uintptr_t, size_t, bool, bool,
                        int, uintptr_t>;
// name, flat, bounds, address, bytes
using Request = std::tuple<std::string, bool, Bounds, uintptr_t, size_t>;

template <typename Byte>
std::span<Byte> memory_at(uintptr_t address, size_t bytes) {
  return {reinterpret_cast<Byte*>(address), bytes};
}

// Parts as the writer takes them: a state that is saved again looks the same, so they are converted once.
class Parts {
 public:
  explicit Parts(const std::vector<Part>& arguments) {
    parts_.reserve(arguments.size());
    for (const auto& [name, dtype, shape, flat, bounds, address, bytes, borrowed, in_place, gpu, stream] : arguments) {
      const auto memory = memory_at<const std::byte>(address, bytes);
      parts_.push_back({name,
                        dtype,
                        shape,
                        {flat, bounds},
                        memory,
                        borrowed,
                        in_place,
                        {gpu},
                        reinterpret_cast<CUstream_st*>(stream)});
    }
  }
  // The part lies elsewhere now.
  void move(size_t index, uintptr_t address) {
    CheckpointPart& part = parts_.at(index);
    part.bytes = memory_at<const std::byte>(address, part.bytes.size());
  }
  const std::vector<CheckpointPart>& get() const noexcept { return parts_; }

 private:
  std::vector<CheckpointPart> parts_;
};

// A Checkpointer whose callbacks are Python's: they take the GIL, so nobody may wait for the background thread with it.
class PyCheckpointer {
 public:
  PyCheckpointer(const std::filesystem::path& directory, int64_t keep, int64_t keep_every, int writer, int writers,
                 std::optional<nb::callable> exchange, std::optional<nb::callable> progress) {
    CheckpointOptions options{.keep = keep, .keep_every = keep_every, .writer = writer, .writers = writers};
    if (exchange) {
      options.exchange = [call = hold(*exchange)](const std::string& message) {
        const nb::gil_scoped_acquire gil;
        const nb::object all = (*call)(nb::bytes(message.data(), message.size()));
        std::vector<std::string> out;
        for (const nb::handle each : all) {
          const auto bytes = nb::cast<nb::bytes>(each);
          out.emplace_back(bytes.c_str(), bytes.size());
        }
        return out;
      };
    }
    if (progress) {
      options.progress = [call = hold(*progress)](uint64_t done, uint64_t total) {
        const nb::gil_scoped_acquire gil;
        (*call)(done, total);
      };
    }
    const nb::gil_scoped_release release;
    checkpointer_ = std::make_unique<Checkpointer>(directory.string(), std::move(options));
  }
  ~PyCheckpointer() {
    const nb::gil_scoped_release release;
    checkpointer_.reset();
  }
  PyCheckpointer(const PyCheckpointer&) = delete;
  PyCheckpointer& operator=(const PyCheckpointer&) = delete;

  void save(int64_t step, const Parts& parts, bool overwrite, std::string state, std::optional<nb::callable> check) {
    SaveOptions options{.overwrite = overwrite, .state = std::move(state)};
    if (check) {
      options.check = [call = hold(*check)] {
        const nb::gil_scoped_acquire gil;
        return nb::cast<std::string>((*call)());
      };
    }
    const nb::gil_scoped_release release;
    checkpointer_->save(step, parts.get(), std::move(options));
  }

  bool busy() const { return checkpointer_->busy(); }
  bool wait_for(double seconds) {
    const nb::gil_scoped_release release;
    return checkpointer_->wait_for(seconds);
  }
  bool wait_released_for(double seconds) {
    const nb::gil_scoped_release release;
    return checkpointer_->wait_released_for(seconds);
  }
  void close() {
    const nb::gil_scoped_release release;
    checkpointer_->close();
  }
  nb::object last() const {
    const CheckpointReport report = checkpointer_->last();
    if (report.step < 0) return nb::none();
    return nb::make_tuple(report.step, std::filesystem::path(report.path), report.bytes, report.borrowed_bytes,
                          report.blocked_seconds, report.seconds, report.cpu_seconds, report.engine);
  }

 private:
  // The callable, let go of with the GIL wherever its last owner is.
  static std::shared_ptr<nb::callable> hold(const nb::callable& callable) {
    return {new nb::callable(callable), [](nb::callable* held) {
              const nb::gil_scoped_acquire gil;
              delete held;
            }};
  }

  std::unique_ptr<Checkpointer> checkpointer_;
};

template <typename T>
void append_bytes(std::string& out, const T* values, size_t count) {
  out.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

nb::object tensor_layouts(const nb::list& tensors) {
  nb::list addresses;
  std::string layouts;
  for (const nb::handle tensor : tensors) {
    const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(tensor.ptr()));
    dlpack::Tensor view;
    if (api == nullptr) return nb::none();
    if (api->view_from_object(tensor.ptr(), &view) != 0) {
      PyErr_Clear();
      return nb::none();
    }
    if (view.device.type != dlpack::kCpu && view.device.type != dlpack::kCudaHost) return nb::none();
    addresses.append(reinterpret_cast<uintptr_t>(view.data) + view.byte_offset);
    append_bytes(layouts, &view.ndim, 1);
    append_bytes(layouts, &view.dtype, 1);
    append_bytes(layouts, view.shape, static_cast<size_t>(view.ndim));
    if (view.strides != nullptr) append_bytes(layouts, view.strides, static_cast<size_t>(view.ndim));
  }
  return nb::make_tuple(addresses, nb::bytes(layouts.data(), layouts.size()));
}

nb::tuple as_tuple(const std::vector<int64_t>& values) {
  nb::list out;
  for (const int64_t value : values) out.append(value);
  return nb::tuple(out);
}

nb::list tensors(const Checkpoint& self) {
  nb::list out;
  for (const StoredTensor& tensor : self.manifest().tensors) {
    uint64_t bytes = 0;
    nb::list regions;
    for (const StoredRegion& stored : tensor.regions) {
      bytes += stored.bytes;
      nb::list bounds;
      for (const auto& [start, stop] : stored.region.bounds) bounds.append(nb::make_tuple(start, stop));
      regions.append(nb::make_tuple(stored.file, stored.region.flat, nb::tuple(bounds), stored.offset, stored.bytes,
                                    stored.checksums));
    }
    out.append(nb::make_tuple(tensor.name, tensor.dtype, as_tuple(tensor.shape), bytes, nb::tuple(regions)));
  }
  return out;
}

nb::object info(const Checkpoint& self, const std::string& name) {
  const StoredTensor* tensor = self.find(name);
  if (tensor == nullptr) return nb::none();
  return nb::make_tuple(tensor->dtype, as_tuple(tensor->shape));
}

nb::tuple read(const Checkpoint& self, const std::vector<Request>& arguments, bool verify) {
  std::vector<ReadRequest> requests;
  requests.reserve(arguments.size());
  for (const auto& [name, flat, bounds, address, bytes] : arguments) {
    requests.push_back({name, {flat, bounds}, memory_at<std::byte>(address, bytes)});
  }
  ReadStatistics statistics;
  {
    const nb::gil_scoped_release release;
    statistics = self.read(requests, verify ? Verify::chunks : Verify::off);
  }
  return nb::make_tuple(statistics.bytes, statistics.bytes_read, statistics.bytes_direct);
}

nb::object map(nb::handle_t<Checkpoint> self, const std::string& name) {
  const std::span<const std::byte> bytes = nb::cast<const Checkpoint&>(self).map(name);
  if (bytes.empty()) return nb::none();
  const size_t shape[] = {bytes.size()};
  return nb::cast(ReadOnlyBytes(bytes.data(), 1, shape, self));
}

void verify(const Checkpoint& self, const std::optional<nb::callable>& progress) {
  std::function<void(uint64_t, uint64_t)> report;
  if (progress) {
    report = [&](uint64_t done, uint64_t total) {
      const nb::gil_scoped_acquire gil;
      (*progress)(done, total);
    };
  }
  const nb::gil_scoped_release release;
  self.verify(report);
}

}  // namespace

void bind_checkpoint(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<Parts>(module, "CheckpointParts",
                    "What a save writes: (name, dtype, shape, flat, bounds, address, bytes, borrowed, in place) each.")
      .def(nb::init<const std::vector<Part>&>(), "parts"_a)
      .def("move", &Parts::move, "index"_a, "address"_a, "The part lies elsewhere now.");

  nb::class_<PyCheckpointer>(module, "Checkpointer", "See narrowgauge.Checkpointer, which drives it.")
      .def(nb::init<const std::filesystem::path&, int64_t, int64_t, int, int, std::optional<nb::callable>,
                    std::optional<nb::callable>>(),
           "directory"_a, "keep"_a, "keep_every"_a, "writer"_a, "writers"_a, "exchange"_a.none(), "progress"_a.none())
      .def("save", &PyCheckpointer::save, "step"_a, "parts"_a, "overwrite"_a, "state"_a, "check"_a.none())
      .def("busy", &PyCheckpointer::busy)
      .def("wait_for", &PyCheckpointer::wait_for, "seconds"_a)
      .def("wait_released_for", &PyCheckpointer::wait_released_for, "seconds"_a)
      .def("last", &PyCheckpointer::last)
      .def("close", &PyCheckpointer::close);

  nb::class_<Checkpoint>(module, "Checkpoint", "A committed checkpoint, open for reading. Thread-safe.")
      .def(
          "__init__",
          [](Checkpoint* self, const std::filesystem::path& path) {
            const nb::gil_scoped_release release;
            new (self) Checkpoint(path.string());
          },
          "path"_a)
      .def_prop_ro("path", [](const Checkpoint& self) { return std::filesystem::path(self.path()); })
      .def_prop_ro("step", [](const Checkpoint& self) { return self.manifest().step; })
      .def_prop_ro("state", [](const Checkpoint& self) { return self.manifest().state; })
      .def_prop_ro("chunk_bytes", [](const Checkpoint& self) { return self.manifest().chunk_bytes; })
      .def("files",
           [](const Checkpoint& self) {
             nb::list out;
             for (const StoredFile& file : self.manifest().files) out.append(nb::make_tuple(file.name, file.bytes));
             return out;
           })
      .def("tensors", &tensors,
           "(name, dtype, shape, bytes, regions) of each; a region is (file, flat, bounds, offset, bytes, checksums).")
      .def("info", &info, "name"_a, "(dtype, shape) of a tensor, or None.")
      .def("read", &read, "requests"_a, "verify"_a, "(bytes asked for, read, of those past the page cache).")
      .def("map", &map, "name"_a, "A view of the file where the tensor lies in one piece, else None. Not verified.")
      .def("verify", &verify, "progress"_a.none() = nb::none());

  module.def("tensor_layouts", &tensor_layouts, "tensors"_a,
             "Addresses, and bytes that are equal where dtypes, shapes and strides are; of tensors in host memory.\n\n"
             "None if one is elsewhere, or not dense, or its framework has no exchange table.");
  module.def(
      "checkpoint_steps", [](const std::filesystem::path& directory) { return checkpoint_steps(directory.string()); },
      "directory"_a);
  module.def("checkpoint_name", &checkpoint_name, "step"_a);
  module.def(
      "prune_checkpoints",
      [](const std::filesystem::path& directory, int64_t keep, int64_t keep_every, bool dry_run) {
        const nb::gil_scoped_release release;
        return prune_checkpoints(directory.string(), keep, keep_every, dry_run);
      },
      "directory"_a, "keep"_a, "keep_every"_a, "dry_run"_a);
}

}  // namespace ng::python
