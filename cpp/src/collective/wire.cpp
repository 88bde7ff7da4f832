#include "collective/wire.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/serial.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/quantize.hpp"
#include "quantize/arguments.hpp"
#include "quantize/codec.hpp"
#include "quantize/sum.hpp"

namespace ng::collective {
namespace {

constexpr int64_t kHadamard = codec::kBlock;
constexpr int64_t kPadding = 16;
constexpr int64_t kBand = 8192;  // elements that one thread works on at a time, cut to a multiple of the unit

using Band = std::array<float, kBand>;

int64_t size_of(DType dtype) { return static_cast<int64_t>(dtype_bytes(dtype)); }

const std::byte* at(const void* from, DType dtype, int64_t index) {
  return static_cast<const std::byte*>(from) + index * size_of(dtype);
}
std::byte* at(void* from, DType dtype, int64_t index) { return static_cast<std::byte*>(from) + index * size_of(dtype); }

// x = H x / sqrt(n) for n a power of two, in place: its own inverse, but for rounding. n < 64.
void short_hadamard(float* x, int64_t n) {
  for (int64_t half = 1; half < n; half *= 2) {
    for (int64_t i = 0; i < n; i += 2 * half) {
      for (int64_t j = i; j < i + half; ++j) {
        const float sum = x[j] + x[j + half];
        x[j + half] = x[j] - x[j + half];
        x[j] = sum;
      }
    }
  }
  const float factor = 1.0f / std::sqrt(static_cast<float>(n));
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// Blocks of 64, and what is left over in powers of two, the largest first.
void hadamard(float* x, int64_t n) {
  codec::table().hadamard(x, n / kHadamard);
  for (int64_t done = n / kHadamard * kHadamard; done < n;) {
    const auto length = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(n - done)));
    short_hadamard(x + done, length);
    done += length;
  }
}

// body(first, count) for all bands of n elements, each by one thread.
template <typename Body>
void for_bands(const Wire& wire, int64_t n, Executor& executor, const Body& body) {
  const int64_t unit = unit_elements(wire), band = kBand / unit * unit;
  executor.parallel_for((n + band - 1) / band, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * band, std::min(band, n - i * band));
  });
}

}  // namespace

void check_wire(const Wire& wire) {
  if (!wire.format) {
    NG_CHECK(!wire.hadamard && !wire.stochastic, InvalidArgument,
             "a wire without a Format is exact; expected neither hadamard nor stochastic");
    return;
  }
  NG_CHECK(wire.format->group != 0, InvalidArgument, "the wire's Format is ", wire.format->str(),
           "; expected one with groups, such as int8:g64:bf16, since elements are cut into chunks");
  NG_CHECK(!wire.format->has_global_scale(), InvalidArgument, "the wire's Format is ", wire.format->str(),
           "; expected one without a global scale, since elements are cut into chunks");
}

int64_t unit_elements(const Wire& wire) { return wire.format ? std::lcm(int64_t{wire.format->group}, kHadamard) : 64; }

int64_t unit_bytes(const Wire& wire, DType dtype, int64_t n) {
  return wire.format ? canonical_bytes(*wire.format, 1, n).total() : n * size_of(dtype);
}

int64_t wire_bytes(const Wire& wire, DType dtype, int64_t n) {
  return (unit_bytes(wire, dtype, n) + kPadding - 1) / kPadding * kPadding;
}

CanonicalView unit_part(const Format& format, const std::byte* unit, int64_t unit_n, int64_t first, int64_t n) {
  const CanonicalBytes bytes = canonical_bytes(format, 1, unit_n);
  auto* base = const_cast<std::byte*>(unit);
  const int64_t group = first / format.group;
  CanonicalView view{.format = format, .rows = 1, .cols = n};
  view.scales = base + group * static_cast<int64_t>(scale_bytes(format.scale));
  if (format.element.has_zero_point()) view.zeros = reinterpret_cast<uint8_t*>(base) + bytes.scales + group;
  view.codes = reinterpret_cast<uint8_t*>(base) + bytes.scales + bytes.zeros + first * format.element.bits / 8;
  return view;
}

TensorView unit_row(const void* data, DType dtype, int64_t n) { return {const_cast<void*>(data), dtype, {1, n}}; }

