// DevicePool in the order of streams: who may use freed memory when, graphs, adaptors, tensors, the end of the pool.
//
// That nobody writes what another stream still reads is seen by reads that are held back by a host function. The tests
// that say so fail if DevicePool leaves out a wait for an event, in find() and in gather(), or its query in reclaim().
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "driver/context.hpp"
#include "driver/stream.hpp"
#include "memory/pool_fixture.hpp"
#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"
#include "narrowgauge/tensor.hpp"

namespace ng {
namespace {

using cuda::ContextScope;
using cuda::DevicePtr;
using cuda::handle_of;

// A point that a stream does not pass until it is opened.
class Gate {
 public:
  explicit Gate(const Stream& stream) {
    const ContextScope context(stream.device());
    NG_CUDA(context.driver(), cuLaunchHostFunc(handle_of(stream), &wait, &open_));
  }
  ~Gate() { open(); }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  void open() {
    open_ = true;
    open_.notify_all();
  }

 private:
  static void wait(void* open) { static_cast<std::atomic<bool>*>(open)->wait(false); }

  // The stream may come to it when the gate is gone.
  static std::atomic<bool>& closed() {
    static std::deque<std::atomic<bool>> all;
    return all.emplace_back(false);
  }

  std::atomic<bool>& open_ = closed();
};

class CudaDevicePool : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::driver() == nullptr) GTEST_SKIP() << why_no_cuda();
    pool_ = std::make_shared<DevicePool>();
    pinned_ = std::make_shared<PinnedPool>();
  }

  std::byte* allocate(size_t bytes, const Stream& stream) {
    return static_cast<std::byte*>(pool_->allocate(bytes, stream));
  }
  std::byte* allocate_pinned(size_t bytes) { return static_cast<std::byte*>(pinned_->allocate(bytes)); }

  static void fill(std::byte* data, unsigned char value, size_t bytes, const Stream& stream) {
    const ContextScope context(stream.device());
    NG_CUDA(context.driver(), cuMemsetD8Async(address_on(data), value, bytes, handle_of(stream)));
  }
  static void read(std::byte* to, const std::byte* from, size_t bytes, const Stream& stream) {
    const ContextScope context(stream.device());
    NG_CUDA(context.driver(), cuMemcpyDtoHAsync_v2(to, address_on(from), bytes, handle_of(stream)));
  }
  static bool all_are(const std::byte* data, unsigned value, size_t bytes) {
    return std::all_of(data, data + bytes, [&](std::byte byte) { return byte == std::byte(value); });
  }

  std::shared_ptr<DevicePool> pool_;
  std::shared_ptr<PinnedPool> pinned_;
};

TEST_F(CudaDevicePool, AStreamReusesItsOwnAtOnce) {
  const Stream stream = Stream::create(0);
  std::byte* block = allocate(3 * kHuge, stream);
  Gate gate(stream);
  pool_->deallocate(block, 3 * kHuge, stream);
  EXPECT_EQ(pool_->statistics().cached, 3 * kHuge);
  EXPECT_EQ(pool_->statistics().in_use, 0u);
  // In whatever pieces, merged and split.
  std::byte* small = allocate(kHuge, stream);
  EXPECT_EQ(small, block);
  pool_->deallocate(small, kHuge, stream);
  EXPECT_EQ(allocate(3 * kHuge, stream), block);
  EXPECT_EQ(pool_->statistics().cached, 0u);
  pool_->deallocate(block, 3 * kHuge, stream);
  EXPECT_EQ(pool_->trim(), 0u);  // work may use it
  gate.open();
  stream.synchronize();
  EXPECT_EQ(pool_->trim(), 3 * kHuge);
  EXPECT_EQ(pool_->statistics().reserved, 0u);
  EXPECT_EQ(pool_->statistics().bad_frees, 0u);
}

