// The file tier: what is put is what is got, whatever the order, the alignment, the space and the failures.
#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "io/memory_file.hpp"
#include "io/system.hpp"
#include "io/temporary_directory.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/io.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

constexpr size_t kMiB = 1 << 20;
constexpr size_t kBlock = 4096;

std::vector<std::byte> pattern(size_t bytes, uint64_t seed) {
  // Made once: a sanitizer takes long over every byte.
  static const std::vector<std::byte> kSource = [] {
    std::vector<std::byte> source(kMiB);
    std::minstd_rand random;
    for (std::byte& each : source) each = static_cast<std::byte>(random() >> 8);
    return source;
  }();
  std::vector<std::byte> out(bytes);
  const size_t start = seed * 4099 % (kMiB / 2);
  for (size_t at = 0; at < bytes; at += kMiB / 2) {
    std::memcpy(out.data() + at, kSource.data() + start, std::min(kMiB / 2, bytes - at));
  }
  return out;
}

bool equal(std::span<const std::byte> a, std::span<const std::byte> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

std::vector<std::byte> get(FileTier& tier, uint64_t key) {
  std::vector<std::byte> out(tier.size(key).value());
  tier.get(key, out);
  return out;
}

struct MemoryTier {
  std::shared_ptr<MemoryDisk> disk = std::make_shared<MemoryDisk>();
  FileTier tier;
  explicit MemoryTier(uint64_t limit = FileTier::kNoLimit) : tier(std::make_unique<MemoryFile>(disk), limit) {}
};

TEST(FileTier, KeepsBuffersOfAnySizeAndAlignment) {
  for (const IoEngine engine : {IoEngine::threads, IoEngine::automatic}) {
    for (const bool direct : {true, false}) {
      const TemporaryDirectory directory;
      FileTier tier(directory / "tier", FileTier::kNoLimit, {.engine = engine, .direct = direct});
      Buffer memory(3 * kMiB);
      Buffer back(3 * kMiB);
      uint64_t key = 0;
      for (const size_t bytes : {size_t{0}, size_t{1}, kBlock - 1, kBlock, kBlock + 1, kMiB, 2 * kMiB + 7}) {
        for (const size_t shift : {size_t{0}, size_t{512}, size_t{3}}) {
          const std::vector<std::byte> expected = pattern(bytes, ++key);
          const std::span<std::byte> in(memory.data() + shift, bytes);
          if (bytes > 0) std::memcpy(in.data(), expected.data(), bytes);
          tier.put(key, in);
          const std::span<std::byte> out(back.data() + (bytes % 2 == 0 ? shift : 1), bytes);
          tier.get(key, out);
          ASSERT_TRUE(equal(out, expected)) << bytes << " at " << shift;
          ASSERT_EQ(tier.size(key), bytes);
        }
      }
      EXPECT_EQ(get(tier, 4), pattern(1, 4));
    }
  }
}

TEST(FileTier, LeavesNothingBehind) {
  const TemporaryDirectory directory;
  FileTier tier(directory / "tier");
  EXPECT_EQ(directory.entries(), 0u);
  tier.put(1, pattern(100, 1));
  EXPECT_EQ(get(tier, 1), pattern(100, 1));
  write_text(directory / "taken", "mine");
  EXPECT_EQ(errno_of([&] { FileTier(directory / "taken"); }), EEXIST);
  EXPECT_EQ(read_text(directory / "taken"), "mine");
  EXPECT_EQ(errno_of([&] { FileTier(directory / "missing/tier"); }), ENOENT);
}

TEST(FileTier, SpaceIsUsedAgain) {
  MemoryTier memory;
  FileTier& tier = memory.tier;
  for (uint64_t round = 0; round < 10; ++round) {
    for (uint64_t key = 0; key < 8; ++key) {
      tier.put(key, pattern((key + round) % 8 * kBlock + 1, key));
    }
    for (uint64_t key = 0; key < 8; key += 2) tier.drop(key);
  }
  EXPECT_LE(memory.disk->size(), 50 * kBlock);  // 36 blocks are used at most, then rearranged
  for (uint64_t key = 1; key < 8; key += 2) EXPECT_EQ(get(tier, key).size(), (key + 9) % 8 * kBlock + 1);
  for (uint64_t key = 0; key < 8; ++key) tier.drop(key);
  tier.drop(77);  // nothing there
  EXPECT_EQ(tier.in_use(), 0u);
  EXPECT_EQ(tier.size(3), std::nullopt);
}

TEST(FileTier, ALimitCountsWhatIsInUseNotHowItLies) {
  MemoryTier memory(10 * kBlock);
  FileTier& tier = memory.tier;
  for (uint64_t key = 0; key < 10; ++key) tier.put(key, pattern(kBlock, key));
  const std::vector<std::byte> large = pattern(5 * kBlock, 42);
  try {
    tier.put(100, large);
    FAIL();
  } catch (const OutOfMemory& error) {
    EXPECT_NE(std::string(error.what()).find("cannot take 20480 bytes: 40960 of 40960 are in use"), std::string::npos)
        << error.what();
  }
  EXPECT_EQ(tier.size(100), std::nullopt);
  for (uint64_t key = 0; key < 10; key += 2) tier.drop(key);
  tier.put(100, large);  // in five places
  EXPECT_EQ(get(tier, 100), large);
  for (uint64_t key = 1; key < 10; key += 2) EXPECT_EQ(get(tier, key), pattern(kBlock, key));
  tier.put(100, large);  // the old one makes room
  EXPECT_THROW(tier.put(100, pattern(6 * kBlock, 1)), OutOfMemory);
  EXPECT_EQ(tier.size(100), std::nullopt);
  EXPECT_LE(memory.disk->size(), 10 * kBlock);
}

TEST(FileTier, ALargerPutWaitsForSpaceThatIsStillRead) {
  MemoryTier memory(4 * kBlock);
  FileTier& tier = memory.tier;
  const std::vector<std::byte> first = pattern(3 * kBlock, 1);
  tier.put(1, first);
  memory.disk->hold();
  std::vector<std::byte> out(first.size());
  std::future<void> read = tier.get_async(1, out);
  tier.drop(1);
  std::thread other([&] { tier.put(2, pattern(4 * kBlock, 2)); });
  memory.disk->go_on();
  read.get();
  EXPECT_EQ(out, first);
  other.join();
  EXPECT_EQ(get(tier, 2), pattern(4 * kBlock, 2));
}

TEST(FileTier, OneKeysTransfersKeepTheirOrder) {
  MemoryTier memory;
  FileTier& tier = memory.tier;
  memory.disk->hold();
  const std::vector<std::byte> one = pattern(2 * kMiB + 5, 1);
  const std::vector<std::byte> two = pattern(2 * kMiB + 5, 2);
  std::vector<std::byte> first(one.size());
  std::vector<std::byte> second(one.size());
  std::vector<std::future<void>> futures;
  futures.push_back(tier.put_async(7, one));
  futures.push_back(tier.get_async(7, first));
  futures.push_back(tier.put_async(7, two));
  futures.push_back(tier.get_async(7, second));
  tier.drop(7);
  EXPECT_THROW(tier.get_async(7, first), InvalidArgument);
  memory.disk->go_on();
  for (std::future<void>& each : futures) each.get();
  EXPECT_EQ(first, one);
  EXPECT_EQ(second, two);
  EXPECT_EQ(tier.in_use(), 0u);
}

TEST(FileTier, SeveralBuffersAreInFlightAtATime) {
  MemoryTier memory;
  memory.disk->hold();
  const std::vector<std::byte> bytes = pattern(kBlock, 1);
  std::vector<std::future<void>> futures;
  for (uint64_t key = 0; key < 4; ++key) futures.push_back(memory.tier.put_async(key, bytes));
  memory.disk->wait_for_starts(1);
  memory.disk->hold_if([](uint64_t offset) { return offset > 0; });  // the first may have been waited for alone
  memory.disk->wait_for_starts(4);
  memory.disk->go_on();
  for (std::future<void>& each : futures) each.get();
}

TEST(FileTier, RefusesWhatDoesNotFit) {
  MemoryTier memory;
  FileTier& tier = memory.tier;
  tier.put(1, pattern(100, 1));
  std::vector<std::byte> out(101);
  EXPECT_NE(message_of([&] { tier.get(1, out); }).find("under key 1 has 100 bytes, asked for were 101"),
            std::string::npos);
  EXPECT_NE(message_of([&] { tier.get(2, out); }).find("no buffer under key 2"), std::string::npos);
  EXPECT_THROW(FileTier(std::make_unique<MemoryFile>(memory.disk, 8192)), InvalidArgument);
}

TEST(FileTier, AFailureIsItsBuffersAlone) {
  MemoryTier memory;
  FileTier& tier = memory.tier;
  tier.put(1, pattern(kBlock, 1));
  memory.disk->fault = [](bool is_write, uint64_t offset) { return is_write && offset == 2 * kMiB + kBlock ? EIO : 0; };
  const std::vector<std::byte> bytes = pattern(5 * kMiB, 2);
  std::future<void> failing = tier.put_async(2, bytes);
  EXPECT_EQ(errno_of([&] { failing.get(); }), EIO);
  std::vector<std::byte> out(5 * kMiB);
  EXPECT_EQ(errno_of([&] { tier.get(2, out); }), EIO);
  tier.put(3, pattern(kBlock, 3));
  EXPECT_EQ(get(tier, 3), pattern(kBlock, 3));
  EXPECT_EQ(get(tier, 1), pattern(kBlock, 1));

  memory.disk->fault = [](bool is_write, uint64_t) { return is_write ? 0 : EBADMSG; };
  EXPECT_EQ(errno_of([&] { get(tier, 3); }), EBADMSG);
  memory.disk->fault = nullptr;
  EXPECT_EQ(get(tier, 3), pattern(kBlock, 3));
  tier.drop(2);
  EXPECT_EQ(tier.in_use(), 2 * kBlock);
}

TEST(FileTier, AFullDiskIsFoundBeforeTheWriting) {
  MemoryTier memory;
  FileTier& tier = memory.tier;
  memory.disk->capacity = 3 * kBlock;  // less than the file grows by at once
  tier.put(1, pattern(3 * kBlock, 1));
  const size_t starts = memory.disk->starts();
  EXPECT_EQ(errno_of([&] { tier.put(2, pattern(kBlock, 2)); }), ENOSPC);
  EXPECT_EQ(memory.disk->starts(), starts);
  EXPECT_EQ(get(tier, 1), pattern(3 * kBlock, 1));
}

TEST(FileTier, AFileThatBreaksFailsEverything) {
  MemoryTier memory;
  FileTier& tier = memory.tier;
  memory.disk->hold();
  const std::vector<std::byte> bytes = pattern(9 * kMiB, 1);  // more than the queue holds
  std::vector<std::future<void>> futures;
  for (uint64_t key = 0; key < 3; ++key) futures.push_back(tier.put_async(key, bytes));
  {
    const std::lock_guard lock(memory.disk->mutex);
    memory.disk->broken = true;
  }
  memory.disk->hold();  // it is found out
  for (std::future<void>& each : futures) EXPECT_EQ(message_of([&] { each.get(); }), "the file is broken");
  EXPECT_EQ(message_of([&] { tier.put(9, bytes); }), "the file is broken");
  tier.close();
}

TEST(FileTier, CloseWaitsAndEnds) {
  MemoryTier memory;
  FileTier& tier = memory.tier;
  const std::vector<std::byte> bytes = pattern(6 * kMiB, 1);
  std::future<void> put = tier.put_async(1, bytes);
  tier.close();
  EXPECT_EQ(put.wait_for(std::chrono::seconds(0)), std::future_status::ready);
  put.get();
  EXPECT_THROW(tier.put(2, bytes), InvalidArgument);
  EXPECT_THROW(tier.drop(1), InvalidArgument);
  EXPECT_THROW(tier.close(), InvalidArgument);
}

TEST(FileTier, AChildProcessIsKeptOut) {
  const TemporaryDirectory directory;
  auto tier = std::make_unique<FileTier>(directory / "tier");
  tier->put(1, pattern(kBlock, 1));
  EXPECT_EQ(run_in_child([&] {
              if (message_of([&] { get(*tier, 1); }).find("before fork()") == std::string::npos) return 1;
              tier.reset();  // returns
              if (!kChildrenHaveThreads) return 0;
              FileTier own(directory / "own");
              own.put(1, pattern(kBlock, 2));
              return get(own, 1) == pattern(kBlock, 2) ? 0 : 2;
            }),
            0);
  EXPECT_EQ(get(*tier, 1), pattern(kBlock, 1));
}

// Random operations from several threads, each against a plain map; space is scarce.
TEST(FileTier, ManyThreadsAgreeWithAMap) {
  for (const bool real : {false, true}) {
    const TemporaryDirectory directory;
    const auto disk = std::make_shared<MemoryDisk>();
    const uint64_t limit = 4 * 12 * 20 * kBlock;
    FileTier tier(real ? open_direct(directory / "tier", OpenMode::create) : std::make_unique<MemoryFile>(disk), limit);
    std::vector<std::thread> threads;
    threads.reserve(4);
    for (unsigned t = 0; t < 4; ++t) {
      threads.emplace_back([&tier, t] {
        std::minstd_rand random(t + 1);
        std::map<uint64_t, std::vector<std::byte>> model;
        for (int round = 0; round < 100; ++round) {
          const uint64_t key = t * 100 + random() % 12;
          switch (random() % 4) {
            case 0:
              tier.drop(key);
              model.erase(key);
              break;
            case 1:
              model[key] = pattern(random() % (20 * kBlock), random() % 1000);
              tier.put(key, model[key]);
              break;
            default: {
              // A few at once.
              std::vector<std::vector<std::byte>> outs;
              std::vector<std::future<void>> futures;
              for (const auto& [each, bytes] : model) {
                outs.emplace_back(bytes.size());
                futures.push_back(tier.get_async(each, outs.back()));
              }
              for (std::future<void>& each : futures) each.get();
              size_t i = 0;
              for (const auto& [each, bytes] : model) ASSERT_TRUE(equal(outs[i++], bytes));
            }
          }
        }
        for (const auto& [key, bytes] : model) tier.drop(key);
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(tier.in_use(), 0u);
  }
}

}  // namespace
}  // namespace ng
