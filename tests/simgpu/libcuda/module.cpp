// Loading of modules.
//
// A module is PTX text: cubins and fat binaries are refused, as a device refuses those of another architecture, so
// programs take the path of their PTX. A simulator process reads the text once for its description, in lines:
//
//   version 80
//   kernel NAME static_shared_bytes local_bytes max_threads [offset bytes]...
//   variable NAME global|const alignment bytes contents_in_hexadecimal
#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "capture.hpp"
#include "driver.hpp"
#include "entry.hpp"
#include "module.hpp"

namespace ng::cuda {
namespace {

constexpr int kDefaultSharedBytes = 48 << 10;

// Where the caller wants messages of the JIT compiler.
class ErrorLog {
 public:
  ErrorLog(unsigned count, const JitOption* options, void** values) {
    for (unsigned i = 0; i < count; ++i) {
      if (options[i] == JitOption::error_log) text_ = static_cast<char*>(values[i]);
      if (options[i] == JitOption::error_log_bytes) bytes_ = reinterpret_cast<uintptr_t>(values[i]);
    }
  }
  void write(const std::string& message) const {
    if (text_ != nullptr && bytes_ > 0) text_[message.copy(text_, bytes_ - 1)] = '\0';
  }

 private:
  char* text_ = nullptr;
  size_t bytes_ = 0;
};

// The first word after a directive of the text, "" if there is none.
std::string directive(const std::string& ptx, const char* name) {
  std::istringstream lines(ptx);
  for (std::string line, word; std::getline(lines, line);) {
    std::istringstream words(line);
    if (words >> word && word == name && words >> word) return word.substr(0, word.find(','));
  }
  return {};
}

// The newest PTX of a driver, as 10 * major + minor: 12.0 has 8.0, 12.9 has 8.8, 13.0 has 9.0.
int newest_ptx(int driver_version) {
  const int major = driver_version / 1000;
  const int minor = driver_version % 1000 / 10;
  return 10 * (major - 4) + minor - (major == 12 && minor > 5 ? 1 : 0);
}

void check_version(const std::string& ptx, const ErrorLog& log) {
  const std::string version = directive(ptx, ".version");
  const std::string target = directive(ptx, ".target");
  if (version.empty() || !target.starts_with("sm_")) {
    log.write("ptxas fatal   : PTX without .version and .target");
    fail(Result::invalid_ptx);
  }
  const size_t dot = version.find('.');
  const int number = 10 * std::atoi(version.c_str()) + (dot == std::string::npos ? 0 : std::atoi(&version[dot + 1]));
  if (number > newest_ptx(settings().driver_version)) {
    log.write("ptxas fatal   : Unsupported .version " + version);
    fail(Result::unsupported_ptx_version);
  }
  const int capability = std::atoi(target.c_str() + 3);
  const bool specific = !std::isdigit(static_cast<unsigned char>(target.back()));  // sm_90a: that architecture only
  if (capability > settings().compute_capability || (specific && capability != settings().compute_capability)) {
    log.write("ptxas fatal   : .target " + target + " does not run on sm_" +
              std::to_string(settings().compute_capability));
    fail(Result::invalid_ptx);
  }
}

void refuse_binaries(const void* image) {
  constexpr unsigned char kElf[4] = {0x7f, 'E', 'L', 'F'};
  constexpr unsigned char kFatBinary[4] = {0x50, 0xed, 0x55, 0xba};
  const auto* bytes = static_cast<const unsigned char*>(image);
  // Byte by byte: PTX may be shorter than a magic number.
  require(!std::equal(kElf, kElf + 4, bytes) && !std::equal(kFatBinary, kFatBinary + 4, bytes),
          Result::no_binary_for_gpu);
  require(*bytes == '.' || *bytes == '/' || std::isspace(*bytes) != 0, Result::invalid_image);
}

struct Variable {
  bool constant;
  std::string contents;
};

// Fills the module from its description.
std::vector<Variable> describe(ModuleOfDriver& module, const std::string& text) {
  std::vector<Variable> variables;
  std::vector<std::pair<size_t, size_t>> sizes;
  std::istringstream lines(text);
  for (std::string line, kind; std::getline(lines, line);) {
    std::istringstream words(line);
    words >> kind;
    if (kind == "version") {
      words >> module.ptx_version;
    } else if (kind == "kernel") {
      auto function = std::make_shared<FunctionOfDriver>();
      words >> function->name >> function->shared_bytes >> function->local_bytes >> function->max_threads;
      for (FunctionOfDriver::Parameter parameter; words >> parameter.offset >> parameter.bytes;) {
        function->parameters.push_back(parameter);
      }
      function->max_dynamic_shared_bytes = std::max(0, kDefaultSharedBytes - function->shared_bytes);
      module.functions.emplace(function->name, std::move(function));
    } else if (kind == "variable") {
      std::string name, space, contents;
      size_t alignment = 0, bytes = 0;
      words >> name >> space >> alignment >> bytes >> contents;
      for (size_t i = 0; i < bytes; ++i) {
        contents[i] = static_cast<char>(std::stoi(contents.substr(2 * i, 2), nullptr, 16));
      }
      contents.resize(bytes);
      if (space == "const") module.constant_bytes += bytes;
      module.variable_names.push_back(name);
      module.variable_bytes.push_back(bytes);
      sizes.emplace_back(bytes, alignment);
      variables.push_back({space == "const", std::move(contents)});
    }
  }
  for (auto& [name, function] : module.functions) {
    function->ptx_version = module.ptx_version;
    function->constant_bytes = static_cast<int>(module.constant_bytes);
  }
  module.variables = module.context->memory.allocate_variables(sizes);
  return variables;
}

std::shared_ptr<ModuleOfDriver> load(ContextOfDriver& context, const char* ptx, const ErrorLog& log) {
  static std::atomic<uint64_t> modules{0};
  auto module = std::make_shared<ModuleOfDriver>();
  module->context = &context;
  module->text = {++modules, ptx};
  check_version(module->text.ptx, log);
  Reply reply;
  try {
    reply = load_module(module->text);
  } catch (const Failure& failure) {
    context.set_error(failure.result);
    throw;
  }
  if (reply.result != Result::success) {
    log.write("ptxas fatal   : " + reply.text);
    fail(reply.result);
  }
  const std::vector<Variable> variables = describe(*module, reply.text);
  DeviceMemory& memory = context.memory;
  for (size_t i = 0; i < variables.size(); ++i) {
    const DevicePtr pointer = module->variables[i];
    std::memcpy(memory.contents(pointer), variables[i].contents.data(), module->variable_bytes[i]);
    if (variables[i].constant) {
      std::memset(memory.shadow(pointer), kAllocated | kInitialised | kReadOnly, module->variable_bytes[i]);
    }
  }
  return module;
}

}  // namespace

// --- entry points ------------------------------------------------------------------------------------------------

Result cuModuleLoadDataEx(Module* handle, const void* image, unsigned count, JitOption* options, void** values) {
  return entry_in_context([&](ContextOfDriver& context) {
    require(handle != nullptr && image != nullptr);
    forbid_while_capturing();
    refuse_binaries(image);
    const auto module = load(context, static_cast<const char*>(image), ErrorLog(count, options, values));
    for (const auto& [name, function] : module->functions) {
      function->module = module;
      registry<FunctionOfDriver>().add(function);
    }
    *handle = registry<ModuleOfDriver>().add(module);
  });
}

Result cuModuleUnload(Module handle) {
  return entry_in_context([&](ContextOfDriver&) {
    forbid_while_capturing();
    const auto module = registry<ModuleOfDriver>().remove(handle);
    for (const auto& [name, function] : module->functions) registry<FunctionOfDriver>().remove(function.get());
    if (!module->variables.empty()) module->context->memory.deallocate_variables(module->variables.front());
  });
}

Result cuModuleGetFunction(Function* function, Module handle, const char* name) {
  return entry_in_context([&](ContextOfDriver&) {
    const auto module = registry<ModuleOfDriver>().find(handle);
    const auto found = module->functions.find(name);
    require(found != module->functions.end(), Result::not_found);
    *function = found->second.get();
  });
}

Result cuModuleGetGlobal_v2(DevicePtr* pointer, size_t* bytes, Module handle, const char* name) {
  return entry_in_context([&](ContextOfDriver&) {
    const auto module = registry<ModuleOfDriver>().find(handle);
    const auto& names = module->variable_names;
    const auto found = std::find(names.begin(), names.end(), name);
    require(found != names.end(), Result::not_found);
    const auto i = static_cast<size_t>(found - names.begin());
    if (pointer != nullptr) *pointer = module->variables[i];
    if (bytes != nullptr) *bytes = module->variable_bytes[i];
  });
}

}  // namespace ng::cuda
