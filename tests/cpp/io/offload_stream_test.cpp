// The stream over a file tier: order, prefetching, writing back, failures, and that nobody waits without need.
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <string>
#include <vector>

#include "io/memory_file.hpp"
#include "io/system.hpp"
#include "io/temporary_directory.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/io.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

constexpr size_t kBlock = 4096;

class CountingPool final : public Pool {
 public:
  void* allocate(size_t bytes) override {
    NG_CHECK(live < most, OutOfMemory, "no more than ", most, " blocks");
    ++live;
    return std::aligned_alloc(kPoolAlignment, (bytes + kPoolAlignment - 1) / kPoolAlignment * kPoolAlignment);
  }
  void deallocate(void* block, size_t /*bytes*/) noexcept override {
    --live;
    std::free(block);
  }

  std::atomic<int> live{0};
  int most = 100;
};

// A tier in memory with buffers 0, 1, 2, ... of so many bytes, filled with their key.
struct Fixture {
  explicit Fixture(const std::vector<size_t>& sizes) : tier(std::make_unique<MemoryFile>(disk, 512, 8)) {
    for (size_t key = 0; key < sizes.size(); ++key) {
      tier.put(key, std::vector<std::byte>(sizes[key], static_cast<std::byte>(key)));
    }
    starts = disk->starts();
  }
  ~Fixture() { EXPECT_EQ(pool.live, 0); }
  Fixture(const Fixture&) = delete;
  Fixture& operator=(const Fixture&) = delete;

  // Waits until so many transfers were started since the filling.
  void wait_for_starts(size_t count) { disk->wait_for_starts(starts + count); }
  size_t started() { return disk->starts() - starts; }

  std::shared_ptr<MemoryDisk> disk = std::make_shared<MemoryDisk>();
  FileTier tier;
  CountingPool pool;
  size_t starts = 0;
};

bool filled_with(std::span<const std::byte> bytes, uint64_t value) {
  return std::all_of(bytes.begin(), bytes.end(), [&](std::byte each) { return each == static_cast<std::byte>(value); });
}

TEST(OffloadStream, FollowsThePlan) {
  const std::vector<size_t> sizes = {kBlock, 3, 0, 5 * kBlock + 1, 100};
  Fixture fixture(sizes);
  const std::vector<uint64_t> plan = {3, 0, 4, 3, 3, 2, 1, 0};
  for (const int buffers : {1, 2, 3, 20}) {
    OffloadStream stream(fixture.tier, fixture.pool, plan, {.buffers = buffers});
    EXPECT_EQ(fixture.pool.live, buffers);
    for (const uint64_t key : plan) {
      const std::optional<OffloadStream::Chunk> chunk = stream.next();
      ASSERT_TRUE(chunk.has_value());
      EXPECT_EQ(chunk->key(), key);
      EXPECT_EQ(chunk->bytes().size(), sizes[key]);
      EXPECT_TRUE(filled_with(chunk->bytes(), key));
    }
    EXPECT_FALSE(stream.next().has_value());
    EXPECT_FALSE(stream.next().has_value());
    stream.finish();
  }
  OffloadStream empty(fixture.tier, fixture.pool, {});
  EXPECT_FALSE(empty.next().has_value());
}

TEST(OffloadStream, ReadsAheadAsFarAsThereAreBuffers) {
  Fixture fixture({kBlock, kBlock, kBlock, kBlock, kBlock});
  OffloadStream stream(fixture.tier, fixture.pool, {0, 1, 2, 3, 4}, {.buffers = 2});
  fixture.wait_for_starts(2);
  std::optional<OffloadStream::Chunk> first = stream.next();
  std::optional<OffloadStream::Chunk> second = stream.next();
  EXPECT_EQ(fixture.started(), 2u);
  // Giving up is what starts a read, in whatever order; nobody has to ask for the chunk.
  second.reset();
  fixture.wait_for_starts(3);
  EXPECT_EQ(first->key(), 0u);
  EXPECT_TRUE(filled_with(first->bytes(), 0));
  first.reset();
  fixture.wait_for_starts(4);
  EXPECT_EQ(stream.next()->key(), 2u);
}

TEST(OffloadStream, AChunkIsThereBeforeTheNextIsRead) {
  Fixture fixture({kBlock, kBlock, kBlock});
  fixture.disk->hold_if([](uint64_t offset) { return offset > 0; });
  OffloadStream stream(fixture.tier, fixture.pool, {0, 1, 2}, {.buffers = 2});
  EXPECT_EQ(stream.next()->key(), 0u);  // returns though the disk stands still
  fixture.disk->go_on();
}

TEST(OffloadStream, HoldingEverythingIsAnErrorNotADeadlock) {
  Fixture fixture({kBlock, kBlock, kBlock});
  for (const bool write_back : {false, true}) {
    OffloadStream stream(fixture.tier, fixture.pool, {0, 1, 2}, {.buffers = 2, .write_back = write_back});
    const auto first = stream.next();
    const auto second = stream.next();
    EXPECT_THROW(stream.next(), InvalidArgument);
  }
  // A chunk that comes twice must be written before it is read again.
  OffloadStream stream(fixture.tier, fixture.pool, {0, 0}, {.buffers = 2, .write_back = true});
  std::optional<OffloadStream::Chunk> chunk = stream.next();
  EXPECT_THROW(stream.next(), InvalidArgument);
  chunk.reset();
  EXPECT_EQ(stream.next()->key(), 0u);
}

