// Suballocator: which units of an abstract range are free. It splits and merges runs of units and never touches what
// they stand for, so it serves host pages, device memory and address space alike.
//
// Free runs are listed by size, eight lists to a doubling (a two-level segregated fit: Masmano et al., "TLSF", 2004);
// within a list the last freed comes first, since it is the likeliest to be in the CPU's caches. Boundary tags (Knuth,
// TAOCP 2.5) in tables beside the range tell a run's neighbours, so that freeing merges in constant time. Not
// thread-safe: its owner locks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace ng {

class Suballocator {
 public:
  // A run [first, first + units) of units below 2^31.
  struct Run {
    uint32_t first;
    uint32_t units;
    friend bool operator==(Run, Run) = default;
  };

  // Units that may be handed out from now on. pre: not empty, and none of them is known yet.
  void add(Run run);

  // The first of `units` adjacent units, now live; nothing if there is no such free run. pre: units > 0.
  std::optional<uint32_t> allocate(uint32_t units) noexcept;

  // Frees what allocate(units) gave. False, and nothing is changed, if no live run of that length begins at `first`.
  bool deallocate(uint32_t first, uint32_t units) noexcept;

  // Forgets `units` adjacent free units and returns the first; add() may bring them back in any pieces.
  std::optional<uint32_t> remove(uint32_t units) noexcept;

  // Forgets all free runs of whole, aligned granules, and returns them.
  std::vector<Run> remove_free(uint32_t granule);

  // Length of the free run that ends right before `unit`, or 0.
  uint32_t free_before(uint32_t unit) const noexcept;

  uint64_t live_units() const noexcept { return live_units_; }
  uint64_t live_runs() const noexcept { return live_runs_; }
  uint64_t free_units() const noexcept { return free_units_; }
  uint32_t largest_free() const noexcept;

  // Calls f(Run, bool live) for every run, in rising order.
  template <typename F>
  void for_each(const F& f) const {
    const auto end = static_cast<uint32_t>(tables_.size()) * kTableUnits;
    for (uint32_t unit = 0; unit < end;) {
      const Tag* tag = find(unit);
      if (tag != nullptr && tag->units != 0) {
        f(Run{unit, tag->units}, tag->next == kLive);
        unit += tag->units;
      } else {
        unit += tag == nullptr ? kTableUnits - unit % kTableUnits : 1;
      }
    }
  }

 private:
  static constexpr uint32_t kNone = ~uint32_t{0};
  static constexpr uint32_t kLive = kNone - 1;
  static constexpr uint32_t kTableUnits = 512;
  static constexpr uint32_t kSteps = 8;  // lists to a doubling
  static constexpr uint32_t kBins = 30 * kSteps;

  // One for each unit. A run is described by the tags of its first and its last unit.
  struct Tag {
    uint32_t units = 0;      // of the run that begins here, or 0
    uint32_t begin = kNone;  // of the run that ends here
    uint32_t next = kNone;   // in the list of free runs; kLive in a live run
    uint32_t previous = kNone;
  };

  static uint32_t bin_of(uint32_t units) noexcept;
  Tag& tag(uint32_t unit) noexcept { return tables_[unit / kTableUnits][unit % kTableUnits]; }
  const Tag* find(uint32_t unit) const noexcept;
  void mark(Run run) noexcept;
  void unmark(Run run) noexcept;
  void link(Run run) noexcept;
  void unlink(Run run) noexcept;
  void merge_and_link(Run run) noexcept;
  uint32_t find_free(uint32_t units) noexcept;

  std::vector<std::unique_ptr<Tag[]>> tables_;  // made where runs are added
  std::array<uint32_t, kBins> heads_ = [] {
    std::array<uint32_t, kBins> heads;
    heads.fill(kNone);
    return heads;
  }();
  std::array<uint64_t, (kBins + 63) / 64> occupied_{};  // a bit for each bin that is not empty
  uint64_t live_units_ = 0;
  uint64_t live_runs_ = 0;
  uint64_t free_units_ = 0;
};

}  // namespace ng
