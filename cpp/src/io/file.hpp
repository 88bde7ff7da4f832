// Files as the io room uses them: an owned descriptor, whole reads, a mapping, and a file that is replaced all at once.
//
// Errors of the operating system are SystemError with the path and errno. Not buffered, not direct I/O.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

namespace ng {

// Throws SystemError: "cannot <action> <path>: <what errno means>".
[[noreturn]] void throw_system_error(int errno_value, const char* action, const std::string& path);

// Calls f until it is not interrupted by a signal.
template <typename F>
auto retry(const F& f) {
  while (true) {
    const auto result = f();
    if (result >= 0 || errno != EINTR) return result;
  }
}

// Owns a descriptor; -1 is none. Move-only.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) noexcept : fd_(fd) {}
  ~FileDescriptor() { close(); }
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }

  int get() const noexcept { return fd_; }
  // Returns 0 or errno: some file systems report a failed write only here.
  int close() noexcept;

 private:
  int fd_ = -1;
};

// Reads until `out` is full or the file ends; returns the bytes read.
size_t read_at(const FileDescriptor& file, std::span<std::byte> out, uint64_t offset, const std::string& path);

// A whole file, mapped privately and read-only. Move-only.
class Mapping {
 public:
  Mapping() = default;
  // Throws SystemError that names `path`.
  Mapping(const FileDescriptor& file, size_t size, const std::string& path);
  ~Mapping();
  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  std::span<const std::byte> bytes() const noexcept { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// An existing regular file, open for reading, and its size. With `follow` false a symbolic link as the last part of the
// path is refused (ELOOP). Throws SystemError if it cannot be opened, FileCorrupt if it is not a regular file.
struct ReadableFile {
  FileDescriptor file;
  uint64_t size = 0;
};
ReadableFile open_readable(const std::string& path, bool follow = true);

// A regular file that appears under its name complete or not at all. Bytes go to a temporary file beside it, named
// `.narrowgauge-<random>.tmp`; commit() makes them durable and renames. Destruction without commit() removes the
// temporary file and leaves `path` as it was. A new file's mode follows the umask, a replaced one's is kept. If `path`
// is a symbolic link, the file that it leads to is replaced and the link stays. Not thread-safe.
class AtomicFile {
 public:
  // Throws SystemError if the directory cannot be written, `path` is a directory or a link that leads nowhere;
  // InvalidArgument if it is another thing that is not a regular file, such as a device.
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);

  // fsync, close, rename, fsync of the directory. Only the last can fail after `path` was replaced; its error says so.
  void commit();

 private:
  std::string path_;  // as given, for messages
  std::string name_;  // within the directory
  std::string temporary_;
  FileDescriptor directory_;
  FileDescriptor file_;
};

}  // namespace ng
