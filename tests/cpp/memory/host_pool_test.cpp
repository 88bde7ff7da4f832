// HostPool: blocks, caches, what goes back to the system, sleep with and without a sink, threads, fork.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

constexpr size_t kPage = kPoolAlignment;
constexpr size_t kHuge = size_t{2} << 20;

struct Block {
  std::byte* data;
  size_t bytes;
  uint64_t seed;

  // A value for each page, so that a block of another, or a lost page, is seen.
  void fill() const {
    for (size_t at = 0; at + sizeof seed <= bytes; at += kPage) {
      const uint64_t value = seed + at;
      std::memcpy(data + at, &value, sizeof value);
    }
  }
  bool is_intact() const {
    for (size_t at = 0; at + sizeof seed <= bytes; at += kPage) {
      uint64_t value = 0;
      std::memcpy(&value, data + at, sizeof value);
      if (value != seed + at) return false;
    }
    return true;
  }
};

Block take(Pool& pool, size_t bytes, uint64_t seed) {
  Block block{static_cast<std::byte*>(pool.allocate(bytes)), bytes, seed};
  block.fill();
  return block;
}

void give(Pool& pool, const Block& block) { pool.deallocate(block.data, block.bytes); }

size_t resident_pages(const std::byte* data, size_t bytes) {
  std::vector<unsigned char> pages((bytes + kPage - 1) / kPage);
  EXPECT_EQ(mincore(const_cast<std::byte*>(data), bytes, pages.data()), 0);
  return static_cast<size_t>(std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; }));
}

// Keeps what it is given, and fails on request.
class MapSink final : public PageSink {
 public:
  void put(uint64_t key, std::span<const std::byte> bytes) override {
    if (fail_put_after-- == 0) throw Error("no room");
    EXPECT_TRUE(kept.emplace(key, std::vector(bytes.begin(), bytes.end())).second) << "key " << key << " twice";
  }
  void get(uint64_t key, std::span<std::byte> bytes) override {
    if (fail_get_after-- == 0) throw Error("cannot read");
    const std::vector<std::byte>& found = kept.at(key);
    ASSERT_EQ(found.size(), bytes.size());
    std::copy(found.begin(), found.end(), bytes.begin());
  }

  std::map<uint64_t, std::vector<std::byte>> kept;
  int fail_put_after = -1;
  int fail_get_after = -1;
};

TEST(HostPool, BlocksAreAlignedApartAndWritable) {
  HostPool pool;
  std::vector<Block> blocks;
  size_t expected = 0;
  for (const size_t bytes : {size_t{0}, size_t{1}, kPage - 1, kPage, kPage + 1, size_t{65536}, size_t{65537},
                             size_t{1} << 20, kHuge, size_t{5} << 20, size_t{100} << 20}) {
    blocks.push_back(take(pool, bytes, 1000 * bytes));
    ASSERT_EQ(reinterpret_cast<uintptr_t>(blocks.back().data) % kPage, 0u);
    expected += std::max((bytes + kPage - 1) / kPage, size_t{1}) * kPage;
  }
  for (const Block& block : blocks) EXPECT_TRUE(block.is_intact());
  const PoolStatistics full = pool.statistics();
  EXPECT_EQ(full.in_use, expected);
  EXPECT_EQ(full.blocks, blocks.size());
  EXPECT_GE(full.reserved, full.in_use + full.cached);
  EXPECT_EQ(full.reserved % kHuge, 0u);
  for (const Block& block : blocks) give(pool, block);
  const PoolStatistics empty = pool.statistics();
  EXPECT_EQ(empty.in_use, 0u);
  EXPECT_EQ(empty.blocks, 0u);
  EXPECT_EQ(empty.bad_frees, 0u);
  EXPECT_EQ(empty.reserved, full.reserved);
  EXPECT_GT(empty.cached, 0u);
  pool.deallocate(nullptr, 5);
  EXPECT_EQ(pool.statistics().bad_frees, 0u);
}

