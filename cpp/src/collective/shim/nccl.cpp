// Loading of libnccl.so.2.
#include "collective/shim/nccl.hpp"

#include <dlfcn.h>

#include "narrowgauge/error.hpp"

namespace ng::nccl {
namespace {

struct Loaded {
  Nccl table;
  std::string reason;  // why there is none; empty: there is
};

std::string version_text(int version) { return concat(version / 10000, '.', version / 100 % 100, '.', version % 100); }

// Fills the table; the reason if that fails.
std::string load(Nccl& table) {
  constexpr const char* kName = "libnccl.so.2";
  void* library = dlopen(kName, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  if (library == nullptr) library = dlopen(kName, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return concat("NCCL was not found (", dlerror(),
                  "): import a torch that has it first, or add it to LD_LIBRARY_PATH");
  }
#define NG_FIND(result, name, parameters)                                                                             \
  table.name = reinterpret_cast<decltype(table.name)>(dlsym(library, #name));                                         \
  if (table.name == nullptr) {                                                                                        \
    return concat("NCCL lacks " #name ": it is older than ", version_text(kMinimumVersion), ", install a newer one"); \
  }
  NG_NCCL_FUNCTIONS(NG_FIND)
#undef NG_FIND
  int version = 0;
  const Result result = table.ncclGetVersion(&version);
  if (result != Result::success) return concat("NCCL does not start: ", table.ncclGetErrorString(result));
  if (version < kMinimumVersion) {
    return concat("NCCL is version ", version_text(version), ", expected at least ", version_text(kMinimumVersion),
                  ": install a newer one");
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

const Nccl* library() noexcept { return loaded().reason.empty() ? &loaded().table : nullptr; }

const std::string& why_unavailable() noexcept { return loaded().reason; }

}  // namespace ng::nccl
