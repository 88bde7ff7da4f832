// io: safetensors files, read as if hostile and written so that a failure loses nothing; asynchronous direct files.
//
// Safetensors: 8-byte little-endian header length, JSON header, tensor bytes (github.com/huggingface/safetensors).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace ng {

// One tensor of a file. `dtype` is safetensors' own name: F32, BF16, U8, F8_E4M3, ...
struct FileTensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;  // inside the mapping, or the caller's memory when writing
};

// A memory-mapped safetensors file. Every length and offset is checked before use: header size, strict JSON (no
// duplicate keys), known dtypes, shape times width equal to the byte range without overflow, ranges that tile the
// data area without holes or overlaps. Move-only; const functions are thread-safe.
//
// The file must not be changed in place while it is open (a truncation makes reading the views fatal, as with any
// mapping); replacing it, as write_safetensors does, leaves the views as they are.
class SafetensorsFile {
 public:
  // Throws SystemError if it cannot be opened, FileCorrupt if it is not a valid safetensors file.
  explicit SafetensorsFile(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;

  // In file order. Views live as long as *this; in files that others wrote they need not be aligned.
  const std::vector<FileTensor>& tensors() const noexcept;
  const FileTensor* find(std::string_view name) const noexcept;
  const std::map<std::string, std::string>& metadata() const noexcept;
  const std::string& path() const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Writes `path` atomically: a temporary file in the same directory, fsync, rename, fsync of the directory. On any
// failure `path` is as it was and the temporary file is gone; only the last fsync can fail after the replacement, and
// its error says so. A symbolic link stays and the file that it leads to is replaced; a replaced file's mode is kept.
//
// Tensors are laid out by falling element size (then as given), so that all are aligned; the data begins on a multiple
// of 64 bytes. Bytes must not change during the call. Thread-safe. Throws SystemError (the operating system refuses)
// or InvalidArgument (a tensor that could not be read back: unknown dtype, bytes that its shape does not take, a name
// twice or not UTF-8; or `path` is neither absent nor a regular file).
void write_safetensors(const std::string& path, std::span<const FileTensor> tensors,
                       const std::map<std::string, std::string>& metadata);

// --- direct files -------------------------------------------------------------------------------------------

// How transfers reach the kernel.
enum class IoEngine : uint8_t {
  automatic,  // NARROWGAUGE_IO_ENGINE if set; else io_uring where the build and the kernel have it, else threads
  io_uring,
  threads,  // pread and pwrite on a few threads
};

// An open file with asynchronous transfers past the page cache (O_DIRECT) where the file system can, buffered where it
// cannot (tmpfs). Used by one thread at a time, whichever it is; not by a child of the process that opened it. The
// destructor waits for what is in flight.
class DirectFile {
 public:
  virtual ~DirectFile() = default;

  // Addresses, offsets and lengths of transfers are multiples of this: 512 to 4096, or 1 where transfers are buffered.
  virtual size_t alignment() const noexcept = 0;
  // Transfers that may be in flight; one more waits for the oldest.
  virtual int queue_depth() const noexcept = 0;

  // Memory that many transfers will use: registered with the kernel where that saves work. It must outlive the file.
  virtual void register_memory(std::span<std::byte> memory) = 0;

  // Start a transfer. The memory must stay as it is until wait() has returned `tag`. Throw InvalidArgument if the
  // transfer is not aligned. A read may reach beyond the end of the file within the last block of alignment() bytes;
  // what lies there reads as zeros.
  virtual void write(std::span<const std::byte> bytes, uint64_t offset, uint64_t tag) = 0;
  virtual void read(std::span<std::byte> bytes, uint64_t offset, uint64_t tag) = 0;

  // Waits until one transfer is done and returns its tag. Throws SystemError (path, offset, length, errno) if it
  // failed: EIO for a write that the kernel cuts short without progress; for a read beyond the end of the file
  // FileCorrupt. Interrupted and short transfers are continued. After an error the file's other transfers still
  // complete: wait for them, or destroy the file, before their memory goes. pre: in_flight() > 0.
  virtual uint64_t wait() = 0;
  virtual int in_flight() const noexcept = 0;

  // Reserves disk space for [0, bytes), so that a full disk is found before the writing; ENOSPC. The file becomes at
  // least that long. Does nothing where the file system has no such call.
  virtual void preallocate(uint64_t bytes) = 0;
  // Waits for what is in flight, then cuts or extends the file.
  virtual void truncate(uint64_t bytes) = 0;
  // Waits for what is in flight, then makes contents and length durable. Throws the first failure that wait() has not
  // reported. After a failed sync all later ones fail too: the kernel may have dropped the bytes.
  virtual void sync() = 0;
  virtual uint64_t size() const = 0;
  // Waits and closes. Throws the first failure that wait() has not reported, or what only close() reports. The
  // destructor closes too, silently.
  virtual void close() = 0;

  // "io_uring", "io_uring, buffered", "threads" or "threads, buffered".
  virtual std::string engine() const = 0;
};

struct DirectFileOptions {
  IoEngine engine = IoEngine::automatic;
  int queue_depth = 8;
  bool direct = true;  // false: through the page cache
};

enum class OpenMode : uint8_t {
  read,    // an existing regular file; a symbolic link as the last part of the path is refused (ELOOP)
  create,  // a new file, read and write; EEXIST if the name is taken
  update,  // an existing or new file, read and write
};

// Throws SystemError, and InvalidArgument if `engine` is io_uring and it is not available.
std::unique_ptr<DirectFile> open_direct(const std::string& path, OpenMode mode, const DirectFileOptions& options = {});

// Why io_uring is not used, or "" if it is: "narrowgauge was built without liburing", "the kernel refuses it: ...".
std::string why_no_io_uring();

}  // namespace ng
