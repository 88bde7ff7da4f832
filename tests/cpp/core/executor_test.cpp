// The executor: every index once, calls from many threads, sleep and wake, change of size, fork.
#include "narrowgauge/executor.hpp"

#include <gtest/gtest.h>
#include <pthread.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

// Runs over [0, count) and checks that each index is visited once, in chunks of at least a grain that are equal.
void check_covers(Executor& executor, int64_t count, int64_t grain) {
  std::vector<std::atomic<int>> visits(static_cast<size_t>(count));
  std::atomic<int64_t> shortest{count};
  std::atomic<int64_t> longest{0};
  const auto update = [](std::atomic<int64_t>& value, int64_t size, auto better) {
    for (int64_t now = value.load(); better(size, now) && !value.compare_exchange_weak(now, size);) {
    }
  };
  executor.parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    update(shortest, end - begin, std::less<>{});
    update(longest, end - begin, std::greater<>{});
    for (int64_t i = begin; i < end; ++i) visits[static_cast<size_t>(i)].fetch_add(1, std::memory_order_relaxed);
  });
  EXPECT_GE(shortest, std::min(grain, count));
  EXPECT_LE(longest, shortest + 1);
  for (const auto& visit : visits) ASSERT_EQ(visit.load(), 1);
}

TEST(Executor, VisitsEveryIndexOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    const auto pool = make_pool(threads);
    EXPECT_EQ(pool->threads(), threads);
    for (const int64_t count : {0, 1, 2, 7, 64, 1000, 4097}) {
      for (const int64_t grain : {1, 3, 64, 5000}) check_covers(*pool, count, grain);
    }
  }
}

TEST(Executor, WritesAreVisibleToTheCaller) {
  const auto pool = make_pool(4);
  std::vector<int64_t> values(10000);
  for (int round = 0; round < 200; ++round) {
    pool->parallel_for(static_cast<int64_t>(values.size()), 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) values[static_cast<size_t>(i)] = i + round;
    });
    const int64_t sum = std::accumulate(values.begin(), values.end(), int64_t{0});
    ASSERT_EQ(sum, 10000 * 9999 / 2 + 10000 * static_cast<int64_t>(round));
  }
}

TEST(Executor, CallsFromSeveralThreadsQueue) {
  const auto pool = make_pool(3);
  std::vector<std::thread> callers;
  for (int i = 0; i < 6; ++i) {
    callers.emplace_back([&] {
      for (int round = 0; round < 100; ++round) check_covers(*pool, 333, 10);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

TEST(Executor, WakesSleepingWorkers) {
  const auto pool = make_pool(3);
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // far beyond the spin
    check_covers(*pool, 100, 1);
  }
}

TEST(Executor, WakesWorkersOnOtherCoresThanTheCallers) {
  cpu_set_t cores;
  ASSERT_EQ(sched_getaffinity(0, sizeof cores, &cores), 0);
  if (CPU_COUNT(&cores) < 2) GTEST_SKIP() << "one core";
  const auto pool = make_pool(2);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int> left{-1};  // to the worker
  pool->parallel_for(2, 1, [&](int64_t, int64_t) {
    if (std::this_thread::get_id() == caller) {
      while (left < 0) std::this_thread::yield();
      return;
    }
    cpu_set_t mine;
    left = pthread_getaffinity_np(pthread_self(), sizeof mine, &mine) == 0 ? CPU_COUNT(&mine) : 0;
  });
  EXPECT_EQ(left, CPU_COUNT(&cores) - 1);
}

TEST(Executor, ChangesSize) {
  const auto pool = make_pool(2);
  for (const int threads : {5, 1, 3}) {
    pool->set_threads(threads);
    EXPECT_EQ(pool->threads(), threads);
    check_covers(*pool, 1000, 1);
  }
  EXPECT_THROW(pool->set_threads(0), InvalidArgument);
  EXPECT_THROW(make_pool(-1), InvalidArgument);
  check_covers(*pool, 1000, 1);
}

TEST(Executor, DefaultWorksInAForkedChild) {
  check_covers(default_executor(), 1000, 1);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    std::atomic<int64_t> sum{0};
    default_executor().parallel_for(1000, 1, [&](int64_t begin, int64_t end) { sum += end - begin; });
    const bool refuses = !adopt_openmp().empty();
    _exit(sum == 1000 && refuses ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  check_covers(default_executor(), 1000, 1);
}

TEST(Executor, StreamReadSeesEveryByte) {
  const auto pool = make_pool(2);
  Buffer buffer((size_t{3} << 20) + 64);
  auto* words = reinterpret_cast<uint64_t*>(buffer.data());
  const size_t count = buffer.size() / sizeof(uint64_t);
  std::iota(words, words + count, uint64_t{1});
  EXPECT_EQ(stream_read(buffer.data(), buffer.size(), *pool), uint64_t{count} * (count + 1) / 2);
}

TEST(Buffer, AlignedAndMovable) {
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{100}, size_t{5} << 20}) {
    Buffer buffer(bytes);
    EXPECT_EQ(buffer.size(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 64, 0u);
    std::byte* data = buffer.data();
    Buffer moved = std::move(buffer);
    EXPECT_EQ(moved.data(), data);
    EXPECT_EQ(moved.size(), bytes);
  }
  EXPECT_THROW(Buffer(~size_t{0}), OutOfMemory);
  EXPECT_THROW(Buffer(size_t{1} << 60), OutOfMemory);
}

}  // namespace
}  // namespace ng
