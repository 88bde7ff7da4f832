// DirectFile: one suite for every engine, past the page cache and through it.
#include "io/direct_file.hpp"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "io/system.hpp"
#include "io/temporary_directory.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

constexpr size_t kBlock = 4096;

// Memory that any DirectFile takes.
class AlignedBytes {
 public:
  explicit AlignedBytes(size_t bytes, unsigned seed = 0) : buffer_(bytes + kBlock) {
    const auto address = reinterpret_cast<uintptr_t>(buffer_.data());
    bytes_ = {buffer_.data() + (kBlock - address % kBlock) % kBlock, bytes};
    for (size_t i = 0; i < bytes; ++i) bytes_[i] = static_cast<std::byte>((i * 131 + i / 251 + seed) & 0xff);
  }
  std::span<std::byte> all() const { return bytes_; }
  std::span<std::byte> part(size_t offset, size_t length) const { return bytes_.subspan(offset, length); }
  std::string text() const { return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()}; }

 private:
  Buffer buffer_;
  std::span<std::byte> bytes_;
};

// Where files open with O_DIRECT; empty if nowhere.
std::filesystem::path direct_parent() {
  for (const auto& parent : {std::filesystem::temp_directory_path(), std::filesystem::current_path()}) {
    const TemporaryDirectory directory(parent);
    if (open_direct(directory / "x", OpenMode::create, {.engine = IoEngine::threads})->alignment() > 1) return parent;
  }
  return {};
}

struct Setting {
  IoEngine engine;
  bool direct;
};

class DirectFileTest : public testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    if (GetParam().engine == IoEngine::io_uring && !why_no_io_uring().empty()) GTEST_SKIP() << why_no_io_uring();
    const std::filesystem::path parent = GetParam().direct ? direct_parent() : "/dev/shm";
    if (parent.empty()) GTEST_SKIP() << "no directory here takes O_DIRECT";
    directory_.emplace(parent);
  }

  DirectFileOptions options(int queue_depth = 8) const {
    return {.engine = GetParam().engine, .queue_depth = queue_depth};
  }
  std::string path() const { return *directory_ / "x"; }
  std::unique_ptr<DirectFile> create(int queue_depth = 8) const {
    return open_direct(path(), OpenMode::create, options(queue_depth));
  }
  std::unique_ptr<DirectFile> create(Interference interference) const {
    return open_direct(path(), OpenMode::create, options(), std::move(interference));
  }

  std::optional<TemporaryDirectory> directory_;
};

std::set<uint64_t> wait_for_all(DirectFile& file) {
  std::set<uint64_t> tags;
  while (file.in_flight() > 0) tags.insert(file.wait());
  return tags;
}

TEST_P(DirectFileTest, SaysHowItWorks) {
  const auto file = create();
  const std::string name = GetParam().engine == IoEngine::io_uring ? "io_uring" : "threads";
  EXPECT_EQ(file->engine(), GetParam().direct ? name : name + ", buffered");
  EXPECT_EQ(file->queue_depth(), 8);
  if (GetParam().direct) {
    EXPECT_GE(file->alignment(), 512u);
    EXPECT_LE(file->alignment(), 4096u);
    EXPECT_EQ(file->alignment() & (file->alignment() - 1), 0u);
  } else {
    EXPECT_EQ(file->alignment(), 1u);
  }
  EXPECT_EQ(file->in_flight(), 0);
  EXPECT_EQ(file->size(), 0u);
}

TEST_P(DirectFileTest, BytesComeBackWhateverTheOrder) {
  constexpr size_t kChunks = 40;
  constexpr size_t kChunk = 5 * kBlock;
  const AlignedBytes written(kChunks * kChunk, 1);
  for (const int queue_depth : {1, 3, 64}) {
    std::filesystem::remove(path());
    const auto file = create(queue_depth);
    std::set<uint64_t> tags;
    for (size_t i = 0; i < kChunks; ++i) {
      const size_t chunk = i * 7 % kChunks;
      file->write(written.part(chunk * kChunk, kChunk), chunk * kChunk, chunk);
      if (i % 5 == 0) tags.insert(file->wait());
    }
    tags.merge(wait_for_all(*file));
    EXPECT_EQ(tags.size(), kChunks);
    EXPECT_EQ(file->size(), written.all().size());
    file->sync();
    ASSERT_EQ(read_text(path()), written.text());

    const AlignedBytes back(written.all().size());
    for (size_t i = kChunks; i-- > 0;) file->read(back.part(i * kChunk, kChunk), i * kChunk, i);
    EXPECT_EQ(file->in_flight(), static_cast<int>(kChunks));
    EXPECT_EQ(wait_for_all(*file).size(), kChunks);
    ASSERT_EQ(back.text(), written.text());
    file->close();
  }
}

