#include "collective/wire.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "narrowgauge/error.hpp"
#include "narrowgauge/quantize.hpp"
#include "quantize/sum.hpp"

namespace ng::collective {
namespace {

constexpr int64_t kHadamard = 64;
constexpr int64_t kPadding = 16;
constexpr int64_t kBand = 262144;  // elements; cut to a multiple of the unit
constexpr int64_t kGrain = 4096;

int64_t size_of(DType dtype) { return static_cast<int64_t>(dtype_bytes(dtype)); }

const std::byte* at(const void* from, DType dtype, int64_t index) {
  return static_cast<const std::byte*>(from) + index * size_of(dtype);
}
std::byte* at(void* from, DType dtype, int64_t index) { return static_cast<std::byte*>(from) + index * size_of(dtype); }

// Elements [first, first + n) of a unit of which `first` starts a group.
CanonicalView part(const Format& format, const std::byte* unit, int64_t unit_n, int64_t first, int64_t n) {
  const CanonicalBytes bytes = canonical_bytes(format, 1, unit_n);
  auto* base = const_cast<std::byte*>(unit);
  const int64_t group = first / format.group;
  CanonicalView view{.format = format, .rows = 1, .cols = n};
  view.scales = base + group * static_cast<int64_t>(scale_bytes(format.scale));
  if (format.element.has_zero_point()) view.zeros = reinterpret_cast<uint8_t*>(base) + bytes.scales + group;
  view.codes = reinterpret_cast<uint8_t*>(base) + bytes.scales + bytes.zeros + first * format.element.bits / 8;
  return view;
}

TensorView row(const void* data, DType dtype, int64_t n) { return {const_cast<void*>(data), dtype, {1, n}}; }

// use(i, value) for n elements of any type.
template <typename Use>
void for_floats(const void* from, DType dtype, int64_t n, const Use& use) {
  switch (dtype) {
    case DType::f16:
      for (int64_t i = 0; i < n; ++i) use(i, to_float(static_cast<const f16*>(from)[i]));
      break;
    case DType::bf16:
      for (int64_t i = 0; i < n; ++i) use(i, to_float(static_cast<const bf16*>(from)[i]));
      break;
    default:
      for (int64_t i = 0; i < n; ++i) use(i, static_cast<const float*>(from)[i]);
  }
}

void widen(const void* from, DType dtype, int64_t n, float* to) {
  for_floats(from, dtype, n, [to](int64_t i, float value) { to[i] = value; });
}

void add(const void* from, DType dtype, int64_t n, float* to) {
  for_floats(from, dtype, n, [to](int64_t i, float value) { to[i] += value; });
}

// x = H x / sqrt(n) for n a power of two, in place: its own inverse, but for rounding. n <= 64.
inline void hadamard(float* x, int64_t n) {
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
void hadamard_all(float* x, int64_t n, Executor& executor) {
  executor.parallel_for(n / kHadamard, kGrain / kHadamard, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) hadamard(x + block * kHadamard, kHadamard);
  });
  for (int64_t done = n / kHadamard * kHadamard; done < n;) {
    const auto length = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(n - done)));
    hadamard(x + done, length);
    done += length;
  }
}

int64_t band_of(const Wire& wire) {
  const int64_t unit = unit_elements(wire);
  return kBand / unit * unit;
}

