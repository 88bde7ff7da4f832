// Regions against arrays of flags: what two regions share, and whether regions are disjoint.
#include "checkpoint/region.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <random>

namespace ng {
namespace {

int64_t numel(Shape shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, [](int64_t a, int64_t b) { return a * b; });
}

// The tensor's flat index of every element of the region, in the order of the region's memory.
std::vector<int64_t> elements(const Region& region, Shape shape) {
  std::vector<int64_t> out;
  for (int64_t flat = 0; flat < numel(shape); ++flat) {
    bool inside = true;
    if (region.flat) {
      inside = flat >= region.bounds[0][0] && flat < region.bounds[0][1];
    } else {
      int64_t rest = flat;
      for (size_t axis = shape.size(); axis-- > 0;) {
        const int64_t at = rest % shape[axis];
        rest /= shape[axis];
        inside &= at >= region.bounds[axis][0] && at < region.bounds[axis][1];
      }
    }
    if (inside) out.push_back(flat);
  }
  return out;
}

class RegionTest : public testing::Test {
 protected:
  int64_t below(int64_t bound) { return std::uniform_int_distribution<int64_t>(0, bound - 1)(random_); }

  std::vector<int64_t> shape() {
    std::vector<int64_t> out(static_cast<size_t>(below(5)));
    for (int64_t& length : out) length = below(10) == 0 ? 0 : 1 + below(5);
    return out;
  }
  std::array<int64_t, 2> bounds(int64_t length) {
    const int64_t a = below(length + 1);
    const int64_t b = below(length + 1);
    return {std::min(a, b), std::max(a, b)};
  }
  Region region(Shape shape) {
    if (below(2) == 0) return {true, {bounds(numel(shape))}};
    Region out;
    for (const int64_t length : shape) out.bounds.push_back(bounds(length));
    return out;
  }

  std::mt19937_64 random_{1};
};

TEST_F(RegionTest, SharedRunsAreWhatBothHold) {
  for (int trial = 0; trial < 20000; ++trial) {
    const std::vector<int64_t> dims = shape();
    const Region source = region(dims);
    const Region target = region(dims);
    ASSERT_EQ(region_mismatch(source, dims), "");
    const std::vector<int64_t> from = elements(source, dims);
    const std::vector<int64_t> to = elements(target, dims);
    ASSERT_EQ(static_cast<int64_t>(from.size()), source.numel());

    std::vector<int64_t> filled(to.size(), -1);
    int64_t last = -1;
    for (const SharedRun& run : shared_runs(source, target, dims)) {
      ASSERT_GT(run.length, 0);
      ASSERT_GT(run.source, last);
      last = run.source + run.length - 1;
      for (int64_t i = 0; i < run.length; ++i) {
        int64_t& element = filled.at(static_cast<size_t>(run.target + i));
        ASSERT_EQ(element, -1) << "filled twice";
        element = from.at(static_cast<size_t>(run.source + i));
      }
    }
    for (size_t i = 0; i < to.size(); ++i) {
      const bool held = std::binary_search(from.begin(), from.end(), to[i]);
      ASSERT_EQ(filled[i], held ? to[i] : -1) << region_str(source) << ' ' << region_str(target);
    }
  }
}

TEST_F(RegionTest, DisjointMeansNoElementTwice) {
  int overlapping = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    const std::vector<int64_t> dims = shape();
    std::vector<Region> regions(static_cast<size_t>(1 + below(4)));
    std::vector<const Region*> pointers;
    std::vector<int> count(static_cast<size_t>(numel(dims)), 0);
    for (Region& each : regions) {
      each = region(dims);
      pointers.push_back(&each);
      for (const int64_t element : elements(each, dims)) ++count[static_cast<size_t>(element)];
    }
    const bool disjoint = std::none_of(count.begin(), count.end(), [](int n) { return n > 1; });
    overlapping += disjoint ? 0 : 1;
    ASSERT_EQ(regions_disjoint(pointers, dims), disjoint);
  }
  EXPECT_GT(overlapping, 1000);
}

TEST_F(RegionTest, RunsAreAsLongAsTheyCanBe) {
  const std::vector<int64_t> dims = {8, 6, 4};
  EXPECT_EQ(shared_runs(Region::whole(dims), Region::whole(dims), dims).size(), 1u);
  EXPECT_EQ(shared_runs(Region::whole(dims), Region::run(5, 100), dims).size(), 1u);
  EXPECT_EQ(shared_runs(Region::whole(dims), {false, {{2, 5}, {0, 6}, {0, 4}}}, dims).size(), 1u);
  EXPECT_EQ(shared_runs(Region::whole(dims), {false, {{2, 5}, {1, 3}, {0, 4}}}, dims).size(), 3u);
}

TEST_F(RegionTest, WhatDoesNotFitIsNamed) {
  const std::vector<int64_t> dims = {4, 6};
  EXPECT_NE(region_mismatch({false, {{0, 4}}}, dims), "");
  EXPECT_NE(region_mismatch({false, {{0, 4}, {3, 7}}}, dims), "");
  EXPECT_NE(region_mismatch({false, {{0, 4}, {-1, 3}}}, dims), "");
  EXPECT_NE(region_mismatch({false, {{0, 4}, {3, 2}}}, dims), "");
  EXPECT_NE(region_mismatch(Region::run(0, 25), dims), "");
  EXPECT_NE(region_mismatch({true, {{0, 1}, {0, 1}}}, dims), "");
  EXPECT_EQ(region_mismatch(Region::run(24, 24), dims), "");
}

}  // namespace
}  // namespace ng