TEST_P(DirectFileTest, EmptyTransfersAreDoneAtOnce) {
  const auto file = create();
  file->write({}, 0, 5);
  file->read({}, 1 << 20, 6);
  EXPECT_EQ(wait_for_all(*file), (std::set<uint64_t>{5, 6}));
  EXPECT_EQ(file->size(), 0u);
}

TEST_P(DirectFileTest, RefusesWhatIsNotAligned) {
  const auto file = create();
  const size_t alignment = file->alignment();
  const AlignedBytes bytes(2 * kBlock);
  if (alignment > 1) {
    EXPECT_THROW(file->write(bytes.part(1, alignment), 0, 0), InvalidArgument);
    EXPECT_THROW(file->write(bytes.part(0, alignment), alignment / 2, 0), InvalidArgument);
    EXPECT_THROW(file->write(bytes.part(0, alignment + 1), 0, 0), InvalidArgument);
    EXPECT_THROW(file->read(bytes.part(1, alignment), 0, 0), InvalidArgument);
    const std::string message = message_of([&] { file->write(bytes.part(0, 100), 0, 0); });
    EXPECT_NE(message.find(path()), std::string::npos) << message;
    EXPECT_NE(message.find("length 100"), std::string::npos) << message;
  } else {
    file->write(bytes.part(1, 77), 13, 0);
    file->wait();
    EXPECT_EQ(file->size(), 90u);
  }
  EXPECT_THROW(file->write(bytes.part(0, kBlock), ~uint64_t{0} - kBlock + 1, 0), InvalidArgument);
  EXPECT_EQ(file->in_flight(), 0);
}

TEST_P(DirectFileTest, WaitingForNothingIsAnError) {
  const auto file = create();
  EXPECT_THROW(file->wait(), InvalidArgument);
}

TEST_P(DirectFileTest, TheLastBlockReadsAsWholeAndNothingBeyond) {
  const size_t length = 2 * kBlock + 100;
  const AlignedBytes written(3 * kBlock, 2);
  write_text(path(), written.text().substr(0, length));
  const auto file = open_direct(path(), OpenMode::read, options());
  const size_t alignment = file->alignment();
  EXPECT_EQ(file->size(), length);
  const size_t rounded = (length + alignment - 1) / alignment * alignment;

  const AlignedBytes back(3 * kBlock, 9);
  file->read(back.part(0, rounded), 0, 0);
  file->wait();
  EXPECT_EQ(back.text().substr(0, length), written.text().substr(0, length));
  EXPECT_EQ(back.text().substr(length, rounded - length), std::string(rounded - length, '\0'));

  file->read(back.part(0, rounded - 2 * kBlock), 2 * kBlock, 1);
  file->wait();
  EXPECT_EQ(back.text().substr(0, 100), written.text().substr(2 * kBlock, 100));

  file->read(back.part(0, rounded - 2 * kBlock + alignment), 2 * kBlock, 2);
  EXPECT_THROW(file->wait(), FileCorrupt);
  file->read(back.part(0, kBlock), 1 << 20, 3);
  const std::string message = message_of([&] { file->wait(); });
  EXPECT_NE(message.find("cannot read 4096 bytes at offset 1048576 of " + path()), std::string::npos) << message;
}

TEST_P(DirectFileTest, CutTransfersAreContinued) {
  const AlignedBytes written(64 * kBlock, 3);
  const AlignedBytes back(64 * kBlock);
  // Without O_DIRECT also by lengths that are not aligned.
  for (const size_t request : {kBlock, GetParam().direct ? 3 * kBlock : size_t{999}}) {
    std::filesystem::remove(path());
    const auto file = create({.largest_request = request});
    for (size_t i = 0; i < 4; ++i) file->write(written.part(i * 16 * kBlock, 16 * kBlock), i * 16 * kBlock, i);
    EXPECT_EQ(wait_for_all(*file).size(), 4u);
    ASSERT_EQ(read_text(path()), written.text());
    file->read(back.all(), 0, 0);
    file->wait();
    ASSERT_EQ(back.text(), written.text());
  }
}

