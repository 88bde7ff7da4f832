// Binds the pools of narrowgauge/memory.hpp that need a GPU.
#include "pool.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <utility>

#include "bindings.hpp"
#include "narrowgauge/stream.hpp"

namespace ng::python {
namespace {

// With counts, and perhaps a limit; that is outermost, so that its error shows the peak.
std::shared_ptr<Pool> counted(std::shared_ptr<Pool> pool, std::optional<size_t> limit) {
  pool = std::make_shared<StatisticsPool>(std::move(pool));
  if (limit) pool = std::make_shared<LimitPool>(std::move(pool), *limit);
  return pool;
}

struct PyPinnedPool {
  PyPinnedPool(std::optional<size_t> limit_, int device)
      : limit(limit_), pool(counted(std::make_shared<PinnedPool>(device), limit)) {}

  std::optional<size_t> limit;
  std::shared_ptr<Pool> pool;
};

// In the order of the device's default stream.
struct PyDevicePool {
  PyDevicePool(int device, std::optional<size_t> limit_)
      : limit(limit_),
        memory(std::make_shared<DevicePool>(device)),
        pool(counted(std::make_shared<StreamPool>(memory, Stream(device, nullptr)), limit)) {}

  std::optional<size_t> limit;
  std::shared_ptr<DevicePool> memory;
  std::shared_ptr<Pool> pool;
};

}  // namespace

void bind_pool(nb::module_& module) {
  using namespace nb::literals;
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;

  nb::class_<PyPinnedPool>(module, "PinnedPool")
      .def(nb::init<std::optional<size_t>, int>(), "limit"_a.none(), "device"_a, Unlocked())
      .def_ro("limit", &PyPinnedPool::limit)
      .def(
          "empty",
          [](const PyPinnedPool& self, const std::vector<int64_t>& shape, std::string_view dtype) {
            return new_tensor(self.pool, shape, dtype);
          },
          "shape"_a, "dtype"_a)
      .def("statistics", [](const PyPinnedPool& self) { return statistics_of(*self.pool); })
      .def("trim", [](const PyPinnedPool& self) { return self.pool->trim(); }, Unlocked());

  nb::class_<PyDevicePool>(module, "DevicePool")
      .def(nb::init<int, std::optional<size_t>>(), "device"_a, "limit"_a.none(), Unlocked())
      .def_ro("limit", &PyDevicePool::limit)
      .def_prop_ro("device", [](const PyDevicePool& self) { return self.memory->device().gpu; })
      .def_prop_ro("is_asleep", [](const PyDevicePool& self) { return self.memory->is_asleep(); })
      .def("statistics", [](const PyDevicePool& self) { return statistics_of(*self.pool); })
      .def(
          "trim", [](const PyDevicePool& self) { return self.pool->trim(); }, Unlocked())
      .def(
          "sleep",
          [](const PyDevicePool& self, nb::object object) {
            std::shared_ptr<PageSink> sink = sink_of(std::move(object));
            const nb::gil_scoped_release release;
            if (sink) {
              self.memory->sleep(std::move(sink));
            } else {
              self.memory->sleep();
            }
          },
          "sink"_a.none())
      .def("wake", [](const PyDevicePool& self) { self.memory->wake(); }, Unlocked());
}

}  // namespace ng::python
