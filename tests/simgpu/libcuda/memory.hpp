// The memory of a simulated device: a window of addresses, its contents, and a shadow byte for each byte that says
// whether it is mapped and initialised.
//
// Contents and shadow are one shared mapping with the simulator processes, which check kernels against the shadow: no
// message tells them about memory. Addresses start where no host pointer can be, so a pointer that is taken for one
// of the other kind is always noticed. A byte lives at its address, so physical memory that is unmapped keeps its
// contents aside, and cannot be mapped at two addresses at once (CUDA allows it).
//
// Pinned host memory has a window too, at its own addresses of this process: kernels reach it by them, on any device.
//
// Thread-safe. Copies and kernels run without the lock, on bytes that their order of execution protects.
#pragma once

#include <atomic>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core/shim/cuda.hpp"

namespace ng::cuda {

// As in memory.py of the simulator. kFreed stands at the first byte of granules that were unmapped: all of their shadow
// would stay in memory otherwise.
enum Shadow : unsigned char { kAllocated = 1, kInitialised = 2, kReadOnly = 4, kFreed = 8 };

inline constexpr size_t kGranularity = size_t{2} << 20;
inline constexpr size_t kWindowBytes = size_t{1} << 38;
// Above the addresses of user space on x86-64 and 48-bit Arm.
inline constexpr DevicePtr kFirstAddress = DevicePtr{1} << 50;

// Contents and shadow, shared with the simulator processes through a file. Lives until the process ends.
class Window {
 public:
  Window();

  int file() const { return file_; }
  unsigned char* contents(size_t offset) const { return contents_ + offset; }
  unsigned char* shadow(size_t offset) const { return contents_ + kWindowBytes + offset; }
  // Gives the memory of whole granules back, and marks them as freed.
  void discard(size_t offset, size_t bytes) const;

 private:
  int file_ = -1;
  unsigned char* contents_ = nullptr;
};

class DeviceMemory;

// Physical memory: what cuMemCreate makes. Owned by its handle and by its mapping.
struct Physical {
  Physical(DeviceMemory& memory_, size_t bytes_);
  ~Physical();
  Physical(const Physical&) = delete;
  Physical& operator=(const Physical&) = delete;

  DeviceMemory& memory;
  size_t bytes;
  bool mapped = false;
  std::vector<unsigned char> contents, shadow;  // while it is not mapped but has been: what it holds
};

class DeviceMemory {
 public:
  explicit DeviceMemory(int ordinal);
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  DevicePtr base() const { return base_; }
  int file() const { return window_.file(); }
  size_t free_bytes() const;

  DevicePtr reserve(size_t bytes, size_t alignment);
  void release_range(DevicePtr pointer, size_t bytes);
  void map(DevicePtr pointer, size_t bytes, std::shared_ptr<Physical> physical);
  void unmap(DevicePtr pointer, size_t bytes);
  void set_access(DevicePtr pointer, size_t bytes, bool accessible);
  // The mapping that holds an address, as (begin, bytes); bytes is 0 if there is none.
  std::pair<DevicePtr, size_t> mapping_of(DevicePtr pointer) const;

  // Variables of a module, in one allocation of their own, of which only they are accessible to kernels.
  std::vector<DevicePtr> allocate_variables(const std::vector<std::pair<size_t, size_t>>& sizes_and_alignments);
  void deallocate_variables(DevicePtr first);

  // By mappings, since shadow bytes belong to the work in progress.
  bool accessible(DevicePtr pointer, size_t bytes) const;
  unsigned char* contents(DevicePtr pointer) const { return window_.contents(pointer - base_); }
  unsigned char* shadow(DevicePtr pointer) const { return window_.shadow(pointer - base_); }

 private:
  friend struct Physical;
  struct Mapping {
    size_t bytes;
    std::shared_ptr<Physical> physical;
    bool accessible = false;
  };
  using Mappings = std::map<DevicePtr, Mapping>;

  // The mapping that holds an address, or the end. pre: locked
  Mappings::const_iterator holding(DevicePtr pointer) const;
  // The mappings that fill [pointer, pointer + bytes) exactly, as a range; fails if there are none such.
  std::pair<Mappings::iterator, Mappings::iterator> exact(DevicePtr pointer, size_t bytes);

  const DevicePtr base_;
  const Window window_;
  std::atomic<size_t> used_{0};
  mutable std::mutex mutex_;
  std::map<DevicePtr, size_t> reservations_;
  Mappings mappings_;
};

// The memory that an address belongs to, mapped or not; null for host addresses.
DeviceMemory* memory_of(DevicePtr pointer);

// Host memory that cuMemHostAlloc made: transfers to and from it are asynchronous, and kernels reach it. All of it
// counts as initialised, since nobody sees what the host writes.
class PinnedMemory {
 public:
  int file() const { return window_.file(); }
  uintptr_t base() const { return reinterpret_cast<uintptr_t>(window_.contents(0)); }

  void* allocate(size_t bytes);
  void deallocate(void* pointer);
  bool contains(const void* pointer, size_t bytes = 1) const;
  std::pair<DevicePtr, size_t> range_of(const void* pointer) const;

 private:
  const Window window_;
  mutable std::mutex mutex_;
  std::map<uintptr_t, size_t> ranges_;
};
PinnedMemory& pinned_memory();

}  // namespace ng::cuda
