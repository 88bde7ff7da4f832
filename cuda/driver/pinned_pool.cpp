// PinnedPool: arenas of page-locked memory under a PoolEngine.
//
// The driver chooses where an arena lies, so the engine's range has no addresses: a table says which part of it each
// arena is.
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>

#include "driver/context.hpp"
#include "memory/pages.hpp"
#include "memory/pool_engine.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {

using cuda::CaptureExemption;
using cuda::ContextScope;
using cuda::where_possible;

namespace {

// Twice the memory that there is, since what is free may be scattered.
size_t range_bytes() noexcept {
  const auto pages = static_cast<size_t>(std::max(sysconf(_SC_PHYS_PAGES), 1l));
  return 2 * pages * static_cast<size_t>(sysconf(_SC_PAGESIZE)) / kHugePage * kHugePage + (size_t{1} << 30);
}

}  // namespace

class PinnedPool::Impl final : public PoolEngine {
 public:
  explicit Impl(int device)
      : PoolEngine({.name = "PinnedPool",
                    .range_bytes = range_bytes(),
                    .unit_bytes = kPoolAlignment,
                    .granule_bytes = kHugePage,
                    .growth = 8,
                    .caches = true,
                    .separate_arenas = true}),
        device_(device) {
    const ContextScope context(device);  // throws where it is of no use
  }

  ~Impl() {
    for (const auto& [offset, arena] : by_offset_) free(arena);
  }

  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  std::byte* address_of(size_t offset) const {
    const std::lock_guard lock(mutex_);
    const auto arena = std::prev(by_offset_.upper_bound(offset));
    return arena->second + (offset - arena->first);
  }

  size_t offset_of(const void* block) const noexcept {
    const auto address = reinterpret_cast<uintptr_t>(block);
    const std::lock_guard lock(mutex_);
    const auto next = by_address_.upper_bound(address);
    if (next == by_address_.begin()) return kNowhere;
    const auto& [begin, arena] = *std::prev(next);
    return address - begin < arena.bytes ? arena.offset + (address - begin) : kNowhere;
  }

 private:
  void commit(Extent arena) override {
    void* data = nullptr;
    {
      const ContextScope context(device_);
      const CaptureExemption exemption(context.driver());
      NG_CUDA(context.driver(), cuMemHostAlloc(&data, arena.bytes, cuda::kHostAllocPortable));
    }
    const auto address = reinterpret_cast<uintptr_t>(data);
    try {
      NG_CHECK(address % kPoolAlignment == 0, CudaError, "cuMemHostAlloc gave memory at address ", data,
               ", expected alignment to ", kPoolAlignment);
      const std::lock_guard lock(mutex_);
      by_address_[address] = arena;
      by_offset_[arena.offset] = static_cast<std::byte*>(data);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      by_address_.erase(address);
      free(data);
      throw;
    }
  }

  void decommit(Extent arena) noexcept override {
    std::byte* data = nullptr;
    {
      const std::lock_guard lock(mutex_);
      const auto found = by_offset_.find(arena.offset);
      data = found->second;
      by_address_.erase(reinterpret_cast<uintptr_t>(data));
      by_offset_.erase(found);
    }
    free(data);
  }

  void free(void* data) const noexcept {
    where_possible(device_, [&](const ContextScope& context) {
      const CaptureExemption exemption(context.driver());
      context->cuMemFreeHost(data);
    });
  }

  const int device_;
  std::map<size_t, std::byte*> by_offset_;  // arenas; guarded by mutex_, like
  std::map<uintptr_t, Extent> by_address_;  // the same
};

PinnedPool::PinnedPool(int device) : impl_(std::make_unique<Impl>(device)) {}
PinnedPool::~PinnedPool() = default;

void* PinnedPool::allocate(size_t bytes) {
  cuda::require_driver();  // not in a forked child
  return impl_->address_of(impl_->allocate(bytes));
}

void PinnedPool::deallocate(void* block, size_t bytes) noexcept {
  if (block != nullptr) impl_->deallocate(impl_->offset_of(block), bytes);
}

PoolStatistics PinnedPool::statistics() const { return impl_->statistics(); }
size_t PinnedPool::trim() { return impl_->trim(); }

}  // namespace ng
