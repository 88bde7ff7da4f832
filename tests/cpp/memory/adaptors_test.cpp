// LimitPool and StatisticsPool, around HostPool and around a pool that only fails.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

class FailingPool final : public Pool {
 public:
  void* allocate(size_t bytes) override { throw OutOfMemory(concat("no ", bytes)); }
  void deallocate(void*, size_t) noexcept override {}
};

TEST(LimitPool, RefusesWhatIsBeyondTheLimit) {
  const auto host = std::make_shared<HostPool>();
  LimitPool pool(host, 10 * kPoolAlignment);
  void* four = pool.allocate(4 * kPoolAlignment);
  void* six = pool.allocate(5 * kPoolAlignment + 1);  // whole pages count
  try {
    pool.allocate(1);
    FAIL();
  } catch (const OutOfMemory& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("cannot allocate 1 bytes: 40960 bytes are in use and the limit is 40960"), std::string::npos)
        << text;
    EXPECT_NE(text.find("in use 40960 bytes in 2 blocks"), std::string::npos) << text;
  }
  EXPECT_THROW(pool.allocate(~size_t{0}), OutOfMemory);
  pool.deallocate(nullptr, 1);
  pool.deallocate(four, 4 * kPoolAlignment);
  four = pool.allocate(4 * kPoolAlignment);
  pool.deallocate(four, 4 * kPoolAlignment);
  pool.deallocate(six, 5 * kPoolAlignment + 1);
  EXPECT_EQ(host->statistics().bad_frees, 0u);
  pool.deallocate(pool.allocate(10 * kPoolAlignment), 10 * kPoolAlignment);
}

TEST(LimitPool, AFailureBelowGivesTheShareBack) {
  LimitPool pool(std::make_shared<FailingPool>(), kPoolAlignment);
  for (int i = 0; i < 3; ++i) {
    try {
      pool.allocate(1);
      FAIL();
    } catch (const OutOfMemory& error) {
      EXPECT_STREQ(error.what(), "no 1");
    }
  }
}

TEST(LimitPool, HoldsUnderThreads) {
  constexpr size_t kLimit = 8;
  LimitPool pool(std::make_shared<HostPool>(), kLimit * kPoolAlignment);
  std::atomic<size_t> held{0};
  std::atomic<bool> exceeded{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int step = 0; step < 5000; ++step) {
        try {
          void* block = pool.allocate(3 * kPoolAlignment);
          if (held.fetch_add(3) + 3 > kLimit) exceeded = true;
          held.fetch_sub(3);
          pool.deallocate(block, 3 * kPoolAlignment);
        } catch (const OutOfMemory&) {
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(exceeded);
  pool.deallocate(pool.allocate(kLimit * kPoolAlignment), kLimit * kPoolAlignment);
}

TEST(StatisticsPool, CountsWhatPassesThrough) {
  const auto host = std::make_shared<HostPool>();
  void* elsewhere = host->allocate(1);
  StatisticsPool pool(host);
  void* one = pool.allocate(1);
  void* two = pool.allocate(2 * kPoolAlignment);
  pool.deallocate(one, 1);
  void* three = pool.allocate(0);
  const PoolStatistics statistics = pool.statistics();
  EXPECT_EQ(statistics.in_use, 3 * kPoolAlignment);
  EXPECT_EQ(statistics.peak, 3 * kPoolAlignment);
  EXPECT_EQ(statistics.blocks, 2u);
  EXPECT_EQ(host->statistics().in_use, 4 * kPoolAlignment);
  EXPECT_EQ(statistics.reserved, host->statistics().reserved);
  pool.deallocate(two, 2 * kPoolAlignment);
  pool.deallocate(three, 0);
  pool.deallocate(nullptr, 0);
  EXPECT_EQ(pool.statistics().in_use, 0u);
  EXPECT_EQ(pool.statistics().blocks, 0u);
  EXPECT_EQ(pool.statistics().peak, 3 * kPoolAlignment);
  host->deallocate(elsewhere, 1);

  StatisticsPool failing(std::make_shared<FailingPool>());
  EXPECT_THROW(failing.allocate(1), OutOfMemory);
  EXPECT_EQ(failing.statistics().in_use, 0u);
}

TEST(PoolStatistics, FragmentationIsOfWhatIsFree) {
  EXPECT_EQ(PoolStatistics{}.fragmentation(), 0.0);
  EXPECT_EQ((PoolStatistics{.in_use = 50, .reserved = 100, .largest_free = 50}).fragmentation(), 0.0);
  EXPECT_EQ((PoolStatistics{.in_use = 20, .reserved = 100, .largest_free = 20}).fragmentation(), 0.75);
}

TEST(Adaptors, RefuseANullPool) {
  EXPECT_THROW(LimitPool(nullptr, 1), InvalidArgument);
  EXPECT_THROW(StatisticsPool(nullptr), InvalidArgument);
}

}  // namespace
}  // namespace ng