TEST_P(DirectFileTest, ATransferCutOffTheBlocksGoesOnThroughThePageCache) {
  const AlignedBytes written(16 * kBlock, 4);
  std::atomic<int> answers{0};
  // Of every first request the last 4000 bytes are taken to be lost.
  const auto file = create({.answer = [&](const Transfer& transfer, int64_t answer) {
    ++answers;
    return transfer.done == 0 && answer > int64_t{4 * kBlock} ? answer - 4000 : answer;
  }});
  file->write(written.part(0, 8 * kBlock), 0, 0);
  file->write(written.part(8 * kBlock, 8 * kBlock), 8 * kBlock, 1);
  EXPECT_EQ(wait_for_all(*file).size(), 2u);
  EXPECT_EQ(answers.load(), 4);
  EXPECT_NE(file->engine().find("buffered"), std::string::npos);
  file->sync();
  EXPECT_EQ(read_text(path()), written.text());
  const AlignedBytes back(16 * kBlock);
  file->read(back.all(), 0, 0);
  file->wait();
  EXPECT_EQ(back.text(), written.text());
}

TEST_P(DirectFileTest, EveryAnswerIsLookedAt) {
  const AlignedBytes bytes(8 * kBlock);
  for (const int error : {EIO, ENOSPC, EDQUOT, EROFS}) {
    std::filesystem::remove(path());
    const auto file = create(
        {.answer = [error](const Transfer& transfer, int64_t answer) { return transfer.tag == 2 ? -error : answer; }});
    for (uint64_t i = 0; i < 4; ++i) file->write(bytes.part(i * kBlock, kBlock), i * kBlock, i);
    std::set<uint64_t> tags;
    int failures = 0;
    while (file->in_flight() > 0) {
      try {
        tags.insert(file->wait());
      } catch (const SystemError& failure) {
        ++failures;
        EXPECT_EQ(failure.errno_value(), error);
        EXPECT_NE(std::string(failure.what()).find("cannot write 4096 bytes at offset 8192 of " + path()),
                  std::string::npos)
            << failure.what();
      }
    }
    EXPECT_EQ(failures, 1);
    EXPECT_EQ(tags, (std::set<uint64_t>{0, 1, 3}));
  }
}

TEST_P(DirectFileTest, AWriteWithoutProgressIsAnError) {
  const AlignedBytes bytes(2 * kBlock);
  const auto file = create({.largest_request = kBlock, .answer = [](const Transfer& transfer, int64_t answer) {
                              return transfer.done > 0 ? 0 : answer;
                            }});
  file->write(bytes.all(), 0, 0);
  EXPECT_EQ(errno_of([&] { file->wait(); }), EIO);
}

TEST_P(DirectFileTest, InterruptionsAreRepeatedButNotForEver) {
  const AlignedBytes bytes(4 * kBlock, 5);
  std::atomic<int> interruptions{0};
  const auto file = create({.largest_request = kBlock, .answer = [&](const Transfer& transfer, int64_t answer) {
                              if (transfer.tag == 1) return int64_t{-EAGAIN};
                              if (transfer.done == kBlock && interruptions < 3) {
                                constexpr int64_t kErrors[] = {-EINTR, -EAGAIN, -ECANCELED};
                                return kErrors[interruptions++];
                              }
                              return answer;
                            }});
  file->write(bytes.all(), 0, 0);
  EXPECT_EQ(file->wait(), 0u);
  EXPECT_EQ(interruptions, 3);
  EXPECT_EQ(read_text(path()), bytes.text());
  file->write(bytes.all(), 0, 1);
  EXPECT_EQ(errno_of([&] { file->wait(); }), EAGAIN);
}

TEST_P(DirectFileTest, ARefusalOfDirectTransfersIsNotTheEnd) {
  const AlignedBytes bytes(4 * kBlock, 6);
  std::atomic<int> refusals{0};
  const auto file =
      create({.answer = [&](const Transfer&, int64_t answer) { return refusals++ < 1 ? int64_t{-EINVAL} : answer; }});
  file->write(bytes.all(), 0, 0);
  if (GetParam().direct) {
    EXPECT_EQ(file->wait(), 0u);
    EXPECT_NE(file->engine().find("buffered"), std::string::npos);
    EXPECT_EQ(read_text(path()), bytes.text());
  } else {
    EXPECT_EQ(errno_of([&] { file->wait(); }), EINVAL);
  }
}

