// CPUID: which instruction set runs here, and the forced choice.
#include "narrowgauge/device.hpp"

#include <array>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <fstream>

#include "narrowgauge/error.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif

namespace ng {
namespace {

constexpr std::array<std::string_view, 4> kNames = {"portable", "avx2", "avx512", "amx"};

#if defined(__x86_64__)
struct Feature {
  std::string_view name;
  int leaf;  // 1: leaf 1; 7: leaf 7 subleaf 0; 71: leaf 7 subleaf 1
  char reg;  // which register
  int bit;
  int state;  // XCR0 bits that the operating system must have enabled
};

constexpr int kYmm = 0x6;       // SSE and AVX state
constexpr int kZmm = 0xe6;      // plus opmask and the upper ZMM state
constexpr int kTile = 0x60000;  // TILECFG and TILEDATA
constexpr std::array kFeatures = {
    Feature{"avx2", 7, 'b', 5, kYmm},         Feature{"fma", 1, 'c', 12, kYmm},
    Feature{"f16c", 1, 'c', 29, kYmm},        Feature{"bmi2", 7, 'b', 8, 0},
    Feature{"sse4_2", 1, 'c', 20, 0},         Feature{"pclmulqdq", 1, 'c', 1, 0},
    Feature{"avx_vnni", 71, 'a', 4, kYmm},    Feature{"avx512f", 7, 'b', 16, kZmm},
    Feature{"avx512bw", 7, 'b', 30, kZmm},    Feature{"avx512dq", 7, 'b', 17, kZmm},
    Feature{"avx512vl", 7, 'b', 31, kZmm},    Feature{"avx512_vbmi", 7, 'c', 1, kZmm},
    Feature{"avx512_vbmi2", 7, 'c', 6, kZmm}, Feature{"avx512_vnni", 7, 'c', 11, kZmm},
    Feature{"avx512_bf16", 71, 'a', 5, kZmm}, Feature{"avx512_fp16", 7, 'd', 23, kZmm},
    Feature{"amx_tile", 7, 'd', 24, kTile},   Feature{"amx_bf16", 7, 'd', 22, kTile},
    Feature{"amx_int8", 7, 'd', 25, kTile},
};
constexpr std::array<std::string_view, 6> kAvx2Needs = {"avx2", "fma", "f16c", "bmi2", "sse4_2", "pclmulqdq"};
constexpr std::array<std::string_view, 7> kAvx512Needs = {"avx512f",     "avx512bw",     "avx512dq",   "avx512vl",
                                                          "avx512_vbmi", "avx512_vbmi2", "avx512_vnni"};
constexpr std::array<std::string_view, 3> kAmxNeeds = {"amx_tile", "amx_bf16", "amx_int8"};

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

uint64_t enabled_state() {
  constexpr unsigned kOsxsave = 1u << 27;
  if ((cpuid(1, 0).c & kOsxsave) == 0) return 0;
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

bool has_feature(const Feature& feature) {
  static const Registers kLeaf1 = cpuid(1, 0);
  static const Registers kLeaf7 = cpuid(7, 0);
  static const Registers kLeaf71 = cpuid(7, 1);
  static const uint64_t kState = enabled_state();
  const Registers& r = feature.leaf == 1 ? kLeaf1 : feature.leaf == 7 ? kLeaf7 : kLeaf71;
  const unsigned word = feature.reg == 'a' ? r.a : feature.reg == 'b' ? r.b : feature.reg == 'c' ? r.c : r.d;
  const auto state = static_cast<uint64_t>(feature.state);
  return ((word >> feature.bit) & 1u) != 0 && (kState & state) == state;
}

template <size_t N>
bool has_all(const std::array<std::string_view, N>& names) {
  for (const std::string_view name : names) {
    for (const Feature& feature : kFeatures) {
      if (feature.name == name && !has_feature(feature)) return false;
    }
  }
  return true;
}

// 0, or why the system does not let this process use tiles. Linux gives each process that asks the larger register
// state, and its threads and children after that.
int tile_permission() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
}

#if defined(NARROWGAUGE_AMX)
constexpr bool kBuiltWithAmx = true;
#else
constexpr bool kBuiltWithAmx = false;
#endif

// Why what the CPU has is not used.
const std::string& amx_reason() {
  static const std::string kReason = []() -> std::string {
    if (!has_all(kAmxNeeds)) return "";
    if (!kBuiltWithAmx) return "built by a compiler whose assembler does not know AMX";
    const int error = tile_permission();
    return error == 0 ? "" : concat("the system refuses permission to use tiles: ", std::strerror(error));
  }();
  return kReason;
}
#endif

void check_supported(Isa isa, const char* asked_by) {
  NG_CHECK(isa <= isa_supported(), InvalidArgument, asked_by, " asks for instruction set '", isa_name(isa),
           "', which this CPU lacks; it runs up to '", isa_name(isa_supported()), "'");
}

Isa initial_isa() {
  const char* forced = std::getenv("NARROWGAUGE_ISA");
  if (forced == nullptr || *forced == '\0') return isa_supported();
  Isa isa{};
  try {
    isa = isa_from_name(forced);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(concat("NARROWGAUGE_ISA: ", error.what()));
  }
  check_supported(isa, "NARROWGAUGE_ISA");
  return isa;
}

// -1 until the first question.
std::atomic<int> g_isa{-1};

}  // namespace

Device Device::parse(std::string_view text) {
  if (text == "cpu") return {};
  if (text == "cuda") return {0};
  Device device;
  constexpr std::string_view kPrefix = "cuda:";
  bool valid = text.starts_with(kPrefix);
  if (valid) {
    const char* end = text.data() + text.size();
    const auto [at, error] = std::from_chars(text.data() + kPrefix.size(), end, device.gpu);
    valid = error == std::errc() && at == end && device.gpu >= 0;
  }
  NG_CHECK(valid, InvalidArgument, "unknown device '", text, "', expected 'cpu', 'cuda' or 'cuda:' and an index");
  return device;
}

std::string Device::str() const { return is_cpu() ? "cpu" : concat("cuda:", gpu); }

std::string_view isa_name(Isa isa) noexcept { return kNames[static_cast<size_t>(isa)]; }

Isa isa_from_name(std::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) return static_cast<Isa>(i);
  }
  throw InvalidArgument(concat("unknown instruction set '", name, "'; expected portable, avx2, avx512 or amx"));
}