TEST_F(CudaDevicePool, WhatIsForEveryStreamWaitsUntilWorkIsDone) {
  const Stream stream = Stream::create(0);
  std::byte* block = allocate(kHuge, stream);
  Gate gate(stream);
  pool_->deallocate(block, kHuge, stream);
  void* other = pool_->allocate(kHuge);
  EXPECT_NE(other, block);
  gate.open();
  stream.synchronize();
  EXPECT_EQ(pool_->allocate(kHuge), block);
  pool_->deallocate(block, kHuge);
  EXPECT_EQ(pool_->statistics().cached, 0u);
  pool_->deallocate(other, kHuge);
}

// Frees after the question do not put the answer off.
TEST_F(CudaDevicePool, LaterFreesDoNotHoldEarlierOnesBack) {
  const Stream stream = Stream::create(0);
  std::byte* first = allocate(kHuge, stream);
  std::byte* second = allocate(kHuge, stream);
  Gate gate(stream);
  pool_->deallocate(first, kHuge, stream);
  EXPECT_EQ(pool_->trim(), 0u);  // asks
  Event between(0);
  between.record(stream);
  Gate later(stream);
  pool_->deallocate(second, kHuge, stream);
  gate.open();
  between.synchronize();
  EXPECT_EQ(pool_->trim(), kHuge);
  EXPECT_EQ(pool_->statistics().cached, kHuge);
  later.open();
  stream.synchronize();
  EXPECT_EQ(pool_->trim(), kHuge);
}

// Fails without the wait in find().
TEST_F(CudaDevicePool, AnotherStreamWaitsForWhatItTakes) {
  const Stream reader = Stream::create(0);
  const Stream writer = Stream::create(0);
  std::byte* seen = allocate_pinned(2 * kHuge);
  std::byte* written = seen + kHuge;
  std::byte* block = allocate(kHuge, reader);
  fill(block, 1, kHuge, reader);
  reader.synchronize();
  Gate gate(reader);
  read(seen, block, kHuge, reader);
  pool_->deallocate(block, kHuge, reader);

  ASSERT_EQ(allocate(kHuge, writer), block);
  EXPECT_EQ(pool_->statistics().reserved, kHuge);
  fill(block, 2, kHuge, writer);
  read(written, block, kHuge, writer);
  pool_->deallocate(block, kHuge, writer);
  EXPECT_FALSE(writer.is_done());
  // Would give the writer the time to go ahead.
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  gate.open();
  writer.synchronize();
  reader.synchronize();
  EXPECT_TRUE(all_are(seen, 1, kHuge));
  EXPECT_TRUE(all_are(written, 2, kHuge));
  pinned_->deallocate(seen, 2 * kHuge);
}

// Fails without the waits in gather(), and without the event that what is left there gets.
TEST_F(CudaDevicePool, WithTheLastMemoryAStreamWaitsForAllOthers) {
  std::array<Stream, 2> readers{Stream::create(0), Stream::create(0)};
  const Stream writer = Stream::create(0);
  // All memory, in turn, so that neither reader frees two neighbours.
  std::vector<std::byte*> blocks;
  try {
    for (;;) blocks.push_back(allocate(4 * kHuge, readers[blocks.size() % 2]));
  } catch (const OutOfMemory&) {
  }
  constexpr size_t kBytes = 4 * kHuge;
  ASSERT_GT(blocks.size(), 4u);
  std::byte* seen = allocate_pinned(kPage * blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) fill(blocks[i], 1, kBytes, readers[i % 2]);
  for (const Stream& reader : readers) reader.synchronize();
  std::vector<std::unique_ptr<Gate>> gates;
  for (const Stream& reader : readers) gates.push_back(std::make_unique<Gate>(reader));
  for (size_t i = 0; i < blocks.size(); ++i) {
    read(seen + i * kPage, blocks[i], kPage, readers[i % 2]);
    pool_->deallocate(blocks[i], kBytes, readers[i % 2]);
  }
  EXPECT_THROW(pool_->allocate(kBytes * blocks.size()), OutOfMemory);  // without a stream nobody could wait
  const Stream last = Stream::create(0);
  const size_t most = kBytes * (blocks.size() - 1);
  std::byte* all = allocate(most, writer);
  std::byte* rest = allocate(kBytes, last);
  fill(all, 2, most, writer);
  fill(rest, 2, kBytes, last);
  EXPECT_FALSE(writer.is_done());
  EXPECT_FALSE(last.is_done());
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  for (const auto& gate : gates) gate->open();
  writer.synchronize();
  last.synchronize();
  for (const Stream& reader : readers) reader.synchronize();
  EXPECT_TRUE(all_are(seen, 1, kPage * blocks.size()));
  pool_->deallocate(all, most, writer);
  pool_->deallocate(rest, kBytes, last);
  pinned_->deallocate(seen, kPage * blocks.size());
}

