// Binds the pools of narrowgauge/memory.hpp.
#include "narrowgauge/memory.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/tensor.hpp"
#include "pool.hpp"
#include "tensor.hpp"

namespace ng::python {
namespace {

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
      : limit_(limit),
        host_(std::make_shared<HostPool>(HostPoolOptions{huge_pages, numa_node.value_or(-1)})),
        pool_(counted(host_, limit)) {}

  HostPool& host() const noexcept { return *host_; }
  const std::shared_ptr<Pool>& pool() const noexcept { return pool_; }
  std::optional<size_t> limit() const noexcept { return limit_; }

 private:
  std::optional<size_t> limit_;
  std::shared_ptr<HostPool> host_;
  std::shared_ptr<Pool> pool_;
};

}  // namespace

std::shared_ptr<Pool> host_pool_of(nb::handle pool) {
  return pool.is_none() ? nullptr : nb::cast<const PyHostPool&>(pool).pool();
}

std::shared_ptr<Pool> counted(std::shared_ptr<Pool> pool, std::optional<size_t> limit) {
  pool = std::make_shared<StatisticsPool>(std::move(pool));
  if (limit) pool = std::make_shared<LimitPool>(std::move(pool), *limit);
  return pool;
}

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

PyTensor new_tensor(const std::shared_ptr<Pool>& pool, const std::vector<int64_t>& shape, std::string_view dtype) {
  const DType type = dtype_named(dtype);
  const nb::gil_scoped_release release;
  return {Tensor::empty(pool, shape, type)};
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