TEST_P(DirectFileTest, SyncAndCloseReportWhatNobodyWaitedFor) {
  const AlignedBytes bytes(kBlock);
  const auto fails = [](const Transfer& transfer, int64_t answer) { return transfer.tag == 1 ? -EIO : answer; };
  {
    const auto file = create({.answer = fails});
    file->write(bytes.all(), 0, 0);
    file->write(bytes.all(), kBlock, 1);
    EXPECT_EQ(errno_of([&] { file->sync(); }), EIO);
    EXPECT_EQ(wait_for_all(*file), (std::set<uint64_t>{0}));
    file->sync();
  }
  std::filesystem::remove(path());
  const auto file = create({.answer = fails});
  file->write(bytes.all(), 0, 1);
  EXPECT_EQ(errno_of([&] { file->close(); }), EIO);
}

TEST_P(DirectFileTest, AFailedSyncStaysFailed) {
  const auto file = create();
  {
    const ScopedHook hook(fsync_hook, [](int) { return EIO; });
    EXPECT_EQ(errno_of([&] { file->sync(); }), EIO);
  }
  EXPECT_EQ(errno_of([&] { file->sync(); }), EIO);
}

TEST_P(DirectFileTest, SyncWaitsForWhatIsInFlight) {
  const AlignedBytes bytes(64 * kBlock, 7);
  const auto file = create();
  int syncs = 0;
  const ScopedHook hook(fsync_hook, [&](int) {
    EXPECT_EQ(read_text(path()), bytes.text());
    return syncs++ == 0 ? EINTR : -1;
  });
  for (size_t i = 0; i < 8; ++i) file->write(bytes.part(i * 8 * kBlock, 8 * kBlock), i * 8 * kBlock, i);
  file->sync();
  EXPECT_EQ(syncs, 2);
  EXPECT_EQ(file->in_flight(), 8);
  EXPECT_EQ(wait_for_all(*file).size(), 8u);
}

TEST_P(DirectFileTest, CloseReportsItsOwnFailureAndEndsTheFile) {
  const AlignedBytes bytes(kBlock);
  const auto file = create();
  {
    const ScopedHook hook(close_hook, [](int) { return EDQUOT; });
    EXPECT_EQ(errno_of([&] { file->close(); }), EDQUOT);
  }
  EXPECT_THROW(file->write(bytes.all(), 0, 0), InvalidArgument);
  EXPECT_THROW(file->sync(), InvalidArgument);
  EXPECT_THROW(file->close(), InvalidArgument);
}

TEST_P(DirectFileTest, LengthsCanBeReservedAndCut) {
  const AlignedBytes bytes(4 * kBlock, 8);
  const auto file = create();
  file->preallocate(0);
  file->preallocate(16 * kBlock);
  EXPECT_EQ(file->size(), 16 * kBlock);
  struct stat status{};
  ASSERT_EQ(stat(path().c_str(), &status), 0);
  EXPECT_GE(status.st_blocks * 512, int64_t{16 * kBlock});
  file->write(bytes.all(), 0, 0);
  file->truncate(3 * kBlock + 5);
  EXPECT_EQ(file->wait(), 0u);
  EXPECT_EQ(read_text(path()), bytes.text().substr(0, 3 * kBlock + 5));
}

TEST_P(DirectFileTest, AFileSizeLimitIsAnErrorNotATruncation) {
  const AlignedBytes bytes(64 * kBlock);
  // Also where the limit cuts a block.
  for (const rlim_t most : {rlim_t{32 * kBlock}, rlim_t{32 * kBlock + 700}}) {
    std::filesystem::remove(path());
    EXPECT_EQ(run_in_child([&] {
                std::signal(SIGXFSZ, SIG_IGN);
                const rlimit limit{most, most};
                if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return 1;
                const auto file = create();
                file->write(bytes.all(), 0, 0);
                return errno_of([&] { file->wait(); });
              }),
              EFBIG);
  }
}

