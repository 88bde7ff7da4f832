// Atomic replacement: whatever fails, the old file is as it was and nothing else is left behind.
#include "io/file.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "io/system.hpp"
#include "io/temporary_directory.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/io.hpp"

namespace ng {
namespace {

std::vector<FileTensor> tensor_of(std::span<const std::byte> bytes) {
  return {{"a", "U8", {static_cast<int64_t>(bytes.size())}, bytes}};
}

mode_t mode_of(const std::string& path) {
  struct stat status{};
  EXPECT_EQ(stat(path.c_str(), &status), 0);
  return status.st_mode & 07777;
}

// Writes `bytes` to `path` and returns the errno of the SystemError, or 0.
int errno_of_write(const std::string& path, std::span<const std::byte> bytes) {
  try {
    write_safetensors(path, tensor_of(bytes), {});
  } catch (const SystemError& error) {
    EXPECT_NE(std::string(error.what()).find(path), std::string::npos) << error.what();
    return error.errno_value();
  }
  return 0;
}

TEST(AtomicFile, NothingIsThereBeforeCommitAndAllIsAfter) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x";
  const std::string text = "new";
  {
    AtomicFile file(path);
    file.write(std::as_bytes(std::span(text)));
    EXPECT_FALSE(std::filesystem::exists(path));
    EXPECT_EQ(directory.entries(), 1u);
  }
  EXPECT_EQ(directory.entries(), 0u);
  AtomicFile file(path);
  file.write(std::as_bytes(std::span(text)));
  file.write({});
  file.write(std::as_bytes(std::span(text)));
  file.commit();
  EXPECT_EQ(read_text(path), "newnew");
  EXPECT_EQ(directory.entries(), 1u);
}

TEST(AtomicFile, FollowsTheUmaskForNewFilesAndKeepsTheModeOfOldOnes) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x";
  const mode_t before = umask(027);
  AtomicFile(path).commit();
  EXPECT_EQ(mode_of(path), 0640u);
  ASSERT_EQ(chmod(path.c_str(), 0606), 0);
  AtomicFile(path).commit();
  EXPECT_EQ(mode_of(path), 0606u);
  umask(before);
}

TEST(AtomicFile, ReplacesWhatALinkLeadsTo) {
  const TemporaryDirectory directory;
  std::filesystem::create_directory(directory / "far");
  write_text(directory / "far/target", "old");
  std::filesystem::create_symlink("far/target", directory / "second");
  std::filesystem::create_symlink("second", directory / "first");
  const std::string text = "new";
  AtomicFile file(directory / "first");
  file.write(std::as_bytes(std::span(text)));
  file.commit();
  EXPECT_EQ(read_text(directory / "far/target"), "new");
  EXPECT_TRUE(std::filesystem::is_symlink(directory / "first"));
  EXPECT_TRUE(std::filesystem::is_symlink(directory / "second"));

  std::filesystem::create_symlink("nowhere", directory / "dangling");
  EXPECT_EQ(errno_of_write(directory / "dangling", {}), ENOENT);
  EXPECT_FALSE(std::filesystem::exists(directory / "nowhere"));
}

TEST(AtomicFile, RefusesWhatIsNotAFile) {
  const TemporaryDirectory directory;
  EXPECT_EQ(errno_of_write(directory.path().string(), {}), EISDIR);
  EXPECT_EQ(errno_of_write(directory / "", {}), EISDIR);
  EXPECT_EQ(errno_of_write(directory / "missing/x", {}), ENOENT);
  EXPECT_EQ(errno_of_write("", {}), ENOENT);
  EXPECT_EQ(errno_of_write(directory / std::string(300, 'x'), {}), ENAMETOOLONG);
  write_text(directory / "plain", "");
  EXPECT_EQ(errno_of_write(directory / "plain/x", {}), ENOTDIR);
  ASSERT_EQ(mkfifo((directory / "fifo").c_str(), 0600), 0);
  EXPECT_THROW(AtomicFile{directory / "fifo"}, InvalidArgument);
  EXPECT_THROW(AtomicFile{"/dev/null"}, InvalidArgument);
  EXPECT_EQ(directory.entries(), 2u);
}

// A name of the full length that the file system allows leaves no room for a suffix; the temporary name needs none.
TEST(AtomicFile, TakesTheLongestName) {
  const TemporaryDirectory directory;
  const std::string path = directory / std::string(255, 'x');
  EXPECT_EQ(errno_of_write(path, {}), 0);
  EXPECT_EQ(errno_of_write(path, {}), 0);
  EXPECT_EQ(directory.entries(), 1u);
}

TEST(AtomicFile, RelativePathsStayWithTheirDirectory) {
  const TemporaryDirectory directory;
  EXPECT_EQ(run_in_child([&] {
              if (chdir(directory.path().c_str()) != 0) return 1;
              AtomicFile file("x");
              if (chdir("/") != 0) return 2;
              file.commit();
              return 0;
            }),
            0);
  EXPECT_TRUE(std::filesystem::exists(directory / "x"));
}

// A limit on file sizes is the disk that fills up for an unprivileged user: the write in the middle fails.
TEST(AtomicFile, AWriteThatFailsLeavesTheOldFile) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x";
  write_text(path, "old");
  const std::vector<std::byte> bytes(1 << 20);
  const int result = run_in_child([&] {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{1 << 19, 1 << 19};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return 1;
    return errno_of_write(path, bytes);
  });
  EXPECT_EQ(result, EFBIG);
  EXPECT_EQ(read_text(path), "old");
  EXPECT_EQ(directory.entries(), 1u);
}

