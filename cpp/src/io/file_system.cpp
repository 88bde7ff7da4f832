// The operating system's directories and files.
#include "io/file_system.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <system_error>

#include "io/file.hpp"
#include "narrowgauge/error.hpp"

namespace ng {
namespace {

class NativeFileSystem final : public FileSystem {
 public:
  explicit NativeFileSystem(IoEngine engine) : options_{.engine = engine} {}

  std::unique_ptr<DirectFile> create(const std::string& path) override {
    return open_direct(path, OpenMode::create, options_);
  }

  void make_directory(const std::string& path) override {
    if (mkdir(path.c_str(), 0777) != 0) throw_system_error(errno, "make the directory", path);
  }

  void rename(const std::string& from, const std::string& to) override {
    if (renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return;
    if (errno == EINVAL || errno == ENOSYS) {
      // A file system without the flag. Between the look and the rename another process could take the name; who
      // needs more holds a lock.
      struct stat status{};
      if (lstat(to.c_str(), &status) == 0) {
        errno = EEXIST;
      } else if (errno == ENOENT && ::rename(from.c_str(), to.c_str()) == 0) {
        return;
      }
    }
    throw_system_error(errno, "rename", concat(from, " to ", to));
  }

  void exchange(const std::string& a, const std::string& b) override {
    if (renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) != 0) {
      throw_system_error(errno, "exchange", concat(a, " and ", b));
    }
  }

  void remove(const std::string& path) override {
    if (std::remove(path.c_str()) != 0) throw_system_error(errno, "remove", path);
  }

  void sync_directory(const std::string& path) override {
    const FileDescriptor directory(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (directory.get() < 0) throw_system_error(errno, "open the directory", path);
    // EINVAL: a file system without fsync for directories.
    if (retry([&] { return fsync(directory.get()); }) != 0 && errno != EINVAL) {
      throw_system_error(errno, "make durable the directory", path);
    }
  }

  std::vector<std::string> list(const std::string& path) override {
    std::vector<std::string> names;
    std::error_code error;
    std::filesystem::directory_iterator entry(path, error);
    while (!error && entry != std::filesystem::directory_iterator()) {
      names.push_back(entry->path().filename().string());
      entry.increment(error);
    }
    if (error) throw_system_error(error.value(), "list", path);
    std::sort(names.begin(), names.end());
    return names;
  }

 private:
  DirectFileOptions options_;
};

}  // namespace

std::unique_ptr<FileSystem> native_file_system(IoEngine engine) { return std::make_unique<NativeFileSystem>(engine); }

}  // namespace ng
