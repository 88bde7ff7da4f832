// What the engines of DirectFile share: the open file, its transfers, and what follows from each answer of the kernel.
//
// An engine only carries requests: it asks what to request next for a transfer and hands back each answer. What decides
// about correctness (short transfers, the end of a file, refusals, errors) is here, once.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "io/file.hpp"
#include "narrowgauge/io.hpp"

namespace ng {

// One read or write as the caller asked for it, and how far it has come.
struct Transfer {
  std::byte* data = nullptr;  // a write does not change it
  size_t length = 0;
  uint64_t offset = 0;
  uint64_t tag = 0;
  bool is_write = false;

  size_t done = 0;
  int idle = 0;             // answers in a row without progress
  bool refused = false;     // EINVAL, once
  int error = 0;            // errno of the failure
  bool beyond_end = false;  // a read that failed because the file ends before
};

// For tests: what comes between an engine and the kernel.
struct Interference {
  // Linux cuts requests at 0x7ffff000 bytes; a power of two below keeps what follows aligned.
  size_t largest_request = size_t{1} << 30;
  // Replaces the kernel's answer (bytes or -errno). Called from any thread.
  std::function<int64_t(const Transfer&, int64_t answer)> answer = {};
};

// An open regular file, O_DIRECT set where it works.
struct OpenedFile {
  FileDescriptor descriptor;
  std::string path;
  size_t alignment = 1;
};

class EngineFile : public DirectFile {
 public:
  size_t alignment() const noexcept final { return file_.alignment; }
  int queue_depth() const noexcept final { return queue_depth_; }
  void register_memory(std::span<std::byte> memory) override;
  void write(std::span<const std::byte> bytes, uint64_t offset, uint64_t tag) final;
  void read(std::span<std::byte> bytes, uint64_t offset, uint64_t tag) final;
  Completion wait_any() final;
  int in_flight() const noexcept final { return running_ + static_cast<int>(over_.size()); }
  void preallocate(uint64_t bytes) final;
  void truncate(uint64_t bytes) final;
  void sync() final;
  uint64_t size() const final;
  void close() final;
  std::string engine() const override;

 protected:
  EngineFile(const char* name, OpenedFile&& file, int queue_depth, Interference&& interference);

  // Starts a transfer of at least one byte.
  virtual void start(Transfer& transfer) = 0;
  // Waits until a transfer that was started is over, and returns it.
  virtual Transfer& reap() = 0;
  // Gives back what holds the file open beside the descriptor. Nothing is running.
  virtual void release() noexcept {}

  // Bytes to request next.
  size_t next_request(const Transfer& transfer) const noexcept;
  // Takes the kernel's answer. Returns whether the transfer is over; else its rest is to be requested. From any thread.
  bool advance(Transfer& transfer, int64_t answer);

  // The whole of a transfer by pread and pwrite, here and now.
  void transfer_now(Transfer& transfer);

  int descriptor() const noexcept { return file_.descriptor.get(); }
  bool is_direct() const noexcept;
  // False in a child of the process that opened the file: the engine's threads and ring are not the child's.
  bool is_owner() const noexcept;
  // Waits for what is running. For the destructors of engines, before they give back what reap() needs.
  void drain();

 private:
  void begin(const Transfer& transfer);
  void check_usable() const;
  void retire_one();
  std::exception_ptr failure(const Transfer& transfer) const;
  void throw_first_failure();
  bool settle_end(Transfer& transfer) const;
  void leave_direct() const noexcept;

  const char* name_;
  OpenedFile file_;
  int queue_depth_;
  Interference interference_;
  pid_t owner_;
  int running_ = 0;
  std::vector<Transfer> slots_;
  std::vector<Transfer*> free_;
  std::deque<Transfer> over_;  // not yet returned by wait()
  int sync_error_ = 0;
};

std::unique_ptr<DirectFile> open_threads(OpenedFile&& file, int queue_depth, Interference&& interference);

// Null, with the reason, where io_uring is not to be had; `file` and `interference` are then as they were.
std::unique_ptr<DirectFile> open_uring(OpenedFile& file, int queue_depth, Interference& interference, std::string& why);
// The reason, or "" if it is to be had.
std::string probe_uring();

// The public function, with an interference.
std::unique_ptr<DirectFile> open_direct(const std::string& path, OpenMode mode, const DirectFileOptions& options,
                                        Interference interference);

}  // namespace ng
