// HostPool: arenas of committed pages, two suballocators (addresses in units of 2 MiB, blocks in pages), and caches.
//
// Locks, in this order: the registry (fork only), grow_ (arenas come and go), one or all caches, mutex_ (the blocks).
// Memory is faulted in under grow_ alone, so that other threads go on meanwhile. A block that a caller holds is noted
// in live_, one atomic word per page outside all locks: an exchange there decides whether a deallocate() is valid, so
// that a second one finds nothing even while the block lies in a cache.
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "memory/pages.hpp"
#include "memory/suballocator.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

constexpr size_t kPage = kPoolAlignment;
constexpr uint32_t kHugePageUnits = kHugePage / kPage;

constexpr uint32_t kCachedUnits = 16;  // blocks of up to 64 KiB are cached
constexpr uint32_t kCacheSlots = 16;   // of one length in one cache
constexpr size_t kCacheBytes = size_t{128} << 10;

// The addresses of a pool are counted in 32-bit pages.
constexpr size_t kMaxBytes = (size_t{1} << 31) * kPage;

constexpr uint32_t slots_of(uint32_t units) noexcept {
  return std::min(kCacheSlots, static_cast<uint32_t>(kCacheBytes / (units * kPage)));
}

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

// Threads are numbered as they come, so that the first ones do not share caches.
uint32_t thread_number() noexcept {
  static std::atomic<uint32_t> threads{0};
  thread_local const uint32_t number = threads.fetch_add(1, std::memory_order_relaxed);
  return number;
}

enum class State : uint8_t { awake, falling_asleep, asleep, waking };

const char* state_name(State state) noexcept {
  switch (state) {
    case State::awake: return "awake";
    case State::falling_asleep: return "falling asleep";
    case State::asleep: return "asleep";
    case State::waking: return "waking";
  }
  return "";
}

// One word for each page of a reservation, zero at first; only what is used takes memory.
class LiveTable {
 public:
  explicit LiveTable(size_t pages) : bytes_(pages * sizeof(std::atomic<uint32_t>)) {
    void* mapping = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    NG_CHECK(mapping != MAP_FAILED, OutOfMemory, "cannot map ", bytes_, " bytes for a pool's table of blocks");
    words_ = static_cast<std::atomic<uint32_t>*>(mapping);
  }
  ~LiveTable() { munmap(words_, bytes_); }
  LiveTable(const LiveTable&) = delete;
  LiveTable& operator=(const LiveTable&) = delete;

  std::atomic<uint32_t>& operator[](size_t page) noexcept { return words_[page]; }

 private:
  static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));
  size_t bytes_;
  std::atomic<uint32_t>* words_;
};

}  // namespace

class HostPool::Impl {
 public:
  explicit Impl(const HostPoolOptions& options)
      : policy_{options.huge_pages, checked_node(options.numa_node)},
        live_(space_.size() / kPage),
        caches_(std::bit_ceil(2 * std::max(std::thread::hardware_concurrency(), 1u))) {
    granules_.add({0, static_cast<uint32_t>(space_.size() / kHugePage)});
    Registry& all = registry();
    const std::lock_guard lock(all.mutex);
    all.pools.push_back(this);
  }

  ~Impl() {
    Registry& all = registry();
    const std::lock_guard lock(all.mutex);
    std::erase(all.pools, this);
  }

  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  void* allocate(size_t bytes) {
    if (bytes > kMaxBytes) throw_out_of_memory(bytes, "it is more than a pool can address");
    const uint32_t units = units_of(bytes);
    std::optional<uint32_t> first;
    if (units <= kCachedUnits) first = allocate_cached(units);
    if (!first) first = allocate_shared(units);
    while (!first) first = grow(units, bytes);
    live_[*first].store(units, std::memory_order_relaxed);
    return space_.data() + size_t{*first} * kPage;
  }

  void deallocate(void* block, size_t bytes) noexcept {
    if (block == nullptr) return;
    const size_t offset = reinterpret_cast<uintptr_t>(block) - reinterpret_cast<uintptr_t>(space_.data());
    uint32_t units = bytes > kMaxBytes ? 0 : units_of(bytes);
    const auto first = static_cast<uint32_t>(offset / kPage);
    if (units == 0 || offset >= space_.size() || offset % kPage != 0 ||
        !live_[first].compare_exchange_strong(units, 0, std::memory_order_relaxed)) {
      bad_frees_.fetch_add(1, std::memory_order_relaxed);
      return;
    }
    if (units <= kCachedUnits && deallocate_cached(first, units)) return;
    const std::lock_guard lock(mutex_);
    blocks_.deallocate(first, units);
  }

