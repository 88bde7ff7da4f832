// Memory: an owned, aligned block, and the streaming read that measures what memory can deliver.
#pragma once

#include <cstddef>
#include <cstdint>

#include "narrowgauge/executor.hpp"

namespace ng {

// Owned bytes, aligned to 64; blocks of 4 MiB and more are aligned to and advised for 2 MiB pages.
// Contents start undefined. Move-only; not thread-safe, like any value.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);  // throws OutOfMemory with the request
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::byte* data() noexcept { return data_; }
  const std::byte* data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Where blocks of memory come from: HostPool, and adaptors (limit, statistics) around any other Pool. Thread-safe.
class Pool {
 public:
  virtual ~Pool() = default;
  // At least `bytes` bytes, aligned to kPoolAlignment; contents undefined; never null. Throws OutOfMemory with the
  // request and the pool's statistics.
  virtual void* allocate(size_t bytes) = 0;
  // pre: `block` came from allocate(bytes) of this pool and is not used any more. From any thread.
  virtual void deallocate(void* block, size_t bytes) noexcept = 0;
};

// A page: what direct I/O and mappings need.
inline constexpr size_t kPoolAlignment = 4096;

// Asks for 2 MiB pages for the whole pages inside [data, data + bytes), before their first use. Advisory: a
// kernel without them ignores it.
void advise_huge_pages(void* data, size_t bytes) noexcept;

// Reads [data, data + bytes) once, whole lines of 64 bytes, in long chunks on all threads, and returns the sum of its
// 64-bit words. The time that it takes is the limit for anything that must read those bytes. Throws InvalidArgument
// unless data is aligned to 8.
uint64_t stream_read(const void* data, size_t bytes, Executor& executor);

}  // namespace ng
