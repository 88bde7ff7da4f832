// HostPool: what only it has: pages and their faults, nodes, fork. What it shares with other pools is in pool_test.cpp.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "memory/pool_fixture.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

using Block = BlockOf<HostPool>;

size_t resident_pages(const std::byte* data, size_t bytes) {
  std::vector<unsigned char> pages((bytes + kPage - 1) / kPage);
  EXPECT_EQ(mincore(const_cast<std::byte*>(data), bytes, pages.data()), 0);
  return static_cast<size_t>(std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; }));
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

TEST(HostPool, NoPageIsLeftWhileItSleeps) {
  HostPool pool;
  const Block block = take(pool, 10 * kHuge, 1);
  const auto resident = [&] { return resident_pages(block.data, block.bytes); };
  pool.sleep();
  EXPECT_EQ(resident(), 0u);
  pool.wake();
  EXPECT_EQ(resident(), block.bytes / kPage);
  auto sink = std::make_shared<MapSink>();
  sink->fail_get_after = 0;
  block.fill();
  pool.sleep(sink);
  EXPECT_EQ(resident(), 0u);
  EXPECT_THROW(pool.wake(), Error);
  EXPECT_EQ(resident(), 0u);
  pool.wake();
  EXPECT_TRUE(block.is_intact());
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