TEST(OffloadStream, WritesBackWhatIsReadNext) {
  const std::vector<size_t> sizes = {kBlock, 3 * kBlock + 5, 100, 300'000, 0};
  for (const int buffers : {1, 2, 3, 8}) {
    Fixture fixture(sizes);
    std::vector<uint64_t> plan;
    constexpr uint64_t kRounds = 6;
    for (uint64_t round = 0; round < kRounds; ++round) {
      for (uint64_t key = 0; key < sizes.size(); ++key) plan.push_back((key * 3 + round) % sizes.size());
    }
    OffloadStream stream(fixture.tier, fixture.pool, plan, {.buffers = buffers, .write_back = true});
    while (const std::optional<OffloadStream::Chunk> chunk = stream.next()) {
      for (std::byte& each : chunk->bytes()) each = static_cast<std::byte>(std::to_integer<unsigned>(each) + 1);
    }
    stream.finish();
    for (uint64_t key = 0; key < sizes.size(); ++key) {
      std::vector<std::byte> out(sizes[key]);
      fixture.tier.get(key, out);
      EXPECT_TRUE(filled_with(out, key + kRounds)) << key << " with " << buffers << " buffers";
    }
  }
}

TEST(OffloadStream, GivingUpDoesNotWaitForTheWriting) {
  Fixture fixture({kBlock, kBlock});
  OffloadStream stream(fixture.tier, fixture.pool, {0, 1, 0}, {.buffers = 1, .write_back = true});
  {
    const auto chunk = stream.next();
    fixture.disk->hold();
  }  // returns though the disk stands still
  fixture.disk->go_on();
  EXPECT_EQ(stream.next()->key(), 1u);
  EXPECT_EQ(stream.next()->key(), 0u);
  stream.finish();
}

TEST(OffloadStream, AFailedReadIsItsChunksAlone) {
  Fixture fixture({kBlock, kBlock, kBlock});
  fixture.disk->fault = [](bool is_write, uint64_t offset) { return !is_write && offset == kBlock ? EIO : 0; };
  OffloadStream stream(fixture.tier, fixture.pool, {0, 1, 2}, {.buffers = 1});
  EXPECT_EQ(stream.next()->key(), 0u);
  EXPECT_EQ(errno_of([&] { stream.next(); }), EIO);
  EXPECT_EQ(stream.next()->key(), 2u);
}

TEST(OffloadStream, AFailedWriteIsReportedByTheNextCall) {
  for (const bool by_finish : {false, true}) {
    Fixture fixture({kBlock, kBlock, kBlock});
    OffloadStream stream(fixture.tier, fixture.pool, {0, 1, 2}, {.buffers = 1, .write_back = true});
    {
      const auto chunk = stream.next();
      const std::lock_guard lock(fixture.disk->mutex);
      fixture.disk->fault = [](bool is_write, uint64_t) { return is_write ? ENOSPC : 0; };
    }
    if (by_finish) {
      EXPECT_EQ(errno_of([&] { stream.finish(); }), ENOSPC);
      EXPECT_EQ(stream.next()->key(), 1u);
    } else {
      fixture.wait_for_starts(3);  // the next read follows the write in the same buffer: the failure is known by then
      EXPECT_EQ(errno_of([&] { stream.next(); }), ENOSPC);
    }
  }
}

TEST(OffloadStream, RefusesAPlanThatCannotBe) {
  Fixture fixture({kBlock, kBlock});
  EXPECT_NE(message_of([&] { OffloadStream(fixture.tier, fixture.pool, {0, 7}); }).find("key 7"), std::string::npos);
  EXPECT_THROW(OffloadStream(fixture.tier, fixture.pool, {0}, {.buffers = 0}), InvalidArgument);
  fixture.pool.most = 2;
  EXPECT_THROW(OffloadStream(fixture.tier, fixture.pool, {0, 1}, {.buffers = 3}), OutOfMemory);
  EXPECT_EQ(fixture.pool.live, 0);

  OffloadStream stream(fixture.tier, fixture.pool, {0, 1}, {.buffers = 1});
  fixture.tier.drop(1);
  EXPECT_EQ(stream.next()->key(), 0u);
  EXPECT_THROW(stream.next(), InvalidArgument);
  EXPECT_FALSE(stream.next().has_value());
}

TEST(OffloadStream, CanBeLeftInTheMiddle) {
  Fixture fixture(std::vector<size_t>(20, kBlock));
  std::vector<uint64_t> plan;
  for (uint64_t key = 0; key < 20; ++key) plan.push_back(key);
  for (size_t used = 0; used < 20; ++used) {
    OffloadStream stream(fixture.tier, fixture.pool, plan, {.buffers = 3, .write_back = used % 2 == 0});
    for (size_t i = 0; i < used; ++i) EXPECT_EQ(stream.next()->key(), i);
  }
}

TEST(OffloadStream, RunsOnARealFile) {
  const TemporaryDirectory directory;
  FileTier tier(directory / "tier");
  CountingPool pool;
  constexpr size_t kBytes = 150'000;
  std::vector<uint64_t> plan;
  for (uint64_t key = 0; key < 6; ++key) {
    tier.put(key, std::vector<std::byte>(kBytes, static_cast<std::byte>(key)));
    plan.push_back(key);
  }
  for (int round = 0; round < 3; ++round) {
    OffloadStream stream(tier, pool, plan, {.buffers = 3, .write_back = true});
    while (const std::optional<OffloadStream::Chunk> chunk = stream.next()) {
      EXPECT_TRUE(filled_with(chunk->bytes(), chunk->key() + static_cast<uint64_t>(round)));
      for (std::byte& each : chunk->bytes()) each = static_cast<std::byte>(std::to_integer<unsigned>(each) + 1);
    }
    stream.finish();
  }
}

}  // namespace
}  // namespace ng
