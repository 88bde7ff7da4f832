// PoolEngine: what the pools have in common. It decides which bytes of a range of addresses belong to whom, and asks
// its pool for memory behind a part of that range, an arena, when there is too little.
//
// It deals in offsets into the range, never in addresses, and never touches memory: the range may be of the host or of
// a device, or lie in pieces. Blocks are whole units, split and merged by a Suballocator; arenas are whole granules, a
// multiple of units, and a second Suballocator says where in the range there are none. Small blocks may pass through
// caches, of which each thread uses one.
//
// Locks, in this order: the registry (fork only), grow_ (arenas come and go), one or all caches, mutex_ (the blocks).
// Arenas are made under grow_ alone, so that other threads go on meanwhile. A block that a caller holds is noted in
// held_, one atomic word a unit outside all locks: an exchange there decides whether a deallocate() is valid, so that a
// second one finds nothing even while the block lies in a cache.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "memory/suballocator.hpp"
#include "memory/zeroed_array.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {

class PoolEngine {
 public:
  using Run = Suballocator::Run;
  // A part of the range, in bytes; begins and ends at granules.
  struct Extent {
    size_t offset;
    size_t bytes;
  };

  // What deallocate() may be given for an address that is not in the range.
  static constexpr size_t kNowhere = ~size_t{0};

  PoolEngine(const PoolEngine&) = delete;
  PoolEngine& operator=(const PoolEngine&) = delete;

  // The offset of a new block. Throws OutOfMemory, InvalidArgument while the pool sleeps.
  size_t allocate(size_t bytes) {
    const uint32_t units = units_of(bytes);
    std::optional<uint32_t> first;
    if (units <= cached_units_) first = allocate_cached(units);
    if (!first) first = allocate_shared(units);
    while (!first) first = grow(units, bytes);
    return hold({*first, units});
  }

  void deallocate(size_t offset, size_t bytes) noexcept {
    const std::optional<Run> run = release(offset, bytes);
    if (!run || (run->units <= cached_units_ && deallocate_cached(*run))) return;
    const std::lock_guard lock(mutex_);
    blocks_.deallocate(run->first, run->units);
  }

  PoolStatistics statistics() const;

  // Empties the caches and gives free granules back; returns the bytes given back, 0 while the pool sleeps.
  size_t trim();

 protected:
  struct Layout {
    const char* name;      // of the pool, for messages
    size_t range_bytes;    // a multiple of granules
    size_t unit_bytes;     // a power of two, at least 512
    size_t granule_bytes;  // a multiple of the unit
    size_t growth;         // an arena is at least this part of what there is: 8 for an eighth
    bool caches;           // whether threads keep blocks of up to kCachedUnits units
    // Whether arenas are kept apart: a block lies in one of them, and they are given back whole.
    bool separate_arenas;
  };

  enum class State : uint8_t { awake, falling_asleep, asleep, waking };

  explicit PoolEngine(const Layout& layout);
  ~PoolEngine();

  // Puts memory behind a part of the range. May throw, OutOfMemory where it can be had later: all is then as before.
  // Called under grow_.
  virtual void commit(Extent arena) = 0;
  // Gives the memory of free granules, or of a whole separate arena, back. Called under grow_.
  virtual void decommit(Extent extent) noexcept = 0;
  // Frees what could be freed by now, because memory is short. Called under all locks.
  virtual void reclaim() noexcept {}

  // Marks a block as a caller's, and returns its offset.
  size_t hold(Run run) noexcept {
    held_[run.first].store(run.units, std::memory_order_relaxed);
    return size_t{run.first} << unit_shift_;
  }

  // The block of that size at that offset, which is not the caller's any more; nothing, and a bad free is counted, if
  // there is none.
  std::optional<Run> release(size_t offset, size_t bytes) noexcept {
    uint32_t units = bytes > most_bytes_ ? 0 : rounded(bytes);
    const auto first = static_cast<uint32_t>(offset >> unit_shift_);
    if (units == 0 || offset >= range_bytes_ || (offset & (unit_bytes() - 1)) != 0 ||
        !held_[first].compare_exchange_strong(units, 0, std::memory_order_relaxed)) [[unlikely]] {
      bad_frees_.fetch_add(1, std::memory_order_relaxed);
      return std::nullopt;
    }
    return Run{first, units};
  }

  // Throws OutOfMemory for what no pool can hold.
  uint32_t units_of(size_t bytes) const {
    if (bytes > most_bytes_) [[unlikely]]
      throw_out_of_memory(bytes, "it is more than a pool can address");
    return rounded(bytes);
  }

  // Makes a new arena and takes a block from it, or from what was freed meanwhile; nothing if other threads took all.
  std::optional<uint32_t> grow(uint32_t units, size_t bytes);

  [[noreturn]] void throw_out_of_memory(size_t bytes, const std::string& why) const;

  size_t unit_bytes() const noexcept { return size_t{1} << unit_shift_; }
  Extent extent_of(Run run) const noexcept {
    return {size_t{run.first} << unit_shift_, size_t{run.units} << unit_shift_};
  }

