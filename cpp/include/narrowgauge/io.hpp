// io: safetensors files, read as if hostile and written so that a failure loses nothing; asynchronous direct files; and
// the file tier, which keeps buffers on one.
//
// Safetensors: 8-byte little-endian header length, JSON header, tensor bytes (github.com/huggingface/safetensors).
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <future>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "narrowgauge/memory.hpp"

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

// A transfer that is over, and how it failed, if it did.
struct Completion {
  uint64_t tag = 0;
  std::exception_ptr error;
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

  // Memory that many transfers will use: registered with the kernel where that saves work. It must outlive the file and
  // keep its pages (no MADV_DONTNEED, no new mapping in its place). Where the limit on locked memory forbids it,
  // transfers work all the same and engine() says so.
  virtual void register_memory(std::span<std::byte> memory) = 0;

  // Start a transfer. The memory must stay as it is until wait() has returned `tag`. Throw InvalidArgument if the
  // transfer is not aligned. A read may reach beyond the end of the file within the last block of alignment() bytes;
  // what lies there reads as zeros.
  virtual void write(std::span<const std::byte> bytes, uint64_t offset, uint64_t tag) = 0;
  virtual void read(std::span<std::byte> bytes, uint64_t offset, uint64_t tag) = 0;

  // Waits until one transfer is over. Throws only if that cannot be done: the file is closed, or not this process's.
  // pre: in_flight() > 0.
  virtual Completion wait_any() = 0;

  // Waits until one transfer is done and returns its tag. Throws SystemError (path, offset, length, errno) if it
  // failed: EIO for a write that the kernel cuts short without progress; for a read beyond the end of the file
  // FileCorrupt. Interrupted and short transfers are continued. After an error the file's other transfers still
  // complete: wait for them, or destroy the file, before their memory goes. pre: in_flight() > 0.
  uint64_t wait() {
    const Completion over = wait_any();
    if (over.error) std::rethrow_exception(over.error);
    return over.tag;
  }
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

  // "io_uring", "io_uring, buffered", "threads" or "threads, buffered"; and why memory could not be registered.
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

// --- the file tier ------------------------------------------------------------------------------------------

// Memory's slow tier: buffers on a file, each under a key of the caller's; a sleeping HostPool's sink. It is scratch
// space, not storage: nothing is made durable. Thread-safe; a thread of its own moves the bytes, in the order of the
// calls, pieces of several buffers at a time. Memory that is aligned to the file's alignment() is transferred in place,
// the rest through staging.
//
// Failures of a transfer are thrown by its future, or by put() and get(). A buffer whose put failed fails every get.
class FileTier final : public PageSink {
 public:
  static constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();

  // Makes a new file at `path` and removes its name at once: however the process ends, the space comes back. `limit` is
  // the most bytes that it takes on disk. Throws SystemError; EEXIST if the name is taken.
  explicit FileTier(const std::string& path, uint64_t limit = kNoLimit, const DirectFileOptions& options = {});
  // On a file that is open and the tier's alone.
  explicit FileTier(std::unique_ptr<DirectFile> file, uint64_t limit = kNoLimit);
  // Waits for what was asked for.
  ~FileTier() override;
  FileTier(const FileTier&) = delete;
  FileTier& operator=(const FileTier&) = delete;

  // Keeps a copy of `bytes` under `key`, in place of what was there. The memory must stay as it is until the future is
  // ready. Throws OutOfMemory, with the request and what is in use, beyond the limit; the old buffer is gone then.
  std::future<void> put_async(uint64_t key, std::span<const std::byte> bytes);
  // Fills `out`, which must be as long as what was put. Throws InvalidArgument if there is no such buffer.
  std::future<void> get_async(uint64_t key, std::span<std::byte> out);
  void put(uint64_t key, std::span<const std::byte> bytes) override { put_async(key, bytes).get(); }
  void get(uint64_t key, std::span<std::byte> out) override { get_async(key, out).get(); }
  // Forgets a buffer, if there is one; transfers that were asked for before still complete.
  void drop(uint64_t key);

  // Bytes of the buffer under `key`, if there is one.
  std::optional<size_t> size(uint64_t key) const;
  // Bytes that buffers take on disk.
  uint64_t in_use() const;

  // Waits for what was asked for and gives the space back. Later calls throw InvalidArgument.
  void close();

 private:
  friend class OffloadStream;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Buffers of a tier passed through a few staging buffers in an order that is known in advance: while one is used, the
// next are being read. Used by one thread at a time.
//
//   OffloadStream stream(tier, pool, {3, 1, 2});
//   while (std::optional<OffloadStream::Chunk> chunk = stream.next()) use(chunk->bytes());
//
// Giving up a chunk starts the read of a later one into its buffer; with `write_back` the chunk is first written under
// its key again. Neither waits for anything. A key may come more than once; what is written back is what is read next.
class OffloadStream {
 public:
  struct Options {
    int buffers = 2;  // each as long as the longest of the plan
    bool write_back = false;
  };

  // One buffer of the plan, in the caller's hands until destruction.
  class Chunk {
   public:
    Chunk(Chunk&& other) noexcept
        : stream_(std::exchange(other.stream_, nullptr)),
          buffer_(other.buffer_),
          key_(other.key_),
          bytes_(other.bytes_) {}
    Chunk& operator=(Chunk&&) = delete;
    ~Chunk();

    uint64_t key() const noexcept { return key_; }
    std::span<std::byte> bytes() const noexcept { return bytes_; }

   private:
    friend class OffloadStream;
    Chunk(OffloadStream* stream, size_t buffer, uint64_t key, std::span<std::byte> bytes)
        : stream_(stream), buffer_(buffer), key_(key), bytes_(bytes) {}
    OffloadStream* stream_;
    size_t buffer_;
    uint64_t key_;
    std::span<std::byte> bytes_;
  };

  // Starts reading. `tier` and `pool` must outlive the stream. Throws InvalidArgument if a key of the plan has no
  // buffer in the tier, OutOfMemory if the pool has not enough.
  OffloadStream(FileTier& tier, Pool& pool, std::vector<uint64_t> plan, const Options& options);
  OffloadStream(FileTier& tier, Pool& pool, std::vector<uint64_t> plan)
      : OffloadStream(tier, pool, std::move(plan), {}) {}
  // Waits for what is under way. pre: all chunks are gone.
  ~OffloadStream();
  OffloadStream(const OffloadStream&) = delete;
  OffloadStream& operator=(const OffloadStream&) = delete;

  // The next chunk of the plan, as soon as it is read; empty after the last. Throws what its read failed with, and goes
  // on with the one after it at the next call; or what a write failed with that was under way. Throws InvalidArgument
  // if the caller holds all buffers.
  std::optional<Chunk> next();
  // Waits until all that was given up is written, and throws the first failure that next() has not.
  void finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace ng