// body(first, n) for all bands of n elements.
template <typename Body>
void for_bands(int64_t n, int64_t band, const Body& body) {
  for (int64_t first = 0; first < n; first += band) body(first, std::min(band, n - first));
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

int64_t wire_bytes(const Wire& wire, DType dtype, int64_t n) {
  const int64_t bytes = wire.format ? canonical_bytes(*wire.format, 1, n).total() : n * size_of(dtype);
  return (bytes + kPadding - 1) / kPadding * kPadding;
}

void encode(const Wire& wire, const void* from, DType dtype, int64_t n, Randomness random, float* error, std::byte* to,
            Executor& executor) {
  const int64_t bytes = wire.format ? canonical_bytes(*wire.format, 1, n).total() : n * size_of(dtype);
  std::memset(to + bytes, 0, static_cast<size_t>(wire_bytes(wire, dtype, n) - bytes));
  if (n == 0) return;
  if (!wire.format) {  // and leaves no error
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  QuantizeOptions options{.nan = NanPolicy::keep, .stochastic = wire.stochastic, .seed = random.seed};
  options.first_index = random.first;
  if (!wire.hadamard && error == nullptr) {
    quantize(row(from, dtype, n), part(*wire.format, to, n, 0, n), options, executor);
    return;
  }
  const int64_t band = band_of(wire);
  std::vector<float> wide(static_cast<size_t>(std::min(band, n))), sent(error == nullptr ? 0 : wide.size());
  for_bands(n, band, [&](int64_t first, int64_t count) {
    executor.parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
      widen(at(from, dtype, first + begin), dtype, end - begin, wide.data() + begin);
    });
    if (error != nullptr) {
      for (int64_t i = 0; i < count; ++i) error[first + i] = wide[static_cast<size_t>(i)] += error[first + i];
    }
    if (wire.hadamard) hadamard_all(wide.data(), count, executor);
    options.first_index = random.first + first;
    const CanonicalView codes = part(*wire.format, to, n, first, count);
    quantize(row(wide.data(), DType::f32, count), codes, options, executor);
    if (error == nullptr) return;
    dequantize(codes, row(sent.data(), DType::f32, count), executor);
    if (wire.hadamard) hadamard_all(sent.data(), count, executor);
    for (int64_t i = 0; i < count; ++i) {
      const float left = error[first + i] - sent[static_cast<size_t>(i)];
      error[first + i] = std::isfinite(left) ? left : 0;
    }
  });
}

void decode(const Wire& wire, const std::byte* from, DType dtype, int64_t n, void* to, DType to_dtype,
            Executor& executor) {
  if (n == 0) return;
  if (!wire.format && dtype == to_dtype) {
    std::memcpy(to, from, static_cast<size_t>(n * size_of(dtype)));
  } else if (wire.format && !wire.hadamard) {
    dequantize(part(*wire.format, from, n, 0, n), row(to, to_dtype, n), executor);
  } else {
    decode_sum(wire, std::span(&from, 1), dtype, n, 1, to, to_dtype, executor);
  }
}

void copy_codes(const std::byte* from, int64_t n, int64_t first, const CanonicalView& to) {
  const CanonicalView unit = part(to.format, from, n, 0, n);
  const CanonicalBytes bytes = canonical_bytes(to.format, 1, n);
  const int64_t group = first / to.format.group;
  const auto copy = [](void* out, int64_t offset, const void* in, int64_t size) {
    if (size != 0) std::memcpy(static_cast<std::byte*>(out) + offset, in, static_cast<size_t>(size));
  };
  copy(to.scales, group * static_cast<int64_t>(scale_bytes(to.format.scale)), unit.scales, bytes.scales);
  copy(to.zeros, group, unit.zeros, bytes.zeros);
  copy(to.codes, first * to.format.element.bits / 8, unit.codes, bytes.codes);
}

void decode_sum(const Wire& wire, std::span<const std::byte* const> from, DType dtype, int64_t n, int divisor, void* to,
                DType to_dtype, Executor& executor) {
  std::vector<CanonicalView> peers(wire.format ? from.size() : 0);
  const auto set_peers = [&](int64_t first, int64_t count) {
    for (size_t i = 0; i < peers.size(); ++i) peers[i] = part(*wire.format, from[i], n, first, count);
  };
  if (wire.format && !wire.hadamard) {
    set_peers(0, n);
    codec::dequantize_sum(peers, divisor, row(to, to_dtype, n), executor);
    return;
  }
  const int64_t band = band_of(wire);
  std::vector<float> sum(static_cast<size_t>(std::min(band, n)));
  for_bands(n, band, [&](int64_t first, int64_t count) {
    if (wire.format) {
      set_peers(first, count);
      dequantize_sum(peers, row(sum.data(), DType::f32, count), executor);
      hadamard_all(sum.data(), count, executor);
    } else {
      executor.parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
        float* const out = sum.data() + begin;
        widen(at(from[0], dtype, first + begin), dtype, end - begin, out);
        for (const std::byte* unit : from.subspan(1)) add(at(unit, dtype, first + begin), dtype, end - begin, out);
      });
    }
    executor.parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
      codec::store_quotients(sum.data() + begin, end - begin, divisor, to_dtype, at(to, to_dtype, first + begin));
    });
  });
}

}  // namespace ng::collective