void encode(const Wire& wire, const void* from, DType dtype, int64_t n, Randomness random, float* error, std::byte* to,
            Executor& executor) {
  const int64_t bytes = unit_bytes(wire, dtype, n);
  std::memset(to + bytes, 0, static_cast<size_t>(wire_bytes(wire, dtype, n) - bytes));
  if (n == 0) return;
  if (!wire.format) {  // and leaves no error
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  QuantizeOptions options{.nan = NanPolicy::keep, .stochastic = wire.stochastic, .seed = random.seed};
  options.first_index = random.first;
  if (!wire.hadamard && error == nullptr) {
    quantize(unit_row(from, dtype, n), unit_part(*wire.format, to, n, 0, n), options, executor);
    return;
  }
  for_bands(wire, n, executor, [&](int64_t first, int64_t count) {
    Serial serial;
    alignas(64) Band wide, sent;
    codec::table().widen(at(from, dtype, first), codec::source_of(dtype, "from"), count, wide.data());
    float* const left = error == nullptr ? nullptr : error + first;
    if (left != nullptr) {
      for (int64_t i = 0; i < count; ++i) left[i] = wide[static_cast<size_t>(i)] += left[i];
    }
    if (wire.hadamard) hadamard(wide.data(), count);
    QuantizeOptions of_band = options;
    of_band.first_index += first;
    const CanonicalView codes = unit_part(*wire.format, to, n, first, count);
    quantize(unit_row(wide.data(), DType::f32, count), codes, of_band, serial);
    if (left == nullptr) return;
    dequantize(codes, unit_row(sent.data(), DType::f32, count), serial);
    if (wire.hadamard) hadamard(sent.data(), count);
    for (int64_t i = 0; i < count; ++i) {
      const float rest = left[i] - sent[static_cast<size_t>(i)];
      left[i] = std::isfinite(rest) ? rest : 0;
    }
  });
}

void decode(const Wire& wire, const std::byte* from, DType dtype, int64_t n, void* to, DType to_dtype,
            Executor& executor) {
  if (n == 0) return;
  if (!wire.format && dtype == to_dtype) {
    std::memcpy(to, from, static_cast<size_t>(n * size_of(dtype)));
  } else if (wire.format && !wire.hadamard) {
    dequantize(unit_part(*wire.format, from, n, 0, n), unit_row(to, to_dtype, n), executor);
  } else {
    decode_sum(wire, std::span(&from, 1), dtype, n, 1, to, to_dtype, executor);
  }
}

std::array<CodesPart, 3> codes_parts(const std::byte* from, int64_t n, int64_t first, const CanonicalView& to) {
  const CanonicalView unit = unit_part(to.format, from, n, 0, n);
  const CanonicalBytes bytes = canonical_bytes(to.format, 1, n);
  const int64_t group = first / to.format.group;
  const auto at = [](void* out, int64_t offset, const void* in, int64_t size) {
    return CodesPart{static_cast<std::byte*>(out) + (size == 0 ? 0 : offset), static_cast<const std::byte*>(in),
                     static_cast<size_t>(size)};
  };
  return {at(to.scales, group * static_cast<int64_t>(scale_bytes(to.format.scale)), unit.scales, bytes.scales),
          at(to.zeros, group, unit.zeros, bytes.zeros),
          at(to.codes, first * to.format.element.bits / 8, unit.codes, bytes.codes)};
}

void copy_codes(const std::byte* from, int64_t n, int64_t first, const CanonicalView& to) {
  for (const CodesPart& part : codes_parts(from, n, first, to)) {
    if (part.bytes != 0) std::memcpy(part.to, part.from, part.bytes);
  }
}

void decode_sum(const Wire& wire, std::span<const std::byte* const> from, DType dtype, int64_t n, int divisor, void* to,
                DType to_dtype, Executor& executor) {
  if (wire.format && !wire.hadamard) {
    std::vector<CanonicalView> peers;
    for (const std::byte* unit : from) peers.push_back(unit_part(*wire.format, unit, n, 0, n));
    codec::dequantize_sum(peers, divisor, unit_row(to, to_dtype, n), executor);
    return;
  }
  for_bands(wire, n, executor, [&](int64_t first, int64_t count) {
    Serial serial;
    alignas(64) Band sum, values;
    const codec::Table& kernels = codec::table();
    const auto get = [&](const std::byte* unit, Band& out) {
      if (wire.format) {
        dequantize(unit_part(*wire.format, unit, n, first, count), unit_row(out.data(), DType::f32, count), serial);
      } else {
        kernels.widen(at(unit, dtype, first), codec::source_of(dtype, "from"), count, out.data());
      }
    };
    get(from[0], sum);
    for (const std::byte* unit : from.subspan(1)) {
      get(unit, values);
      kernels.add(values.data(), count, sum.data());
    }
    if (wire.hadamard) hadamard(sum.data(), count);
    kernels.narrow(sum.data(), count, static_cast<float>(divisor), codec::source_of(to_dtype, "to"),
                   at(to, to_dtype, first));
  });
}

}  // namespace ng::collective
