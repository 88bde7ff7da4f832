// Saving and loading as one writer and as several: contents, the protocol's errors, retention, and damage.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include "checkpoint/states.hpp"
#include "io/file_system.hpp"
#include "io/temporary_directory.hpp"
#include "narrowgauge/checkpoint.hpp"
#include "narrowgauge/io.hpp"

namespace ng {
namespace {

namespace fs = std::filesystem;

std::string step_path(const TemporaryDirectory& directory, int64_t step) { return directory / checkpoint_name(step); }

void save(Checkpointer& checkpointer, int64_t step, const std::vector<StateTensor>& state, SaveOptions options = {}) {
  checkpointer.save(step, parts_of(state), std::move(options));
  checkpointer.wait();
}

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "no error";
}

// Page-aligned memory of whole pages.
class Pages {
 public:
  explicit Pages(size_t bytes) : data_(static_cast<std::byte*>(std::aligned_alloc(4096, bytes))), size_(bytes) {}
  ~Pages() { std::free(data_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  std::span<std::byte> bytes() const { return {data_, size_}; }

 private:
  std::byte* data_;
  size_t size_;
};

TEST(CheckpointTest, WhatIsSavedIsLoaded) {
  const TemporaryDirectory directory;
  const auto state = make_state(1);
  {
    Checkpointer checkpointer(directory.path().string());
    EXPECT_EQ(checkpointer.last().step, -1);
    save(checkpointer, 100, state, {.state = "{\"text\": \"\\u00e9\"}"});
    EXPECT_EQ(checkpointer.last().step, 100);
    EXPECT_EQ(checkpointer.last().path, step_path(directory, 100));
    EXPECT_EQ(checkpointer.last().borrowed_bytes, 0u);
  }
  const Checkpoint checkpoint(step_path(directory, 100));
  EXPECT_EQ(checkpoint.manifest().step, 100);
  EXPECT_EQ(checkpoint.manifest().state, "{\"text\": \"\\u00e9\"}");
  EXPECT_TRUE(same(load_like(checkpoint, state), state));
  EXPECT_TRUE(same(load_like(checkpoint, state, Verify::off), state));
  EXPECT_EQ(checkpoint_steps(directory.path().string()), std::vector<int64_t>{100});
  checkpoint.verify();
}

TEST(CheckpointTest, ShardsArePlainSafetensors) {
  const TemporaryDirectory directory;
  const auto state = make_state(2);
  Checkpointer checkpointer(directory.path().string());
  save(checkpointer, 3, state);
  const SafetensorsFile file(step_path(directory, 3) + "/model-00000-of-00001.safetensors");
  EXPECT_EQ(file.tensors().size(), state.size());
  for (const StateTensor& tensor : state) {
    const FileTensor* found = file.find(tensor.name);
    ASSERT_NE(found, nullptr) << tensor.name;
    EXPECT_EQ(found->dtype, tensor.dtype);
    EXPECT_EQ(found->shape, tensor.shape);
    EXPECT_TRUE(std::equal(found->bytes.begin(), found->bytes.end(), tensor.bytes.begin(), tensor.bytes.end()));
  }
}

TEST(CheckpointTest, NothingIsFineToo) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer(directory.path().string());
  save(checkpointer, 0, {});
  EXPECT_TRUE(Checkpoint(step_path(directory, 0)).manifest().tensors.empty());
}

TEST(CheckpointTest, BorrowedMemoryIsWrittenInPlace) {
  const TemporaryDirectory directory;
  const Pages pages(size_t{5} << 20);
  for (size_t i = 0; i < pages.bytes().size(); ++i) pages.bytes()[i] = static_cast<std::byte>(i * 7 + i / 4096);
  const auto small = make_state(4);
  std::vector<CheckpointPart> parts = parts_of(small);
  const std::vector<int64_t> shape = {5 << 18};
  parts.insert(parts.begin() + 2, {"aligned", "F32", shape, Region::whole(shape), pages.bytes(), true});
  // Not aligned: staged, and still right.
  const auto inner = std::span<const std::byte>(pages.bytes()).subspan(64, size_t{2} << 20);
  parts.push_back({"shifted", "U8", {2 << 20}, Region::whole(std::vector<int64_t>{2 << 20}), inner, true});

  Checkpointer checkpointer(directory.path().string());
  std::atomic<int> checks{0};
  checkpointer.save(1, parts, {.check = [&] {
                      ++checks;
                      return std::string();
                    }});
  while (!checkpointer.wait_released_for(10)) {
  }
  checkpointer.wait();
  EXPECT_EQ(checks.load(), 1);
  EXPECT_EQ(checkpointer.last().borrowed_bytes, size_t{5} << 20);

  const Checkpoint checkpoint(step_path(directory, 1));
  EXPECT_TRUE(same(load_like(checkpoint, small), small));
  std::vector<std::byte> back(size_t{5} << 20);
  checkpoint.read(std::vector<ReadRequest>{{"aligned", Region::whole(shape), back}});
  EXPECT_TRUE(std::equal(back.begin(), back.end(), pages.bytes().begin()));
  back.resize(size_t{2} << 20);
  checkpoint.read(std::vector<ReadRequest>{{"shifted", Region::run(0, 2 << 20), back}});
  EXPECT_TRUE(std::equal(back.begin(), back.end(), inner.begin()));
}

TEST(CheckpointTest, ChangedMemoryIsNotCommitted) {
  const TemporaryDirectory directory;
  const auto state = make_state(5);
  Checkpointer checkpointer(directory.path().string());
  save(checkpointer, 1, state);
  checkpointer.save(2, parts_of(state, true), {.check = [] { return std::string("tensor 'w' was changed"); }});
  const std::string message = message_of([&] { checkpointer.wait(); });
  EXPECT_NE(message.find("tensor 'w' was changed"), std::string::npos) << message;
  EXPECT_EQ(checkpoint_steps(directory.path().string()), std::vector<int64_t>{1});
  EXPECT_EQ(directory.entries(), 2u);  // the step and the lock
  checkpointer.wait();                 // the error was reported
  save(checkpointer, 2, state);
  EXPECT_TRUE(same(load_like(Checkpoint(step_path(directory, 2)), state), state));
}

TEST(CheckpointTest, AStateLikeTheOneBeforeMayLieElsewhere) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer(directory.path().string());
  const std::vector<std::byte> memory(64);
  for (int64_t step = 0; step < 12; ++step) {
    const auto state = make_state(static_cast<uint64_t>(step), step % 6 == 4 ? size_t{1} << 20 : size_t{3} << 20);
    checkpointer.save(step, parts_of(state, step % 3 == 1));
    checkpointer.wait();
    const Checkpoint checkpoint(step_path(directory, step));
    checkpoint.verify();
    EXPECT_EQ(checkpoint.manifest().step, step);
    EXPECT_TRUE(same(load_like(checkpoint, state), state)) << step;
    if (step % 4 == 3) {  // a layout that fails leaves none behind
      auto parts = parts_of(state);
      parts.push_back({"w", "F7", {16}, Region::run(0, 16), memory});
      EXPECT_THROW(checkpointer.save(100, parts), InvalidArgument);
      EXPECT_THROW(checkpointer.save(100, parts), InvalidArgument);
    }
  }
  EXPECT_EQ(checkpoint_steps(directory.path().string()).size(), 12u);
}

TEST(CheckpointTest, AStepIsReplacedOnlyOnRequest) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer(directory.path().string());
  save(checkpointer, 1, make_state(1));
  EXPECT_THROW(save(checkpointer, 1, make_state(2)), CheckpointError);
  EXPECT_TRUE(same(load_like(Checkpoint(step_path(directory, 1)), make_state(1)), make_state(1)));
  save(checkpointer, 1, make_state(2), {.overwrite = true});
  EXPECT_TRUE(same(load_like(Checkpoint(step_path(directory, 1)), make_state(2)), make_state(2)));
  EXPECT_EQ(directory.entries(), 2u);
}

