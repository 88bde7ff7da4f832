// Memory: an owned, aligned block; pools, which keep memory for reuse; and the streaming read that measures what memory
// can deliver.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "narrowgauge/device.hpp"
#include "narrowgauge/executor.hpp"
#include "narrowgauge/stream.hpp"

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

// A page: what direct I/O and mappings need.
inline constexpr size_t kPoolAlignment = 4096;

// What a pool holds at one instant, in bytes of whole units; zero where a pool does not count.
struct PoolStatistics {
  size_t in_use = 0;        // held by callers
  size_t blocks = 0;        // their number
  size_t peak = 0;          // the largest in_use so far
  size_t reserved = 0;      // had from the system: in use, cached and free
  size_t cached = 0;        // free, but in the threads' caches, or not yet for every stream
  size_t largest_free = 0;  // the longest free run
  uint64_t bad_frees = 0;   // calls of deallocate that named no block of that size, and were ignored

  // 1 - largest_free / free: 0 while what is free is in one piece.
  double fragmentation() const noexcept;
  std::string to_string() const;
};

// Where blocks of memory come from: HostPool, PinnedPool, DevicePool, and adaptors (limit, statistics, a stream) around
// another Pool. Thread-safe.
class Pool {
 public:
  virtual ~Pool() = default;
  // At least `bytes` bytes, whole units; contents undefined; never null. Throws OutOfMemory with the request and the
  // pool's statistics.
  virtual void* allocate(size_t bytes) = 0;
  // pre: `block` came from allocate(bytes) of this pool and is not used any more. From any thread. Null is ignored.
  virtual void deallocate(void* block, size_t bytes) noexcept = 0;
  // Blocks are whole multiples of it and aligned to it: a power of two.
  virtual size_t unit() const noexcept { return kPoolAlignment; }
  virtual PoolStatistics statistics() const { return {}; }
  // Gives free memory back to the system, as far as the pool can; returns the bytes given back.
  virtual size_t trim() { return 0; }
  // Where the blocks lie.
  virtual Device device() const noexcept { return {}; }
};

// Where the contents of a sleeping pool wait. The pool calls it from the thread that calls sleep() or wake(), one call
// at a time, with none of its locks held.
class PageSink {
 public:
  virtual ~PageSink() = default;
  // Keeps a copy of `bytes` under `key`. May throw: the pool then stays awake.
  virtual void put(uint64_t key, std::span<const std::byte> bytes) = 0;
  // Fills `bytes`, as long as they were, with what was put under `key`. May throw: the pool then stays asleep.
  virtual void get(uint64_t key, std::span<std::byte> bytes) = 0;
};

struct HostPoolOptions {
  bool huge_pages = true;  // ask for 2 MiB pages; false: refuse them
  int numa_node = -1;      // bind all memory to this node; -1: as the system likes
};

// Page-aligned host memory out of large arenas that are faulted in before their first use, so that neither a block's
// first touch nor its return costs a page fault. Arenas are whole multiples of 2 MiB in one range of addresses that is
// reserved at the start, so neighbours merge, and grow by an eighth of the pool, or by the request where it is more.
//
// Blocks are whole pages, split and merged by size (src/memory/suballocator.hpp). Blocks of up to 64 KiB pass through
// caches, of which each thread uses one: they belong to the pool and not to the thread, so that a thread may die and a
// block may be freed anywhere. Memory goes back to the system by trim(), sleep() and the destructor, and where the
// system refuses a new arena.
//
// A deallocate() that names no live block of that size (a wrong pointer or size, a second time) changes nothing and is
// counted in statistics().bad_frees. After fork the child has its own copy. The destructor unmaps all blocks.
class HostPool final : public Pool {
 public:
  // Throws InvalidArgument if there is no such node, OutOfMemory if no addresses can be reserved.
  explicit HostPool(const HostPoolOptions& options = {});
  ~HostPool() override;

  // Throws InvalidArgument while the pool sleeps.
  void* allocate(size_t bytes) override;
  void deallocate(void* block, size_t bytes) noexcept override;
  PoolStatistics statistics() const override;  // all but the peak, which StatisticsPool counts