TEST_P(DirectFileTest, AFullDiskIsAnError) {
  const AlignedBytes bytes(512 * kBlock);
  const int result = run_in_child([&] {
    if (!mount_small_disk(directory_->path(), "1m")) return kCannotMount;
    const auto file = create();
    if (errno_of([&] { file->preallocate(2 << 20); }) != ENOSPC) return 1;
    for (size_t i = 0; i < 8; ++i) file->write(bytes.part(i * 64 * kBlock, 64 * kBlock), i * 64 * kBlock, i);
    int failures = 0;
    while (file->in_flight() > 0) failures += errno_of([&] { file->wait(); }) == ENOSPC ? 1 : 0;
    return failures >= 4 ? ENOSPC : 2;
  });
  if (result == kCannotMount) GTEST_SKIP() << "cannot mount a tmpfs here";
  EXPECT_EQ(result, ENOSPC);
}

TEST_P(DirectFileTest, AnyThreadMayUseIt) {
  const AlignedBytes bytes(16 * kBlock, 9);
  const auto file = create();
  for (size_t i = 0; i < 16; ++i) {
    // A transfer that one thread starts another waits for.
    std::thread([&] { file->write(bytes.part(i * kBlock, kBlock), i * kBlock, i); }).join();
    if (i % 3 == 0) {
      EXPECT_LE(file->wait(), i);
    }
  }
  std::thread([&] { file->sync(); }).join();
  wait_for_all(*file);
  EXPECT_EQ(read_text(path()), bytes.text());
}

TEST_P(DirectFileTest, DestructionWaits) {
  const AlignedBytes bytes(256 * kBlock, 10);
  {
    const auto file = create();
    for (size_t i = 0; i < 8; ++i) file->write(bytes.part(i * 32 * kBlock, 32 * kBlock), i * 32 * kBlock, i);
  }
  EXPECT_EQ(read_text(path()), bytes.text());
}

TEST_P(DirectFileTest, AChildProcessIsKeptOut) {
  const AlignedBytes bytes(2 * kBlock, 11);
  auto file = create();
  file->write(bytes.part(0, kBlock), 0, 0);
  EXPECT_EQ(run_in_child([&] {
              const std::string message = message_of([&] { file->write(bytes.part(0, kBlock), 0, 0); });
              if (message.find("before fork()") == std::string::npos) return 1;
              if (message_of([&] { file->wait(); }).find("before fork()") == std::string::npos) return 2;
              file.reset();  // returns
              if (!kChildrenHaveThreads) return 0;
              const auto own = open_direct(*directory_ / "child", OpenMode::create, options());
              own->write(bytes.all(), 0, 0);
              own->sync();
              return 0;
            }),
            0);
  EXPECT_EQ(read_text(*directory_ / "child"), kChildrenHaveThreads ? bytes.text() : "");
  file->write(bytes.part(kBlock, kBlock), kBlock, 1);
  file->sync();
  EXPECT_EQ(read_text(path()), bytes.text());
}

TEST_P(DirectFileTest, RegisteredMemoryTransfersAlike) {
  const AlignedBytes one(32 * kBlock, 12);
  const AlignedBytes two(32 * kBlock, 13);
  const auto file = create();
  file->register_memory(one.all());
  file->register_memory({});
  file->write(one.all(), 0, 0);
  file->write(two.part(0, 16 * kBlock), 32 * kBlock, 1);  // not registered
  file->register_memory(two.all());
  file->write(two.part(16 * kBlock, 16 * kBlock), 48 * kBlock, 2);
  EXPECT_EQ(wait_for_all(*file).size(), 3u);
  EXPECT_EQ(read_text(path()), one.text() + two.text());
  std::swap_ranges(one.all().begin(), one.all().end(), two.all().begin());
  file->read(one.all(), 0, 0);
  file->read(two.all(), 32 * kBlock, 1);
  wait_for_all(*file);
  EXPECT_EQ(read_text(path()), one.text() + two.text());
}