TEST(CheckpointTest, OldStepsGo) {
  const TemporaryDirectory directory;
  {
    Checkpointer checkpointer(directory.path().string(), {.keep = 2, .keep_every = 4});
    for (int64_t step = 1; step <= 9; ++step) save(checkpointer, step, make_state(1, 4096));
  }
  EXPECT_EQ(checkpoint_steps(directory.path().string()), (std::vector<int64_t>{4, 8, 9}));
  EXPECT_EQ(prune_checkpoints(directory.path().string(), 1, 0, /*dry_run=*/true), (std::vector<int64_t>{4, 8}));
  EXPECT_EQ(prune_checkpoints(directory.path().string(), 1, 0, /*dry_run=*/false), (std::vector<int64_t>{4, 8}));
  EXPECT_EQ(checkpoint_steps(directory.path().string()), std::vector<int64_t>{9});
  EXPECT_THROW(prune_checkpoints(directory.path().string(), 0, 0, false), InvalidArgument);
}

TEST(CheckpointTest, OneSaverADirectory) {
  const TemporaryDirectory directory;
  {
    const Checkpointer first(directory.path().string());
    EXPECT_THROW(Checkpointer second(directory.path().string()), CheckpointError);
    EXPECT_THROW(prune_checkpoints(directory.path().string(), 1, 0, false), CheckpointError);
  }
  Checkpointer again(directory.path().string());
  again.close();
  EXPECT_THROW(save(again, 1, {}), CheckpointError);
  const Checkpointer third(directory.path().string());
}