  // Empties the caches and gives back every free stretch of 2 MiB; returns the bytes given back. Nothing is given back
  // while the pool sleeps.
  size_t trim() override;

  // Gives all physical pages back to the system; addresses stay. Until wake(), blocks may be freed but not allocated,
  // and must not be used. The contents are lost, or first put into `sink`, which is kept until wake(). Memory that was
  // registered for I/O must be released before, since the device would go on with the old pages.
  // Throws InvalidArgument unless the pool is awake, SystemError if the kernel keeps pages (the pool is then asleep).
  void sleep();
  void sleep(std::shared_ptr<PageSink> sink);
  // Faults all arenas in again and fetches what was put. Throws InvalidArgument unless the pool sleeps; after
  // OutOfMemory, or an error of the sink, it sleeps on and wake() may be tried again.
  void wake();
  bool is_asleep() const;

  // How much of the arenas lies in huge pages now, as the kernel reports it (/proc/self/smaps: slow).
  size_t huge_page_bytes() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// Page-locked host memory, which copies between host and device need to be asynchronous and fast; all devices may use
// it. HostPool's blocks and caches, over arenas that the driver allocates (at the speed of a page fault, and it is
// taken from what the system can give to others: keep it small). A block lies in one arena, and arenas go back to the
// system as a whole, by trim() and the destructor. It does not sleep: its addresses could not be kept.
//
// A block that work on a device still uses must not be freed. In a child that was forked it allocates nothing.
class PinnedPool final : public Pool {
 public:
  // Memory is asked for in the context of cuda:`device`, where it makes no other difference. Throws CudaError if there
  // is no driver, InvalidArgument if there is no such device.
  explicit PinnedPool(int device = 0);
  ~PinnedPool() override;

  void* allocate(size_t bytes) override;
  void deallocate(void* block, size_t bytes) noexcept override;
  PoolStatistics statistics() const override;  // all but the peak
  size_t trim() override;                      // whole arenas

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// What blocks of a DevicePool are aligned to: the driver's own is 256, a cache line of the L2 has 128 bytes.
inline constexpr size_t kDevicePoolAlignment = 512;

// Memory of one GPU: one range of addresses of twice its size, in which granules of physical memory (2 MiB) are mapped
// as they are needed, so that neighbours merge whenever they were mapped. Blocks are split and merged by the same code
// as HostPool's, in units of 512 bytes; there are no caches. It grows by what is needed, or by a 32nd of itself.
//
// Streams. Memory that is freed in a stream's order is reused at once by that stream. Others get it when all work
// before the free is done; if they would have to wait and nothing else is free, it is their stream that waits, for one
// event, before the pool grows. The host never waits. Memory that was freed without a stream is everybody's at once.
//
// A stream that is being captured into a graph gets nothing: allocate before the capture. A block that is freed in its
// order stays taken until the pool is destroyed, since the graph may use it whenever it is launched; so does one whose
// free the driver refuses. Other streams go on during a capture, and do not disturb it.
//
// Bad frees are ignored and counted as by HostPool. In a child that was forked the pool throws CudaError or does
// nothing; likewise when the process ends and the driver has gone before it. Not for host functions in a stream.
class DevicePool final : public Pool {
 public:
  // Throws CudaError if there is no driver, InvalidArgument if there is no such device.
  explicit DevicePool(int device = 0);
  // Waits for the work before the last frees, and unmaps everything.
  ~DevicePool() override;

  // For any stream. Throws OutOfMemory, CudaError, InvalidArgument while the pool sleeps; likewise below. Memory that
  // streams have freed is not waited for.
  void* allocate(size_t bytes) override;
  // pre: no work uses the block any more.
  void deallocate(void* block, size_t bytes) noexcept override;

  // For work that is given to `stream` from now on, or ordered behind such. The stream is of the pool's device.
  void* allocate(size_t bytes, const Stream& stream);
  // pre: all work that uses the block has been given to `stream`, or is ordered before what it is given next.
  void deallocate(void* block, size_t bytes, const Stream& stream) noexcept;

