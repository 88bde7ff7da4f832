// Binds the pools of narrowgauge/memory.hpp that need a GPU.
#include "pool.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>

#include "bindings.hpp"
#include "narrowgauge/stream.hpp"

namespace ng::python {
namespace {

struct PyPinnedPool {
  PyPinnedPool(std::optional<size_t> limit_, int device)
      : limit(limit_), pool(counted(std::make_shared<PinnedPool>(device), limit)) {}

  std::optional<size_t> limit;
  std::shared_ptr<Pool> pool;
};

// Blocks for the stream that is current when they are allocated, and freed in its order.
class CurrentStreamPool final : public Pool {
 public:
  explicit CurrentStreamPool(std::shared_ptr<DevicePool> pool) : pool_(std::move(pool)) {}

  void* allocate(size_t bytes) override {
    const Stream stream = current_stream(device().gpu);
    void* block = pool_->allocate(bytes, stream);
    const std::lock_guard lock(mutex_);
    streams_.emplace(block, stream);
    return block;
  }
  void deallocate(void* block, size_t bytes) noexcept override {
    std::unique_lock lock(mutex_);
    const auto node = streams_.extract(block);
    lock.unlock();
    if (node) pool_->deallocate(block, bytes, node.mapped());
  }
  size_t unit() const noexcept override { return pool_->unit(); }
  PoolStatistics statistics() const override { return pool_->statistics(); }
  size_t trim() override { return pool_->trim(); }
  Device device() const noexcept override { return pool_->device(); }

 private:
  std::shared_ptr<DevicePool> pool_;
  std::mutex mutex_;
  std::unordered_map<void*, Stream> streams_;
};

struct PyDevicePool {
  PyDevicePool(int device, std::optional<size_t> limit_)
      : limit(limit_),
        memory(std::make_shared<DevicePool>(device)),
        pool(counted(std::make_shared<CurrentStreamPool>(memory), limit)) {}

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
      .def(
          "empty",
          [](const PyDevicePool& self, const std::vector<int64_t>& shape, std::string_view dtype) {
            return new_tensor(self.pool, shape, dtype);
          },
          "shape"_a, "dtype"_a)
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
