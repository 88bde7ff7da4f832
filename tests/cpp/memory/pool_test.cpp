// What all pools have in common: blocks, bad frees, what goes back to the system, out of memory, threads; and sleep, of
// those that sleep. The pools of a GPU need one: the simulated one does.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "memory/pool_fixture.hpp"
#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

template <typename P>
constexpr bool is_host = std::is_same_v<P, HostPool>;
template <typename P>
constexpr bool is_device = std::is_same_v<P, DevicePool>;
template <typename P>
constexpr bool has_caches = !is_device<P>;
template <typename P>
constexpr bool merges_arenas = !std::is_same_v<P, PinnedPool>;

template <typename P>
class PoolTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if constexpr (!is_host<P>) {
      if (cuda::driver() == nullptr) GTEST_SKIP() << why_no_cuda();
    }
    pool_ = std::make_unique<P>();
  }

  P& pool() { return *pool_; }
  size_t unit() const { return pool_->unit(); }
  size_t counted(size_t bytes) const { return std::max((bytes + unit() - 1) / unit(), size_t{1}) * unit(); }

  // More than can be had.
  static size_t too_much() {
    if constexpr (is_device<P>) return cuda_device(0).memory_bytes;
    return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  }

  std::unique_ptr<P> pool_;
};

template <typename P>
class SleepingPoolTest : public PoolTest<P> {};

TYPED_TEST_SUITE_P(PoolTest);
TYPED_TEST_SUITE_P(SleepingPoolTest);

TYPED_TEST_P(PoolTest, BlocksAreAlignedApartAndWritable) {
  auto& pool = this->pool();
  const size_t unit = this->unit();
  std::vector<BlockOf<TypeParam>> blocks;
  size_t expected = 0;
  for (const size_t bytes : {size_t{0}, size_t{1}, unit - 1, unit, unit + 1, size_t{65536}, size_t{65537},
                             size_t{1} << 20, kHuge, size_t{5} << 20, size_t{100} << 20}) {
    blocks.push_back(take(pool, bytes, 1000 * bytes));
    ASSERT_EQ(reinterpret_cast<uintptr_t>(blocks.back().data) % unit, 0u);
    expected += this->counted(bytes);
  }
  for (const auto& block : blocks) EXPECT_TRUE(block.is_intact());
  const PoolStatistics full = pool.statistics();
  EXPECT_EQ(full.in_use, expected);
  EXPECT_EQ(full.blocks, blocks.size());
  EXPECT_GE(full.reserved, full.in_use + full.cached);
  EXPECT_EQ(full.reserved % kHuge, 0u);
  for (const auto& block : blocks) give(pool, block);
  const PoolStatistics empty = pool.statistics();
  EXPECT_EQ(empty.in_use, 0u);
  EXPECT_EQ(empty.blocks, 0u);
  EXPECT_EQ(empty.bad_frees, 0u);
  EXPECT_EQ(empty.reserved, full.reserved);
  EXPECT_EQ(empty.cached > 0, has_caches<TypeParam>);
  pool.deallocate(nullptr, 5);
  EXPECT_EQ(pool.statistics().bad_frees, 0u);
}

