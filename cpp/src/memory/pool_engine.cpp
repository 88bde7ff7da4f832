// Arenas, caches, statistics and fork; see pool_engine.hpp.
#include "memory/pool_engine.hpp"

#include <pthread.h>

namespace ng {
namespace {

constexpr size_t kMostUnits = size_t{1} << 31;

const char* state_name(int state) noexcept {
  constexpr std::array kNames = {"awake", "falling asleep", "asleep", "waking"};
  return kNames[static_cast<size_t>(state)];
}

}  // namespace

// All pools, so that none is locked by a thread that a forked child does not have.
struct PoolEngine::Registry {
  std::mutex mutex;
  std::vector<PoolEngine*> pools;
};

PoolEngine::Registry& PoolEngine::registry() {
  static Registry* all = [] {
    auto* made = new Registry;  // never destroyed: pools may outlive static destruction
    pthread_atfork([] { lock_all(); }, [] { unlock_all(); }, [] { unlock_all(); });
    return made;
  }();
  return *all;
}

void PoolEngine::lock_all() {
  registry().mutex.lock();
  for (PoolEngine* pool : registry().pools) {
    pool->grow_.lock();
    pool->lock_blocks();
  }
}

void PoolEngine::unlock_all() {
  for (PoolEngine* pool : registry().pools) {
    pool->unlock_blocks();
    pool->grow_.unlock();
  }
  registry().mutex.unlock();
}

PoolEngine::PoolEngine(const Layout& layout)
    : blocks_(static_cast<uint32_t>(layout.range_bytes / layout.unit_bytes)),
      name_(layout.name),
      range_bytes_(layout.range_bytes),
      most_bytes_(kMostUnits * layout.unit_bytes),
      unit_shift_(static_cast<uint32_t>(std::countr_zero(layout.unit_bytes))),
      granule_units_(static_cast<uint32_t>(layout.granule_bytes / layout.unit_bytes)),
      growth_(layout.growth),
      gap_(layout.separate_arenas ? 1 : 0),
      cached_units_(layout.caches ? kCachedUnits : 0),
      held_(layout.range_bytes / layout.unit_bytes),
      granules_(static_cast<uint32_t>(layout.range_bytes / layout.granule_bytes)),
      arenas_(layout.separate_arenas ? layout.range_bytes / layout.granule_bytes : 0),
      caches_(layout.caches ? std::bit_ceil(2 * std::max(std::thread::hardware_concurrency(), 1u)) : 0) {
  granules_.add({0, static_cast<uint32_t>(layout.range_bytes / layout.granule_bytes)});
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  all.pools.push_back(this);
}

PoolEngine::~PoolEngine() {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  std::erase(all.pools, this);
}

void PoolEngine::lock_blocks() const {
  for (Cache& cache : caches_) cache.enter();
  mutex_.lock();
}

void PoolEngine::unlock_blocks() const {
  mutex_.unlock();
  for (Cache& cache : caches_) cache.leave();
}

void PoolEngine::require(State state, const char* action) const {
  NG_CHECK(state_ == state, InvalidArgument, "cannot ", action, ": the pool is ", state_name(static_cast<int>(state_)),
           ", expected ", state_name(static_cast<int>(state)));
}

void PoolEngine::throw_out_of_memory(size_t bytes, const std::string& why) const {
  throw OutOfMemory(concat(name_, " cannot allocate ", bytes, " bytes: ", why, " (", statistics().to_string(), ")"));
}

PoolStatistics PoolEngine::statistics() const {
  const AllLocks locks(*this);
  uint64_t cached_blocks = 0;
  uint64_t cached_units = 0;
  for (const Cache& cache : caches_) {
    for (uint32_t units = 1; units <= kCachedUnits; ++units) {
      cached_blocks += cache.counts[units];
      cached_units += cache.counts[units] * units;
    }
  }
  const uint64_t kept_apart = blocks_.known_units() - blocks_.live_units() - blocks_.free_units();
  PoolStatistics out;
  out.in_use = (blocks_.live_units() - cached_units) << unit_shift_;
  out.blocks = blocks_.live_runs() - cached_blocks;
  out.reserved = blocks_.known_units() << unit_shift_;
  out.cached = (cached_units + kept_apart) << unit_shift_;
  out.largest_free = size_t{blocks_.largest_free()} << unit_shift_;
  out.bad_frees = bad_frees_.load(std::memory_order_relaxed);
  return out;
}

// --- caches --------------------------------------------------------------------------------------------------------

// Half of the slots at once, so that the lock is taken seldom.
void PoolEngine::refill(Cache& cache, uint32_t units) noexcept {
  const std::lock_guard lock(mutex_);
  uint8_t& count = cache.counts[units];
  while (count < (slots_of(units) + 1) / 2) {
    const std::optional<uint32_t> first = blocks_.allocate(units);
    if (!first) return;
    cache.slots[units][count++] = *first;
  }
}

void PoolEngine::make_room(Cache& cache, uint32_t units) noexcept {
  const std::lock_guard lock(mutex_);
  empty(cache, units, slots_of(units) / 2);
}

// Gives the oldest blocks back, all but `keep`. pre: the cache and mutex_ are held.
void PoolEngine::empty(Cache& cache, uint32_t units, uint32_t keep) noexcept {
  auto& slots = cache.slots[units];
  uint8_t& count = cache.counts[units];
  const uint32_t give = count - std::min<uint32_t>(count, keep);
  for (uint32_t i = 0; i < give; ++i) blocks_.deallocate(slots[i], units);
  std::copy(slots.begin() + give, slots.begin() + count, slots.begin());
  count = static_cast<uint8_t>(count - give);
}

void PoolEngine::empty_caches() noexcept {
  for (Cache& cache : caches_) {
    for (uint32_t units = 1; units <= kCachedUnits; ++units) empty(cache, units, 0);
  }
}

// --- arenas --------------------------------------------------------------------------------------------------------

std::optional<uint32_t> PoolEngine::grow(uint32_t units, size_t bytes) {
  const std::lock_guard growing(grow_);
  uint64_t known = 0;
  {
    const AllLocks locks(*this);
    require(State::awake, "allocate");
    empty_caches();
    reclaim();
    if (const auto first = blocks_.allocate(units)) return first;
    known = blocks_.known_units();
  }
  const auto ample = static_cast<uint32_t>(known / growth_ / granule_units_);
  std::string error = add_arena(units, std::max(ample, 1u));
  if (!error.empty() && ample > 1) error = add_arena(units, 1);
  // What is free elsewhere in the range may do as memory for an arena.
  if (!error.empty() && give_back() > 0) error = add_arena(units, 1);
  if (!error.empty()) throw_out_of_memory(bytes, error);
  return allocate_shared(units);
}

// Makes an arena that serves `units`, of `least` granules or more. Returns why that is impossible, or an empty string.
// pre: grow_ is held, mutex_ is not.
std::string PoolEngine::add_arena(uint32_t units, uint32_t least) {
  const uint32_t wanted = std::max(least, granules_of(units)) + gap_;
  const std::optional<uint32_t> first = granules_.remove(wanted);
  if (!first) return "no addresses are left";
  Run run{*first, wanted};
  if (gap_ == 0) {
    // Free blocks right before the arena will merge with it and serve a part of the request.
    const std::lock_guard lock(mutex_);
    const uint32_t before = blocks_.free_before(run.first * granule_units_);
    run.units = std::max(least, granules_of(units - std::min(before, units - 1)));
  }
  if (run.units < wanted) granules_.add({run.first + run.units, wanted - run.units});
  const Run arena = units_in({run.first, run.units - gap_});
  try {
    commit(extent_of(arena));
  } catch (const OutOfMemory& error) {
    granules_.add(run);
    return error.what();
  } catch (...) {
    granules_.add(run);
    throw;
  }
  if (gap_ > 0) arenas_[run.first] = run.units - gap_;
  const std::lock_guard lock(mutex_);
  blocks_.add(arena);
  return {};
}

// What may be given back of a free run: whole granules, or a separate arena as a whole.
PoolEngine::Run PoolEngine::giveable(Run run) const noexcept {
  const uint32_t begin = granules_of(run.first);
  const uint32_t end = (run.first + run.units) / granule_units_;
  if (begin >= end || (gap_ > 0 && arenas_[begin] != end - begin)) return {run.first, 0};
  return units_in({begin, end - begin});
}

// pre: grow_ is held, mutex_ is not.
size_t PoolEngine::give_back() {
  std::vector<Run> runs;
  {
    const AllLocks locks(*this);
    if (state_ != State::awake) return 0;
    empty_caches();
    reclaim();
    runs = blocks_.remove_free([this](Run run) { return giveable(run); });
  }
  size_t bytes = 0;
  for (const Run run : runs) {
    const Extent extent = extent_of(run);
    decommit(extent);
    if (gap_ > 0) arenas_[run.first / granule_units_] = 0;
    granules_.add({run.first / granule_units_, run.units / granule_units_ + gap_});
    bytes += extent.bytes;
  }
  return bytes;
}

size_t PoolEngine::trim() {
  const std::lock_guard growing(grow_);
  return give_back();
}

std::vector<PoolEngine::Extent> PoolEngine::extents(bool live_only) const {
  std::vector<Extent> out;
  blocks_.for_each([&](Run run, Suballocator::Set set) {
    if (live_only && set != Suballocator::kLive) return;
    const Extent extent = extent_of(run);
    if (!out.empty() && out.back().offset + out.back().bytes == extent.offset) {
      out.back().bytes += extent.bytes;
    } else {
      out.push_back(extent);
    }
  });
  return out;
}

}  // namespace ng
