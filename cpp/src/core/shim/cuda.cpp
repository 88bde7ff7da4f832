// Loading of libcuda.so.1.
#include "core/shim/cuda.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include "narrowgauge/error.hpp"

namespace ng::cuda {
namespace {

struct Loaded {
  Driver table;
  std::string reason;  // why there is none; empty: there is
  pid_t process = getpid();
};

std::string version_text(int version) { return concat(version / 1000, '.', version % 1000 / 10); }

// Fills the table; the reason if that fails.
std::string load(Driver& table) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return concat("no NVIDIA driver was found (", dlerror(), ")");
#define NG_FIND(name, parameters)                                                                                   \
  table.name = reinterpret_cast<decltype(table.name)>(dlsym(library, #name));                                       \
  if (table.name == nullptr) {                                                                                      \
    return concat("the NVIDIA driver lacks " #name ": it is older than CUDA ", version_text(kMinimumDriverVersion), \
                  ", install a newer one");                                                                         \
  }
  NG_CUDA_FUNCTIONS(NG_FIND)
#undef NG_FIND
  int version = 0;
  if (table.cuDriverGetVersion(&version) == Result::success && version < kMinimumDriverVersion) {
    return concat("the NVIDIA driver is for CUDA ", version_text(version), ", expected at least ",
                  version_text(kMinimumDriverVersion), ": install a newer one");
  }
  const Result result = table.cuInit(0);
  if (result != Result::success) {
    const char* name = nullptr;
    const char* text = nullptr;
    table.cuGetErrorName(result, &name);
    table.cuGetErrorString(result, &text);
    return concat("the NVIDIA driver does not start: ", name != nullptr ? name : "unknown error", " (",
                  text != nullptr ? text : "no description", ')');
  }
  int count = 0;
  if (table.cuDeviceGetCount(&count) != Result::success || count == 0) {
    return "the NVIDIA driver finds no device (is CUDA_VISIBLE_DEVICES empty?)";
  }
  return {};
}

const Loaded& loaded() noexcept {
  static const Loaded instance = [] {
    Loaded out;
    out.reason = load(out.table);
    return out;
  }();
  return instance;
}

}  // namespace

const Driver* driver() noexcept { return loaded().reason.empty() ? &loaded().table : nullptr; }

const std::string& why_unavailable() noexcept { return loaded().reason; }

int driver_process() noexcept { return loaded().process; }

}  // namespace ng::cuda