TEST_P(DirectFileTest, OpenModes) {
  const auto open = [&](const std::string& name, OpenMode mode) {
    return errno_of([&] { open_direct(*directory_ / name, mode, options()); });
  };
  EXPECT_EQ(open("missing", OpenMode::read), ENOENT);
  EXPECT_EQ(open("missing/x", OpenMode::create), ENOENT);
  EXPECT_EQ(open("new", OpenMode::create), 0);
  EXPECT_EQ(open("new", OpenMode::create), EEXIST);
  EXPECT_EQ(open("new", OpenMode::read), 0);
  EXPECT_EQ(open("update", OpenMode::update), 0);
  write_text(*directory_ / "update", "kept");
  EXPECT_EQ(open("update", OpenMode::update), 0);
  EXPECT_EQ(read_text(*directory_ / "update"), "kept");
  std::filesystem::create_symlink("new", *directory_ / "link");
  std::filesystem::create_symlink("nowhere", *directory_ / "dangling");
  EXPECT_EQ(open("link", OpenMode::read), ELOOP);
  EXPECT_EQ(open("dangling", OpenMode::create), EEXIST);
  ASSERT_EQ(mkfifo((*directory_ / "fifo").c_str(), 0600), 0);
  EXPECT_THROW(open_direct(*directory_ / "fifo", OpenMode::read, options()), InvalidArgument);
  EXPECT_THROW(open_direct(directory_->path(), OpenMode::read, options()), InvalidArgument);
  EXPECT_THROW(open_direct(path(), OpenMode::create, options(0)), InvalidArgument);
  EXPECT_THROW(open_direct(path(), OpenMode::create, options(5000)), InvalidArgument);
  EXPECT_FALSE(std::filesystem::exists(path()));

  // A file that is opened for reading is not written.
  const AlignedBytes bytes(kBlock);
  const auto file = open_direct(*directory_ / "new", OpenMode::read, options());
  file->write(bytes.all(), 0, 0);
  EXPECT_EQ(errno_of([&] { file->wait(); }), EBADF);
}

// --- which engine ---------------------------------------------------------------------------------------------

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

class IoEngineTest : public testing::Test {
 protected:
  std::string path() const { return directory_ / "x"; }
  std::unique_ptr<DirectFile> create(IoEngine engine) const {
    return open_direct(path(), OpenMode::create, {.engine = engine});
  }
  void need_io_uring() {
    if (!why_no_io_uring().empty()) GTEST_SKIP() << why_no_io_uring();
  }

  TemporaryDirectory directory_;
  AlignedBytes bytes_{16 * kBlock, 14};
};

TEST_F(IoEngineTest, IsIoUringWhereThereIsOne) {
  const bool expected = why_no_io_uring().empty();
  EXPECT_EQ(create(IoEngine::automatic)->engine().starts_with("io_uring"), expected);
}

TEST_F(IoEngineTest, IsThreadsWhereTheKernelRefusesIoUring) {
  EXPECT_EQ(run_in_child([&] {
              unsetenv("NARROWGAUGE_IO_ENGINE");
              if (!answer(SYS_io_uring_setup, EPERM)) return 1;
              const std::string why = why_no_io_uring();
              if (!has(why, "Operation not permitted") && !has(why, "without liburing")) return 2;
              try {
                create(IoEngine::io_uring);
                return 3;
              } catch (const InvalidArgument& error) {
                if (!has(error.what(), why)) return 4;
              }
              const auto file = create(IoEngine::automatic);  // the failure has left nothing behind
              if (!file->engine().starts_with("threads")) return 5;
              file->write(bytes_.all(), 0, 0);
              file->sync();
              return read_text(path()) == bytes_.text() ? 0 : 6;
            }),
            0);
}

TEST_F(IoEngineTest, ASandboxThatClosesLaterStopsNothing) {
  need_io_uring();
  EXPECT_EQ(run_in_child([&] {
              const auto file = create(IoEngine::io_uring);
              file->write(bytes_.part(0, 4 * kBlock), 0, 0);
              if (!answer(SYS_io_uring_enter, EPERM)) return 1;
              for (size_t i = 1; i < 4; ++i) file->write(bytes_.part(i * 4 * kBlock, 4 * kBlock), i * 4 * kBlock, i);
              if (wait_for_all(*file).size() != 4) return 2;
              for (int i = 0; i < 50; ++i) file->write(bytes_.part(0, kBlock), 0, 0);
              file->sync();
              return read_text(path()) == bytes_.text() ? 0 : 3;
            }),
            0);
}