  PoolStatistics statistics() const {
    const AllLocks locks(*this);
    PoolStatistics out;
    size_t cached_blocks = 0;
    for (const Cache& cache : caches_) {
      for (uint32_t units = 1; units <= kCachedUnits; ++units) {
        cached_blocks += cache.counts[units];
        out.cached += cache.counts[units] * units * kPage;
      }
    }
    out.in_use = blocks_.live_units() * kPage - out.cached;
    out.blocks = blocks_.live_runs() - cached_blocks;
    out.reserved = (blocks_.live_units() + blocks_.free_units()) * kPage;
    out.largest_free = blocks_.largest_free() * kPage;
    out.bad_frees = bad_frees_.load(std::memory_order_relaxed);
    return out;
  }

  size_t trim() {
    const std::lock_guard growing(grow_);
    std::vector<Suballocator::Run> runs;
    {
      const AllLocks locks(*this);
      if (state_ != State::awake) return 0;
      empty_caches();
      runs = blocks_.remove_free(kHugePageUnits);
    }
    size_t bytes = 0;
    for (const Suballocator::Run run : runs) {
      decommit(range_of(run));
      granules_.add({run.first / kHugePageUnits, run.units / kHugePageUnits});
      bytes += run.units * kPage;
    }
    return bytes;
  }

  void sleep(std::shared_ptr<PageSink> sink) {
    std::vector<Suballocator::Run> kept;
    {
      // With grow_ no arena is on its way; after this none can come before wake().
      const std::lock_guard growing(grow_);
      const AllLocks locks(*this);
      require(State::awake, "sleep");
      empty_caches();
      if (sink) kept = runs(true);
      state_ = State::falling_asleep;
    }
    try {
      for (const Suballocator::Run run : kept) sink->put(run.first, range_of(run));
    } catch (...) {
      set_state(State::awake);
      throw;
    }
    sink_ = std::move(sink);
    kept_ = std::move(kept);
    const int error = discard_arenas();
    set_state(State::asleep);
    if (error != 0) {
      throw SystemError(error,
                        concat("the system keeps pages of a sleeping pool: ", std::generic_category().message(error)));
    }
  }

  void wake() {
    {
      const AllLocks locks(*this);
      require(State::asleep, "wake");
      state_ = State::waking;
    }
    try {
      for (const Suballocator::Run arena : arenas()) populate(range_of(arena));
      for (const Suballocator::Run run : kept_) sink_->get(run.first, range_of(run));
    } catch (...) {
      discard_arenas();
      set_state(State::asleep);
      throw;
    }
    kept_.clear();
    sink_.reset();
    set_state(State::awake);
  }

  bool is_asleep() const {
    const std::lock_guard lock(mutex_);
    return state_ != State::awake;
  }

  size_t huge_page_bytes() const { return bytes_in_huge_pages({space_.data(), space_.size()}); }

 private:
  struct Registry {
    std::mutex mutex;
    std::vector<Impl*> pools;
  };

  // All pools, so that none is locked by a thread that a forked child does not have.
  static Registry& registry() {
    static Registry* all = [] {
      auto* made = new Registry;  // never destroyed: pools may outlive static destruction
      pthread_atfork([] { lock_all(); }, [] { unlock_all(); }, [] { unlock_all(); });
      return made;
    }();
    return *all;
  }

  static void lock_all() {
    registry().mutex.lock();
    for (Impl* pool : registry().pools) {
      pool->grow_.lock();
      pool->lock_blocks();
    }
  }

  static void unlock_all() {
    for (Impl* pool : registry().pools) {
      pool->unlock_blocks();
      pool->grow_.unlock();
    }
    registry().mutex.unlock();
  }