TYPED_TEST_P(PoolTest, WrongDeallocationsChangeNothing) {
  auto& pool = this->pool();
  const size_t unit = this->unit();
  const auto small = take(pool, 3 * unit, 7);
  const auto large = take(pool, kHuge, 9);
  uint64_t expected = 0;
  const auto refuse = [&](void* block, size_t bytes) {
    pool.deallocate(block, bytes);
    EXPECT_EQ(pool.statistics().bad_frees, ++expected);
  };
  std::byte local{};
  refuse(&local, 1);
  refuse(small.data + 1, 3 * unit);
  refuse(small.data + unit, 2 * unit);  // inside
  refuse(small.data + 2 * unit, unit);
  refuse(small.data, 2 * unit);
  refuse(small.data, 4 * unit);
  refuse(small.data, ~size_t{0});
  refuse(large.data, kHuge - unit);
  refuse(large.data + (size_t{1} << 30), unit);  // no memory of the pool
  EXPECT_TRUE(small.is_intact() && large.is_intact());
  EXPECT_EQ(pool.statistics().blocks, 2u);
  give(pool, small);
  give(pool, large);
  refuse(small.data, 3 * unit);  // now in a cache, or merged
  refuse(large.data, kHuge);     // now merged
  EXPECT_EQ(pool.statistics().in_use, 0u);
  // Nobody got it twice.
  const auto one = take(pool, 3 * unit, 1);
  const auto two = take(pool, 3 * unit, 2);
  EXPECT_NE(one.data, two.data);
}

TYPED_TEST_P(PoolTest, FreedNeighboursServeALargerRequest) {
  auto& pool = this->pool();
  const auto first = take(pool, 3 * kHuge, 1);
  const auto second = take(pool, 4 * kHuge, 2);
  give(pool, first);
  give(pool, second);
  const size_t reserved = pool.statistics().reserved;
  if (!merges_arenas<TypeParam>) {
    EXPECT_EQ(pool.statistics().largest_free, 4 * kHuge);
    GTEST_SKIP() << "arenas of this pool are not neighbours";
  }
  EXPECT_EQ(pool.statistics().largest_free, reserved);
  EXPECT_EQ(pool.statistics().fragmentation(), 0.0);
  give(pool, take(pool, reserved, 3));
  EXPECT_EQ(pool.statistics().reserved, reserved);
  // Growing by a request takes only what the free memory before the new arena lacks.
  give(pool, take(pool, 4 * reserved, 3));
  EXPECT_EQ(pool.statistics().reserved, 4 * reserved);
}

TYPED_TEST_P(PoolTest, ServesThreadsThatCameAndWent) {
  auto& pool = this->pool();
  constexpr size_t kCount = 200;
  std::vector<BlockOf<TypeParam>> blocks(kCount);
  std::thread([&] {
    for (size_t i = 0; i < kCount; ++i) blocks[i] = take(pool, (1 + i % 16) * kPage, i);
  }).join();
  EXPECT_EQ(pool.statistics().blocks, kCount);
  std::thread([&] {
    for (const auto& block : blocks) {
      EXPECT_TRUE(block.is_intact());
      give(pool, block);
    }
  }).join();
  const PoolStatistics after = pool.statistics();
  EXPECT_EQ(after.blocks, 0u);
  EXPECT_EQ(after.in_use, 0u);
  EXPECT_EQ(after.cached > 0, has_caches<TypeParam>);
  // What dead threads cached is not lost: it merges when memory is short, and trim() gives it back.
  if (merges_arenas<TypeParam>) {
    give(pool, take(pool, after.reserved, 1));
    EXPECT_EQ(pool.statistics().reserved, after.reserved);
  }
  give(pool, take(pool, 1, 1));
  EXPECT_EQ(pool.trim(), after.reserved);
  EXPECT_EQ(pool.statistics().reserved, 0u);
  EXPECT_EQ(pool.statistics().cached, 0u);
}

TYPED_TEST_P(PoolTest, TrimGivesBackWhatIsFree) {
  auto& pool = this->pool();
  const auto before = take(pool, kPage, 1);
  const auto middle = take(pool, 64 * kHuge, 2);
  const auto after = take(pool, kPage, 3);
  give(pool, middle);
  const size_t reserved = pool.statistics().reserved;
  const size_t given = pool.trim();
  EXPECT_GE(given, 62 * kHuge);
  EXPECT_EQ(pool.statistics().reserved, reserved - given);
  EXPECT_TRUE(before.is_intact() && after.is_intact());
  EXPECT_EQ(pool.trim(), 0u);
  // The addresses are used again.
  const auto again = take(pool, 64 * kHuge, 4);
  EXPECT_TRUE(again.is_intact() && before.is_intact() && after.is_intact());
  for (const auto& block : {before, after, again}) give(pool, block);
  pool.trim();
  EXPECT_EQ(pool.statistics().reserved, 0u);
}

