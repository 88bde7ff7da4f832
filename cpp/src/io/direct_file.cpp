// Opening a file for direct transfers, and the life of a transfer whatever the engine.
#include "io/direct_file.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <system_error>
#include <utility>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

// No device in use has larger blocks: what is assumed where the kernel does not say.
constexpr size_t kMaxAlignment = 4096;
constexpr size_t kMinAlignment = 512;
// EAGAIN and EINTR in a row after which they count as failures.
constexpr int kMaxIdle = 1000;

constexpr const char* kEngineVariable = "NARROWGAUGE_IO_ENGINE";

IoEngine forced_engine() {
  const char* value = std::getenv(kEngineVariable);
  const std::string_view name = value == nullptr ? "" : value;
  if (name.empty()) return IoEngine::automatic;
  if (name == "threads") return IoEngine::threads;
  NG_CHECK(name == "io_uring", InvalidArgument, kEngineVariable, " is '", name, "', expected io_uring or threads");
  return IoEngine::io_uring;
}

// What O_DIRECT needs here, or 1 if the file has none.
size_t direct_alignment(int fd) {
#ifdef STATX_DIOALIGN
  struct statx status{};
  if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && (status.stx_mask & STATX_DIOALIGN) != 0) {
    if (status.stx_dio_offset_align == 0) return 1;
    return std::max<size_t>({kMinAlignment, status.stx_dio_mem_align, status.stx_dio_offset_align});
  }
#endif
  // Newer kernels accept O_DIRECT on tmpfs and then use the page cache, which is all that there is.
  struct statfs system{};
  if (fstatfs(fd, &system) == 0 && (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC)) return 1;
  return kMaxAlignment;
}

OpenedFile open_file(const std::string& path, OpenMode mode, bool direct) {
  NG_CHECK(path.find('\0') == std::string::npos, InvalidArgument, "the path has a NUL byte: ", path.c_str());
  const int how = mode == OpenMode::read     ? O_RDONLY | O_NOFOLLOW
                  : mode == OpenMode::create ? O_RDWR | O_CREAT | O_EXCL
                                             : O_RDWR | O_CREAT;
  // Not blocking, in case a pipe lies there.
  OpenedFile file{FileDescriptor(retry([&] { return open(path.c_str(), how | O_NONBLOCK | O_CLOEXEC, 0666); })), path};
  const int fd = file.descriptor.get();
  if (fd < 0) throw_system_error(errno, mode == OpenMode::create ? "create" : "open", path);
  struct stat status{};
  if (fstat(fd, &status) != 0) throw_system_error(errno, "open", path);
  NG_CHECK(S_ISREG(status.st_mode), InvalidArgument, "cannot open ", path, ": it is not a regular file");

  if (direct) file.alignment = direct_alignment(fd);
  const int flags = fcntl(fd, F_GETFL) & ~O_NONBLOCK;
  if (file.alignment > 1 && fcntl(fd, F_SETFL, flags | O_DIRECT) != 0) file.alignment = 1;
  if (file.alignment == 1 && fcntl(fd, F_SETFL, flags) != 0) throw_system_error(errno, "open", path);
  return file;
}

}  // namespace

EngineFile::EngineFile(const char* name, OpenedFile&& file, int queue_depth, Interference&& interference)
    : name_(name),
      file_(std::move(file)),
      queue_depth_(queue_depth),
      interference_(std::move(interference)),
      owner_(getpid()),
      slots_(static_cast<size_t>(queue_depth)) {
  for (Transfer& slot : slots_) free_.push_back(&slot);
}

bool EngineFile::is_owner() const noexcept { return getpid() == owner_; }

bool EngineFile::is_direct() const noexcept { return (fcntl(descriptor(), F_GETFL) & O_DIRECT) != 0; }

// For good: a file system that refuses direct transfers once would refuse them again.
void EngineFile::leave_direct() const noexcept {
  fcntl(descriptor(), F_SETFL, fcntl(descriptor(), F_GETFL) & ~O_DIRECT);
}

void EngineFile::check_usable() const {
  NG_CHECK(is_owner(), Error, file_.path, " was opened before fork(); the child cannot use it");
  NG_CHECK(descriptor() >= 0, InvalidArgument, file_.path, " is closed");
}

void EngineFile::register_memory(std::span<std::byte> /*memory*/) { check_usable(); }

