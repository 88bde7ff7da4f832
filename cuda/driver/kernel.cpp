// Loading images and launching kernels.
#include "driver/kernel.hpp"

#include <array>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <utility>

#include "narrowgauge/error.hpp"

namespace ng::cuda {
namespace {

// An image on a device. Never unloaded: kernels may run until the process ends.
struct Loaded {
  Module module = nullptr;
  std::map<std::string, Function, std::less<>> kernels;
};

struct Modules {
  std::shared_mutex mutex;
  std::map<std::pair<const Image*, int>, Loaded> all;
};

Modules& modules() {
  static auto* made = new Modules;
  return *made;
}

// The driver compiles PTX, and says in `log` what it does not like.
Result load_code(const Driver& driver, const void* code, Module& module, std::span<char> log) {
  std::array options = {JitOption::error_log, JitOption::error_log_bytes};
  std::array<void*, 2> values = {log.data(), reinterpret_cast<void*>(log.size())};
  return driver.cuModuleLoadDataEx(&module, code, 2, options.data(), values.data());
}

Module load(const Image& image, int device) {
  NG_CHECK(*image.ptx != '\0', CudaError,
           "this build of narrowgauge has no CUDA kernels, since it was made without "
           "nvcc: install the CUDA toolkit (12.8 or later) and build again");
  const Driver& driver = require_driver();
  std::array<char, 4096> log{};
  Module module = nullptr;
  Result result = Result::no_binary_for_gpu;
  if (image.cubins != nullptr) result = load_code(driver, image.cubins, module, log);
  if (result == Result::no_binary_for_gpu) result = load_code(driver, image.ptx, module, log);
  check(result, concat("loading the kernels '", image.name, "' on cuda:", device, ' ', log.data()).c_str());
  return module;
}

}  // namespace

Function find_kernel(const Image& image, std::string_view name, int device) {
  Modules& known = modules();
  const std::pair key(&image, device);
  {
    const std::shared_lock lock(known.mutex);
    if (const auto loaded = known.all.find(key); loaded != known.all.end()) {
      const auto kernel = loaded->second.kernels.find(name);
      if (kernel != loaded->second.kernels.end()) return kernel->second;
    }
  }
  const std::unique_lock lock(known.mutex);
  Loaded& loaded = known.all[key];
  if (loaded.module == nullptr) loaded.module = load(image, device);
  std::string text(name);
  Function kernel = nullptr;
  const Result result = require_driver().cuModuleGetFunction(&kernel, loaded.module, text.c_str());
  check(result, concat("looking for kernel ", text, " in '", image.name, "'").c_str());
  loaded.kernels.emplace(std::move(text), kernel);
  return kernel;
}

DevicePtr find_variable(const Image& image, const char* name, int device) {
  Modules& known = modules();
  const std::unique_lock lock(known.mutex);
  Loaded& loaded = known.all[{&image, device}];
  if (loaded.module == nullptr) loaded.module = load(image, device);
  DevicePtr pointer = 0;
  size_t bytes = 0;
  const Result result = require_driver().cuModuleGetGlobal_v2(&pointer, &bytes, loaded.module, name);
  check(result, concat("looking for variable ", name, " in '", image.name, "'").c_str());
  return pointer;
}

void allow_shared_bytes(Function kernel, size_t bytes) {
  NG_CUDA(require_driver(),
          cuFuncSetAttribute(kernel, FunctionAttribute::max_dynamic_shared_bytes, static_cast<int>(bytes)));
}

void launch_with(const Launch& what, const Stream& stream, std::span<void*> arguments) {
  const auto& [name, kernel, grid, block, shared_bytes] = what;
  const Result result = require_driver().cuLaunchKernel(kernel, grid.x, grid.y, grid.z, block.x, block.y, block.z,
                                                        static_cast<unsigned>(shared_bytes), handle_of(stream),
                                                        arguments.data(), nullptr);
  if (result != Result::success) [[unlikely]] {
    check(result, concat("launching ", name, " on cuda:", stream.device(), " with ", grid.x, 'x', grid.y, 'x', grid.z,
                         " blocks of ", block.x, 'x', block.y, 'x', block.z, " threads and ", shared_bytes,
                         " bytes of shared memory")
                      .c_str());
  }
  note_kernel(stream.device(), name);
}

}  // namespace ng::cuda