TYPED_TEST_P(PoolTest, AddressesAreUsedAgain) {
  if (!merges_arenas<TypeParam>) GTEST_SKIP() << "the driver chooses the addresses of this pool";
  auto& pool = this->pool();
  uintptr_t lowest = ~uintptr_t{0};
  uintptr_t highest = 0;
  for (size_t i = 0; i < (is_device<TypeParam> ? 30 : 500); ++i) {
    const size_t bytes = (1 + i % 3) * kHuge;
    void* block = pool.allocate(bytes);
    lowest = std::min(lowest, reinterpret_cast<uintptr_t>(block));
    highest = std::max(highest, reinterpret_cast<uintptr_t>(block) + bytes);
    pool.deallocate(block, bytes);
    pool.trim();
  }
  EXPECT_LE(highest - lowest, 8 * kHuge);
  EXPECT_EQ(pool.statistics().reserved, 0u);
}

TYPED_TEST_P(PoolTest, OutOfMemoryShowsRequestAndStatistics) {
  auto& pool = this->pool();
  const auto block = take(pool, kHuge, 1);
  // Refused by the memory there is, by the pool's addresses, by their numbering, by arithmetic.
  for (const size_t bytes : {this->too_much(), 16 * this->too_much(), size_t{1} << 50, ~size_t{0}}) {
    if (bytes == this->too_much() && std::is_same_v<TypeParam, PinnedPool>) continue;  // no limit of the simulated GPU
    try {
      pool.allocate(bytes);
      FAIL();
    } catch (const OutOfMemory& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find("cannot allocate " + std::to_string(bytes) + " bytes"), std::string::npos) << text;
      EXPECT_NE(text.find("in use 2097152 bytes in 1 blocks"), std::string::npos) << text;
    }
  }
  EXPECT_TRUE(block.is_intact());
  give(pool, take(pool, kHuge, 1));
}

// Memory that is free in pieces serves a large request where the system has no other.
TYPED_TEST_P(PoolTest, ScatteredMemoryIsMovedWhereItIsNeeded) {
  if (!is_device<TypeParam>) GTEST_SKIP() << "would take all memory of this machine";
  auto& pool = this->pool();
  std::vector<BlockOf<TypeParam>> blocks;
  try {
    for (;;) blocks.push_back(take(pool, 4 * kHuge, blocks.size()));
  } catch (const OutOfMemory&) {
  }
  ASSERT_GT(blocks.size(), 10u);
  for (size_t i = 0; i < blocks.size(); i += 2) give(pool, blocks[i]);
  EXPECT_LT(pool.statistics().largest_free, 20 * kHuge);
  give(pool, take(pool, 20 * kHuge, 1));
  for (size_t i = 1; i < blocks.size(); i += 2) EXPECT_TRUE(blocks[i].is_intact());
}