  // The node to bind to, or -1 where there is no choice: a container may forbid the call.
  static int checked_node(int node) {
    if (node == -1) return -1;
    const std::vector<int> nodes = numa_nodes();
    std::string known;
    for (const int each : nodes) known += (known.empty() ? "" : ", ") + std::to_string(each);
    NG_CHECK(std::find(nodes.begin(), nodes.end(), node) != nodes.end(), InvalidArgument, "there is no NUMA node ",
             node, "; this machine has ", known);
    return nodes.size() > 1 ? node : -1;
  }

  static uint32_t units_of(size_t bytes) noexcept {
    return static_cast<uint32_t>(std::max((bytes + kPage - 1) / kPage, size_t{1}));
  }

  static uint32_t huge_pages_of(uint32_t units) noexcept { return (units + kHugePageUnits - 1) / kHugePageUnits; }

  PageRange range_of(Suballocator::Run run) const noexcept {
    return {space_.data() + size_t{run.first} * kPage, size_t{run.units} * kPage};
  }

  // All caches and the blocks.
  void lock_blocks() const {
    for (Cache& cache : caches_) cache.enter();
    mutex_.lock();
  }

  void unlock_blocks() const {
    mutex_.unlock();
    for (Cache& cache : caches_) cache.leave();
  }

  class AllLocks {
   public:
    explicit AllLocks(const Impl& pool) : pool_(pool) { pool_.lock_blocks(); }
    ~AllLocks() { pool_.unlock_blocks(); }
    AllLocks(const AllLocks&) = delete;
    AllLocks& operator=(const AllLocks&) = delete;

   private:
    const Impl& pool_;
  };

  // pre: mutex_ or a cache is held, as for every read of state_; writes hold all of them.
  void require(State state, const char* action) const {
    NG_CHECK(state_ == state, InvalidArgument, "cannot ", action, ": the pool is ", state_name(state_), ", expected ",
             state_name(state));
  }

  void set_state(State state) {
    const AllLocks locks(*this);
    state_ = state;
  }

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

  // Half of the slots at once, so that the lock is taken seldom.
  void refill(Cache& cache, uint32_t units) noexcept {
    const std::lock_guard lock(mutex_);
    uint8_t& count = cache.counts[units];
    while (count < (slots_of(units) + 1) / 2) {
      const std::optional<uint32_t> first = blocks_.allocate(units);
      if (!first) return;
      cache.slots[units][count++] = *first;
    }
  }

  bool deallocate_cached(uint32_t first, uint32_t units) noexcept {
    Cache& cache = own_cache();
    if (!cache.try_enter()) return false;
    if (cache.counts[units] == slots_of(units)) {
      const std::lock_guard lock(mutex_);
      empty(cache, units, slots_of(units) / 2);
    }
    cache.slots[units][cache.counts[units]++] = first;
    cache.leave();
    return true;
  }

  // Gives the oldest blocks back, all but `keep`. pre: the cache and mutex_ are held.
  void empty(Cache& cache, uint32_t units, uint32_t keep) noexcept {
    auto& slots = cache.slots[units];
    uint8_t& count = cache.counts[units];
    const uint32_t give = count - std::min<uint32_t>(count, keep);
    for (uint32_t i = 0; i < give; ++i) blocks_.deallocate(slots[i], units);
    std::copy(slots.begin() + give, slots.begin() + count, slots.begin());
    count = static_cast<uint8_t>(count - give);
  }

  void empty_caches() noexcept {
    for (Cache& cache : caches_) {
      for (uint32_t units = 1; units <= kCachedUnits; ++units) empty(cache, units, 0);
    }
  }

  std::optional<uint32_t> allocate_shared(uint32_t units) {
    const std::lock_guard lock(mutex_);
    require(State::awake, "allocate");
    return blocks_.allocate(units);
  }

  // Makes a new arena and takes a block from it, or from what was freed meanwhile; nothing if other threads took all.
  std::optional<uint32_t> grow(uint32_t units, size_t bytes) {
    const std::lock_guard growing(grow_);
    size_t reserved = 0;
    {
      const AllLocks locks(*this);
      require(State::awake, "allocate");
      empty_caches();
      if (const auto first = blocks_.allocate(units)) return first;
      reserved = blocks_.live_units() + blocks_.free_units();
    }
    const auto ample = static_cast<uint32_t>(reserved / 8 / kHugePageUnits);
    std::string error = add_arena(units, std::max(ample, 1u));
    if (!error.empty() && ample > 1) error = add_arena(units, 1);
    if (!error.empty()) throw_out_of_memory(bytes, error);
    return allocate_shared(units);
  }