TEST(HostPool, ArenasAreFaultedInBeforeUse) {
  HostPool pool;
  constexpr size_t kBytes = size_t{200} << 20;  // several pieces, so several threads where there are cores
  auto* data = static_cast<std::byte*>(pool.allocate(kBytes));
  EXPECT_EQ(resident_pages(data, kBytes), kBytes / kPage);
  EXPECT_LE(pool.huge_page_bytes(), pool.statistics().reserved);
  pool.deallocate(data, kBytes);

  HostPool small({.huge_pages = false});
  small.deallocate(small.allocate(kHuge), kHuge);
  EXPECT_EQ(small.huge_page_bytes(), 0u);
}

TEST(HostPool, WrongDeallocationsChangeNothing) {
  HostPool pool;
  const Block small = take(pool, 3 * kPage, 7);
  const Block large = take(pool, kHuge, 9);
  uint64_t expected = 0;
  const auto refuse = [&](void* block, size_t bytes) {
    pool.deallocate(block, bytes);
    EXPECT_EQ(pool.statistics().bad_frees, ++expected);
  };
  std::byte local{};
  refuse(&local, 1);
  refuse(small.data + 1, 3 * kPage);
  refuse(small.data + kPage, 2 * kPage);  // inside
  refuse(small.data + 2 * kPage, kPage);
  refuse(small.data, 2 * kPage);
  refuse(small.data, 4 * kPage);
  refuse(small.data, ~size_t{0});
  refuse(large.data, kHuge - kPage);
  refuse(large.data + (size_t{1} << 30), kPage);  // reserved, without memory
  EXPECT_TRUE(small.is_intact() && large.is_intact());
  EXPECT_EQ(pool.statistics().blocks, 2u);
  give(pool, small);
  give(pool, large);
  refuse(small.data, 3 * kPage);  // now in a cache
  refuse(large.data, kHuge);      // now merged
  EXPECT_EQ(pool.statistics().in_use, 0u);
  // The cache did not get it twice.
  const Block one = take(pool, 3 * kPage, 1);
  const Block two = take(pool, 3 * kPage, 2);
  EXPECT_NE(one.data, two.data);
}

TEST(HostPool, FreedNeighboursServeALargerRequest) {
  HostPool pool;
  const Block first = take(pool, 3 * kHuge, 1);
  const Block second = take(pool, 4 * kHuge, 2);
  give(pool, first);
  give(pool, second);
  const size_t reserved = pool.statistics().reserved;
  EXPECT_EQ(pool.statistics().largest_free, reserved);
  EXPECT_EQ(pool.statistics().fragmentation(), 0.0);
  give(pool, take(pool, reserved, 3));
  EXPECT_EQ(pool.statistics().reserved, reserved);
  // Growing by a request takes only what the free memory before the new arena lacks.
  give(pool, take(pool, 4 * reserved, 3));
  EXPECT_EQ(pool.statistics().reserved, 4 * reserved);
}

TEST(HostPool, CachesServeThreadsThatCameAndWent) {
  HostPool pool;
  constexpr size_t kCount = 200;
  std::vector<Block> blocks(kCount);
  std::thread([&] {
    for (size_t i = 0; i < kCount; ++i) blocks[i] = take(pool, (1 + i % 16) * kPage, i);
  }).join();
  EXPECT_EQ(pool.statistics().blocks, kCount);
  std::thread([&] {
    for (const Block& block : blocks) {
      EXPECT_TRUE(block.is_intact());
      give(pool, block);
    }
  }).join();
  const PoolStatistics after = pool.statistics();
  EXPECT_EQ(after.blocks, 0u);
  EXPECT_EQ(after.in_use, 0u);
  EXPECT_GT(after.cached, 0u);
  // What dead threads cached is not lost: it merges when memory is short, and trim() gives it back.
  give(pool, take(pool, after.reserved, 1));
  EXPECT_EQ(pool.statistics().reserved, after.reserved);
  give(pool, take(pool, 1, 1));
  EXPECT_EQ(pool.trim(), after.reserved);
  EXPECT_EQ(pool.statistics().reserved, 0u);
  EXPECT_EQ(pool.statistics().cached, 0u);
}

