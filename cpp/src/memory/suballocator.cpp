// Splitting, merging and finding runs; see suballocator.hpp.
#include "memory/suballocator.hpp"

#include <bit>

namespace ng {
namespace {

// A list holds runs of slightly different lengths; this many of them are tried for the best fit before a longer run
// is split.
constexpr int kTries = 16;

}  // namespace

uint32_t Suballocator::bin_of(uint32_t units) noexcept {
  if (units < kSteps) return units;
  const auto shift = static_cast<uint32_t>(std::bit_width(units)) - 4;  // leaves the leading bit and three more
  return (shift + 1) * kSteps + (units >> shift) % kSteps;
}

const Suballocator::Tag* Suballocator::find(uint32_t unit) const noexcept {
  const size_t table = unit / kTableUnits;
  return table < tables_.size() && tables_[table] ? &tables_[table][unit % kTableUnits] : nullptr;
}

void Suballocator::mark(Run run) noexcept {
  tag(run.first).units = run.units;
  tag(run.first + run.units - 1).begin = run.first;
}

void Suballocator::unmark(Run run) noexcept {
  tag(run.first).units = 0;
  tag(run.first + run.units - 1).begin = kNone;
}

void Suballocator::link(Run run) noexcept {
  mark(run);
  const uint32_t bin = bin_of(run.units);
  Tag& first = tag(run.first);
  first.next = heads_[bin];
  first.previous = kNone;
  if (first.next != kNone) tag(first.next).previous = run.first;
  heads_[bin] = run.first;
  occupied_[bin / 64] |= uint64_t{1} << bin % 64;
  free_units_ += run.units;
}

void Suballocator::unlink(Run run) noexcept {
  const uint32_t bin = bin_of(run.units);
  const Tag& first = tag(run.first);
  if (first.next != kNone) tag(first.next).previous = first.previous;
  if (first.previous != kNone) {
    tag(first.previous).next = first.next;
  } else {
    heads_[bin] = first.next;
    if (first.next == kNone) occupied_[bin / 64] &= ~(uint64_t{1} << bin % 64);
  }
  unmark(run);
  free_units_ -= run.units;
}

void Suballocator::merge_and_link(Run run) noexcept {
  if (const uint32_t left = free_before(run.first); left != 0) {
    unlink({run.first - left, left});
    run = {run.first - left, run.units + left};
  }
  const Tag* right = find(run.first + run.units);
  if (right != nullptr && right->units != 0 && right->next != kLive) {
    const Run neighbour{run.first + run.units, right->units};
    unlink(neighbour);
    run.units += neighbour.units;
  }
  link(run);
}

void Suballocator::add(Run run) {
  const size_t last = (run.first + run.units - 1) / kTableUnits;
  if (last >= tables_.size()) tables_.resize(last + 1);
  for (size_t table = run.first / kTableUnits; table <= last; ++table) {
    if (!tables_[table]) tables_[table] = std::make_unique<Tag[]>(kTableUnits);
  }
  merge_and_link(run);
}

uint32_t Suballocator::find_free(uint32_t units) noexcept {
  const uint32_t own = bin_of(units);
  uint32_t best = kNone;
  uint32_t best_units = kNone;
  uint32_t candidate = heads_[own];
  const auto try_candidate = [&] {
    const Tag& it = tag(candidate);
    if (it.units >= units && it.units < best_units) {
      best = candidate;
      best_units = it.units;
    }
    candidate = it.next;
  };
  for (int i = 0; i < kTries && candidate != kNone && best_units != units; ++i) try_candidate();
  if (best != kNone) return best;
  // Any run in a higher bin is long enough.
  for (uint32_t word = (own + 1) / 64; word < occupied_.size(); ++word) {
    uint64_t bits = occupied_[word];
    if (word == (own + 1) / 64) bits &= ~uint64_t{0} << (own + 1) % 64;
    if (bits != 0) return heads_[word * 64 + static_cast<uint32_t>(std::countr_zero(bits))];
  }
  while (candidate != kNone && best == kNone) try_candidate();
  return best;
}

std::optional<uint32_t> Suballocator::remove(uint32_t units) noexcept {
  const uint32_t first = find_free(units);
  if (first == kNone) return std::nullopt;
  const Run run{first, tag(first).units};
  unlink(run);
  // Its neighbours are live or absent: the rest merges with nothing.
  if (run.units > units) link({first + units, run.units - units});
  return first;
}

std::optional<uint32_t> Suballocator::allocate(uint32_t units) noexcept {
  const std::optional<uint32_t> first = remove(units);
  if (!first) return std::nullopt;
  mark({*first, units});
  tag(*first).next = kLive;
  live_units_ += units;
  ++live_runs_;
  return first;
}

bool Suballocator::deallocate(uint32_t first, uint32_t units) noexcept {
  const Tag* begin = find(first);
  if (begin == nullptr || units == 0 || begin->units != units || begin->next != kLive) return false;
  unmark({first, units});
  live_units_ -= units;
  --live_runs_;
  merge_and_link({first, units});
  return true;
}

std::vector<Suballocator::Run> Suballocator::remove_free(uint32_t granule) {
  std::vector<Run> all;
  for_each([&](Run run, bool live) {
    if (!live && run.units >= granule) all.push_back(run);
  });
  std::vector<Run> removed;
  removed.reserve(all.size());
  for (const Run run : all) {
    const uint32_t end = run.first + run.units;
    const uint32_t whole_begin = (run.first + granule - 1) / granule * granule;
    const uint32_t whole_end = end / granule * granule;
    if (whole_begin >= whole_end) continue;
    unlink(run);
    if (run.first < whole_begin) link({run.first, whole_begin - run.first});
    if (whole_end < end) link({whole_end, end - whole_end});
    removed.push_back({whole_begin, whole_end - whole_begin});
  }
  return removed;
}

uint32_t Suballocator::free_before(uint32_t unit) const noexcept {
  if (unit == 0) return 0;
  const Tag* last = find(unit - 1);
  if (last == nullptr || last->begin == kNone) return 0;
  const Tag* begin = find(last->begin);
  return begin->next == kLive ? 0 : begin->units;
}

uint32_t Suballocator::largest_free() const noexcept {
  for (uint32_t bin = kBins; bin-- > 0;) {
    uint32_t largest = 0;
    for (uint32_t first = heads_[bin]; first != kNone; first = find(first)->next) {
      largest = largest > find(first)->units ? largest : find(first)->units;
    }
    if (largest != 0) return largest;
  }
  return 0;
}

}  // namespace ng
