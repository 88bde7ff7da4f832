// Boxes and runs. A run of flattened elements is cut into boxes, so that all questions are questions about boxes.
#include "checkpoint/region.hpp"

#include <algorithm>
#include <utility>

namespace ng {
namespace {

std::vector<int64_t> dense_strides(Shape shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t axis = shape.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= shape[axis];
  }
  return strides;
}

// Where an element lies in a region's memory: a linear function of its coordinates in the tensor.
struct Placement {
  int64_t base = 0;
  std::vector<int64_t> strides;

  Placement(const Region& region, Shape shape) {
    if (region.flat) {
      strides = dense_strides(shape);
      base = -region.bounds[0][0];
      return;
    }
    std::vector<int64_t> lengths;
    lengths.reserve(region.bounds.size());
    for (const auto& [start, stop] : region.bounds) lengths.push_back(stop - start);
    strides = dense_strides(lengths);
    for (size_t axis = 0; axis < lengths.size(); ++axis) base -= region.bounds[axis][0] * strides[axis];
  }
};

// Appends the boxes of elements [start, stop) of the row-major tensor `shape`, each behind the fixed axes in `prefix`.
void cut_run(int64_t start, int64_t stop, Shape shape, Box& prefix, std::vector<Box>& out) {
  if (start >= stop) return;
  const size_t fixed = prefix.size();
  const auto append = [&](int64_t low, int64_t high) {  // whole rows of this axis
    Box box = prefix;
    box.push_back({low, high});
    for (size_t axis = fixed + 1; axis < shape.size(); ++axis) box.push_back({0, shape[axis]});
    out.push_back(std::move(box));
  };
  if (fixed == shape.size()) {  // a scalar
    out.push_back(prefix);
    return;
  }
  int64_t row = 1;
  for (size_t axis = fixed + 1; axis < shape.size(); ++axis) row *= shape[axis];
  const auto partial = [&](int64_t index, int64_t low, int64_t high) {
    prefix.push_back({index, index + 1});
    cut_run(low, high, shape, prefix, out);
    prefix.pop_back();
  };
  int64_t first = start / row;
  const int64_t last = stop / row;
  if (first == last) return partial(first, start % row, stop % row);
  if (start % row != 0) partial(first++, start % row, row);
  if (first < last) append(first, last);
  if (stop % row != 0) partial(last, 0, stop % row);
}

// Appends the runs of one box that both memories hold.
void append_runs(const Box& box, const Placement& source, const Placement& target, std::vector<SharedRun>& out) {
  // Axes from the last on that are dense in both memories make up one run.
  int64_t length = 1;
  size_t outer = box.size();
  while (outer > 0) {
    const size_t axis = outer - 1;
    const int64_t extent = box[axis][1] - box[axis][0];
    if (extent != 1 && (source.strides[axis] != length || target.strides[axis] != length)) break;
    length *= extent;
    outer = axis;
  }
  int64_t from = source.base;
  int64_t to = target.base;
  for (size_t axis = 0; axis < box.size(); ++axis) {
    from += box[axis][0] * source.strides[axis];
    to += box[axis][0] * target.strides[axis];
  }
  std::vector<int64_t> index(outer, 0);
  while (true) {
    if (!out.empty() && out.back().source + out.back().length == from && out.back().target + out.back().length == to) {
      out.back().length += length;
    } else {
      out.push_back({from, to, length});
    }
    size_t axis = outer;
    while (axis > 0) {
      --axis;
      const int64_t extent = box[axis][1] - box[axis][0];
      from += source.strides[axis];
      to += target.strides[axis];
      if (++index[axis] < extent) break;
      from -= extent * source.strides[axis];
      to -= extent * target.strides[axis];
      index[axis] = 0;
      if (axis == 0) return;
    }
    if (outer == 0) return;
  }
}

// False if they share nothing; otherwise `out` is what they share.
bool intersect(const Box& a, const Box& b, Box& out) {
  out.resize(a.size());
  for (size_t axis = 0; axis < a.size(); ++axis) {
    out[axis] = {std::max(a[axis][0], b[axis][0]), std::min(a[axis][1], b[axis][1])};
    if (out[axis][0] >= out[axis][1]) return false;
  }
  return true;
}

}  // namespace

Region Region::whole(std::span<const int64_t> shape) {
  Region out;
  for (const int64_t length : shape) out.bounds.push_back({0, length});
  return out;
}

int64_t Region::numel() const noexcept {
  int64_t count = 1;
  for (const auto& [start, stop] : bounds) count *= stop - start;
  return count;
}

std::string region_str(const Region& region) {
  if (region.flat) return concat("elements ", region.bounds[0][0], ":", region.bounds[0][1]);
  std::string out = "[";
  for (const auto& [start, stop] : region.bounds) out += concat(out.size() == 1 ? "" : ", ", start, ":", stop);
  return out + "]";
}

std::string region_mismatch(const Region& region, Shape shape) {
  const size_t expected = region.flat ? 1 : shape.size();
  if (region.bounds.size() != expected) {
    return concat("has ", region.bounds.size(), " pairs of bounds, expected ", expected);
  }
  int64_t total = 1;
  for (const int64_t length : shape) total *= length;
  for (size_t axis = 0; axis < expected; ++axis) {
    const auto [start, stop] = region.bounds[axis];
    const int64_t length = region.flat ? total : shape[axis];
    if (start < 0 || start > stop || stop > length) {
      return concat("has bounds ", start, ":", stop, region.flat ? " of elements" : concat(" on axis ", axis),
                    ", expected them within 0:", length);
    }
  }
  return {};
}

std::vector<Box> region_boxes(const Region& region, Shape shape) {
  std::vector<Box> out;
  if (region.numel() == 0) return out;
  if (region.flat) {
    Box prefix;
    cut_run(region.bounds[0][0], region.bounds[0][1], shape, prefix, out);
  } else {
    out.push_back(region.bounds);
  }
  return out;
}

bool regions_disjoint(std::span<const Region* const> regions, Shape shape) {
  if (regions.size() < 2) return true;
  std::vector<Box> boxes;
  for (const Region* region : regions) {
    for (Box& box : region_boxes(*region, shape)) boxes.push_back(std::move(box));
  }
  if (shape.empty()) return boxes.size() < 2;
  // Sorted by their beginning on the first axis, a box is compared with those that begin before it ends there.
  std::sort(boxes.begin(), boxes.end());
  Box common;
  for (size_t i = 0; i < boxes.size(); ++i) {
    for (size_t j = i + 1; j < boxes.size() && boxes[j][0][0] < boxes[i][0][1]; ++j) {
      if (intersect(boxes[i], boxes[j], common)) return false;
    }
  }
  return true;
}

std::vector<SharedRun> shared_runs(const Region& source, const Region& target, Shape shape) {
  std::vector<SharedRun> out;
  if (source.flat && target.flat) {  // no need of boxes
    const int64_t start = std::max(source.bounds[0][0], target.bounds[0][0]);
    const int64_t stop = std::min(source.bounds[0][1], target.bounds[0][1]);
    if (start < stop) out.push_back({start - source.bounds[0][0], start - target.bounds[0][0], stop - start});
    return out;
  }
  const Placement from(source, shape);
  const Placement to(target, shape);
  Box common;
  for (const Box& a : region_boxes(source, shape)) {
    for (const Box& b : region_boxes(target, shape)) {
      if (intersect(a, b, common)) append_runs(common, from, to, out);
    }
  }
  return out;
}

}  // namespace ng
