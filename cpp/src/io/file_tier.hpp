// The file tier's workings, for the streams built on it: transfers that end in a call instead of a future.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <unordered_map>
#include <vector>

#include "narrowgauge/io.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {

struct FileTier::Impl {
 public:
  // Called on the tier's thread with what went wrong, or null. May ask for more; must not throw.
  using Done = std::function<void(std::exception_ptr)>;

  Impl(std::unique_ptr<DirectFile> file, uint64_t limit);
  ~Impl();

  void put(uint64_t key, std::span<const std::byte> bytes, Done done);
  void get(uint64_t key, std::span<std::byte> out, Done done);
  void drop(uint64_t key);
  std::optional<size_t> size(uint64_t key) const;
  uint64_t in_use() const;
  void stop();
  void close();
  // False in a child of the process that made it, which has no thread for it.
  bool is_owner() const noexcept;

 private:
  struct Range {
    uint64_t offset;
    uint64_t length;
  };
  // A buffer on the file. Written once: a put under the same key makes a new one.
  struct Entry {
    std::vector<Range> ranges;
    size_t size = 0;
    int users = 0;         // transfers that are not over
    bool dropped = false;  // no key leads to it: its space is free once it has no users
    bool written = false;
    std::exception_ptr error;  // why it could not be written
  };
  // What goes to or from the file in one transfer.
  struct Piece {
    uint64_t offset;
    std::span<std::byte> memory;
  };
  struct Request {
    bool is_put;
    std::shared_ptr<Entry> entry;
    std::vector<Piece> pieces;
    Done done;
    size_t started = 0;
    size_t running = 0;
    std::exception_ptr error;
  };
  struct Slot {
    std::shared_ptr<Request> request;
    Piece piece;
    std::byte* staging;  // null: in place
  };

  void check_owner() const;
  // pre for the rest: the mutex is held.
  void check_usable() const;
  void submit(bool is_put, std::shared_ptr<Entry> entry, std::span<std::byte> memory, Done done);
  std::vector<Range> allocate(std::unique_lock<std::mutex>& lock, uint64_t bytes);
  void release(const Entry& entry);
  void forget(uint64_t key);

  // On the tier's thread.
  void serve() noexcept;
  void work();
  void start_pieces();
  bool prepare(Request& request, bool needs_staging);
  void start(const std::shared_ptr<Request>& request);
  void finish_one();
  void complete(Request& request);
  void reserve(const Entry& entry);
  void fail_all(const std::exception_ptr& error);

  const pid_t owner_;
  const uint64_t limit_;
  std::unique_ptr<DirectFile> file_;

  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable freed_;
  std::unordered_map<uint64_t, std::shared_ptr<Entry>> entries_;
  std::map<uint64_t, uint64_t> free_;  // offset -> length; no two touch
  uint64_t end_ = 0;                   // of the part of the file that was ever used
  uint64_t in_use_ = 0;
  uint64_t dropped_in_use_ = 0;
  std::deque<std::shared_ptr<Request>> queue_;
  bool stopping_ = false;
  std::exception_ptr broken_;  // the file itself failed

  // The thread's own.
  std::deque<std::shared_ptr<Request>> waiting_;
  std::vector<Slot> slots_;  // by tag
  std::vector<size_t> free_slots_;
  Buffer staging_;
  uint64_t reserved_ = 0;
  std::thread thread_;
};

}  // namespace ng
