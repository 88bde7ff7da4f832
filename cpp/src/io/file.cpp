// Descriptors, whole reads and atomic replacement over POSIX calls.
#include "io/file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <system_error>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

// Linux transfers at most 0x7ffff000 bytes per call; a round number below keeps the offsets aligned.
constexpr size_t kMaxTransfer = size_t{1} << 30;

std::string random_name() {
  uint64_t number = 0;
  if (retry([&] { return getrandom(&number, sizeof number, 0); }) != sizeof number) {
    throw_system_error(errno, "read random bytes for", "a temporary file's name");
  }
  std::string out = ".narrowgauge-";
  for (int shift = 60; shift >= 0; shift -= 4) out += "0123456789abcdef"[number >> shift & 15];
  return out + ".tmp";
}

}  // namespace

void throw_system_error(int errno_value, const char* action, const std::string& path) {
  throw SystemError(errno_value,
                    concat("cannot ", action, " ", path, ": ", std::generic_category().message(errno_value)));
}

int FileDescriptor::close() noexcept {
  const int fd = std::exchange(fd_, -1);
  // On Linux the descriptor is gone even when a signal interrupts close().
  return fd < 0 || ::close(fd) == 0 || errno == EINTR ? 0 : errno;
}

size_t read_at(const FileDescriptor& file, std::span<std::byte> out, uint64_t offset, const std::string& path) {
  size_t done = 0;
  while (done < out.size()) {
    const size_t want = std::min(out.size() - done, kMaxTransfer);
    const ssize_t got =
        retry([&] { return pread(file.get(), out.data() + done, want, static_cast<off_t>(offset + done)); });
    if (got < 0) throw_system_error(errno, "read", path);
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  return done;
}

Mapping::Mapping(const FileDescriptor& file, size_t size, const std::string& path) {
  if (size == 0) return;
  void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (data == MAP_FAILED) throw_system_error(errno, "map", path);
  data_ = data;
  size_ = size;
}

Mapping::~Mapping() {
  if (size_ > 0) munmap(data_, size_);
}

ReadableFile open_readable(const std::string& path, bool follow) {
  NG_CHECK(path.find('\0') == std::string::npos, InvalidArgument, "the path has a NUL byte: ", path.c_str());
  // O_NONBLOCK: opening a FIFO must fail below, not wait for its writer.
  const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | (follow ? 0 : O_NOFOLLOW);
  ReadableFile out{FileDescriptor(open(path.c_str(), flags))};
  struct stat status{};
  if (out.file.get() < 0 || fstat(out.file.get(), &status) != 0) throw_system_error(errno, "open", path);
  if (S_ISDIR(status.st_mode)) throw_system_error(EISDIR, "open", path);
  NG_CHECK(S_ISREG(status.st_mode), FileCorrupt, path, ": not a regular file");
  out.size = static_cast<uint64_t>(status.st_size);
  return out;
}

AtomicFile::AtomicFile(const std::string& path) : path_(path) {
  NG_CHECK(path.find('\0') == std::string::npos, InvalidArgument, "the path has a NUL byte: ", path.c_str());
  mode_t mode = 0666;
  std::string target = path;
  struct stat status{};
  const bool exists = lstat(path.c_str(), &status) == 0;
  if (!exists && errno != ENOENT) throw_system_error(errno, "write", path);
  if (exists) {
    const std::unique_ptr<char, decltype(&std::free)> resolved(realpath(path.c_str(), nullptr), &std::free);
    if (!resolved || stat(resolved.get(), &status) != 0) throw_system_error(errno, "write", path);
    if (S_ISDIR(status.st_mode)) throw_system_error(EISDIR, "write", path);
    NG_CHECK(S_ISREG(status.st_mode), InvalidArgument, "cannot write ", path, ": it exists and is not a regular file");
    target = resolved.get();
    mode = status.st_mode & 0777;
  }

  const size_t slash = target.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : target.substr(0, slash + 1);
  name_ = slash == std::string::npos ? target : target.substr(slash + 1);
  if (name_.empty()) throw_system_error(path.empty() ? ENOENT : EISDIR, "write", path);
  directory_ = FileDescriptor(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory_.get() < 0) throw_system_error(errno, "open the directory of", path);

  do {
    temporary_ = random_name();
    file_ = FileDescriptor(retry([&] {
      return openat(directory_.get(), temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
    }));
  } while (file_.get() < 0 && errno == EEXIST);
  if (file_.get() < 0) {
    temporary_.clear();
    throw_system_error(errno, "create a temporary file beside", path);
  }
  // The destructor does not run if a constructor throws.
  if (exists && fchmod(file_.get(), mode) != 0) {
    const int error = errno;
    unlinkat(directory_.get(), temporary_.c_str(), 0);
    throw_system_error(error, "keep the mode of", path);
  }
}

AtomicFile::~AtomicFile() {
  if (!temporary_.empty()) unlinkat(directory_.get(), temporary_.c_str(), 0);
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const size_t want = std::min(bytes.size(), kMaxTransfer);
    const ssize_t put = retry([&] { return ::write(file_.get(), bytes.data(), want); });
    if (put <= 0) throw_system_error(put < 0 ? errno : EIO, "write", path_);
    bytes = bytes.subspan(static_cast<size_t>(put));
  }
}

void AtomicFile::commit() {
  if (retry([&] { return fsync(file_.get()); }) != 0) throw_system_error(errno, "write", path_);
  if (const int error = file_.close(); error != 0) throw_system_error(error, "write", path_);
  if (renameat(directory_.get(), temporary_.c_str(), directory_.get(), name_.c_str()) != 0) {
    throw_system_error(errno, "replace", path_);
  }
  temporary_.clear();
  // EINVAL: a file system without fsync for directories.
  if (retry([&] { return fsync(directory_.get()); }) != 0 && errno != EINVAL) {
    const int error = errno;
    throw SystemError(error, concat("wrote ", path_, ", but a crash may undo it: cannot fsync its directory: ",
                                    std::generic_category().message(error)));
  }
}

}  // namespace ng
