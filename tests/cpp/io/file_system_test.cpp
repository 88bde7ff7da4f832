// The operating system's file system behind the seam.
#include "io/file_system.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <vector>

#include "io/system.hpp"
#include "io/temporary_directory.hpp"
#include "narrowgauge/error.hpp"

namespace ng {
namespace {

using Names = std::vector<std::string>;

class NativeFileSystemTest : public testing::Test {
 protected:
  std::string at(const std::string& name) const { return directory_ / name; }
  Names names() const { return system_->list(directory_.path()); }

  TemporaryDirectory directory_;
  std::unique_ptr<FileSystem> system_ = native_file_system();
};

TEST_F(NativeFileSystemTest, CreatesOnlyWhatIsNew) {
  system_->create(at("x"));
  EXPECT_EQ(errno_of([&] { system_->create(at("x")); }), EEXIST);
  std::filesystem::create_symlink("nowhere", at("dangling"));
  EXPECT_EQ(errno_of([&] { system_->create(at("dangling")); }), EEXIST);
  EXPECT_EQ(errno_of([&] { system_->create(at("missing/x")); }), ENOENT);
  system_->make_directory(at("d"));
  EXPECT_EQ(errno_of([&] { system_->make_directory(at("d")); }), EEXIST);
  EXPECT_EQ(errno_of([&] { system_->make_directory(at("missing/d")); }), ENOENT);
  EXPECT_EQ(names(), (Names{"d", "dangling", "x"}));
}

TEST_F(NativeFileSystemTest, RenamesNeverReplace) {
  write_text(at("a"), "a");
  write_text(at("b"), "b");
  system_->make_directory(at("empty"));
  system_->make_directory(at("other"));
  EXPECT_EQ(errno_of([&] { system_->rename(at("a"), at("b")); }), EEXIST);
  EXPECT_EQ(errno_of([&] { system_->rename(at("other"), at("empty")); }), EEXIST);
  EXPECT_EQ(errno_of([&] { system_->rename(at("missing"), at("c")); }), ENOENT);
  EXPECT_EQ(read_text(at("b")), "b");
  system_->rename(at("a"), at("c"));
  system_->rename(at("other"), at("another"));
  EXPECT_EQ(read_text(at("c")), "a");
  EXPECT_EQ(names(), (Names{"another", "b", "c", "empty"}));
}

TEST_F(NativeFileSystemTest, ExchangesWhatExists) {
  system_->make_directory(at("a"));
  system_->make_directory(at("b"));
  write_text(at("a/x"), "");
  system_->exchange(at("a"), at("b"));
  EXPECT_EQ(system_->list(at("b")), Names{"x"});
  EXPECT_EQ(system_->list(at("a")), Names{});
  EXPECT_EQ(errno_of([&] { system_->exchange(at("a"), at("missing")); }), ENOENT);
}

TEST_F(NativeFileSystemTest, RemovesFilesAndEmptyDirectories) {
  system_->make_directory(at("d"));
  write_text(at("d/x"), "");
  EXPECT_EQ(errno_of([&] { system_->remove(at("d")); }), ENOTEMPTY);
  system_->remove(at("d/x"));
  system_->remove(at("d"));
  EXPECT_EQ(errno_of([&] { system_->remove(at("d")); }), ENOENT);
  EXPECT_EQ(errno_of([&] { system_->list(at("d")); }), ENOENT);
}

TEST_F(NativeFileSystemTest, SyncsADirectoryAndSaysWhereItCannot) {
  struct stat expected{};
  ASSERT_EQ(stat(directory_.path().c_str(), &expected), 0);
  int answer = -1;
  int calls = 0;
  const ScopedHook hook(fsync_hook, [&](int fd) {
    struct stat seen{};
    EXPECT_EQ(fstat(fd, &seen), 0);
    EXPECT_EQ(seen.st_ino, expected.st_ino);
    return calls++ == 0 ? EINTR : answer;
  });
  system_->sync_directory(directory_.path());
  EXPECT_EQ(calls, 2);
  answer = EIO;
  EXPECT_EQ(errno_of([&] { system_->sync_directory(directory_.path()); }), EIO);
  answer = EINVAL;  // a file system without fsync for directories
  system_->sync_directory(directory_.path());
  EXPECT_EQ(errno_of([&] { system_->sync_directory(at("missing")); }), ENOENT);
}

}  // namespace
}  // namespace ng