// Blocks wander between threads that allocate, check, free, trim and read statistics.
TYPED_TEST_P(PoolTest, ManyThreads) {
  auto& pool = this->pool();
  constexpr int kThreads = 6;
  constexpr int kSteps = is_device<TypeParam> ? 500 : 3000;
  std::mutex mutex;
  std::vector<BlockOf<TypeParam>> shared;
  std::atomic<int> broken{0};
  const auto work = [&](unsigned seed) {
    std::mt19937 random(seed);
    std::vector<BlockOf<TypeParam>> own;
    for (int step = 0; step < kSteps; ++step) {
      if (random() % 2 == 0) {
        const size_t pages = random() % 50 == 0 ? 1 + random() % 1500 : 1 + random() % 20;
        own.push_back(take(pool, pages * kPage, (uint64_t{seed} << 40) + static_cast<uint64_t>(step) * 0x100000));
      } else if (!own.empty()) {
        std::swap(own[random() % own.size()], own.back());
        const auto block = own.back();
        own.pop_back();
        if (!block.is_intact()) ++broken;
        if (random() % 3 == 0) {
          const std::lock_guard lock(mutex);
          shared.push_back(block);
        } else {
          give(pool, block);
        }
      }
      if (random() % 3 == 0) {
        const std::lock_guard lock(mutex);
        if (shared.empty()) continue;
        own.push_back(shared.back());
        shared.pop_back();
      }
      if (random() % 500 == 0) pool.trim();
      if (random() % 500 == 0 && pool.statistics().in_use > pool.statistics().reserved + (size_t{1} << 40)) ++broken;
    }
    for (const auto& block : own) {
      if (!block.is_intact()) ++broken;
      give(pool, block);
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kThreads; ++i) threads.emplace_back(work, i + 1);
  for (std::thread& thread : threads) thread.join();
  for (const auto& block : shared) give(pool, block);
  EXPECT_EQ(broken, 0);
  EXPECT_EQ(pool.statistics().in_use, 0u);
  EXPECT_EQ(pool.statistics().blocks, 0u);
  EXPECT_EQ(pool.statistics().bad_frees, 0u);
  pool.trim();
  EXPECT_EQ(pool.statistics().reserved, 0u);
}

// --- sleep -------------------------------------------------------------------------------------------------------

TYPED_TEST_P(SleepingPoolTest, KeepsAddressesAndRefusesMemory) {
  auto& pool = this->pool();
  const auto kept = take(pool, 10 * kHuge, 1);
  const auto freed = take(pool, kPage, 2);
  EXPECT_FALSE(pool.is_asleep());
  pool.sleep();
  EXPECT_TRUE(pool.is_asleep());
  EXPECT_THROW(pool.allocate(1), InvalidArgument);
  EXPECT_THROW(pool.allocate(10 * kHuge), InvalidArgument);
  EXPECT_THROW(pool.sleep(), InvalidArgument);
  EXPECT_EQ(pool.trim(), 0u);
  give(pool, freed);
  EXPECT_THROW(pool.allocate(kPage), InvalidArgument);  // from a cache too
  pool.wake();
  EXPECT_FALSE(pool.is_asleep());
  EXPECT_THROW(pool.wake(), InvalidArgument);
  EXPECT_EQ(pool.statistics().blocks, 1u);
  kept.fill();
  EXPECT_TRUE(kept.is_intact());
  give(pool, take(pool, kPage, 2));
  give(pool, kept);
}

TYPED_TEST_P(SleepingPoolTest, KeepsContentsInASink) {
  auto& pool = this->pool();
  std::mt19937 random(1);
  std::vector<BlockOf<TypeParam>> blocks;
  for (uint64_t i = 0; i < 300; ++i) {
    blocks.push_back(take(pool, (1 + random() % (i % 10 == 0 ? 600 : 20)) * kPage, i << 32));
  }
  blocks.push_back(take(pool, 17 * kHuge, uint64_t{300} << 32));  // in several pieces
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (int i = 0; i < 100; ++i) {
    give(pool, blocks.back());
    blocks.pop_back();
  }
  const size_t in_use = pool.statistics().in_use;
  auto sink = std::make_shared<MapSink>();
  pool.sleep(sink);
  size_t put = 0;
  for (const auto& [key, bytes] : sink->kept) put += bytes.size();
  EXPECT_EQ(put, in_use);         // live blocks only, each once
  for (int i = 0; i < 20; ++i) {  // freed while asleep
    give(pool, blocks.back());
    blocks.pop_back();
  }
  pool.wake();
  EXPECT_EQ(sink.use_count(), 1);
  for (const auto& block : blocks) EXPECT_TRUE(block.is_intact());
  for (const auto& block : blocks) give(pool, block);
  EXPECT_EQ(pool.statistics().in_use, 0u);
  EXPECT_EQ(pool.statistics().bad_frees, 0u);
}

TYPED_TEST_P(SleepingPoolTest, ASinkThatFailsLosesNothing) {
  auto& pool = this->pool();
  const auto first = take(pool, kHuge, 1);
  const auto gap = take(pool, kHuge, 2);
  const auto second = take(pool, kHuge, 3);
  give(pool, gap);
  auto broken = std::make_shared<MapSink>();
  broken->fail_put_after = 1;
  EXPECT_THROW(pool.sleep(broken), Error);
  EXPECT_FALSE(pool.is_asleep());
  EXPECT_EQ(broken.use_count(), 1);
  EXPECT_TRUE(first.is_intact() && second.is_intact());
  give(pool, take(pool, kPage, 4));
  EXPECT_THROW(pool.sleep(nullptr), InvalidArgument);

  auto sink = std::make_shared<MapSink>();
  sink->fail_get_after = 1;
  pool.sleep(sink);
  EXPECT_THROW(pool.wake(), Error);
  EXPECT_TRUE(pool.is_asleep());
  pool.wake();
  EXPECT_TRUE(first.is_intact() && second.is_intact());
}

// A sink may use the pool, as one that drops references to tensors does.
TYPED_TEST_P(SleepingPoolTest, ASinkMayFreeAndIsRefusedMemory) {
  class Sink final : public PageSink {
   public:
    explicit Sink(TypeParam& pool) : pool_(pool), extra_(take(pool, kPage, 1)) {}
    void put(uint64_t, std::span<const std::byte>) override {
      give(pool_, extra_);
      extra_.data = nullptr;
      EXPECT_THROW(pool_.allocate(1), InvalidArgument);
      EXPECT_THROW(pool_.sleep(), InvalidArgument);
      EXPECT_EQ(pool_.trim(), 0u);
    }
    void get(uint64_t, std::span<std::byte>) override { EXPECT_THROW(pool_.wake(), InvalidArgument); }

   private:
    TypeParam& pool_;
    BlockOf<TypeParam> extra_;
  };
  auto& pool = this->pool();
  pool.sleep(std::make_shared<Sink>(pool));
  pool.wake();
  EXPECT_EQ(pool.statistics().blocks, 0u);
}

REGISTER_TYPED_TEST_SUITE_P(PoolTest, BlocksAreAlignedApartAndWritable, WrongDeallocationsChangeNothing,
                            FreedNeighboursServeALargerRequest, ServesThreadsThatCameAndWent, TrimGivesBackWhatIsFree,
                            AddressesAreUsedAgain, OutOfMemoryShowsRequestAndStatistics,
                            ScatteredMemoryIsMovedWhereItIsNeeded, ManyThreads);
REGISTER_TYPED_TEST_SUITE_P(SleepingPoolTest, KeepsAddressesAndRefusesMemory, KeepsContentsInASink,
                            ASinkThatFailsLosesNothing, ASinkMayFreeAndIsRefusedMemory);

struct Names {
  template <typename P>
  static std::string GetName(int) {
    return is_host<P> ? "HostPool" : is_device<P> ? "DevicePool" : "PinnedPool";
  }
};

using GpuPools = ::testing::Types<PinnedPool, DevicePool>;
INSTANTIATE_TYPED_TEST_SUITE_P(Host, PoolTest, ::testing::Types<HostPool>, Names);
INSTANTIATE_TYPED_TEST_SUITE_P(Cuda, PoolTest, GpuPools, Names);
INSTANTIATE_TYPED_TEST_SUITE_P(Host, SleepingPoolTest, ::testing::Types<HostPool>, Names);
INSTANTIATE_TYPED_TEST_SUITE_P(Cuda, SleepingPoolTest, ::testing::Types<DevicePool>, Names);

}  // namespace
}  // namespace ng
