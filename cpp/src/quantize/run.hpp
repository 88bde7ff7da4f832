// Runs: what the codec's kernels work on, and the scales of one.
//
// A run is a whole number of groups and of blocks of 64 codes of one row, so runs write separate bytes and can go to
// any thread. Scratch is on the stack (about 50 KB a thread). Results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "narrowgauge/format.hpp"
#include "quantize/codec.hpp"

namespace ng::codec {

// Elements of a run: whole groups and whole blocks of 64 codes. A format without groups is cut anywhere.
inline int64_t run_length(const Format& format) {
  if (format.group == 0) return kRun;
  const int64_t unit = std::lcm(int64_t{format.group}, kBlock);
  return kRun / unit * unit;
}

// Elements for which the kernels see one scale, as a power of two: whole blocks where groups allow it.
inline int spread_shift(int64_t group) { return group % kBlock == 0 ? 6 : 4; }

// The scales of a run's groups and their zero points, and the same spread for the kernels.
struct Scales {
  static constexpr size_t kMost = kRun / kSpread;
  // Vectors are written whole, so the last may run over.
  template <typename T>
  using Array = std::array<T, kMost + kSpread>;

  alignas(64) std::array<std::byte, 4 * kMost> stored;
  Array<float> scale, inverse, inverse_low;
  Array<int32_t> zero;
  Array<float> spread_scale, spread_inverse, spread_inverse_low;
  Array<int32_t> spread_zero;
  codec::Division division = codec::Division::plain;

  codec::ScaleArrays arrays() { return {scale.data(), inverse.data(), inverse_low.data()}; }

  // pre: entries for `count` groups of `group` elements, of a run of n.
  codec::Spread spread(const codec::Table& table, int64_t count, int64_t group, int64_t n, bool zeros,
                       bool reciprocals) {
    const int shift = spread_shift(group);
    const int64_t unit = int64_t{1} << shift;
    const int64_t step = (std::min(group, n) + unit - 1) / unit;
    const auto each = [&](const Array<float>& from, Array<float>& to) {
      if (step == 1) return from.data();
      table.spread(from.data(), count, step, to.data());
      return static_cast<const float*>(to.data());
    };
    for (int64_t g = 0; zeros && g < count; ++g) {
      std::fill_n(spread_zero.begin() + g * step, step, zero[static_cast<size_t>(g)]);
    }
    return {shift,
            each(scale, spread_scale),
            reciprocals ? each(inverse, spread_inverse) : nullptr,
            reciprocals ? each(inverse_low, spread_inverse_low) : nullptr,
            spread_zero.data(),
            division};
  }
};

}  // namespace ng::codec