void EngineFile::write(std::span<const std::byte> bytes, uint64_t offset, uint64_t tag) {
  begin({.data = const_cast<std::byte*>(bytes.data()),
         .length = bytes.size(),
         .offset = offset,
         .tag = tag,
         .is_write = true});
}

void EngineFile::read(std::span<std::byte> bytes, uint64_t offset, uint64_t tag) {
  begin({.data = bytes.data(), .length = bytes.size(), .offset = offset, .tag = tag});
}

void EngineFile::begin(const Transfer& transfer) {
  check_usable();
  const auto address = reinterpret_cast<uintptr_t>(transfer.data);
  NG_CHECK((address | transfer.offset | transfer.length) % file_.alignment == 0, InvalidArgument,
           transfer.is_write ? "write to " : "read from ", file_.path, ": address ",
           static_cast<const void*>(transfer.data), ", offset ", transfer.offset, ", length ", transfer.length,
           "; expected multiples of ", file_.alignment);
  constexpr uint64_t kEnd = uint64_t{1} << 62;  // far from where file offsets overflow
  NG_CHECK(transfer.offset < kEnd && transfer.length < kEnd, InvalidArgument,
           transfer.is_write ? "write to " : "read from ", file_.path, ": offset ", transfer.offset, ", length ",
           transfer.length, "; expected less than ", kEnd);
  if (transfer.length == 0) {
    over_.push_back(transfer);
    return;
  }
  if (free_.empty()) retire_one();
  Transfer& slot = *free_.back();
  slot = transfer;
  start(slot);
  free_.pop_back();
  ++running_;
}

size_t EngineFile::next_request(const Transfer& transfer) const noexcept {
  return std::min(transfer.length - transfer.done, interference_.largest_request);
}

bool EngineFile::advance(Transfer& transfer, int64_t answer) {
  if (interference_.answer) answer = interference_.answer(transfer, answer);
  if (answer < 0) {
    const int error = static_cast<int>(-answer);
    // ECANCELED: the thread that asked has ended, and the kernel gave up what it had queued for it.
    if ((error == EINTR || error == EAGAIN || error == ECANCELED) && ++transfer.idle < kMaxIdle) return false;
    // Some file systems accept O_DIRECT and refuse the transfer.
    if (error == EINVAL && file_.alignment > 1 && !std::exchange(transfer.refused, true)) {
      leave_direct();
      return false;
    }
    transfer.error = error;
    return true;
  }
  transfer.done += static_cast<size_t>(answer);
  if (transfer.done == transfer.length) return true;
  const bool aligned = transfer.done % file_.alignment == 0;
  if (!transfer.is_write && (answer == 0 || !aligned) && settle_end(transfer)) return true;
  if (answer == 0) {
    transfer.error = EIO;
    return true;
  }
  transfer.idle = 0;
  if (!aligned) leave_direct();
  return false;
}

// If the file ends where the read has come to: its last, partial block counts as whole, with zeros behind the end.
bool EngineFile::settle_end(Transfer& transfer) const {
  struct stat status{};
  if (fstat(descriptor(), &status) != 0) {
    transfer.error = errno;
    return true;
  }
  const auto end = static_cast<uint64_t>(status.st_size);
  if (transfer.offset + transfer.done < end) return false;
  const uint64_t last_block = (end + file_.alignment - 1) / file_.alignment * file_.alignment;
  if (transfer.offset < end && transfer.offset + transfer.length <= last_block) {
    std::memset(transfer.data + transfer.done, 0, transfer.length - transfer.done);
    transfer.done = transfer.length;
  } else {
    transfer.beyond_end = true;
  }
  return true;
}

void EngineFile::transfer_now(Transfer& transfer) {
  while (true) {
    std::byte* data = transfer.data + transfer.done;
    const auto offset = static_cast<off_t>(transfer.offset + transfer.done);
    const size_t request = next_request(transfer);
    const ssize_t answer =
        transfer.is_write ? pwrite(descriptor(), data, request, offset) : pread(descriptor(), data, request, offset);
    if (advance(transfer, answer < 0 ? -errno : answer)) return;
  }
}

