// The state of the simulated driver: devices with their primary contexts, the current context of each thread, the
// objects behind handles, and the frame of every entry point.
//
// Objects are owned by the registry of their type and by the work that uses them, so a handle may be destroyed while
// its work runs, as on hardware; a handle that is not registered is an error, never undefined. Everything here lives
// until the process ends, since threads may run until then.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>

#include "core/shim/cuda.hpp"
#include "memory.hpp"
#include "settings.hpp"

namespace ng::cuda {

// A device and its primary context: there is no other.
struct ContextOfDriver {
  explicit ContextOfDriver(int ordinal_) : ordinal(ordinal_), memory(ordinal_) {}

  const DeviceId ordinal;
  DeviceMemory memory;
  std::shared_ptr<StreamOfDriver> legacy;  // the default stream, while the context is retained
  std::atomic<int> retained{0};
  std::atomic<Result> error{Result::success};  // the first failure of its work: every later call returns it

  void check() const { require(error.load() == Result::success, error.load()); }
  void set_error(Result result) {
    Result none = Result::success;
    if (result != Result::success) error.compare_exchange_strong(none, result);
  }
};

// pre: initialised and not forked; fails with invalid_device.
ContextOfDriver& device(int ordinal);
// The context that the calling thread has pushed last; fails with invalid_context.
ContextOfDriver& current_context();

// Whether calls may be made: cuInit has run, in this process and not in one that it was forked from.
bool initialised();
// Set while a host function runs, which may not call the driver.
[[gnu::tls_model("initial-exec")]] extern thread_local bool in_host_function;

// A duplicate that is out of the way of the numbers that a simulator process gets its files by. Closes the file.
int inherited_file(int file);

template <typename Body>
Result entry(Body&& body) noexcept {
  if (!initialised()) return Result::not_initialized;
  if (in_host_function) return Result::not_permitted;
  try {
    body();
    return Result::success;
  } catch (const Failure& failure) {
    return failure.result;
  } catch (const std::bad_alloc&) {
    return Result::out_of_memory;
  } catch (...) {
    return Result::unknown;
  }
}

// An entry point that works in the current context, and returns its error if it has one.
template <typename Body>
Result entry_in_context(Body&& body) noexcept {
  return entry([&] {
    ContextOfDriver& context = current_context();
    context.check();
    body(context);
  });
}

// What the handles of a type stand for.
template <typename T>
class Registry {
 public:
  T* add(std::shared_ptr<T> object) {
    T* const handle = object.get();
    const std::lock_guard lock(mutex_);
    objects_.emplace(handle, std::move(object));
    return handle;
  }
  std::shared_ptr<T> find(T* handle, Result otherwise = Result::invalid_handle) const {
    const std::lock_guard lock(mutex_);
    const auto found = objects_.find(handle);
    require(found != objects_.end(), otherwise);
    return found->second;
  }
  std::shared_ptr<T> remove(T* handle, Result otherwise = Result::invalid_handle) {
    const std::lock_guard lock(mutex_);
    auto node = objects_.extract(handle);
    require(!node.empty(), otherwise);
    return std::move(node.mapped());
  }

 private:
  mutable std::mutex mutex_;
  std::unordered_map<T*, std::shared_ptr<T>> objects_;
};

template <typename T>
Registry<T>& registry() {
  static Registry<T>& instance = *new Registry<T>;
  return instance;
}

}  // namespace ng::cuda