TEST_F(CudaDevicePool, ManyStreamsAndThreads) {
  constexpr int kThreads = 4;
  constexpr int kSteps = 60;
  constexpr size_t kMost = size_t{256} << 10;
  const size_t seen_bytes = kSteps * kMost;
  std::array<std::byte*, kThreads> seen{};
  for (std::byte*& each : seen) each = allocate_pinned(seen_bytes);
  std::array<std::vector<size_t>, kThreads> sizes;
  const auto work = [&](size_t thread) {
    std::mt19937 random(static_cast<unsigned>(thread));
    const Stream stream = Stream::create(0);
    for (size_t step = 0; step < kSteps; ++step) {
      const size_t bytes = 1 + random() % kMost;
      sizes[thread].push_back(bytes);
      std::byte* block = allocate(bytes, stream);
      fill(block, static_cast<unsigned char>(64 * thread + step), bytes, stream);
      read(seen[thread] + step * kMost, block, bytes, stream);
      pool_->deallocate(block, bytes, stream);
      if (random() % 20 == 0) stream.synchronize();
      if (random() % 20 == 0) pool_->trim();
    }
    stream.synchronize();
  };
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
  for (size_t thread = 0; thread < kThreads; ++thread) {
    for (size_t step = 0; step < kSteps; ++step) {
      EXPECT_TRUE(
          all_are(seen[thread] + step * kMost, static_cast<unsigned char>(64 * thread + step), sizes[thread][step]))
          << thread << ' ' << step;
    }
    pinned_->deallocate(seen[thread], seen_bytes);
  }
  EXPECT_EQ(pool_->statistics().blocks, 0u);
  EXPECT_EQ(pool_->statistics().bad_frees, 0u);
  pool_->trim();
  EXPECT_EQ(pool_->statistics().reserved, 0u);
}

TEST_F(CudaDevicePool, ACapturedStreamGetsNothingAndDoesNotMind) {
  const Stream captured = Stream::create(0);
  const Stream other = Stream::create(0);
  std::byte* kept = allocate(kHuge, captured);
  std::byte* freed = allocate(kHuge, other);
  const ContextScope context(0);
  Gate gate(other);
  NG_CUDA(context.driver(), cuStreamBeginCapture_v2(handle_of(captured), cuda::CaptureMode::global));
  fill(kept, 5, kHuge, captured);
  try {
    pool_->allocate(1, captured);
    FAIL();
  } catch (const CudaError& error) {
    EXPECT_NE(std::string(error.what()).find("captured into a graph"), std::string::npos) << error.what();
  }
  pool_->deallocate(kept, kHuge, captured);
  // Others go on, from this thread too: they free, ask for events, and map memory.
  pool_->deallocate(freed, kHuge, other);
  void* more = pool_->allocate(9 * kHuge, other);
  pool_->deallocate(pool_->allocate(2 * kHuge), 2 * kHuge);
  pinned_->deallocate(pinned_->allocate(1), 1);
  cuda::Graph graph = nullptr;
  NG_CUDA(context.driver(), cuStreamEndCapture(handle_of(captured), &graph));
  NG_CUDA(context.driver(), cuGraphDestroy(graph));
  gate.open();
  other.synchronize();
  pool_->deallocate(more, 9 * kHuge, other);
  other.synchronize();
  // The graph may use its block whenever it is launched.
  pool_->trim();
  EXPECT_EQ(pool_->statistics().blocks, 1u);
  EXPECT_EQ(pool_->statistics().in_use, kHuge);
  EXPECT_NE(pool_->allocate(kHuge), kept);
}

