// Modules and functions behind their handles.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "driver.hpp"
#include "simulator.hpp"

namespace ng::cuda {

struct ModuleOfDriver {
  ContextOfDriver* context;
  ModuleText text;
  int ptx_version = 0;
  size_t constant_bytes = 0;
  std::map<std::string, std::shared_ptr<FunctionOfDriver>> functions;
  std::vector<std::string> variable_names;  // in the order of the description
  std::vector<size_t> variable_bytes;
  std::vector<DevicePtr> variables;
};

struct FunctionOfDriver {
  struct Parameter {
    size_t offset;
    size_t bytes;
  };
  std::weak_ptr<ModuleOfDriver> module;
  std::string name;
  int shared_bytes = 0;
  int local_bytes = 0;
  int max_threads = 0;
  int constant_bytes = 0;
  int ptx_version = 0;
  std::atomic<int> max_dynamic_shared_bytes{0};
  std::vector<Parameter> parameters;
};

}  // namespace ng::cuda