  // Adjacent runs as one: of live blocks only, or of all that is committed. pre: mutex_ is held.
  std::vector<Extent> extents(bool live_only) const;

  // All caches and the blocks.
  class AllLocks {
   public:
    explicit AllLocks(const PoolEngine& pool) : pool_(pool) { pool_.lock_blocks(); }
    ~AllLocks() { pool_.unlock_blocks(); }
    AllLocks(const AllLocks&) = delete;
    AllLocks& operator=(const AllLocks&) = delete;

   private:
    const PoolEngine& pool_;
  };

  // pre: mutex_ or a cache is held, as for every read of state_; writes hold all of them.
  void require(State state, const char* action) const;
  void empty_caches() noexcept;

  mutable std::mutex grow_;
  mutable std::mutex mutex_;
  Suballocator blocks_;  // guarded by mutex_
  State state_ = State::awake;

 private:
  static constexpr uint32_t kCachedUnits = 16;  // at most 255
  static constexpr uint32_t kCacheSlots = 16;   // of one length in one cache, and
  static constexpr uint32_t kCacheUnits = 32;   // not more units than these

  static constexpr uint32_t slots_of(uint32_t units) noexcept { return std::min(kCacheSlots, kCacheUnits / units); }

  // Free blocks of a few lengths, last in first out. One thread is inside at a time; a thread that finds another there
  // does without, so nobody spins for it but those who empty all caches.
  struct alignas(64) Cache {
    std::atomic_flag busy;
    std::array<uint8_t, kCachedUnits + 1> counts{};
    std::array<std::array<uint32_t, kCacheSlots>, kCachedUnits + 1> slots{};

    bool try_enter() noexcept { return !busy.test_and_set(std::memory_order_acquire); }
    void enter() noexcept {
      while (!try_enter()) std::this_thread::yield();
    }
    void leave() noexcept { busy.clear(std::memory_order_release); }
  };

  struct Registry;
  static Registry& registry();
  static void lock_all();
  static void unlock_all();

  // Threads are numbered as they come, so that the first ones do not share caches.
  static uint32_t thread_number() noexcept {
    static std::atomic<uint32_t> threads{0};
    thread_local const uint32_t number = threads.fetch_add(1, std::memory_order_relaxed);
    return number;
  }

  uint32_t rounded(size_t bytes) const noexcept {
    return static_cast<uint32_t>(std::max((bytes + unit_bytes() - 1) >> unit_shift_, size_t{1}));
  }

  uint32_t granules_of(uint32_t units) const noexcept { return (units + granule_units_ - 1) / granule_units_; }
  Run units_in(Run granules) const noexcept {
    return {granules.first * granule_units_, granules.units * granule_units_};
  }

  void lock_blocks() const;
  void unlock_blocks() const;

  Cache& own_cache() noexcept { return caches_[thread_number() & (caches_.size() - 1)]; }

  // Nothing if another thread is in the cache, or neither it nor the free blocks have such a block.
  std::optional<uint32_t> allocate_cached(uint32_t units) {
    Cache& cache = own_cache();
    if (!cache.try_enter()) return std::nullopt;
    std::optional<uint32_t> first;
    if (state_ == State::awake) {
      uint8_t& count = cache.counts[units];
      if (count == 0) refill(cache, units);
      if (count > 0) first = cache.slots[units][--count];
    }
    cache.leave();
    return first;
  }

  bool deallocate_cached(Run run) noexcept {
    Cache& cache = own_cache();
    if (!cache.try_enter()) return false;
    if (cache.counts[run.units] == slots_of(run.units)) make_room(cache, run.units);
    cache.slots[run.units][cache.counts[run.units]++] = run.first;
    cache.leave();
    return true;
  }

  std::optional<uint32_t> allocate_shared(uint32_t units) {
    const std::lock_guard lock(mutex_);
    require(State::awake, "allocate");
    return blocks_.allocate(units);
  }

  void refill(Cache& cache, uint32_t units) noexcept;
  void make_room(Cache& cache, uint32_t units) noexcept;
  void empty(Cache& cache, uint32_t units, uint32_t keep) noexcept;
  std::string add_arena(uint32_t units, uint32_t least);
  Run giveable(Run run) const noexcept;
  size_t give_back();

  const char* const name_;
  const size_t range_bytes_;
  const size_t most_bytes_;
  const uint32_t unit_shift_;
  const uint32_t granule_units_;
  const size_t growth_;
  const uint32_t gap_;  // granules that stay empty behind each arena
  const uint32_t cached_units_;

  ZeroedArray<std::atomic<uint32_t>> held_;
  std::atomic<uint64_t> bad_frees_{0};
  Suballocator granules_;         // without memory; guarded by grow_, as is:
  ZeroedArray<uint32_t> arenas_;  // granules of the separate arena that begins here
  mutable std::vector<Cache> caches_;
};

}  // namespace ng
