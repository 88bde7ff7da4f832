// Regions of a row-major tensor: checking them, telling whether they are disjoint, and finding the runs of elements
// that two of them share. Everything counts elements.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "narrowgauge/checkpoint.hpp"

namespace ng {

using Shape = std::span<const int64_t>;

// Why `region` is no part of a tensor of this shape; empty if it is.
std::string region_mismatch(const Region& region, Shape shape);

// "[0:4, 2:6]", or "elements 128:256".
std::string region_str(const Region& region);

// A box with [start, stop) for every axis; none for a scalar.
using Box = std::vector<std::array<int64_t, 2>>;

// The region as disjoint boxes that are not empty, in row-major order: a run of elements takes at most two for every
// axis. pre: region_mismatch(region, shape) is empty.
std::vector<Box> region_boxes(const Region& region, Shape shape);

// Whether no element is in two of the regions. pre: each fits the shape.
bool regions_disjoint(std::span<const Region* const> regions, Shape shape);

// Elements that lie together in both: `length` from `source` in one region's memory and from `target` in the other's.
struct SharedRun {
  int64_t source;
  int64_t target;
  int64_t length;
};

// What two regions of one tensor share, as the longest runs, with rising `source`. Memory of a region holds its
// elements densely, row-major. pre: both fit the shape.
std::vector<SharedRun> shared_runs(const Region& source, const Region& target, Shape shape);

}  // namespace ng