  PoolStatistics statistics() const override;  // all but the peak
  size_t unit() const noexcept override { return kDevicePoolAlignment; }
  Device device() const noexcept override;

  // Unmaps every free granule whose streams have passed the free, and returns the bytes given back; 0 while asleep.
  size_t trim() override;

  // As HostPool's: waits for the device, then gives all physical memory back; addresses stay. The contents go into the
  // sink by way of page-locked memory, in pieces of up to 16 MiB. Until wake() blocks may be freed, by work that was
  // done before, but not allocated or used. wake() throws OutOfMemory if the device's memory was taken meanwhile, and
  // may be tried again.
  void sleep();
  void sleep(std::shared_ptr<PageSink> sink);
  void wake();
  bool is_asleep() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// The pool of cuda:`device` that the Python package makes its tensors in, and torch's if it is asked to. Made on the
// first call and kept until the process ends. Throws as DevicePool's constructor does. Thread-safe.
std::shared_ptr<DevicePool> default_device_pool(int device);

// A DevicePool as one stream sees it: what allocates and frees through it does so in that stream's order. So tensors
// and the other adaptors work with streams.
class StreamPool final : public Pool {
 public:
  // A stream that is not our own must outlive the pool and its blocks. Throws InvalidArgument if the pool is null or of
  // another device.
  StreamPool(std::shared_ptr<DevicePool> pool, Stream stream);

  void* allocate(size_t bytes) override { return pool_->allocate(bytes, stream_); }
  void deallocate(void* block, size_t bytes) noexcept override { pool_->deallocate(block, bytes, stream_); }
  PoolStatistics statistics() const override { return pool_->statistics(); }
  size_t unit() const noexcept override { return pool_->unit(); }
  size_t trim() override { return pool_->trim(); }
  Device device() const noexcept override { return pool_->device(); }
  const Stream& stream() const noexcept { return stream_; }

 private:
  std::shared_ptr<DevicePool> pool_;
  Stream stream_;
};

// At most `limit` bytes in use, in whole units: a request beyond it throws OutOfMemory. It bounds what callers hold;
// what the pool below reserves may be more.
class LimitPool final : public Pool {
 public:
  LimitPool(std::shared_ptr<Pool> pool, size_t limit);

  void* allocate(size_t bytes) override;
  void deallocate(void* block, size_t bytes) noexcept override;
  PoolStatistics statistics() const override { return pool_->statistics(); }
  size_t trim() override { return pool_->trim(); }
  Device device() const noexcept override { return pool_->device(); }
  size_t unit() const noexcept override { return unit_; }
  size_t limit() const noexcept { return limit_; }

 private:
  std::shared_ptr<Pool> pool_;
  const size_t unit_;
  const size_t limit_;
  std::atomic<size_t> in_use_{0};
};

// Counts in_use, blocks and peak of what passes through it; the rest is the pool's below.
class StatisticsPool final : public Pool {
 public:
  explicit StatisticsPool(std::shared_ptr<Pool> pool);

  void* allocate(size_t bytes) override;
  void deallocate(void* block, size_t bytes) noexcept override;
  PoolStatistics statistics() const override;
  size_t trim() override { return pool_->trim(); }
  Device device() const noexcept override { return pool_->device(); }
  size_t unit() const noexcept override { return unit_; }

 private:
  std::shared_ptr<Pool> pool_;
  const size_t unit_;
  std::atomic<size_t> in_use_{0};
  std::atomic<size_t> blocks_{0};
  std::atomic<size_t> peak_{0};
};

// The NUMA nodes of this machine that are online, rising. {0} where the kernel knows none.
std::vector<int> numa_nodes();

// Asks for 2 MiB pages for the whole pages inside [data, data + bytes), before their first use. Advisory: a
// kernel without them ignores it.
void advise_huge_pages(void* data, size_t bytes) noexcept;

// Reads [data, data + bytes) once, whole lines of 64 bytes, in long chunks on all threads, and returns the sum of its
// 64-bit words. The time that it takes is the limit for anything that must read those bytes. Throws InvalidArgument
// unless data is aligned to 8.
uint64_t stream_read(const void* data, size_t bytes, Executor& executor);

}  // namespace ng