TEST(CheckpointTest, LeftoversGoAndStrangersStay) {
  const TemporaryDirectory directory;
  fs::create_directory(directory / "step-00000007.tmp-0123456789abcdef");
  std::ofstream(directory / "step-00000007.tmp-0123456789abcdef/model-00000-of-00001.safetensors") << "x";
  fs::create_directory(directory / "my.tmp-notes");
  fs::create_directory(directory / "step-7");
  const Checkpointer checkpointer(directory.path().string());
  EXPECT_FALSE(fs::exists(directory / "step-00000007.tmp-0123456789abcdef"));
  EXPECT_TRUE(fs::exists(directory / "my.tmp-notes"));
  EXPECT_TRUE(checkpoint_steps(directory.path().string()).empty());
}

TEST(CheckpointTest, ForkedChildrenNeitherSaveNorKeepTheLock) {
  const TemporaryDirectory directory;
  auto checkpointer = std::make_unique<Checkpointer>(directory.path().string());
  int to_child[2];
  int to_parent[2];
  ASSERT_EQ(pipe(to_child), 0);
  ASSERT_EQ(pipe(to_parent), 0);
  const pid_t child = fork();
  char byte = 0;
  if (child == 0) {
    const bool refused = message_of([&] { checkpointer->wait(); }).find("child") != std::string::npos;
    close(to_child[1]);
    const bool told = write(to_parent[1], &byte, 1) == 1;
    const bool ended = read(to_child[0], &byte, 1) == 0;  // lives until the parent has opened another
    _exit(refused && told && ended ? 0 : 1);
  }
  close(to_child[0]);
  ASSERT_EQ(read(to_parent[0], &byte, 1), 1);
  checkpointer.reset();
  {
    const Checkpointer again(directory.path().string());
  }
  close(to_child[1]);
  close(to_parent[0]);
  close(to_parent[1]);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(CheckpointTest, WrongPartsAreNamed) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer(directory.path().string());
  const std::vector<std::byte> memory(64);
  const auto attempt = [&](CheckpointPart part) {
    return message_of([&] { checkpointer.save(1, std::vector<CheckpointPart>{std::move(part)}); });
  };
  EXPECT_NE(attempt({"w", "F7", {16}, Region::run(0, 16), memory}).find("dtype"), std::string::npos);
  EXPECT_NE(attempt({"w", "F4", {16}, Region::run(0, 16), memory}).find("dtype"), std::string::npos);
  EXPECT_NE(attempt({"w", "F32", {16}, Region::run(0, 15), memory}).find("60"), std::string::npos);
  EXPECT_NE(attempt({"w", "F32", {16}, Region::run(0, 17), memory}).find("17"), std::string::npos);
  EXPECT_NE(attempt({"w", "F32", {INT64_MAX, 4}, Region::run(0, 16), memory}).find("overflow"), std::string::npos);
  EXPECT_NE(attempt({"\xff", "F32", {16}, Region::run(0, 16), memory}).find("UTF-8"), std::string::npos);
  EXPECT_THROW(checkpointer.save(-1, {}), InvalidArgument);
  // A tensor that the parts do not cover is found before anything is committed.
  checkpointer.save(1, std::vector<CheckpointPart>{{"w", "F32", {17}, Region::run(0, 16), memory}});
  EXPECT_NE(message_of([&] { checkpointer.wait(); }).find("16 elements"), std::string::npos);
  EXPECT_TRUE(checkpoint_steps(directory.path().string()).empty());
}