TEST(AtomicFile, AFullDiskLeavesTheOldFile) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x";
  const int result = run_in_child([&] {
    if (!mount_small_disk(directory.path(), "1m")) return kCannotMount;
    const std::vector<std::byte> bytes(600'000, std::byte{7});
    if (const int error = errno_of_write(path, bytes); error != 0) return error;
    const std::string old = read_text(path);
    const int error = errno_of_write(path, bytes);  // the new file does not fit beside the old one
    if (read_text(path) != old || directory.entries() != 1) return 201;
    return error;
  });
  if (result == kCannotMount) GTEST_SKIP() << "cannot mount a tmpfs here";
  EXPECT_EQ(result, ENOSPC);
}

TEST(AtomicFile, AReadOnlyDirectoryIsAClearError) {
  const TemporaryDirectory directory;
  write_text(directory / "x", "old");
  ASSERT_EQ(chmod(directory.path().c_str(), 0555), 0);
  EXPECT_EQ(run_in_child([&] {
              if (geteuid() == 0 && setuid(65534) != 0) return 1;  // root may write anywhere
              return errno_of_write(directory / "x", {});
            }),
            EACCES);
  ASSERT_EQ(chmod(directory.path().c_str(), 0700), 0);
  EXPECT_EQ(read_text(directory / "x"), "old");
}

bool is_directory(int fd) {
  struct stat status{};
  return fstat(fd, &status) == 0 && S_ISDIR(status.st_mode);
}

TEST(AtomicFile, SyncsTheFileBeforeAndTheDirectoryAfterTheRename) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x";
  write_text(path, "old");
  std::vector<std::string> calls;
  const ScopedHook hook(fsync_hook, [&](int fd) {
    calls.push_back((is_directory(fd) ? "directory " : "file ") + read_text(path));
    return -1;
  });
  const std::string text = "new";
  AtomicFile file(path);
  file.write(std::as_bytes(std::span(text)));
  file.commit();
  EXPECT_EQ(calls, (std::vector<std::string>{"file old", "directory new"}));
}

TEST(AtomicFile, AFailedSyncLeavesTheOldFile) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x";
  write_text(path, "old");
  const ScopedHook hook(fsync_hook, [](int) { return EIO; });
  EXPECT_EQ(errno_of_write(path, {}), EIO);
  EXPECT_EQ(read_text(path), "old");
  EXPECT_EQ(directory.entries(), 1u);
}

TEST(AtomicFile, AFailedCloseLeavesTheOldFile) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x";
  write_text(path, "old");
  {
    const ScopedHook hook(close_hook, [](int fd) { return is_directory(fd) ? -1 : EDQUOT; });
    EXPECT_EQ(errno_of_write(path, {}), EDQUOT);
  }
  EXPECT_EQ(read_text(path), "old");
  EXPECT_EQ(directory.entries(), 1u);
}

TEST(AtomicFile, AFailedSyncOfTheDirectorySaysWhatItMeans) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x";
  int error_of_directory = EIO;
  const ScopedHook hook(fsync_hook, [&](int fd) { return is_directory(fd) ? error_of_directory : -1; });
  std::string message;
  try {
    write_safetensors(path, {}, {});
  } catch (const SystemError& error) {
    message = error.what();
  }
  EXPECT_NE(message.find("wrote " + path + ", but a crash may undo it"), std::string::npos) << message;
  const SafetensorsFile file(path);

  error_of_directory = EINVAL;  // a file system without fsync for directories
  EXPECT_EQ(errno_of_write(path, {}), 0);
}

TEST(AtomicFile, SignalsInterruptNothing) {
  const TemporaryDirectory directory;
  int interruptions = 3;
  const ScopedHook sync(fsync_hook, [&](int) { return interruptions-- > 0 ? EINTR : -1; });
  const ScopedHook close(close_hook, [](int) { return EINTR; });
  EXPECT_EQ(errno_of_write(directory / "x", {}), 0);
  EXPECT_LT(interruptions, 0);
}

// A reader sees one whole file or the other, whatever writers do and whenever they die.
TEST(AtomicFile, ReadersSeeWholeFilesWhileWritersAreKilled) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x";
  const std::vector<std::byte> bytes(200'000, std::byte{1});
  write_safetensors(path, tensor_of(bytes), {});
  for (int round = 0; round < 20; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      for (unsigned i = 0;; ++i) {
        const std::vector<std::byte> next(200'000 - i % 7, static_cast<std::byte>(i));
        write_safetensors(path, tensor_of(next), {});
      }
    }
    usleep(static_cast<useconds_t>(1000 + round * 700));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    const SafetensorsFile file(path);
    const std::span<const std::byte> seen = file.find("a")->bytes;
    for (const std::byte each : seen) ASSERT_EQ(each, seen[0]);
  }
}

TEST(AtomicFile, ThreadsThatWriteOneNameEachWriteAWholeFile) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x";
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&path, i] {
      const std::vector<std::byte> bytes(10'000 + static_cast<size_t>(i), static_cast<std::byte>(i));
      for (int round = 0; round < 10; ++round) write_safetensors(path, tensor_of(bytes), {});
    });
  }
  for (std::thread& thread : threads) thread.join();
  const SafetensorsFile file(path);
  const std::span<const std::byte> seen = file.find("a")->bytes;
  EXPECT_EQ(seen.size(), 10'000 + std::to_integer<size_t>(seen[0]));
  EXPECT_EQ(directory.entries(), 1u);
}

}  // namespace
}  // namespace ng