TEST_F(IoEngineTest, CanBeForcedByTheEnvironment) {
  EXPECT_EQ(run_in_child([&] {
              setenv("NARROWGAUGE_IO_ENGINE", "threads", 1);
              if (why_no_io_uring() != "NARROWGAUGE_IO_ENGINE=threads") return 1;
              if (!create(IoEngine::automatic)->engine().starts_with("threads")) return 2;
              setenv("NARROWGAUGE_IO_ENGINE", "", 1);
              if (why_no_io_uring() == "NARROWGAUGE_IO_ENGINE=threads") return 3;
              setenv("NARROWGAUGE_IO_ENGINE", "libaio", 1);
              if (!has(message_of([] { why_no_io_uring(); }), "NARROWGAUGE_IO_ENGINE is 'libaio'")) return 4;
              setenv("NARROWGAUGE_IO_ENGINE", "io_uring", 1);
              std::filesystem::remove(path());
              if (why_no_io_uring().empty())
                return create(IoEngine::automatic)->engine().starts_with("io_uring") ? 0 : 5;
              return message_of([&] { create(IoEngine::automatic); }).empty() ? 6 : 0;
            }),
            0);
}

// What one thread has started another can wait for, though the first is busy: see the choice of ring flags.
TEST_F(IoEngineTest, ABusyThreadKeepsNoOtherWaiting) {
  for (const IoEngine engine : {IoEngine::threads, IoEngine::io_uring}) {
    if (engine == IoEngine::io_uring && !why_no_io_uring().empty()) continue;
    std::filesystem::remove(path());
    const auto file = create(engine);
    std::atomic<bool> started{false};
    std::atomic<bool> over{false};
    std::thread busy([&] {
      for (size_t i = 0; i < 8; ++i) file->write(bytes_.all(), i * bytes_.all().size(), i);
      started = true;
      while (!over) continue;
    });
    while (!started) std::this_thread::yield();
    EXPECT_EQ(wait_for_all(*file).size(), 8u);
    over = true;
    busy.join();
  }
}

TEST_F(IoEngineTest, WithoutTheRightToLockMemoryTransfersGoOnUnregistered) {
  need_io_uring();
  const std::filesystem::path parent = direct_parent();
  if (parent.empty()) GTEST_SKIP() << "no directory here takes O_DIRECT";
  const TemporaryDirectory directory(parent);
  std::filesystem::permissions(directory.path(), std::filesystem::perms::all);
  const AlignedBytes bytes(1 << 20, 15);
  EXPECT_EQ(run_in_child([&] {
              const rlimit limit{64 << 10, 64 << 10};
              if (setrlimit(RLIMIT_MEMLOCK, &limit) != 0) return 1;
              if (geteuid() == 0 && setuid(65534) != 0) return 2;  // root may lock what it likes
              const auto file = open_direct(directory / "x", OpenMode::create, {.engine = IoEngine::io_uring});
              file->register_memory(bytes.part(0, kBlock));
              if (file->engine() != "io_uring") return 3;
              file->register_memory(bytes.all());
              if (file->engine() != "io_uring, memory not registered: Cannot allocate memory") return 4;
              file->write(bytes.all(), 0, 0);
              file->sync();
              return read_text(directory / "x") == bytes.text() ? 0 : 5;
            }),
            0);
}

TEST_F(IoEngineTest, MoreRegionsThanTheTableHoldsAreUsedUnregistered) {
  need_io_uring();
  const AlignedBytes bytes(100 * kBlock, 16);
  const auto file = create(IoEngine::io_uring);
  for (size_t i = 0; i < 100; ++i) file->register_memory(bytes.part(i * kBlock, kBlock));
  for (size_t i = 0; i < 50; ++i)
    file->write(bytes.part(i * 2 * kBlock, 2 * kBlock), i * 2 * kBlock, i);  // two regions
  file->sync();
  for (size_t i = 0; i < 100; ++i) file->write(bytes.part(i * kBlock, kBlock), i * kBlock, i);
  file->sync();
  EXPECT_EQ(read_text(path()), bytes.text());
}

std::string name_of(const testing::TestParamInfo<Setting>& setting) {
  return std::string(setting.param.engine == IoEngine::threads ? "Threads" : "IoUring") +
         (setting.param.direct ? "Direct" : "Buffered");
}

INSTANTIATE_TEST_SUITE_P(All, DirectFileTest,
                         testing::Values(Setting{IoEngine::threads, true}, Setting{IoEngine::threads, false},
                                         Setting{IoEngine::io_uring, true}, Setting{IoEngine::io_uring, false}),
                         name_of);

}  // namespace
}  // namespace ng