TEST(HostPool, TrimGivesBackWhatIsFree) {
  HostPool pool;
  const Block before = take(pool, kPage, 1);
  const Block middle = take(pool, 64 * kHuge, 2);
  const Block after = take(pool, kPage, 3);
  give(pool, middle);
  const size_t reserved = pool.statistics().reserved;
  const size_t given = pool.trim();
  EXPECT_GE(given, 62 * kHuge);
  EXPECT_EQ(pool.statistics().reserved, reserved - given);
  EXPECT_TRUE(before.is_intact() && after.is_intact());
  EXPECT_EQ(pool.trim(), 0u);
  // The addresses are used again.
  const Block again = take(pool, 64 * kHuge, 4);
  EXPECT_TRUE(again.is_intact() && before.is_intact() && after.is_intact());
  for (const Block& block : {before, after, again}) give(pool, block);
  pool.trim();
  EXPECT_EQ(pool.statistics().reserved, 0u);
}

TEST(HostPool, AddressesAreUsedAgain) {
  HostPool pool;
  uintptr_t lowest = ~uintptr_t{0};
  uintptr_t highest = 0;
  for (size_t i = 0; i < 500; ++i) {
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

TEST(HostPool, SleepDiscards) {
  HostPool pool;
  const Block kept = take(pool, 10 * kHuge, 1);
  const Block freed = take(pool, kPage, 2);
  EXPECT_FALSE(pool.is_asleep());
  pool.sleep();
  EXPECT_TRUE(pool.is_asleep());
  EXPECT_EQ(resident_pages(kept.data, kept.bytes), 0u);
  EXPECT_THROW(pool.allocate(1), InvalidArgument);
  EXPECT_THROW(pool.allocate(10 * kHuge), InvalidArgument);
  EXPECT_THROW(pool.sleep(), InvalidArgument);
  EXPECT_EQ(pool.trim(), 0u);
  give(pool, freed);
  EXPECT_THROW(pool.allocate(kPage), InvalidArgument);  // from the cache too
  pool.wake();
  EXPECT_FALSE(pool.is_asleep());
  EXPECT_THROW(pool.wake(), InvalidArgument);
  EXPECT_EQ(resident_pages(kept.data, kept.bytes), kept.bytes / kPage);
  EXPECT_EQ(pool.statistics().blocks, 1u);
  kept.fill();
  EXPECT_TRUE(kept.is_intact());
  give(pool, take(pool, kPage, 2));
  give(pool, kept);
}

TEST(HostPool, SleepKeepsContentsInASink) {
  HostPool pool;
  std::mt19937 random(1);
  std::vector<Block> blocks;
  for (uint64_t i = 0; i < 300; ++i) {
    blocks.push_back(take(pool, (1 + random() % (i % 10 == 0 ? 600 : 20)) * kPage, i << 32));
  }
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (int i = 0; i < 100; ++i) {
    give(pool, blocks.back());
    blocks.pop_back();
  }
  size_t in_use = pool.statistics().in_use;
  auto sink = std::make_shared<MapSink>();
  pool.sleep(sink);
  size_t put = 0;
  for (const auto& [key, bytes] : sink->kept) put += bytes.size();
  EXPECT_EQ(put, in_use);  // live blocks only, each once
  EXPECT_EQ(resident_pages(blocks[0].data, blocks[0].bytes), 0u);
  for (int i = 0; i < 20; ++i) {  // freed while asleep
    give(pool, blocks.back());
    blocks.pop_back();
  }
  pool.wake();
  EXPECT_EQ(sink.use_count(), 1);
  for (const Block& block : blocks) EXPECT_TRUE(block.is_intact());
  for (const Block& block : blocks) give(pool, block);
  EXPECT_EQ(pool.statistics().in_use, 0u);
  EXPECT_EQ(pool.statistics().bad_frees, 0u);
}

TEST(HostPool, ASinkThatFailsLosesNothing) {
  HostPool pool;
  const Block first = take(pool, kHuge, 1);
  const Block gap = take(pool, kHuge, 2);
  const Block second = take(pool, kHuge, 3);
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
  EXPECT_EQ(resident_pages(first.data, first.bytes), 0u);
  pool.wake();
  EXPECT_TRUE(first.is_intact() && second.is_intact());
}

// A sink may use the pool, as one that drops references to tensors does.
TEST(HostPool, ASinkMayFreeAndIsRefusedMemory) {
  class Sink final : public PageSink {
   public:
    explicit Sink(HostPool& pool) : pool_(pool), extra_(take(pool, kPage, 1)) {}
    void put(uint64_t, std::span<const std::byte>) override {
      give(pool_, extra_);
      extra_.data = nullptr;
      EXPECT_THROW(pool_.allocate(1), InvalidArgument);
      EXPECT_THROW(pool_.sleep(), InvalidArgument);
      EXPECT_EQ(pool_.trim(), 0u);
    }
    void get(uint64_t, std::span<std::byte>) override { EXPECT_THROW(pool_.wake(), InvalidArgument); }

   private:
    HostPool& pool_;
    Block extra_;
  };
  HostPool pool;
  pool.sleep(std::make_shared<Sink>(pool));
  pool.wake();
  EXPECT_EQ(pool.statistics().blocks, 0u);
}

TEST(HostPool, OutOfMemoryShowsRequestAndStatistics) {
  HostPool pool;
  const Block block = take(pool, kHuge, 1);
  // Refused by the memory there is, by the pool's addresses, by their numbering, by arithmetic.
  const size_t physical = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (const size_t bytes : {physical, 16 * physical, size_t{1} << 50, ~size_t{0}}) {
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

TEST(HostPool, BindsToANode) {
  const std::vector<int> nodes = numa_nodes();
  ASSERT_FALSE(nodes.empty());
  EXPECT_TRUE(std::is_sorted(nodes.begin(), nodes.end()));
  HostPool pool({.numa_node = nodes.back()});
  const Block block = take(pool, 3 * kHuge, 1);
  EXPECT_TRUE(block.is_intact());
  EXPECT_THROW(HostPool({.numa_node = nodes.back() + 1}), InvalidArgument);
  EXPECT_THROW(HostPool({.numa_node = -2}), InvalidArgument);
}

// Blocks wander between threads that allocate, check, free, trim and read statistics.
TEST(HostPool, ManyThreads) {
  HostPool pool;
  constexpr int kThreads = 6;
  std::mutex mutex;
  std::vector<Block> shared;
  std::atomic<int> broken{0};
  const auto work = [&](unsigned seed) {
    std::mt19937 random(seed);
    std::vector<Block> own;
    for (int step = 0; step < 3000; ++step) {
      if (random() % 2 == 0) {
        const size_t pages = random() % 50 == 0 ? 1 + random() % 1500 : 1 + random() % 20;
        own.push_back(take(pool, pages * kPage, (uint64_t{seed} << 40) + static_cast<uint64_t>(step) * 0x100000));
      } else if (!own.empty()) {
        std::swap(own[random() % own.size()], own.back());
        const Block block = own.back();
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
    for (const Block& block : own) {
      if (!block.is_intact()) ++broken;
      give(pool, block);
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kThreads; ++i) threads.emplace_back(work, i + 1);
  for (std::thread& thread : threads) thread.join();
  for (const Block& block : shared) give(pool, block);
  EXPECT_EQ(broken, 0);
  EXPECT_EQ(pool.statistics().in_use, 0u);
  EXPECT_EQ(pool.statistics().blocks, 0u);
  EXPECT_EQ(pool.statistics().bad_frees, 0u);
  pool.trim();
  EXPECT_EQ(pool.statistics().reserved, 0u);
}

// Forked in the middle of other threads' calls, the child has a pool that works and memory of its own.
TEST(HostPool, WorksInAForkedChild) {
  HostPool pool;
  const Block block = take(pool, 3 * kHuge, 1);
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] {
      for (uint64_t step = 0; !stop; ++step) give(pool, take(pool, (1 + step % 40 * (i + 1)) * kPage, step));
    });
  }
  for (int round = 0; round < 20; ++round) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      bool good = block.is_intact();
      const Block other = take(pool, 5 * kHuge, 2);
      const Block small = take(pool, kPage, 3);
      block.fill();
      std::memset(block.data, 0, block.bytes);
      good = good && other.is_intact() && small.is_intact();
      for (const Block& each : {block, other, small}) give(pool, each);
      pool.trim();
      _exit(good && pool.statistics().bad_frees == 0 ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(block.is_intact());
}

}  // namespace
}  // namespace ng