TEST_F(CudaDevicePool, WrongStreamsAndFrees) {
  const Stream stream = Stream::create(0);
  const Stream elsewhere(1, nullptr);
  EXPECT_THROW(pool_->allocate(1, elsewhere), InvalidArgument);
  EXPECT_THROW(DevicePool{cuda_device_count()}, InvalidArgument);
  EXPECT_THROW(PinnedPool{-1}, InvalidArgument);
  EXPECT_THROW(StreamPool(nullptr, Stream(0, nullptr)), InvalidArgument);
  EXPECT_THROW(StreamPool(pool_, Stream(1, nullptr)), InvalidArgument);
  std::byte* block = allocate(1000, stream);
  pool_->deallocate(block, 1000, stream);
  pool_->deallocate(block, 1000, stream);
  pool_->deallocate(block + 512, 500, stream);
  pool_->deallocate(nullptr, 7, stream);
  EXPECT_EQ(pool_->statistics().bad_frees, 2u);
  EXPECT_EQ(pool_->statistics().blocks, 0u);
}

TEST_F(CudaDevicePool, SleepWaitsForStreamsAndFreesMemory) {
  const auto free_bytes = [] {
    const ContextScope context(0);
    size_t free = 0;
    size_t total = 0;
    NG_CUDA(context.driver(), cuMemGetInfo_v2(&free, &total));
    return free;
  };
  const Stream stream = Stream::create(0);
  const size_t before = free_bytes();
  const auto block = take(*pool_, 20 * kHuge, 7);
  std::byte* other = allocate(kHuge, stream);
  fill(other, 1, kHuge, stream);
  pool_->deallocate(other, kHuge, stream);
  EXPECT_EQ(free_bytes(), before - pool_->statistics().reserved);
  pool_->sleep(std::make_shared<MapSink>());
  EXPECT_EQ(free_bytes(), before);
  EXPECT_THROW(pool_->allocate(1, stream), InvalidArgument);
  pool_->wake();
  EXPECT_EQ(free_bytes(), before - pool_->statistics().reserved);
  EXPECT_TRUE(block.is_intact());

  // With its memory taken it sleeps on.
  pool_->sleep(std::make_shared<MapSink>());
  {
    DevicePool greedy;
    void* all = greedy.allocate(free_bytes() - kHuge);
    EXPECT_THROW(pool_->wake(), OutOfMemory);
    EXPECT_TRUE(pool_->is_asleep());
    EXPECT_EQ(free_bytes(), kHuge);
    greedy.deallocate(all, before - kHuge);
  }
  pool_->wake();
  EXPECT_TRUE(block.is_intact());
  pool_->sleep();
  pool_->deallocate(block.data, block.bytes, stream);  // of work that was done before
  pool_->wake();
  EXPECT_EQ(pool_->statistics().in_use, 0u);
  EXPECT_EQ(pool_->statistics().cached, 0u);
}

TEST_F(CudaDevicePool, SleepWaitsForWorkThatUsesIt) {
  const Stream stream = Stream::create(0);
  std::byte* seen = allocate_pinned(kHuge);
  std::byte* block = allocate(kHuge, stream);
  fill(block, 9, kHuge, stream);
  Gate gate(stream);
  read(seen, block, kHuge, stream);
  std::thread later([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    gate.open();
  });
  pool_->sleep();
  later.join();
  stream.synchronize();
  EXPECT_TRUE(all_are(seen, 9, kHuge));
  pool_->deallocate(block, kHuge, stream);
  pinned_->deallocate(seen, kHuge);
}

