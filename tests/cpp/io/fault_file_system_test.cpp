// The fault backend itself: it agrees with the operating system, counts every state, and sees the classic mistakes.
#include "io/fault_file_system.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "io/system.hpp"
#include "io/temporary_directory.hpp"
#include "narrowgauge/error.hpp"

namespace ng {
namespace {

constexpr size_t kBlock = 512;

// Aligned memory with a pattern.
struct alignas(4096) Block {
  std::byte bytes[16 * kBlock];
  explicit Block(int seed = 1) {
    for (size_t i = 0; i < sizeof bytes; ++i)
      bytes[i] = static_cast<std::byte>(i * 7 + i / 512 + 1 + static_cast<size_t>(seed));
  }
  std::span<const std::byte> first(size_t length) const { return std::span(bytes).first(length); }
  std::string text(size_t length) const { return {reinterpret_cast<const char*>(bytes), length}; }
};

void write(DirectFile& file, std::span<const std::byte> bytes, uint64_t offset = 0) {
  file.write(bytes, offset, 0);
  file.wait();
}

// How a new version of a file is put in place; each flag is a step that some forget.
struct Care {
  bool sync_file = true;
  bool sync_name = true;
};

void replace(FileSystem& system, const Block& block, size_t length, Care care) {
  const auto file = system.create("/x.tmp");
  write(*file, block.first(length));
  if (care.sync_file) file->sync();
  file->close();
  system.rename("/x.tmp", "/x");
  if (care.sync_name) system.sync_directory("/");
}

TEST(FaultFileSystem, CareLeavesNoBadState) {
  const Block block;
  FaultFileSystem system;
  replace(system, block, 4 * kBlock, {});
  const CrashStates states = system.crash_states(10'000);
  EXPECT_TRUE(states.exhaustive);
  EXPECT_GT(states.states.size(), 5u);
  for (const CrashState& state : states) {
    if (state.exists("/x")) {
      EXPECT_EQ(state.read("/x"), block.text(4 * kBlock)) << state.describe();
    }
    EXPECT_TRUE(state.operations() < system.operations() || state.exists("/x")) << state.describe();
  }
}

TEST(FaultFileSystem, ARenameBeforeTheDataIsSeen) {
  const Block block;
  FaultFileSystem system;
  replace(system, block, 4 * kBlock, {.sync_file = false});
  std::set<std::string> contents;
  for (const CrashState& state : system.crash_states(10'000)) {
    if (state.operations() == system.operations()) contents.insert(state.read("/x"));
  }
  EXPECT_TRUE(contents.contains(""));
  EXPECT_TRUE(contents.contains(std::string(4 * kBlock, '\0')));
  for (size_t blocks = 1; blocks <= 4; ++blocks) EXPECT_TRUE(contents.contains(block.text(blocks * kBlock)));
  EXPECT_EQ(contents.size(), 6u);
}

TEST(FaultFileSystem, ARenameThatIsNotSyncedMayBeLost) {
  const Block block;
  FaultFileSystem system;
  replace(system, block, kBlock, {.sync_name = false});
  int lost = 0;
  for (const CrashState& state : system.crash_states(10'000)) {
    if (state.operations() == system.operations() && !state.exists("/x")) ++lost;
  }
  EXPECT_EQ(lost, 2);  // with the temporary name, and without any
}

TEST(FaultFileSystem, ASyncOfAFileDoesNotCoverItsName) {
  FaultFileSystem system;
  system.create("/x")->sync();
  std::set<bool> seen;
  for (const CrashState& state : system.crash_states(100)) {
    if (state.operations() == 2) seen.insert(state.exists("/x"));
  }
  EXPECT_EQ(seen, (std::set<bool>{false, true}));
}

TEST(FaultFileSystem, ADirectoryMayAppearWithoutItsFiles) {
  const Block block;
  for (const bool care : {false, true}) {
    FaultFileSystem system;
    system.make_directory("/d.tmp");
    const auto file = system.create("/d.tmp/x");
    write(*file, block.first(kBlock));
    file->sync();
    if (care) system.sync_directory("/d.tmp");
    system.rename("/d.tmp", "/d");
    system.sync_directory("/");
    bool empty = false;
    for (const CrashState& state : system.crash_states(1000)) empty |= state.exists("/d") && !state.exists("/d/x");
    EXPECT_EQ(empty, !care);
  }
}

TEST(FaultFileSystem, TheOldMayBeGoneBeforeTheNewIsThere) {
  for (const bool care : {false, true}) {
    FaultFileSystem system;
    system.create("/old")->sync();
    system.create("/new.tmp")->sync();
    system.settle();
    system.rename("/new.tmp", "/new");
    if (care) system.sync_directory("/");
    system.remove("/old");
    bool neither = false;
    for (const CrashState& state : system.crash_states(1000)) neither |= !state.exists("/old") && !state.exists("/new");
    EXPECT_EQ(neither, !care);
  }
}

TEST(FaultFileSystem, OperationsOnOneNameKeepTheirOrder) {
  FaultFileSystem system;
  const auto create = [&](size_t length) {
    const auto file = system.create("/a");
    file->truncate(length);
    file->sync();
  };
  create(1);
  system.rename("/a", "/b");
  create(2);
  system.exchange("/a", "/b");
  system.remove("/a");
  // Each operation on a name builds on the one before, so that no more states are possible than there were.
  std::set<std::string> seen;
  for (const CrashState& state : system.crash_states(10'000)) {
    if (state.operations() < system.operations()) continue;
    std::string names;
    for (const std::string name : {"/a", "/b"}) {
      if (state.exists(name)) names += concat(name, state.read(name).size());
    }
    seen.insert(names);
  }
  EXPECT_EQ(seen, (std::set<std::string>{"", "/a1", "/b1", "/a2/b1", "/a1/b2", "/b2"}));
}

TEST(FaultFileSystem, UnsyncedWritesComeInAnySubset) {
  const Block block;
  FaultFileSystem system;
  const auto file = system.create("/x");
  file->preallocate(3 * kBlock);
  file->sync();
  system.sync_directory("/");
  system.settle();
  for (size_t i = 0; i < 3; ++i) write(*file, block.first(kBlock), i * kBlock);
  std::set<std::string> contents;
  const CrashStates states = system.crash_states(1000);
  for (const CrashState& state : states) contents.insert(state.read("/x"));
  EXPECT_EQ(contents.size(), 8u);
  EXPECT_EQ(states.states.size(), 8u);
  EXPECT_TRUE(contents.contains(std::string(2 * kBlock, '\0') + block.text(kBlock)));
}

TEST(FaultFileSystem, LongLogsAreSampledByASeed) {
  const Block block;
  FaultFileSystem system;
  const auto file = system.create("/x");
  for (size_t i = 0; i < 20; ++i) write(*file, block.first(4 * kBlock), i * 4 * kBlock);
  const auto describe = [](const CrashStates& states) {
    std::vector<std::string> out;
    for (const CrashState& state : states) out.push_back(state.describe());
    return out;
  };
  const CrashStates states = system.crash_states(2000);
  EXPECT_FALSE(states.exhaustive);
  EXPECT_GT(states.states.size(), 1000u);
  EXPECT_LE(states.states.size(), 2000u);
  EXPECT_EQ(describe(states), describe(system.crash_states(2000)));
  EXPECT_NE(describe(states), describe(system.crash_states(2000, 2)));
  bool torn = false;
  for (const std::string& text : describe(states)) torn |= text.find("some blocks") != std::string::npos;
  EXPECT_TRUE(torn);
}

TEST(FaultFileSystem, WritesAStateOut) {
  const TemporaryDirectory directory;
  const Block block;
  FaultFileSystem system("/run");
  system.make_directory("/run/d");
  write(*system.create("/run/d/x"), block.first(kBlock));
  system.create("/run/y");
  write_text(directory / "leftover", "");
  system.state().write_to(directory.path());
  EXPECT_EQ(directory.entries(), 2u);
  EXPECT_EQ(read_text(directory / "d/x"), block.text(kBlock));
  EXPECT_EQ(read_text(directory / "y"), "");
}

// --- faults -------------------------------------------------------------------------------------------------

TEST(FaultFileSystem, FailsAnyOperation) {
  const Block block;
  const std::vector<std::function<void(FileSystem&)>> all = {
      [](FileSystem& system) { system.make_directory("/d"); }, [](FileSystem& system) { system.create("/d/x"); },
      [](FileSystem& system) { system.rename("/d", "/e"); },   [](FileSystem& system) { system.make_directory("/d"); },
      [](FileSystem& system) { system.exchange("/d", "/e"); }, [](FileSystem& system) { system.sync_directory("/d"); },
      [](FileSystem& system) { system.remove("/d/x"); },
  };
  for (size_t failing = 0; failing < all.size(); ++failing) {
    FaultFileSystem system;
    system.fail(failing, EIO);
    for (size_t i = 0; i < failing; ++i) all[i](system);
    EXPECT_EQ(errno_of([&] { all[failing](system); }), EIO);
    for (size_t i = failing; i < all.size(); ++i) all[i](system);  // it did nothing
    EXPECT_EQ(system.operations(), all.size() + 1);
  }

  FaultFileSystem system;
  const auto file = system.create("/x");
  for (size_t i = 1; i < 4; ++i) system.fail(i, ENOSPC);
  EXPECT_EQ(errno_of([&] { file->preallocate(kBlock); }), ENOSPC);
  EXPECT_EQ(errno_of([&] { write(*file, block.first(kBlock)); }), ENOSPC);
  EXPECT_EQ(errno_of([&] { file->truncate(7); }), ENOSPC);
  EXPECT_EQ(file->size(), 0u);
  write(*file, {});
  EXPECT_EQ(errno_of([&] { file->sync(); }), 0);
  system.fail(system.operations(), EIO);
  EXPECT_EQ(errno_of([&] { file->sync(); }), EIO);
  EXPECT_EQ(errno_of([&] { file->sync(); }), EIO);  // for good
}

TEST(FaultFileSystem, TearsAndDropsSilently) {
  const Block block;
  FaultFileSystem system;
  const auto file = system.create("/x");
  system.tear(1, kBlock);
  system.drop(2);
  system.drop(3);
  write(*file, block.first(2 * kBlock));
  write(*file, block.first(kBlock), 4 * kBlock);
  file->sync();
  EXPECT_EQ(system.state().read("/x"), block.text(kBlock));
  system.sync_directory("/");
  std::set<std::string> contents;
  for (const CrashState& state : system.crash_states(1000)) {
    if (state.exists("/x")) contents.insert(state.read("/x"));
  }
  EXPECT_TRUE(contents.contains("")) << "a sync that was dropped covers nothing";
  system.drop(system.operations());
  EXPECT_THROW(system.remove("/x"), std::logic_error);
}

TEST(FaultFileSystem, NothingGoesOnAfterACrash) {
  const Block block;
  FaultFileSystem system;
  const auto file = system.create("/x");
  system.crash(2);
  file->write(block.first(kBlock), 0, 0);
  EXPECT_THROW(file->sync(), Crash);
  EXPECT_THROW(file->wait(), Crash);
  EXPECT_THROW(file->close(), Crash);
  EXPECT_THROW(system.list("/"), Crash);
  EXPECT_THROW(system.create("/y"), Crash);
  EXPECT_EQ(system.operations(), 2u);
  EXPECT_EQ(system.crash_states(1000).states.size(), 4u);  // no name; the name with nothing, a length, the bytes
}

TEST(FaultFileSystem, SeesMisuse) {
  Block block;
  FaultFileSystem system("/", 4096);
  const auto file = system.create("/x");
  EXPECT_EQ(file->alignment(), 4096u);
  EXPECT_THROW(file->write(block.first(kBlock), 0, 0), InvalidArgument);
  file->write(block.first(4096), 0, 0);
  block.bytes[5] ^= std::byte{1};
  EXPECT_THROW(file->wait(), std::logic_error);
  EXPECT_THROW(file->wait(), std::logic_error);  // nothing is in flight
  EXPECT_THROW(system.create("relative"), std::logic_error);
  file->close();
  EXPECT_THROW(file->write(block.first(4096), 0, 0), InvalidArgument);
}

TEST(FaultFileSystem, ReadsLikeAFile) {
  const Block written;
  Block back(9);
  FaultFileSystem system;
  const auto file = system.create("/x");
  write(*file, written.first(2 * kBlock));
  file->truncate(kBlock + 100);
  file->read(std::span(back.bytes).first(2 * kBlock), 0, 0);
  file->wait();
  EXPECT_EQ(back.text(2 * kBlock), written.text(kBlock + 100) + std::string(kBlock - 100, '\0'));
  file->read(std::span(back.bytes).first(kBlock), 2 * kBlock, 0);
  EXPECT_THROW(file->wait(), FileCorrupt);
}

// The same random operations on the operating system's files and here give the same errors and the same files.
TEST(FaultFileSystem, AgreesWithTheOperatingSystem) {
  const TemporaryDirectory directory;
  const TemporaryDirectory copy;
  const Block block;
  const std::string root = directory.path();
  FaultFileSystem memory(root);
  const auto native = native_file_system(IoEngine::threads);
  std::mt19937 random(7);
  const std::vector<std::string> names = {"/a", "/b", "/a/c", "/b/c", "/a/c/d"};
  const auto any = [&] { return root + names[random() % names.size()]; };
  int successes = 0;
  for (int round = 0; round < 2000; ++round) {
    const unsigned action = random() % 8;
    const std::string a = any();
    const std::string b = any();
    const size_t length = (random() % 4) * 4096;
    const size_t cut = random() % 5000;
    const auto run = [&](FileSystem& system) {
      const int error = errno_of([&] {
        switch (action) {
          case 0: system.make_directory(a); break;
          case 1: system.rename(a, b); break;
          case 2: system.exchange(a, b); break;
          case 3: system.remove(a); break;
          case 4: system.sync_directory(a); break;
          case 5: system.list(a); break;
          default: {
            const auto file = system.create(a);
            write(*file, block.first(std::min<size_t>(length, 4096)), length);
            file->preallocate(cut / 2);
            if (action == 6) file->truncate(cut);
            file->sync();
          }
        }
      });
      return error == ENOTDIR ? ENOENT : error;
    };
    const int expected = run(*native);
    ASSERT_EQ(run(memory), expected) << action << " " << a << " " << b;
    successes += expected == 0 ? 1 : 0;
  }
  EXPECT_GT(successes, 400);
  memory.state().write_to(copy.path());
  const auto read_all = [](const std::filesystem::path& path) {
    std::map<std::string, std::string> out;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(path)) {
      out[entry.path().lexically_relative(path)] = entry.is_directory() ? "directory" : read_text(entry.path());
    }
    return out;
  };
  EXPECT_EQ(read_all(copy.path()), read_all(directory.path()));
}

}  // namespace
}  // namespace ng
