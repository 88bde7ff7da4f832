// The ranks' parts of a tensor, and their chunks: ranges that start at whole units, so that results do not depend on
// how many there are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "collective/wire.hpp"
#include "narrowgauge/collective.hpp"

namespace ng::collective {

struct Range {
  int64_t first = 0;
  int64_t n = 0;
};

// Throws InvalidArgument.
void check_options(const CollectiveOptions& options);

// Of `count` nearly equal ranges of [0, n) that start at multiples of `unit`, the one of this index.
inline Range cut(int64_t n, int64_t unit, int64_t index, int64_t count) {
  const int64_t units = (n + unit - 1) / unit;
  const auto bound = [&](int64_t i) { return std::min(n, units * i / count * unit); };
  return {bound(index), bound(index + 1) - bound(index)};
}

// The ranks' parts of a tensor, and the chunks of each.
struct Layout {
  std::vector<Range> parts;
  int64_t unit = 1;
  int chunks = 1;

  Range chunk(int part, int index) const {
    const Range whole = parts[static_cast<size_t>(part)];
    const Range range = cut(whole.n, unit, index, chunks);
    return {whole.first + range.first, range.n};
  }
  int64_t longest(int index) const {
    int64_t n = 0;
    for (int part = 0; part < static_cast<int>(parts.size()); ++part) n = std::max(n, chunk(part, index).n);
    return n;
  }
};

inline int chunks_of(CollectiveKind kind, int64_t n, DType dtype, const CollectiveOptions& options) {
  const int64_t bytes = n * static_cast<int64_t>(dtype_bytes(dtype));
  const int64_t least = options.chunk_bytes.value_or(default_chunk_bytes(kind));
  return static_cast<int>(std::clamp<int64_t>(bytes / least, 1, options.chunks));
}

// Parts of n elements each.
inline Layout equal_parts(CollectiveKind kind, int64_t n, int ranks, DType dtype, const CollectiveOptions& options) {
  Layout layout;
  for (int rank = 0; rank < ranks; ++rank) layout.parts.push_back({rank * n, n});
  layout.unit = std::lcm(unit_elements(options.wire), unit_elements(options.inside));
  layout.chunks = chunks_of(kind, n * ranks, dtype, options);
  return layout;
}

// n elements of an all_reduce in parts.
inline Layout nearly_equal_parts(int64_t n, int ranks, DType dtype, const CollectiveOptions& options) {
  constexpr auto kKind = CollectiveKind::all_reduce;
  Layout layout = equal_parts(kKind, 0, ranks, dtype, options);
  layout.chunks = chunks_of(kKind, n, dtype, options);
  for (int rank = 0; rank < ranks; ++rank) {
    layout.parts[static_cast<size_t>(rank)] = cut(n, layout.unit, rank, ranks);
  }
  return layout;
}

}  // namespace ng::collective