  // Makes an arena that serves `units`, of `least` huge pages or more. Returns why that is impossible, or an empty
  // string. pre: grow_ is held, mutex_ is not.
  std::string add_arena(uint32_t units, uint32_t least) {
    const uint32_t wanted = std::max(least, huge_pages_of(units));
    const std::optional<uint32_t> first = granules_.remove(wanted);
    if (!first) return "no addresses are left";
    Suballocator::Run run{*first, wanted};
    {
      // Free blocks right before the arena will merge with it and serve a part of the request.
      const std::lock_guard lock(mutex_);
      const uint32_t before = blocks_.free_before(run.first * kHugePageUnits);
      run.units = std::max(least, huge_pages_of(units - std::min(before, units - 1)));
    }
    if (run.units < wanted) granules_.add({run.first + run.units, wanted - run.units});
    const Suballocator::Run arena{run.first * kHugePageUnits, run.units * kHugePageUnits};
    try {
      commit(range_of(arena), policy_);
    } catch (const OutOfMemory& error) {
      granules_.add(run);
      return error.what();
    } catch (...) {
      granules_.add(run);
      throw;
    }
    const std::lock_guard lock(mutex_);
    blocks_.add(arena);
    return {};
  }

  // Adjacent runs as one: of live blocks only, or of all that is committed. pre: mutex_ is held.
  std::vector<Suballocator::Run> runs(bool live_only) const {
    std::vector<Suballocator::Run> out;
    blocks_.for_each([&](Suballocator::Run run, bool live) {
      if (live_only && !live) return;
      if (!out.empty() && out.back().first + out.back().units == run.first) {
        out.back().units += run.units;
      } else {
        out.push_back(run);
      }
    });
    return out;
  }

  std::vector<Suballocator::Run> arenas() const {
    const std::lock_guard lock(mutex_);
    return runs(false);
  }

  // Returns 0, or the errno of a range that the system keeps.
  int discard_arenas() const {
    int error = 0;
    for (const Suballocator::Run arena : arenas()) {
      if (const int result = discard(range_of(arena)); result != 0) error = result;
    }
    return error;
  }

  [[noreturn]] void throw_out_of_memory(size_t bytes, const std::string& why) const {
    throw OutOfMemory(concat("HostPool cannot allocate ", bytes, " bytes: ", why, " (", statistics().to_string(), ")"));
  }

  const PagePolicy policy_;
  Reservation space_{kMaxBytes};
  LiveTable live_;
  std::atomic<uint64_t> bad_frees_{0};

  mutable std::mutex grow_;
  Suballocator granules_;  // addresses without memory, in units of 2 MiB; guarded by grow_

  mutable std::vector<Cache> caches_;

  mutable std::mutex mutex_;
  Suballocator blocks_;  // guarded by mutex_
  State state_ = State::awake;

  // Of the sleep in progress: whoever moved state_ to falling_asleep or waking owns them.
  std::shared_ptr<PageSink> sink_;
  std::vector<Suballocator::Run> kept_;
};

HostPool::HostPool(const HostPoolOptions& options) : impl_(std::make_unique<Impl>(options)) {}
HostPool::~HostPool() = default;
void* HostPool::allocate(size_t bytes) { return impl_->allocate(bytes); }
void HostPool::deallocate(void* block, size_t bytes) noexcept { impl_->deallocate(block, bytes); }
PoolStatistics HostPool::statistics() const { return impl_->statistics(); }
size_t HostPool::trim() { return impl_->trim(); }
void HostPool::sleep() { impl_->sleep(nullptr); }

void HostPool::sleep(std::shared_ptr<PageSink> sink) {
  NG_CHECK(sink != nullptr, InvalidArgument, "sleep: the sink is null");
  impl_->sleep(std::move(sink));
}

void HostPool::wake() { impl_->wake(); }
bool HostPool::is_asleep() const { return impl_->is_asleep(); }
size_t HostPool::huge_page_bytes() const { return impl_->huge_page_bytes(); }

}  // namespace ng
