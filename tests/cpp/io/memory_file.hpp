// A DirectFile in memory whose transfers take place when a test says so, and fail where it says so.
//
// Bytes move when a transfer completes, in random order among those in flight: who uses memory too early is seen.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "narrowgauge/error.hpp"
#include "narrowgauge/io.hpp"

namespace ng {

// What a test keeps of a MemoryFile that it has given away. Thread-safe.
class MemoryDisk {
 public:
  // Transfers at these offsets stay in flight; go_on() ends that.
  void hold_if(std::function<bool(uint64_t offset)> which) {
    const std::lock_guard lock(mutex);
    held = std::move(which);
    changed.notify_all();
  }
  void hold() {
    hold_if([](uint64_t) { return true; });
  }
  void go_on() { hold_if(nullptr); }

  // Waits until so many transfers have been started since the beginning.
  void wait_for_starts(size_t count) {
    std::unique_lock lock(mutex);
    ASSERT_TRUE(changed.wait_for(lock, std::chrono::seconds(60), [&] { return started >= count; }))
        << started << " of " << count << " transfers were started";
  }
  size_t starts() {
    const std::lock_guard lock(mutex);
    return started;
  }
  size_t size() {
    const std::lock_guard lock(mutex);
    return bytes.size();
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::byte> bytes;
  std::function<bool(uint64_t offset)> held;
  size_t started = 0;
  uint64_t capacity = ~uint64_t{0};
  // errno with which a transfer fails, or 0. With the mutex held.
  std::function<int(bool is_write, uint64_t offset)> fault;
  bool broken = false;  // waiting itself fails
};

class MemoryFile final : public DirectFile {
 public:
  explicit MemoryFile(std::shared_ptr<MemoryDisk> disk, size_t alignment = 512, int queue_depth = 4)
      : disk_(std::move(disk)), alignment_(alignment), queue_depth_(queue_depth) {}

  size_t alignment() const noexcept override { return alignment_; }
  int queue_depth() const noexcept override { return queue_depth_; }
  void register_memory(std::span<std::byte> /*memory*/) override {}
  void write(std::span<const std::byte> bytes, uint64_t offset, uint64_t tag) override {
    start({tag, true, {const_cast<std::byte*>(bytes.data()), bytes.size()}, offset});
  }
  void read(std::span<std::byte> bytes, uint64_t offset, uint64_t tag) override { start({tag, false, bytes, offset}); }

  Completion wait_any() override {
    std::unique_lock lock(disk_->mutex);
    std::vector<size_t> free;
    disk_->changed.wait(lock, [&] {
      for (size_t i = 0; i < running_.size(); ++i) {
        if (!disk_->held || !disk_->held(running_[i].offset)) free.push_back(i);
      }
      return !free.empty() || disk_->broken;
    });
    if (disk_->broken) throw Error("the file is broken");
    const size_t index = free[random_() % free.size()];
    const Transfer transfer = running_[index];
    running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(index));
    const int error = disk_->fault ? disk_->fault(transfer.is_write, transfer.offset) : 0;
    if (error != 0) return {transfer.tag, std::make_exception_ptr(SystemError(error, "the disk fails"))};
    const uint64_t end = transfer.offset + transfer.bytes.size();
    if (transfer.is_write) {
      if (disk_->bytes.size() < end) disk_->bytes.resize(end);
      std::memcpy(disk_->bytes.data() + transfer.offset, transfer.bytes.data(), transfer.bytes.size());
    } else if (disk_->bytes.size() < end) {
      return {transfer.tag, std::make_exception_ptr(FileCorrupt("the file ends before"))};
    } else {
      std::memcpy(transfer.bytes.data(), disk_->bytes.data() + transfer.offset, transfer.bytes.size());
    }
    return {transfer.tag, nullptr};
  }
  int in_flight() const noexcept override { return static_cast<int>(running_.size()); }

  void preallocate(uint64_t bytes) override {
    const std::lock_guard lock(disk_->mutex);
    if (bytes > disk_->capacity) throw SystemError(ENOSPC, "the disk is full");
  }
  void truncate(uint64_t bytes) override {
    const std::lock_guard lock(disk_->mutex);
    disk_->bytes.resize(bytes);
  }
  void sync() override {}
  uint64_t size() const override { return disk_->size(); }
  void close() override {}
  std::string engine() const override { return "memory"; }

 private:
  struct Transfer {
    uint64_t tag;
    bool is_write;
    std::span<std::byte> bytes;
    uint64_t offset;
  };

  void start(const Transfer& transfer) {
    const auto address = reinterpret_cast<uintptr_t>(transfer.bytes.data());
    NG_CHECK((address | transfer.offset | transfer.bytes.size()) % alignment_ == 0, InvalidArgument, "not aligned");
    NG_CHECK(running_.size() < static_cast<size_t>(queue_depth_), InvalidArgument, "more than the queue holds");
    running_.push_back(transfer);
    const std::lock_guard lock(disk_->mutex);
    ++disk_->started;
    disk_->changed.notify_all();
  }

  std::shared_ptr<MemoryDisk> disk_;
  size_t alignment_;
  int queue_depth_;
  std::minstd_rand random_{5};
  std::vector<Transfer> running_;
};

}  // namespace ng
