// The suballocator against a model that keeps one state per unit.
#include "memory/suballocator.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

namespace ng {
namespace {

using UnitRun = Suballocator::Run;

// The specification: every unit is unknown, free or live; runs are found by looking at all of them.
class Model {
 public:
  enum Unit : uint8_t { unknown, free, live };

  explicit Model(uint32_t units) : units_(units, unknown) {}

  void fill(UnitRun run, Unit from, Unit to) {
    for (uint32_t unit = run.first; unit < run.first + run.units; ++unit) {
      ASSERT_EQ(units_.at(unit), from) << unit;
      units_[unit] = to;
    }
  }

  std::vector<UnitRun> free_runs() const {
    std::vector<UnitRun> out;
    for (uint32_t unit = 0; unit < units_.size(); ++unit) {
      if (units_[unit] != free) continue;
      if (unit > 0 && units_[unit - 1] == free) {
        ++out.back().units;
      } else {
        out.push_back({unit, 1});
      }
    }
    return out;
  }

  uint32_t largest_free() const {
    uint32_t largest = 0;
    for (const UnitRun run : free_runs()) largest = std::max(largest, run.units);
    return largest;
  }

 private:
  std::vector<Unit> units_;
};

void expect_same(const Suballocator& allocator, const Model& model, const std::map<uint32_t, uint32_t>& live) {
  std::vector<UnitRun> free_runs;
  std::map<uint32_t, uint32_t> live_runs;
  uint64_t free_units = 0;
  uint64_t live_units = 0;
  allocator.for_each([&](UnitRun run, bool is_live) {
    if (is_live) {
      live_runs[run.first] = run.units;
      live_units += run.units;
    } else {
      free_runs.push_back(run);
      free_units += run.units;
    }
  });
  ASSERT_EQ(free_runs, model.free_runs());  // as long as they can be: all neighbours are merged
  ASSERT_EQ(live_runs, live);
  ASSERT_EQ(allocator.free_units(), free_units);
  ASSERT_EQ(allocator.live_units(), live_units);
  ASSERT_EQ(allocator.live_runs(), live.size());
  ASSERT_EQ(allocator.largest_free(), model.largest_free());
}

TEST(Suballocator, FollowsTheModel) {
  constexpr uint32_t kUnits = 3000;
  constexpr uint32_t kGranule = 64;
  for (uint32_t seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](uint32_t bound) { return static_cast<uint32_t>(random() % bound); };
    Suballocator allocator;
    Model model(kUnits);
    std::map<uint32_t, uint32_t> live;
    std::vector<UnitRun> absent;
    for (uint32_t first = 0; first < kUnits; first += 100) absent.push_back({first, 100});
    for (int step = 0; step < 3000; ++step) {
      const uint32_t action = below(100);
      if (action < 3 && !absent.empty()) {
        std::swap(absent[below(static_cast<uint32_t>(absent.size()))], absent.back());
        allocator.add(absent.back());
        model.fill(absent.back(), Model::unknown, Model::free);
        absent.pop_back();
      } else if (action < 4) {
        for (const UnitRun run : allocator.remove_free(kGranule)) {
          ASSERT_TRUE(run.units > 0 && run.first % kGranule == 0 && run.units % kGranule == 0);
          model.fill(run, Model::free, Model::unknown);
          absent.push_back(run);
        }
        for (const UnitRun run : model.free_runs()) {  // nothing of a whole granule is left
          ASSERT_LT((run.first + run.units) / kGranule, (run.first + kGranule - 1) / kGranule + 1);
        }
      } else if (action < 55) {
        const uint32_t units = 1 + (below(4) == 0 ? below(300) : below(20));
        const uint32_t largest = model.largest_free();
        const auto first = action == 54 ? allocator.remove(units) : allocator.allocate(units);
        ASSERT_EQ(first.has_value(), units <= largest) << units;
        if (!first) continue;
        model.fill({*first, units}, Model::free, action == 54 ? Model::unknown : Model::live);
        if (action == 54) {
          absent.push_back({*first, units});
        } else {
          live[*first] = units;
        }
      } else if (action < 60) {
        const uint32_t first = below(kUnits + 1000);
        const uint32_t units = below(25);
        if (live.contains(first) && live[first] == units) continue;
        ASSERT_FALSE(allocator.deallocate(first, units));
      } else if (!live.empty()) {
        const auto it = std::next(live.begin(), below(static_cast<uint32_t>(live.size())));
        ASSERT_FALSE(allocator.deallocate(it->first, it->second + 1));
        ASSERT_TRUE(allocator.deallocate(it->first, it->second));
        ASSERT_FALSE(allocator.deallocate(it->first, it->second));
        model.fill({it->first, it->second}, Model::live, Model::free);
        live.erase(it);
      }
      for (const UnitRun run : model.free_runs()) ASSERT_EQ(allocator.free_before(run.first + run.units), run.units);
      if (step % 50 == 0) expect_same(allocator, model, live);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(Suballocator, FindsTheOneRunThatFits) {
  // Many runs of the same list, of which only the one freed first is long enough: it is behind all others.
  Suballocator allocator;
  constexpr uint32_t kCount = 100;
  allocator.add({0, kCount * 80});
  std::vector<uint32_t> runs;
  for (uint32_t i = 0; i < kCount; ++i) {
    runs.push_back(*allocator.allocate(i == 0 ? 71 : 64));
    ASSERT_TRUE(allocator.allocate(1));  // keeps them apart
  }
  while (allocator.allocate(1)) {
  }
  for (uint32_t i = 0; i < kCount; ++i) ASSERT_TRUE(allocator.deallocate(runs[i], i == 0 ? 71 : 64));
  EXPECT_EQ(allocator.allocate(72), std::nullopt);
  EXPECT_EQ(allocator.allocate(70), runs[0]);
}

TEST(Suballocator, PrefersTheBestFitOfAList) {
  Suballocator allocator;
  allocator.add({0, 1000});
  const uint32_t long_run = *allocator.allocate(79);
  allocator.allocate(1);
  const uint32_t exact_run = *allocator.allocate(73);
  allocator.allocate(1);
  const uint32_t other_run = *allocator.allocate(76);
  allocator.allocate(1);
  allocator.deallocate(exact_run, 73);
  allocator.deallocate(other_run, 76);
  allocator.deallocate(long_run, 79);
  EXPECT_EQ(allocator.allocate(73), exact_run);
  EXPECT_EQ(allocator.allocate(75), other_run);
}

}  // namespace
}  // namespace ng
