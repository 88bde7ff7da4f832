// Binds narrowgauge/collective.hpp and transport.hpp: transports may be Python objects.
#include "narrowgauge/collective.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/operators.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <variant>

#include "bindings.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/transport_nccl.hpp"
#include "pool.hpp"
#include "tensor_view.hpp"

namespace ng::python {
namespace {

using namespace nb::literals;

// What Python raised in a transport, as our error. pre: the GIL is held.
[[noreturn]] void rethrow(const nb::python_error& error, std::string_view operation, int rank) {
  const std::string message = concat(operation, " on rank ", rank, ": ", error.what());
  if (message.find("imed out") != std::string::npos || error.matches(PyExc_TimeoutError)) throw Timeout(message);
  throw TransportError(message);
}

// A writable memoryview, which has a share of the memory.
nb::object view_of(const SharedBytes& bytes) {
  using Owner = std::shared_ptr<std::byte>;
  const nb::capsule owner(new Owner(bytes.owner()), [](void* held) noexcept { delete static_cast<Owner*>(held); });
  return nb::cast(nb::ndarray<nb::memview, uint8_t, nb::ndim<1>>(bytes.data(), {bytes.size()}, owner));
}

// An object with wait().
class PyTransfer : public Transfer {
 public:
  PyTransfer(nb::object object, std::string_view operation, int rank)
      : object_(std::move(object)), operation_(operation), rank_(rank) {}
  ~PyTransfer() override {
    const nb::gil_scoped_acquire gil;
    object_.reset();
  }

  void wait() override {
    const nb::gil_scoped_acquire gil;
    try {
      object_.attr("wait")();
    } catch (const nb::python_error& error) {
      rethrow(error, operation_, rank_);
    }
  }