TEST_F(CudaDevicePool, AdaptorsAndTensorsInAStream) {
  auto stream_pool = std::make_shared<StreamPool>(pool_, Stream::create(0));
  auto counted = std::make_shared<StatisticsPool>(stream_pool);
  auto limited = std::make_shared<LimitPool>(counted, kHuge);
  EXPECT_EQ(limited->unit(), kDevicePoolAlignment);
  const std::array<int64_t, 2> shape{3, 100};
  Tensor tensor = Tensor::empty(limited, shape, DType::f32);
  EXPECT_EQ(counted->statistics().in_use, 3 * kDevicePoolAlignment);  // 1200 bytes
  EXPECT_THROW(limited->allocate(kHuge), OutOfMemory);
  {
    Gate gate(stream_pool->stream());
    tensor = Tensor();
    EXPECT_EQ(pool_->statistics().cached, 3 * kDevicePoolAlignment);
    limited->deallocate(limited->allocate(kHuge), kHuge);
  }
}

TEST_F(CudaDevicePool, TensorsOutliveThePool) {
  const Stream stream = Stream::create(0);
  const std::array<int64_t, 1> shape{int64_t{1} << 20};
  const std::weak_ptr<DevicePool> watch = pool_;
  Tensor tensor =
      Tensor::empty(std::make_shared<StreamPool>(std::exchange(pool_, nullptr), Stream::create(0)), shape, DType::u8);
  auto* data = static_cast<std::byte*>(tensor->data);
  fill(data, 3, 1 << 20, stream);
  stream.synchronize();
  EXPECT_FALSE(watch.expired());
  std::thread([last = std::move(tensor)]() mutable { last = Tensor(); }).join();
  EXPECT_TRUE(watch.expired());
  // The pool has ended: its memory is not mapped any more.
  EXPECT_THROW(fill(data, 3, 1 << 20, stream), CudaError);
}

// Work that is outstanding at the end of the pool is waited for, not cut off.
TEST_F(CudaDevicePool, TheDestructorWaitsForWork) {
  const Stream stream = Stream::create(0);
  std::byte* seen = allocate_pinned(kHuge);
  std::byte* block = allocate(kHuge, stream);
  fill(block, 9, kHuge, stream);
  Gate gate(stream);
  read(seen, block, kHuge, stream);
  pool_->deallocate(block, kHuge, stream);
  std::thread later([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    gate.open();
  });
  pool_.reset();
  EXPECT_TRUE(all_are(seen, 9, kHuge));
  later.join();
  stream.synchronize();
  pinned_->deallocate(seen, kHuge);
}

TEST_F(CudaDevicePool, DoesNothingInAForkedChild) {
  const Stream stream = Stream::create(0);
  std::byte* block = allocate(kHuge, stream);
  std::byte* pinned = allocate_pinned(kHuge);
  pool_->deallocate(allocate(kHuge, stream), kHuge, stream);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const auto refused = [](auto&& call) {
      try {
        call();
        return false;
      } catch (const CudaError&) {
        return true;
      }
    };
    const bool good = refused([&] { pool_->allocate(1); }) && refused([&] { pool_->allocate(1, stream); }) &&
                      refused([&] { pinned_->allocate(1); }) && refused([&] { pool_->sleep(); });
    pool_->deallocate(block, kHuge, stream);
    pinned_->deallocate(pinned, kHuge);
    pool_->trim();
    pinned_->trim();
    pool_.reset();
    pinned_.reset();
    _exit(good ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  pool_->deallocate(block, kHuge, stream);
  EXPECT_EQ(pool_->statistics().bad_frees, 0u);
}

}  // namespace
}  // namespace ng