Isa isa_supported() noexcept {
#if defined(__x86_64__)
  static const Isa kBest = [] {
    if (!has_all(kAvx2Needs)) return Isa::portable;
    if (!has_all(kAvx512Needs)) return Isa::avx2;
    return has_all(kAmxNeeds) && amx_reason().empty() ? Isa::amx : Isa::avx512;
  }();
  return kBest;
#else
  return Isa::portable;
#endif
}

Isa isa() {
  const int known = g_isa.load(std::memory_order_relaxed);
  if (known >= 0) [[likely]]
    return static_cast<Isa>(known);
  const Isa chosen = initial_isa();
  g_isa.store(static_cast<int>(chosen), std::memory_order_relaxed);
  return chosen;
}

void force_isa(Isa isa) {
  check_supported(isa, "force_isa");
  g_isa.store(static_cast<int>(isa), std::memory_order_relaxed);
}

std::string why_no_amx() {
#if defined(__x86_64__)
  return amx_reason();
#else
  return "";
#endif
}

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) {
      const size_t colon = line.find(':');
      if (colon != std::string::npos && colon + 2 <= line.size()) return line.substr(colon + 2);
    }
  }
  return "unknown";
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  for (const Feature& feature : kFeatures) {
    if (has_feature(feature)) names.emplace_back(feature.name);
  }
#endif
  return names;
}

}  // namespace ng