Completion EngineFile::wait_any() {
  NG_CHECK(in_flight() > 0, InvalidArgument, "wait on ", file_.path, ": nothing is in flight");
  if (over_.empty()) {
    check_usable();
    retire_one();
  }
  const Transfer transfer = over_.front();
  over_.pop_front();
  return {transfer.tag, failure(transfer)};
}

std::exception_ptr EngineFile::failure(const Transfer& transfer) const {
  if (transfer.error == 0 && !transfer.beyond_end) return nullptr;
  const std::string what = concat("cannot ", transfer.is_write ? "write " : "read ", transfer.length,
                                  " bytes at offset ", transfer.offset, " of ", file_.path, ": ");
  if (transfer.beyond_end) return std::make_exception_ptr(FileCorrupt(what + "the file ends before"));
  return std::make_exception_ptr(SystemError(transfer.error, what + std::generic_category().message(transfer.error)));
}

void EngineFile::retire_one() {
  Transfer& transfer = reap();
  over_.push_back(transfer);
  free_.push_back(&transfer);
  --running_;
}

void EngineFile::drain() {
  while (running_ > 0) retire_one();
}

void EngineFile::throw_first_failure() {
  for (auto transfer = over_.begin(); transfer != over_.end(); ++transfer) {
    if (const std::exception_ptr error = failure(*transfer)) {
      over_.erase(transfer);
      std::rethrow_exception(error);
    }
  }
}

void EngineFile::preallocate(uint64_t bytes) {
  check_usable();
  if (bytes == 0) return;
  if (retry([&] { return fallocate(descriptor(), 0, 0, static_cast<off_t>(bytes)); }) == 0) return;
  if (errno != EOPNOTSUPP && errno != ENOSYS) throw_system_error(errno, "reserve space for", file_.path);
}

void EngineFile::truncate(uint64_t bytes) {
  check_usable();
  drain();
  if (retry([&] { return ftruncate(descriptor(), static_cast<off_t>(bytes)); }) != 0) {
    throw_system_error(errno, "set the length of", file_.path);
  }
}

void EngineFile::sync() {
  check_usable();
  drain();
  throw_first_failure();
  // After a failed fsync Linux marks the pages clean: a later one would succeed without their bytes.
  if (sync_error_ == 0 && retry([&] { return fsync(descriptor()); }) != 0) sync_error_ = errno;
  if (sync_error_ != 0) throw_system_error(sync_error_, "make durable", file_.path);
}

uint64_t EngineFile::size() const {
  check_usable();
  struct stat status{};
  if (fstat(descriptor(), &status) != 0) throw_system_error(errno, "ask the length of", file_.path);
  return static_cast<uint64_t>(status.st_size);
}

void EngineFile::close() {
  check_usable();
  drain();
  release();
  const int error = file_.descriptor.close();
  throw_first_failure();
  if (error != 0) throw_system_error(error, "close", file_.path);
}

std::string EngineFile::engine() const {
  check_usable();
  return is_direct() ? name_ : concat(name_, ", buffered");
}

std::unique_ptr<DirectFile> open_direct(const std::string& path, OpenMode mode, const DirectFileOptions& options) {
  return open_direct(path, mode, options, {});
}

std::unique_ptr<DirectFile> open_direct(const std::string& path, OpenMode mode, const DirectFileOptions& options,
                                        Interference interference) {
  constexpr int kMaxQueueDepth = 1024;
  NG_CHECK(options.queue_depth >= 1 && options.queue_depth <= kMaxQueueDepth, InvalidArgument, "queue depth ",
           options.queue_depth, " for ", path, ", expected 1 to ", kMaxQueueDepth);
  const IoEngine engine = options.engine == IoEngine::automatic ? forced_engine() : options.engine;
  OpenedFile file = open_file(path, mode, options.direct);
  try {
    if (engine != IoEngine::threads) {
      std::string why;
      if (auto with_ring = open_uring(file, options.queue_depth, interference, why)) return with_ring;
      NG_CHECK(engine != IoEngine::io_uring, InvalidArgument, "cannot open ", path, " with io_uring: ", why);
    }
    return open_threads(std::move(file), options.queue_depth, std::move(interference));
  } catch (...) {
    if (mode == OpenMode::create) unlink(path.c_str());
    throw;
  }
}

std::string why_no_io_uring() {
  return forced_engine() == IoEngine::threads ? concat(kEngineVariable, "=threads") : probe_uring();
}

}  // namespace ng