 private:
  nb::object object_;
  std::string operation_;
  int rank_;
};

// An object with rank, size, name, and
//   all_gather(sent, received, operation), all_to_all(sent, sent_bytes, received, received_bytes, operation)
// which take writable memoryviews and lists and return an object with wait(), and split(color). A memoryview keeps its
// memory: whoever still reads or writes there when the object is dropped must have it.
class PyTransport : public Transport {
 public:
  explicit PyTransport(nb::object object)
      : object_(std::move(object)),
        rank_(nb::cast<int>(object_.attr("rank"))),
        size_(nb::cast<int>(object_.attr("size"))),
        name_(nb::cast<std::string>(object_.attr("name"))) {}
  ~PyTransport() override {
    const nb::gil_scoped_acquire gil;
    object_.reset();
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string name() const override { return name_; }

  std::unique_ptr<Transfer> all_gather(const SharedBytes& sent, const SharedBytes& received,
                                       std::string_view operation) override {
    return start(operation,
                 [&] { return object_.attr("all_gather")(view_of(sent), view_of(received), text(operation)); });
  }

  std::unique_ptr<Transfer> all_to_all(const SharedBytes& sent, std::span<const int64_t> sent_bytes,
                                       const SharedBytes& received, std::span<const int64_t> received_bytes,
                                       std::string_view operation) override {
    const auto list = [](std::span<const int64_t> bytes) {
      nb::list all;
      for (const int64_t each : bytes) all.append(each);
      return all;
    };
    return start(operation, [&] {
      return object_.attr("all_to_all")(view_of(sent), list(sent_bytes), view_of(received), list(received_bytes),
                                        text(operation));
    });
  }

  std::shared_ptr<Transport> split(int color) override {
    const nb::gil_scoped_acquire gil;
    try {
      return std::make_shared<PyTransport>(object_.attr("split")(color));
    } catch (const nb::python_error& error) {
      rethrow(error, "split", rank_);
    }
  }

 private:
  static nb::str text(std::string_view text) { return nb::str(text.data(), text.size()); }

  template <typename Call>
  std::unique_ptr<Transfer> start(std::string_view operation, const Call& call) {
    const nb::gil_scoped_acquire gil;
    try {
      return std::make_unique<PyTransfer>(call(), operation, rank_);
    } catch (const nb::python_error& error) {
      rethrow(error, operation, rank_);
    }
  }

  nb::object object_;
  int rank_;
  int size_;
  std::string name_;
};

constexpr const char* kWireDoc = R"(How elements travel in a collective.

format: a Format with groups and no global scale, or its name, such as ``int8:g64:bf16``, or None: as they are, exactly.
hadamard: blocks of 64 elements are multiplied by a Hadamard matrix first, which spreads outliers.
stochastic: unbiased rounding.

Immutable and hashable.)";

Reduction reduction_of(std::string_view text) {
  NG_CHECK(text == "sum" || text == "mean", InvalidArgument, "op is '", text, "', expected 'sum' or 'mean'");
  return text == "sum" ? Reduction::sum : Reduction::mean;
}

CollectiveKind kind_of(std::string_view text) {
  if (text == "all_gather") return CollectiveKind::all_gather;
  if (text == "reduce_scatter") return CollectiveKind::reduce_scatter;
  NG_CHECK(text == "all_reduce", InvalidArgument, "collective is '", text,
           "', expected 'all_gather', 'reduce_scatter' or 'all_reduce'");
  return CollectiveKind::all_reduce;
}

std::chrono::milliseconds milliseconds_of(double timeout) {
  constexpr double kMost = 1e9;
  NG_CHECK(timeout > 0 && timeout <= kMost, InvalidArgument, "timeout is ", timeout,
           " s, expected more than 0 and at most ", kMost);
  return std::chrono::milliseconds(std::max<int64_t>(1, static_cast<int64_t>(timeout * 1000)));
}

// Options for tensors that lie where `first` does, in the order of its stream on a GPU.
CollectiveOptions options_for(const CollectiveOptions& options, const BorrowedTensor& first) {
  CollectiveOptions own = options;
  if (!first.device().is_cpu()) own.stream = first.stream();
  return own;
}

// An argument that lies where the first one does.
BorrowedTensor beside(const BorrowedTensor& first, nb::handle tensor, const char* name) {
  BorrowedTensor borrowed(tensor, name, Access::write, Where::anywhere);
  require_device(borrowed, first.device(), name);
  return borrowed;
}

// reduce_scatter or all_reduce.
using Reduce = Pending (Communicator::*)(const TensorView&, const TensorView&, Reduction, const CollectiveOptions&,
                                         const TensorView*);

template <Reduce kReduce>
Pending reduce(Communicator& self, nb::handle input, nb::handle out, std::string_view op,
               const CollectiveOptions& options, nb::handle error) {
  const BorrowedTensor from(input, "input", Access::read, Where::anywhere), to = beside(from, out, "out");
  const Reduction reduction = reduction_of(op);
  std::optional<BorrowedTensor> kept;
  if (!error.is_none()) kept.emplace(beside(from, error, "error"));
  const nb::gil_scoped_release release;
  return (self.*kReduce)(from.view(), to.view(), reduction, options_for(options, from), kept ? &kept->view() : nullptr);
}

}  // namespace

void bind_collective(nb::module_& module) {
  nb::class_<Wire> wire(module, "Wire", nb::is_final(), kWireDoc);
  wire.attr("__module__") = "narrowgauge";
  const auto make = [](Wire* self, std::optional<std::variant<Format, std::string>> format, bool hadamard,
                       bool stochastic) {
    std::optional<Format> parsed;
    if (format) {
      const auto* name = std::get_if<std::string>(&*format);
      parsed = name != nullptr ? Format::parse(*name) : std::get<Format>(*format);
    }
    new (self) Wire{parsed, hadamard, stochastic};
  };
  wire.def("__init__", make, "format"_a = nb::none(), "hadamard"_a = false, "stochastic"_a = false)
      .def_prop_ro("format", [](const Wire& self) { return self.format; })
      .def_prop_ro("hadamard", [](const Wire& self) { return self.hadamard; })
      .def_prop_ro("stochastic", [](const Wire& self) { return self.stochastic; })
      .def("__str__", &Wire::str)
      .def("__repr__", [](const Wire& self) { return "Wire(" + self.str() + ")"; })
      .def(nb::self == nb::self)
      .def("__hash__", [](const Wire& self) { return std::hash<std::string>{}(self.str()); });

  nb::class_<CollectiveOptions>(module, "CollectiveOptions")
      .def(
          "__init__",
          [](CollectiveOptions* self, const Wire& how, const Wire& inside, int chunks,
             std::optional<int64_t> chunk_bytes, uint64_t seed, int64_t exact_below) {
            new (self) CollectiveOptions{how, inside, chunks, chunk_bytes, seed, exact_below};
          },
          "wire"_a, "inside"_a, "chunks"_a, "chunk_bytes"_a.none(), "seed"_a, "exact_below"_a);
  module.attr("EXACT_BELOW") = kExactBelow;
  module.attr("CHUNKS") = CollectiveOptions{}.chunks;

  nb::class_<CollectivePlan> plan(module, "CollectivePlan", nb::is_final());
  plan.attr("__module__") = "narrowgauge";
  plan.def_ro("wire", &CollectivePlan::wire)
      .def_ro("inside", &CollectivePlan::inside)
      .def_ro("reason", &CollectivePlan::reason)
      .def_ro("chunks", &CollectivePlan::chunks)
      .def_ro("sent_bytes", &CollectivePlan::sent_bytes)
      .def_ro("sent_across", &CollectivePlan::sent_across)
      .def("__str__", &CollectivePlan::str)
      .def("__repr__", [](const CollectivePlan& self) { return "CollectivePlan(" + self.str() + ")"; });
  module.def(
      "plan_collective",
      [](std::string_view collective, int64_t numel, std::string_view dtype, int ranks, int node_size,
         const CollectiveOptions& options) {
        return plan_collective(kind_of(collective), numel, dtype_named(dtype), ranks, node_size, options);
      },
      "collective"_a, "numel"_a, "dtype"_a, "ranks"_a, "node_size"_a, "options"_a);

  nb::class_<SecondaryShard>(module, "SecondaryShard")
      .def(
          "__init__", [](SecondaryShard* self, nb::handle pool) { new (self) SecondaryShard(host_pool_of(pool)); },
          "pool"_a.none())
      .def_prop_ro("is_filled", &SecondaryShard::is_filled)
      .def_prop_ro("nbytes", &SecondaryShard::nbytes)
      .def("invalidate", &SecondaryShard::invalidate);

  // What it reads and writes is kept alive by the Python object that has it.
  nb::class_<Pending>(module, "Pending").def("wait", &Pending::wait, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Transport>(module, "Transport");
  nb::class_<Communicator>(module, "Communicator")
      .def_prop_ro("rank", &Communicator::rank)
      .def_prop_ro("size", &Communicator::size)
      .def_prop_ro("node_size", &Communicator::node_size)
      .def_prop_ro("transport", [](const Communicator& self) { return self.transport().name(); })
      .def(
          "all_gather",
          [](Communicator& self, nb::handle shard, nb::handle out, const CollectiveOptions& options,
             SecondaryShard* secondary) {
            const BorrowedTensor from(shard, "shard", Access::read, Where::anywhere), to = beside(from, out, "out");
            const nb::gil_scoped_release release;
            return self.all_gather(from.view(), to.view(), options_for(options, from), secondary);
          },
          "shard"_a, "out"_a, "options"_a, "secondary"_a.none())
      .def(
          "all_gather_codes",
          [](Communicator& self, nb::handle shard, nb::handle codes, nb::handle scales, nb::handle zeros, int64_t rows,
             int64_t cols, const CollectiveOptions& options) {
            NG_CHECK(options.wire.format.has_value(), InvalidArgument,
                     "the wire is exact; expected a Format, which a QTensor has");
            const CanonicalBytes bytes = canonical_bytes(*options.wire.format, rows, cols);
            const BorrowedTensor from(shard, "shard", Access::read, Where::anywhere);
            const BorrowedTensor code = beside(from, codes, "codes"), scale = beside(from, scales, "scales");
            CanonicalView out{.format = *options.wire.format, .rows = rows, .cols = cols};
            out.codes = dense_bytes(code.view(), "codes", bytes.codes);
            out.scales = dense_bytes(scale.view(), "scales", bytes.scales);
            if (options.wire.format->element.has_zero_point()) {
              out.zeros = dense_bytes(beside(from, zeros, "zeros").view(), "zeros", bytes.zeros);
            }
            const nb::gil_scoped_release release;
            return self.all_gather(from.view(), out, options_for(options, from));
          },
          "shard"_a, "codes"_a, "scales"_a, "zeros"_a.none(), "rows"_a, "cols"_a, "options"_a)
      .def("reduce_scatter", reduce<&Communicator::reduce_scatter>, "input"_a, "out"_a, "op"_a, "options"_a,
           "error"_a.none())
      .def("all_reduce", reduce<&Communicator::all_reduce>, "input"_a, "out"_a, "op"_a, "options"_a, "error"_a.none())
      .def(
          "all_to_all",
          [](Communicator& self, nb::handle input, const std::vector<int64_t>& input_numels, nb::handle out,
             const std::vector<int64_t>& out_numels, const CollectiveOptions& options) {
            const BorrowedTensor from(input, "input", Access::read, Where::anywhere), to = beside(from, out, "out");
            const nb::gil_scoped_release release;
            return self.all_to_all(from.view(), input_numels, to.view(), out_numels, options_for(options, from));
          },
          "input"_a, "input_numels"_a, "out"_a, "out_numels"_a, "options"_a);

  module.def(
      "communicator",
      [](nb::object transport, int node_size, nb::handle pool) {
        std::shared_ptr<Transport> native;
        if (!nb::try_cast(transport, native)) native = std::make_shared<PyTransport>(std::move(transport));
        std::shared_ptr<Pool> memory = host_pool_of(pool);
        const nb::gil_scoped_release release;
        return Communicator(std::move(native), node_size, default_executor(), std::move(memory));
      },
      "transport"_a, "node_size"_a, "pool"_a.none());
  module.def(
      "in_process_transports",
      [](int size, double timeout) { return in_process_transports(size, milliseconds_of(timeout)); }, "size"_a,
      "timeout"_a);

  module.def("why_no_nccl", &why_no_nccl, nb::call_guard<nb::gil_scoped_release>());
  module.def("nccl_version", &nccl_version, nb::call_guard<nb::gil_scoped_release>());
  module.def("nccl_unique_id", [] {
    const NcclId id = nccl_unique_id();
    return nb::bytes(id.data(), id.size());
  });
  module.def(
      "nccl_transport",
      [](const nb::bytes& bytes, int rank, int size, int device, double timeout) -> std::shared_ptr<Transport> {
        NcclId id{};
        NG_CHECK(bytes.size() == id.size(), InvalidArgument, "the unique id has ", bytes.size(), " bytes, expected ",
                 id.size());
        std::memcpy(id.data(), bytes.c_str(), id.size());
        const std::chrono::milliseconds most = milliseconds_of(timeout);
        const nb::gil_scoped_release release;
        return NcclTransport::create(id, rank, size, device, most);
      },
      "unique_id"_a, "rank"_a, "size"_a, "device"_a, "timeout"_a);
  module.def(
      "adopted_nccl_transport",
      [](uintptr_t communicator, const Stream& stream, double timeout) -> std::shared_ptr<Transport> {
        const std::chrono::milliseconds most = milliseconds_of(timeout);
        const nb::gil_scoped_release release;
        return NcclTransport::adopt(reinterpret_cast<void*>(communicator), stream, most);
      },
      "communicator"_a, "stream"_a, "timeout"_a);
}

}  // namespace ng::python
