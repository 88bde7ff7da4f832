// Splitting, merging and finding runs; see suballocator.hpp.
#include "memory/suballocator.hpp"

#include <algorithm>
#include <bit>

namespace ng {
namespace {

// A list holds runs of slightly different lengths; this many of them are tried for the best fit before a longer run
// is split.
constexpr int kTries = 16;

}  // namespace

Suballocator::Suballocator(uint32_t capacity) : tags_(capacity), known_(capacity / kChunk + 1), sets_(1) {}

Suballocator::Set Suballocator::make_set() {
  sets_.emplace_back();
  return static_cast<Set>(sets_.size() - 1);
}

uint32_t Suballocator::bin_of(uint32_t units) noexcept {
  if (units < kSteps) return units;
  const auto shift = static_cast<uint32_t>(std::bit_width(units)) - 4;  // leaves the leading bit and three more
  return (shift + 1) * kSteps + (units >> shift) % kSteps;
}

void Suballocator::mark(Run run, Set set) noexcept {
  tags_[run.first].units = run.units;
  tags_[run.first].set = set;
  tags_[run.first + run.units - 1].begin = run.first + 1;
}

void Suballocator::unmark(Run run) noexcept {
  tags_[run.first].units = 0;
  tags_[run.first + run.units - 1].begin = 0;
}

void Suballocator::link(Run run, Set set) noexcept {
  mark(run, set);
  Lists& lists = sets_[set];
  const uint32_t bin = bin_of(run.units);
  Tag& first = tags_[run.first];
  first.next = lists.heads[bin];
  first.previous = kNone;
  if (first.next != kNone) tags_[first.next].previous = run.first;
  lists.heads[bin] = run.first;
  lists.occupied[bin / 64] |= uint64_t{1} << bin % 64;
  lists.units += run.units;
}

void Suballocator::unlink(Run run) noexcept {
  const uint32_t bin = bin_of(run.units);
  const Tag& first = tags_[run.first];
  Lists& lists = sets_[first.set];
  if (first.next != kNone) tags_[first.next].previous = first.previous;
  if (first.previous != kNone) {
    tags_[first.previous].next = first.next;
  } else {
    lists.heads[bin] = first.next;
    if (first.next == kNone) lists.occupied[bin / 64] &= ~(uint64_t{1} << bin % 64);
  }
  lists.units -= run.units;
  unmark(run);
}

void Suballocator::merge_and_link(Run run, Set set) noexcept {
  if (run.first > 0) {
    if (const uint32_t begin = tags_[run.first - 1].begin; begin != 0 && tags_[begin - 1].set == set) {
      const Run left{begin - 1, tags_[begin - 1].units};
      unlink(left);
      run = {left.first, left.units + run.units};
    }
  }
  if (const uint32_t end = run.first + run.units; end < tags_.size()) {
    if (const Tag& tag = tags_[end]; tag.units != 0 && tag.set == set) {
      const Run right{end, tag.units};
      unlink(right);
      run.units += right.units;
    }
  }
  link(run, set);
}

void Suballocator::count(Run run, bool known) noexcept {
  for (uint32_t unit = run.first; unit < run.first + run.units;) {
    const uint32_t end = std::min((unit / kChunk + 1) * kChunk, run.first + run.units);
    known_[unit / kChunk] += known ? end - unit : unit - end;
    unit = end;
  }
  known_units_ += known ? uint64_t{run.units} : -uint64_t{run.units};
}

void Suballocator::add(Run run) noexcept {
  count(run, true);
  merge_and_link(run, kShared);
}

uint32_t Suballocator::find_free(uint32_t units, Set set) noexcept {
  const Lists& lists = sets_[set];
  const uint32_t own = bin_of(units);
  uint32_t best = kNone;
  uint32_t best_units = kNone;
  uint32_t candidate = lists.heads[own];
  const auto try_candidate = [&] {
    const Tag& it = tags_[candidate];
    if (it.units >= units && it.units < best_units) {
      best = candidate;
      best_units = it.units;
    }
    candidate = it.next;
  };
  for (int i = 0; i < kTries && candidate != kNone && best_units != units; ++i) try_candidate();
  if (best != kNone) return best;
  // Any run in a higher bin is long enough.
  for (uint32_t word = (own + 1) / 64; word < lists.occupied.size(); ++word) {
    uint64_t bits = lists.occupied[word];
    if (word == (own + 1) / 64) bits &= ~uint64_t{0} << (own + 1) % 64;
    if (bits != 0) return lists.heads[word * 64 + static_cast<uint32_t>(std::countr_zero(bits))];
  }
  while (candidate != kNone && best == kNone) try_candidate();
  return best;
}

// Units that belong to no run for a moment.
std::optional<uint32_t> Suballocator::take(uint32_t units, Set set) noexcept {
  const uint32_t first = find_free(units, set);
  if (first == kNone) return std::nullopt;
  const Run run{first, tags_[first].units};
  unlink(run);
  // No neighbour is of this set: the rest merges with nothing.
  if (run.units > units) link({first + units, run.units - units}, set);
  return first;
}

std::optional<uint32_t> Suballocator::remove(uint32_t units) noexcept {
  const std::optional<uint32_t> first = take(units, kShared);
  if (first) count({*first, units}, false);
  return first;
}

std::optional<uint32_t> Suballocator::allocate(uint32_t units, Set set) noexcept {
  const std::optional<uint32_t> first = take(units, set);
  if (!first) return std::nullopt;
  mark({*first, units}, kLive);
  live_units_ += units;
  ++live_runs_;
  return first;
}

bool Suballocator::deallocate(uint32_t first, uint32_t units, Set set) noexcept {
  if (first >= tags_.size() || units == 0) return false;
  if (const Tag& begin = tags_[first]; begin.units != units || begin.set != kLive) return false;
  unmark({first, units});
  live_units_ -= units;
  --live_runs_;
  merge_and_link({first, units}, set);
  return true;
}

void Suballocator::move(Set from, Set to) noexcept {
  for (size_t bin = 0; bin < kBins; ++bin) {
    while (sets_[from].heads[bin] != kNone) {
      const uint32_t first = sets_[from].heads[bin];
      const Run run{first, tags_[first].units};
      unlink(run);
      merge_and_link(run, to);
    }
  }
}

uint32_t Suballocator::free_before(uint32_t unit) const noexcept {
  const uint32_t begin = unit == 0 ? 0 : tags_[unit - 1].begin;
  return begin != 0 && tags_[begin - 1].set == kShared ? tags_[begin - 1].units : 0;
}

uint32_t Suballocator::largest_free() const noexcept {
  const Lists& lists = sets_[kShared];
  for (uint32_t bin = kBins; bin-- > 0;) {
    uint32_t largest = 0;
    for (uint32_t first = lists.heads[bin]; first != kNone; first = tags_[first].next) {
      largest = std::max(largest, tags_[first].units);
    }
    if (largest != 0) return largest;
  }
  return 0;
}

}  // namespace ng