TEST(CheckpointTest, NamesOfFragmentsDoNotClash) {
  const TemporaryDirectory directory;
  std::vector<std::byte> memory(64);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<std::byte>(i);
  const std::span<const std::byte> bytes(memory);
  Checkpointer checkpointer(directory.path().string());
  checkpointer.save(1, std::vector<CheckpointPart>{{"w", "U8", {64}, Region::run(0, 32), bytes.first(32)},
                                                   {"w", "U8", {64}, Region::run(32, 64), bytes.last(32)},
                                                   {"w@32", "U8", {64}, Region::run(0, 64), bytes},
                                                   {"m", "U8", {8, 8}, {false, {{0, 8}, {0, 4}}}, bytes.first(32)},
                                                   {"m", "U8", {8, 8}, {false, {{0, 8}, {4, 8}}}, bytes.last(32)}});
  checkpointer.wait();
  const Checkpoint checkpoint(step_path(directory, 1));
  std::vector<std::byte> back(64);
  for (const char* name : {"w", "w@32"}) {
    checkpoint.read(std::vector<ReadRequest>{{name, Region::run(0, 64), back}});
    EXPECT_EQ(back, memory);
  }
  checkpoint.read(std::vector<ReadRequest>{{"m", Region::run(0, 64), back}});
  for (size_t i = 0; i < 64; ++i) {
    const size_t half = i % 8 < 4 ? 0 : 32;
    EXPECT_EQ(back[i], memory[half + i / 8 * 4 + i % 4]);
  }
}

// --- several writers ----------------------------------------------------------------------------------------

// An all-gather between threads.
class Exchange {
 public:
  explicit Exchange(int writers) : messages_(static_cast<size_t>(writers)), barrier_(writers) {}
  std::vector<std::string> operator()(int writer, const std::string& message) {
    messages_[static_cast<size_t>(writer)] = message;
    barrier_.arrive_and_wait();
    auto all = messages_;
    barrier_.arrive_and_wait();
    return all;
  }

 private:
  std::vector<std::string> messages_;
  std::barrier<> barrier_;
};

