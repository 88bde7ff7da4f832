// Attributes of functions, and launches.
#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "entry.hpp"
#include "module.hpp"
#include "stream.hpp"

namespace ng::cuda {
namespace {

// PTX does not say how many registers a kernel will have; with these, a block of 1024 threads fits.
constexpr int kRegisters = 64;

using Shape = std::array<uint32_t, 3>;

void require_launchable(const FunctionOfDriver& function, const Shape& grid, const Shape& block,
                        unsigned shared_bytes) {
  const uint64_t threads = uint64_t{block[0]} * block[1] * block[2];
  require(grid[0] > 0 && grid[1] > 0 && grid[2] > 0 && threads > 0);
  require(grid[0] <= 0x7fffffff && grid[1] <= 65535 && grid[2] <= 65535);
  require(block[0] <= 1024 && block[1] <= 1024 && block[2] <= 64);
  require(threads <= static_cast<uint64_t>(function.max_threads));
  require(shared_bytes <= static_cast<unsigned>(function.max_dynamic_shared_bytes.load()));
}

std::shared_ptr<ModuleOfDriver> module_of(const FunctionOfDriver& function) {
  auto module = function.module.lock();
  require(module != nullptr, Result::invalid_handle);
  return module;
}

}  // namespace

Result cuFuncGetAttribute(int* value, FunctionAttribute attribute, Function handle) {
  return entry_in_context([&](ContextOfDriver&) {
    const auto function = registry<FunctionOfDriver>().find(handle);
    switch (attribute) {
      case FunctionAttribute::max_threads_per_block: *value = function->max_threads; return;
      case FunctionAttribute::shared_bytes: *value = function->shared_bytes; return;
      case FunctionAttribute::const_bytes: *value = function->constant_bytes; return;
      case FunctionAttribute::local_bytes: *value = function->local_bytes; return;
      case FunctionAttribute::registers: *value = kRegisters; return;
      case FunctionAttribute::ptx_version: *value = function->ptx_version; return;
      case FunctionAttribute::binary_version: *value = settings().compute_capability; return;
      case FunctionAttribute::max_dynamic_shared_bytes: *value = function->max_dynamic_shared_bytes.load(); return;
    }
    fail(Result::invalid_value);
  });
}

Result cuFuncSetAttribute(Function handle, FunctionAttribute attribute, int value) {
  return entry_in_context([&](ContextOfDriver&) {
    const auto function = registry<FunctionOfDriver>().find(handle);
    require(attribute == FunctionAttribute::max_dynamic_shared_bytes && value >= 0);
    require(value + function->shared_bytes <= device_attribute(DeviceAttribute::max_shared_bytes_per_block_optin));
    function->max_dynamic_shared_bytes = value;
  });
}

Result cuLaunchKernel(Function handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned shared_bytes, StreamHandle stream_handle,
                      void** parameters, void** extra) {
  return entry_in_context([&](ContextOfDriver& context) {
    const auto function = registry<FunctionOfDriver>().find(handle);
    const auto module = module_of(*function);
    const auto stream = stream_of(stream_handle, context);
    require(stream->context == module->context, Result::invalid_handle);
    require(extra == nullptr, Result::not_supported);
    require(function->parameters.empty() || parameters != nullptr);
    const Shape grid = {grid_x, grid_y, grid_z};
    const Shape block = {block_x, block_y, block_z};
    require_launchable(*function, grid, block, shared_bytes);

    std::string body;
    append(body, module->text.id);
    append(body, module->context->ordinal);
    append(body, grid);
    append(body, block);
    append(body, shared_bytes);
    append(body, static_cast<uint32_t>(module->variables.size()));
    append(body, static_cast<uint32_t>(function->name.size()));
    for (const DevicePtr pointer : module->variables) append(body, pointer);
    body += function->name;
    const size_t begin = body.size();
    for (size_t i = 0; i < function->parameters.size(); ++i) {
      const auto& [offset, bytes] = function->parameters[i];
      body.resize(begin + offset);
      body.append(static_cast<const char*>(parameters[i]), bytes);
    }
    enqueue(*stream, {[module, body = std::move(body)] {
      const Result result = launch_kernel(module->text, body);
      require(result == Result::success, result);
    }});
  });
}

}  // namespace ng::cuda
