// Executes the instructions of AMX that our kernels use on a CPU that has none: it raises SIGILL, whose handler decodes
// them (Intel's manual, volume 2: LDTILECFG to TILEZERO), does what they do to tiles that each thread has here, and
// goes on behind them. What a CPU would refuse, tiles that no configuration has, shapes that do not fit, other
// instructions, ends the process by that signal. Products of bf16 take subnormals for zero, round to nearest even, and
// make no subnormals.

#include <ucontext.h>

#include <array>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr size_t kTiles = 8;
constexpr size_t kRows = 16;
constexpr size_t kRowBytes = 64;

struct Config {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

using Tile = std::array<std::array<uint8_t, kRowBytes>, kRows>;

thread_local Config t_config;
thread_local std::array<Tile, kTiles> t_tiles;

template <typename T>
T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// In the order of a VEX prefix's pp.
enum class Prefix : uint8_t { none, x66, xf3, xf2 };

struct Instruction {
  Prefix prefix = Prefix::none;
  uint8_t opcode = 0;
  size_t reg = 0, vvvv = 0;
  size_t rm = 0;  // a register, or with memory:
  bool memory = false;
  uint64_t address = 0;
  uint64_t stride = 0;
  size_t length = 0;
};

uint64_t register_of(const ucontext_t& context, size_t number) {
  static constexpr std::array kOrder = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                        REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<uint64_t>(context.uc_mcontext.gregs[kOrder[number]]);
}

// False if this is not a VEX.128.0F38.W0 instruction.
bool decode(const ucontext_t& context, Instruction& out) {
  const auto start = static_cast<uint64_t>(context.uc_mcontext.gregs[REG_RIP]);
  const auto* at = reinterpret_cast<const uint8_t*>(start);
  if (at[0] != 0xc4 || (at[1] & 0x1fu) != 2 || (at[2] & 0x84u) != 0) return false;
  const size_t r = (at[1] & 0x80u) != 0 ? 0 : 8;
  const size_t x = (at[1] & 0x40u) != 0 ? 0 : 8;
  const size_t b = (at[1] & 0x20u) != 0 ? 0 : 8;
  out.prefix = static_cast<Prefix>(at[2] & 3u);
  out.vvvv = ~at[2] >> 3 & 15u;
  out.opcode = at[3];
  const uint8_t modrm = at[4];
  const unsigned mod = modrm >> 6;
  out.reg = (modrm >> 3 & 7u) + r;
  out.rm = (modrm & 7u) + b;
  at += 5;
  out.memory = mod != 3;
  if (out.memory) {
    size_t base = out.rm;
    bool has_base = true;
    if ((modrm & 7u) == 4) {
      const uint8_t sib = *at++;
      const size_t index = (sib >> 3 & 7u) + x;
      base = (sib & 7u) + b;
      if (index != 4) out.stride = register_of(context, index) << (sib >> 6);
      has_base = mod != 0 || (sib & 7u) != 5;
    }
    const bool relative = mod == 0 && (modrm & 7u) == 5;
    if (mod == 1) out.address = static_cast<uint64_t>(int64_t{static_cast<int8_t>(*at++)});
    if (mod == 2 || relative || !has_base) {
      out.address = static_cast<uint64_t>(int64_t{load<int32_t>(at)});
      at += 4;
    }
    if (relative) {
      out.address += reinterpret_cast<uint64_t>(at);
    } else if (has_base) {
      out.address += register_of(context, base);
    }
  }
  out.length = reinterpret_cast<uint64_t>(at) - start;
  return true;
}

bool configure(const void* from) {
  const auto config = load<Config>(from);
  if (config.palette != 1 || config.start_row != 0) return false;
  for (const uint8_t byte : config.reserved) {
    if (byte != 0) return false;
  }
  for (size_t t = 0; t < 16; ++t) {
    if (config.row_bytes[t] > kRowBytes || config.rows[t] > kRows) return false;
    if ((config.row_bytes[t] == 0) != (config.rows[t] == 0)) return false;
    if (t >= kTiles && config.rows[t] != 0) return false;
  }
  t_config = config;
  t_tiles = {};
  return true;
}

bool configured(size_t tile) { return t_config.palette == 1 && tile < kTiles && t_config.rows[tile] > 0; }

float flush(float value) {
  const auto bits = load<uint32_t>(&value);
  return (bits & 0x7f800000u) == 0 ? load<float>(std::array{bits & 0x80000000u}.data()) : value;
}
float bf16_at(const uint8_t* at) {
  return flush(load<float>(std::array{static_cast<uint32_t>(load<uint16_t>(at)) << 16}.data()));
}

// Adds the products of k quads of bytes, or pairs of bf16, to one of n sums: even pairs in one chain, odd ones in
// another.
float sum_of_bf16(float sum, const uint8_t* a, const Tile& b, size_t n, size_t quads) {
  float chains[2] = {};
  for (size_t k = 0; k < quads; ++k) {
    for (size_t i = 0; i < 2; ++i) {
      const float product = bf16_at(a + 4 * k + 2 * i);
      chains[i] = flush(__builtin_fmaf(product, bf16_at(&b[k][4 * n + 2 * i]), chains[i]));
    }
  }
  return flush(flush(sum) + flush(chains[0] + chains[1]));
}
uint32_t sum_of_bytes(uint32_t sum, const uint8_t* a, const Tile& b, size_t n, size_t quads) {
  for (size_t k = 0; k < quads; ++k) {
    for (size_t i = 0; i < 4; ++i) {
      sum += static_cast<uint32_t>(static_cast<int8_t>(a[4 * k + i]) * static_cast<int8_t>(b[k][4 * n + i]));
    }
  }
  return sum;
}

bool multiply(const Instruction& of) {
  const size_t c = of.reg;
  const size_t a = of.rm;
  const size_t b = of.vvvv;
  if (a == b || a == c || b == c || !configured(a) || !configured(b) || !configured(c)) return false;
  const size_t quads = t_config.row_bytes[a] / 4u;
  if (t_config.rows[a] != t_config.rows[c] || t_config.row_bytes[b] != t_config.row_bytes[c]) return false;
  if (t_config.rows[b] != quads || t_config.row_bytes[a] % 4 != 0 || t_config.row_bytes[b] % 4 != 0) return false;
  for (size_t m = 0; m < t_config.rows[c]; ++m) {
    for (size_t n = 0; n < t_config.row_bytes[c] / 4u; ++n) {
      uint8_t* sum = &t_tiles[c][m][4 * n];
      if (of.opcode == 0x5c) {
        const float total = sum_of_bf16(load<float>(sum), t_tiles[a][m].data(), t_tiles[b], n, quads);
        std::memcpy(sum, &total, sizeof total);
      } else {
        const uint32_t total = sum_of_bytes(load<uint32_t>(sum), t_tiles[a][m].data(), t_tiles[b], n, quads);
        std::memcpy(sum, &total, sizeof total);
      }
    }
  }
  return true;
}

bool execute(const Instruction& of) {
  auto* memory = reinterpret_cast<uint8_t*>(of.address);
  if (of.opcode == 0x49 && of.memory && of.prefix == Prefix::none) return configure(memory);  // LDTILECFG
  if (of.opcode == 0x49 && !of.memory && of.prefix == Prefix::none) {                         // TILERELEASE
    t_config = {};
    return true;
  }
  if (of.opcode == 0x49 && !of.memory && of.prefix == Prefix::xf2) {  // TILEZERO
    if (!configured(of.reg)) return false;
    t_tiles[of.reg] = {};
    return true;
  }
  if (of.opcode == 0x4b && of.memory && (of.prefix == Prefix::xf2 || of.prefix == Prefix::xf3)) {
    if (!configured(of.reg)) return false;
    const bool loads = of.prefix == Prefix::xf2;  // TILELOADD, TILESTORED
    if (loads) t_tiles[of.reg] = {};
    for (size_t row = 0; row < t_config.rows[of.reg]; ++row) {
      uint8_t* of_tile = t_tiles[of.reg][row].data();
      uint8_t* of_memory = memory + row * of.stride;
      std::memcpy(loads ? of_tile : of_memory, loads ? of_memory : of_tile, t_config.row_bytes[of.reg]);
    }
    return true;
  }
  if (!of.memory &&
      ((of.opcode == 0x5c && of.prefix == Prefix::xf3) || (of.opcode == 0x5e && of.prefix == Prefix::xf2))) {
    return multiply(of);  // TDPBF16PS, TDPBSSD
  }
  return false;
}

void on_illegal_instruction(int, siginfo_t*, void* given) {
  auto& context = *static_cast<ucontext_t*>(given);
  Instruction instruction;
  if (decode(context, instruction) && execute(instruction)) {
    context.uc_mcontext.gregs[REG_RIP] += static_cast<greg_t>(instruction.length);
  } else {
    std::signal(SIGILL, SIG_DFL);  // and once more
  }
}

[[maybe_unused]] const bool kInstalled = [] {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, nullptr) == 0;
}();

}  // namespace