// Runs f(writer, checkpointer) on a thread for each writer; returns what each threw.
std::vector<std::string> with_writers(const std::string& directory, int writers,
                                      const std::function<void(int, Checkpointer&)>& f) {
  Exchange exchange(writers);
  std::vector<std::string> errors(static_cast<size_t>(writers));
  std::vector<std::thread> threads;
  for (int writer = 0; writer < writers; ++writer) {
    threads.emplace_back([&, writer] {
      errors[static_cast<size_t>(writer)] = message_of([&] {
        Checkpointer checkpointer(directory,
                                  {.writer = writer, .writers = writers, .exchange = [&](const auto& message) {
                                     return exchange(writer, message);
                                   }});
        f(writer, checkpointer);
        checkpointer.close();
      });
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

// The writer's share of every tensor: an equal run of its elements.
std::vector<CheckpointPart> share_of(const std::vector<StateTensor>& state, int writer, int writers) {
  std::vector<CheckpointPart> parts;
  for (const StateTensor& tensor : state) {
    const int64_t numel = Region::whole(tensor.shape).numel();
    const int64_t start = numel * writer / writers;
    const int64_t stop = numel * (writer + 1) / writers;
    if (start == stop && !(numel == 0 && writer == 0)) continue;
    const size_t width = numel == 0 ? 0 : tensor.bytes.size() / static_cast<size_t>(numel);
    const auto bytes = std::span<const std::byte>(tensor.bytes)
                           .subspan(static_cast<size_t>(start) * width, static_cast<size_t>(stop - start) * width);
    parts.push_back({tensor.name, tensor.dtype, tensor.shape, Region::run(start, stop), bytes});
  }
  return parts;
}

TEST(CheckpointTest, ManyWritersMakeOneCheckpoint) {
  for (const int writers : {2, 3, 5}) {
    const TemporaryDirectory directory;
    const auto state = make_state(static_cast<uint64_t>(writers));
    const auto errors = with_writers(directory.path().string(), writers, [&](int writer, Checkpointer& checkpointer) {
      for (const int64_t step : {1, 2}) {
        checkpointer.save(step, share_of(state, writer, writers), {.state = writer == 0 ? "0" : "ignored"});
        checkpointer.wait();
      }
    });
    for (const std::string& error : errors) EXPECT_EQ(error, "no error");
    const Checkpoint checkpoint(step_path(directory, 2));
    EXPECT_EQ(checkpoint.manifest().files.size(), static_cast<size_t>(writers));
    EXPECT_EQ(checkpoint.manifest().state, "0");
    EXPECT_TRUE(same(load_like(checkpoint, state), state));
    checkpoint.verify();
  }
}

TEST(CheckpointTest, OneWriterThatFailsStopsAll) {
  const TemporaryDirectory directory;
  const auto state = make_state(1);
  const auto errors = with_writers(directory.path().string(), 3, [&](int writer, Checkpointer& checkpointer) {
    checkpointer.save(1, share_of(state, writer, 3),
                      {.check = [writer] { return std::string(writer == 1 ? "tensor 'w' was changed" : ""); }});
    checkpointer.wait();
  });
  EXPECT_EQ(errors[0].find("writer 1 failed"), 0u) << errors[0];
  EXPECT_NE(errors[1].find("tensor 'w' was changed"), std::string::npos) << errors[1];
  EXPECT_EQ(errors[2].find("writer 1 failed"), 0u) << errors[2];
  EXPECT_TRUE(checkpoint_steps(directory.path().string()).empty());
  EXPECT_EQ(directory.entries(), 1u);
}

TEST(CheckpointTest, WritersThatLeaveAGapDoNotCommit) {
  const TemporaryDirectory directory;
  const auto state = make_state(1);
  const auto errors = with_writers(directory.path().string(), 2, [&](int writer, Checkpointer& checkpointer) {
    auto parts = share_of(state, writer, 2);
    if (writer == 1) parts.pop_back();
    checkpointer.save(1, parts);
    checkpointer.wait();
  });
  for (const std::string& error : errors) EXPECT_NE(error.find("elements"), std::string::npos) << error;
  EXPECT_TRUE(checkpoint_steps(directory.path().string()).empty());
}

TEST(CheckpointTest, AWriterThatDoesNotAnswerIsAnError) {
  const TemporaryDirectory directory;
  std::atomic<int> calls{0};
  Checkpointer checkpointer(directory.path().string(), {.writers = 2, .exchange = [&](const std::string& message) {
                                                          if (++calls == 2)
                                                            throw Error("writer 1 did not answer within 5 s");
                                                          return std::vector<std::string>{message, "+"};
                                                        }});
  checkpointer.save(1, share_of(make_state(1), 0, 2));
  EXPECT_NE(message_of([&] { checkpointer.wait(); }).find("did not answer"), std::string::npos);
  EXPECT_EQ(directory.entries(), 1u);
}

// --- reading ------------------------------------------------------------------------------------------------

TEST(CheckpointTest, RegionsAreReadFromAnyLayout) {
  const TemporaryDirectory directory;
  constexpr int64_t kRows = 96;
  constexpr int64_t kCols = 4096;
  std::vector<std::byte> memory(kRows * kCols * 4);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<std::byte>(i * 31 + i / 4096);
  const std::vector<int64_t> shape = {kRows, kCols};
  // Saved as two column halves.
  std::vector<std::byte> halves[2];
  for (size_t half : {size_t{0}, size_t{1}}) {
    for (size_t row = 0; row < kRows; ++row) {
      const auto* begin = memory.data() + row * kCols * 4 + half * kCols * 2;
      halves[half].insert(halves[half].end(), begin, begin + kCols * 2);
    }
  }
  Checkpointer checkpointer(directory.path().string());
  checkpointer.save(
      1, std::vector<CheckpointPart>{{"w", "F32", shape, {false, {{0, kRows}, {0, kCols / 2}}}, halves[0]},
                                     {"w", "F32", shape, {false, {{0, kRows}, {kCols / 2, kCols}}}, halves[1]}});
  checkpointer.wait();
  const Checkpoint checkpoint(step_path(directory, 1));
  std::mt19937_64 random(3);
  const auto below = [&](int64_t bound) { return std::uniform_int_distribution<int64_t>(0, bound)(random); };
  for (int trial = 0; trial < 60; ++trial) {
    Region region;
    if (trial % 2 == 0) {
      const int64_t a = below(kRows * kCols);
      const int64_t b = below(kRows * kCols);
      region = Region::run(std::min(a, b), std::max(a, b));
    } else {
      for (const int64_t length : shape) {
        const int64_t a = below(length);
        const int64_t b = below(length);
        region.bounds.push_back({std::min(a, b), std::max(a, b)});
      }
    }
    std::vector<std::byte> out(static_cast<size_t>(region.numel()) * 4);
    const Verify verify = trial % 3 == 0 ? Verify::off : Verify::chunks;
    const ReadStatistics statistics = checkpoint.read(std::vector<ReadRequest>{{"w", region, out}}, verify);
    size_t at = 0;
    for (int64_t flat = 0; flat < kRows * kCols; ++flat) {
      const int64_t row = flat / kCols;
      const int64_t col = flat % kCols;
      const bool inside = region.flat ? flat >= region.bounds[0][0] && flat < region.bounds[0][1]
                                      : row >= region.bounds[0][0] && row < region.bounds[0][1] &&
                                            col >= region.bounds[1][0] && col < region.bounds[1][1];
      if (!inside) continue;
      ASSERT_TRUE(std::equal(&out[at], &out[at] + 4, &memory[static_cast<size_t>(flat) * 4])) << trial << ' ' << flat;
      at += 4;
    }
    EXPECT_EQ(at, out.size());
    EXPECT_EQ(statistics.bytes, out.size());
    if (verify == Verify::off) {
      EXPECT_EQ(statistics.bytes_read, out.size());
    }
  }
}

// Drops the files' pages from the page cache, or brings them there.
void set_cached(const std::string& path, bool cached) {
  for (const auto& entry : fs::directory_iterator(path)) {
    const int fd = open(entry.path().c_str(), O_RDONLY);
    ASSERT_GE(fd, 0);
    std::vector<char> bytes(entry.file_size());
    fsync(fd);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    if (cached) {
      ASSERT_EQ(pread(fd, bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    }
    close(fd);
  }
}

TEST(CheckpointTest, ReadsAtMostTwoChunksMoreThanItOwns) {
  const TemporaryDirectory directory;
  const auto state = make_state(6, size_t{12} << 20);
  Checkpointer checkpointer(directory.path().string());
  save(checkpointer, 1, state);
  for (const bool cached : {false, true}) {
    set_cached(step_path(directory, 1), cached);
    const Checkpoint checkpoint(step_path(directory, 1));
    const uint64_t chunk = checkpoint.manifest().chunk_bytes;
    for (const int64_t start : {0, 1, 300000, 1000000}) {
      const int64_t stop = start + 1500000;
      std::vector<std::byte> out(static_cast<size_t>(stop - start) * 4);
      const auto statistics = checkpoint.read(std::vector<ReadRequest>{{"large", Region::run(start, stop), out}});
      EXPECT_TRUE(std::equal(out.begin(), out.end(), state[5].bytes.begin() + start * 4));
      EXPECT_LE(statistics.bytes_read, out.size() + 2 * chunk);
      if (cached) {
        EXPECT_EQ(statistics.bytes_direct, 0u);
      }
    }
  }
}

TEST(CheckpointTest, MapsWhatLiesInOnePiece) {
  const TemporaryDirectory directory;
  const auto state = make_state(7);
  Checkpointer checkpointer(directory.path().string());
  save(checkpointer, 1, state);
  const Checkpoint checkpoint(step_path(directory, 1));
  for (const StateTensor& tensor : state) {
    const auto bytes = checkpoint.map(tensor.name);
    EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), tensor.bytes.begin(), tensor.bytes.end()));
  }
  EXPECT_THROW(checkpoint.map("absent"), CheckpointError);
}

TEST(CheckpointTest, WrongRequestsAreNamed) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer(directory.path().string());
  save(checkpointer, 1, make_state(8));
  const Checkpoint checkpoint(step_path(directory, 1));
  std::vector<std::byte> out(16);
  EXPECT_THROW(checkpoint.read(std::vector<ReadRequest>{{"absent", Region::run(0, 1), out}}), CheckpointError);
  EXPECT_THROW(checkpoint.read(std::vector<ReadRequest>{{"large", Region::run(0, 5), out}}), InvalidArgument);
  EXPECT_THROW(checkpoint.read(std::vector<ReadRequest>{{"odd", Region::run(0, 16), out}}), InvalidArgument);
}

// --- damage -------------------------------------------------------------------------------------------------

TEST(CheckpointTest, EveryFlippedBitIsFound) {
  const TemporaryDirectory directory;
  const auto state = make_state(9, 16384);
  Checkpointer checkpointer(directory.path().string());
  save(checkpointer, 1, state);
  std::mt19937_64 random(5);
  for (const auto& entry : fs::directory_iterator(step_path(directory, 1))) {
    const auto size = entry.file_size();
    for (int trial = 0; trial < 200; ++trial) {
      const uint64_t bit = random() % (size * 8);
      std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
      file.seekg(static_cast<std::streamoff>(bit / 8));
      const char before = static_cast<char>(file.get());
      const auto put = [&](char byte) {
        file.seekp(static_cast<std::streamoff>(bit / 8));
        file.put(byte);
        file.flush();
      };
      put(static_cast<char>(before ^ (1 << bit % 8)));
      EXPECT_THROW(load_like(Checkpoint(step_path(directory, 1)), state), CheckpointCorrupt)
          << entry.path() << " bit " << bit;
      EXPECT_THROW(Checkpoint(step_path(directory, 1)).verify(), CheckpointCorrupt);
      put(before);
    }
  }
  EXPECT_TRUE(same(load_like(Checkpoint(step_path(directory, 1)), state), state));
}

TEST(CheckpointTest, DamageIsNamed) {
  const TemporaryDirectory directory;
  const auto state = make_state(10);
  Checkpointer checkpointer(directory.path().string());
  save(checkpointer, 1, state);
  const std::string shard = step_path(directory, 1) + "/model-00000-of-00001.safetensors";
  const StoredTensor* large = nullptr;
  const Checkpoint before(step_path(directory, 1));
  large = before.find("large");
  {
    std::fstream file(shard, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(large->regions[0].offset + 2 * before.manifest().chunk_bytes + 5));
    file.put('x');
    file.put('y');
  }
  const std::string message = message_of([&] { load_like(Checkpoint(step_path(directory, 1)), state); });
  for (const char* part : {"model-00000-of-00001.safetensors", "\"large\"", "chunk 2"}) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
  fs::resize_file(shard, fs::file_size(shard) - 1);
  EXPECT_NE(message_of([&] { load_like(Checkpoint(step_path(directory, 1)), state); }).find("truncated"),
            std::string::npos);
  fs::remove(shard);
  EXPECT_NE(message_of([&] { load_like(Checkpoint(step_path(directory, 1)), state); }).find("not complete"),
            std::string::npos);
  fs::create_symlink("/dev/zero", shard);
  EXPECT_THROW(load_like(Checkpoint(step_path(directory, 1)), state), CheckpointCorrupt);
  fs::remove(shard);
  ASSERT_EQ(mkfifo(shard.c_str(), 0666), 0);
  EXPECT_THROW(load_like(Checkpoint(step_path(directory, 1)), state), CheckpointCorrupt);
}

}  // namespace
}  // namespace ng
