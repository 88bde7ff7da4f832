// The suballocator against a model that keeps one state per unit.
#include "memory/suballocator.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <random>
#include <vector>

namespace ng {
namespace {

using UnitRun = Suballocator::Run;
constexpr Suballocator::Set kSets = 3;

// The specification: every unit is unknown, live, or free in a set; runs are found by looking at all of them.
class Model {
 public:
  enum Unit : uint8_t { unknown, live, free };  // and free + n: in set n

  explicit Model(uint32_t units) : units_(units, unknown) {}

  void fill(UnitRun run, Unit from, Unit to) {
    for (uint32_t unit = run.first; unit < run.first + run.units; ++unit) {
      ASSERT_EQ(units_.at(unit), from) << unit;
      units_[unit] = to;
    }
  }

  std::vector<UnitRun> free_runs(Suballocator::Set set = Suballocator::kShared) const {
    std::vector<UnitRun> out;
    for (uint32_t unit = 0; unit < units_.size(); ++unit) {
      if (units_[unit] != free_in(set)) continue;
      if (unit > 0 && units_[unit - 1] == free_in(set)) {
        ++out.back().units;
      } else {
        out.push_back({unit, 1});
      }
    }
    return out;
  }

  static Unit free_in(Suballocator::Set set) { return static_cast<Unit>(free + set); }

  void move(Suballocator::Set from, Suballocator::Set to) {
    std::replace(units_.begin(), units_.end(), free_in(from), free_in(to));
  }

  uint32_t largest_free(Suballocator::Set set = Suballocator::kShared) const {
    uint32_t largest = 0;
    for (const UnitRun run : free_runs(set)) largest = std::max(largest, run.units);
    return largest;
  }

 private:
  std::vector<Unit> units_;
};

void expect_same(const Suballocator& allocator, const Model& model, const std::map<uint32_t, uint32_t>& live) {
  std::array<std::vector<UnitRun>, kSets> free_runs;
  std::map<uint32_t, uint32_t> live_runs;
  std::array<uint64_t, kSets> free_units{};
  uint64_t live_units = 0;
  allocator.for_each([&](UnitRun run, Suballocator::Set set) {
    if (set == Suballocator::kLive) {
      live_runs[run.first] = run.units;
      live_units += run.units;
    } else {
      free_runs.at(set).push_back(run);
      free_units.at(set) += run.units;
    }
  });
  uint64_t known_units = live_units;
  for (Suballocator::Set set = 0; set < kSets; ++set) {
    ASSERT_EQ(free_runs[set], model.free_runs(set));  // as long as they can be: all neighbours of a set are merged
    ASSERT_EQ(allocator.free_units(set), free_units[set]);
    known_units += free_units[set];
  }
  ASSERT_EQ(live_runs, live);
  ASSERT_EQ(allocator.known_units(), known_units);
  ASSERT_EQ(allocator.live_units(), live_units);
  ASSERT_EQ(allocator.live_runs(), live.size());
  ASSERT_EQ(allocator.largest_free(), model.largest_free());
}

TEST(Suballocator, FollowsTheModel) {
  constexpr uint32_t kUnits = 9000;  // several chunks of the table
  constexpr uint32_t kGranule = 64;
  for (uint32_t seed = 0; seed < 12; ++seed) {
    std::mt19937 random(seed);
    const auto granules = [](UnitRun run) {
      const uint32_t begin = (run.first + kGranule - 1) / kGranule * kGranule;
      const uint32_t end = (run.first + run.units) / kGranule * kGranule;
      return begin < end ? UnitRun{begin, end - begin} : UnitRun{begin, 0};
    };
    const auto below = [&](uint32_t bound) { return static_cast<uint32_t>(random() % bound); };
    Suballocator allocator(kUnits);
    while (allocator.make_set() + 1 < kSets) {
    }
    Model model(kUnits);
    std::map<uint32_t, uint32_t> live;
    std::vector<UnitRun> absent;
    for (uint32_t first = 0; first < kUnits; first += 100) {
      if (first / 1000 % 4 == seed % 4) absent.push_back({first, 100});
    }
    for (int step = 0; step < 3000; ++step) {
      const uint32_t action = below(100);
      if (action < 3 && !absent.empty()) {
        std::swap(absent[below(static_cast<uint32_t>(absent.size()))], absent.back());
        allocator.add(absent.back());
        model.fill(absent.back(), Model::unknown, Model::free);
        absent.pop_back();
      } else if (action < 4) {
        for (const UnitRun run : allocator.remove_free(granules)) {
          ASSERT_TRUE(run.units > 0 && run.first % kGranule == 0 && run.units % kGranule == 0);
          model.fill(run, Model::free, Model::unknown);
          absent.push_back(run);
        }
        for (const UnitRun run : model.free_runs()) {  // nothing of a whole granule is left
          ASSERT_LT((run.first + run.units) / kGranule, (run.first + kGranule - 1) / kGranule + 1);
        }
      } else if (action < 55) {
        const uint32_t units = 1 + (below(4) == 0 ? below(300) : below(20));
        const Suballocator::Set set = action == 54 ? Suballocator::kShared : below(kSets);
        const uint32_t largest = model.largest_free(set);
        const auto first = action == 54 ? allocator.remove(units) : allocator.allocate(units, set);
        ASSERT_EQ(first.has_value(), units <= largest) << units;
        if (!first) continue;
        model.fill({*first, units}, Model::free_in(set), action == 54 ? Model::unknown : Model::live);
        if (action == 54) {
          absent.push_back({*first, units});
        } else {
          live[*first] = units;
        }
      } else if (action == 55) {
        const Suballocator::Set from = below(kSets);
        const Suballocator::Set to = (from + 1 + below(kSets - 1)) % kSets;
        allocator.move(from, to);
        model.move(from, to);
      } else if (action < 60) {
        const uint32_t first = below(kUnits + 1000);
        const uint32_t units = below(25);
        if (live.contains(first) && live[first] == units) continue;
        ASSERT_FALSE(allocator.deallocate(first, units));
      } else if (!live.empty()) {
        const auto it = std::next(live.begin(), below(static_cast<uint32_t>(live.size())));
        ASSERT_FALSE(allocator.deallocate(it->first, it->second + 1));
        const Suballocator::Set set = below(2) == 0 ? Suballocator::kShared : below(kSets);
        ASSERT_TRUE(allocator.deallocate(it->first, it->second, set));
        ASSERT_FALSE(allocator.deallocate(it->first, it->second, set));
        model.fill({it->first, it->second}, Model::live, Model::free_in(set));
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
  constexpr uint32_t kCount = 100;
  Suballocator allocator(kCount * 80);
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
  Suballocator allocator(1000);
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
