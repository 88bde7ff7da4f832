// Suballocator: which units of an abstract range are free. It splits and merges runs of units and never touches what
// they stand for, so it serves host pages, device memory and address space alike.
//
// Free runs are listed by size, eight lists to a doubling (a two-level segregated fit: Masmano et al., "TLSF", 2004);
// within a list the last freed comes first, since it is the likeliest to be in the CPU's caches. Boundary tags (Knuth,
// TAOCP 2.5) in a table beside the range tell a run's neighbours, so that freeing merges in constant time. The table
// takes memory only near the ends of runs.
//
// Free runs may be kept apart in sets: what is in different sets is not merged. Not thread-safe: its owner locks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "memory/zeroed_array.hpp"

namespace ng {

class Suballocator {
 public:
  // A run [first, first + units).
  struct Run {
    uint32_t first;
    uint32_t units;
    friend bool operator==(Run, Run) = default;
  };

  using Set = uint32_t;
  static constexpr Set kShared = 0;           // is always there
  static constexpr Set kLive = ~uint32_t{0};  // no set: what for_each() says of a live run

  // For units below `capacity`, at most 2^31. Throws OutOfMemory if the table cannot be mapped.
  explicit Suballocator(uint32_t capacity);

  // A new, empty set.
  Set make_set();

  // Units that may be handed out from now on. pre: not empty, below the capacity, and none of them is known yet.
  void add(Run run) noexcept;

  // The first of `units` adjacent units of the set, now live; nothing if there is no such free run. pre: units > 0.
  std::optional<uint32_t> allocate(uint32_t units, Set set = kShared) noexcept;

  // Frees into `set` what allocate(units) gave. False, and nothing is changed, if no live run of that length begins at
  // `first`.
  bool deallocate(uint32_t first, uint32_t units, Set set = kShared) noexcept;

  // Moves all runs of a set.
  void move(Set from, Set to) noexcept;

  // Forgets `units` adjacent free units and returns the first; add() may bring them back in any pieces.
  std::optional<uint32_t> remove(uint32_t units) noexcept;

  // Forgets of each shared free run the part that `part(Run)` names, perhaps none (0 units), and returns the parts.
  template <typename F>
  std::vector<Run> remove_free(const F& part);

  // Length of the shared free run that ends right before `unit`, or 0.
  uint32_t free_before(uint32_t unit) const noexcept;

  uint64_t live_units() const noexcept { return live_units_; }
  uint64_t live_runs() const noexcept { return live_runs_; }
  uint64_t known_units() const noexcept { return known_units_; }  // live, or free in any set
  uint64_t free_units(Set set = kShared) const noexcept { return sets_[set].units; }
  uint32_t largest_free() const noexcept;  // of the shared runs

  // Calls f(Run, Set) for every run, in rising order.
  template <typename F>
  void for_each(const F& f) const {
    const auto end = static_cast<uint32_t>(tags_.size());
    for (uint32_t unit = 0; unit < end;) {
      if (unit % kChunk == 0 && known_[unit / kChunk] == 0) {
        unit += kChunk;
      } else if (const Tag& tag = tags_[unit]; tag.units != 0) {
        f(Run{unit, tag.units}, tag.set);
        unit += tag.units;
      } else {
        ++unit;
      }
    }
  }

 private:
  static constexpr uint32_t kNone = ~uint32_t{0};
  static constexpr uint32_t kSteps = 8;  // lists to a doubling
  static constexpr uint32_t kBins = 30 * kSteps;
  static constexpr uint32_t kChunk = 4096;

  // One for each unit. A run is described by the tags of its first and its last unit.
  struct Tag {
    uint32_t units;     // of the run that begins here, or 0
    uint32_t begin;     // of the run that ends here, plus 1, or 0
    uint32_t next;      // in the list of free runs
    uint32_t previous;  // likewise
    Set set;            // where the run that begins here is free, or kLive
  };

  struct Lists {
    std::array<uint32_t, kBins> heads;
    std::array<uint64_t, (kBins + 63) / 64> occupied{};  // a bit for each list that is not empty
    uint64_t units = 0;
    Lists() { heads.fill(kNone); }
  };

  static uint32_t bin_of(uint32_t units) noexcept;
  void mark(Run run, Set set) noexcept;
  void unmark(Run run) noexcept;
  void link(Run run, Set set) noexcept;
  void unlink(Run run) noexcept;
  void merge_and_link(Run run, Set set) noexcept;
  uint32_t find_free(uint32_t units, Set set) noexcept;
  std::optional<uint32_t> take(uint32_t units, Set set) noexcept;
  void count(Run run, bool known) noexcept;

  ZeroedArray<Tag> tags_;
  ZeroedArray<uint32_t> known_;  // units of each chunk that are known, so that for_each() need not look at others
  std::vector<Lists> sets_;
  uint64_t live_units_ = 0;
  uint64_t live_runs_ = 0;
  uint64_t known_units_ = 0;
};

template <typename F>
std::vector<Suballocator::Run> Suballocator::remove_free(const F& part) {
  std::vector<Run> all;
  for_each([&](Run run, Set set) {
    if (set == kShared) all.push_back(run);
  });
  std::vector<Run> removed;
  removed.reserve(all.size());
  for (const Run run : all) {
    const Run gone = part(run);
    if (gone.units == 0) continue;
    unlink(run);
    if (run.first < gone.first) link({run.first, gone.first - run.first}, kShared);
    const uint32_t end = gone.first + gone.units;
    if (end < run.first + run.units) link({end, run.first + run.units - end}, kShared);
    count(gone, false);
    removed.push_back(gone);
  }
  return removed;
}

}  // namespace ng
