// Adaptors around any pool: a limit, and counts. Their counters are atomic; memory that is freed by one thread may be
// allocated by another at once.
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

// Whole units, as the pool hands them out; saturated, since such a request fails in the pool.
size_t in_units(size_t bytes, size_t unit) noexcept {
  const size_t most = ~(unit - 1);
  return bytes > most ? most : bytes == 0 ? unit : (bytes + unit - 1) & most;
}

std::shared_ptr<Pool> not_null(std::shared_ptr<Pool> pool, const char* adaptor) {
  NG_CHECK(pool != nullptr, InvalidArgument, adaptor, ": the pool is null");
  return pool;
}

}  // namespace

double PoolStatistics::fragmentation() const noexcept {
  const size_t free = reserved - in_use;
  return free == 0 ? 0.0 : 1.0 - static_cast<double>(largest_free) / static_cast<double>(free);
}

std::string PoolStatistics::to_string() const {
  const std::string most = peak == 0 ? "" : concat(", peak ", peak);  // counted by StatisticsPool only
  return concat("in use ", in_use, " bytes in ", blocks, " blocks", most, ", reserved ", reserved, ", cached ", cached,
                ", largest free ", largest_free, ", fragmentation ", fragmentation());
}

LimitPool::LimitPool(std::shared_ptr<Pool> pool, size_t limit)
    : pool_(not_null(std::move(pool), "LimitPool")), unit_(pool_->unit()), limit_(limit) {}

void* LimitPool::allocate(size_t bytes) {
  const size_t size = in_units(bytes, unit_);
  size_t seen = in_use_.load(std::memory_order_relaxed);
  do {
    if (size > limit_ || seen > limit_ - size) [[unlikely]] {
      throw OutOfMemory(concat("cannot allocate ", bytes, " bytes: ", seen, " bytes are in use and the limit is ",
                               limit_, " (", pool_->statistics().to_string(), ")"));
    }
  } while (!in_use_.compare_exchange_weak(seen, seen + size, std::memory_order_relaxed));
  try {
    return pool_->allocate(bytes);
  } catch (...) {
    in_use_.fetch_sub(size, std::memory_order_relaxed);
    throw;
  }
}

void LimitPool::deallocate(void* block, size_t bytes) noexcept {
  if (block == nullptr) return;
  pool_->deallocate(block, bytes);
  in_use_.fetch_sub(in_units(bytes, unit_), std::memory_order_relaxed);
}

StatisticsPool::StatisticsPool(std::shared_ptr<Pool> pool)
    : pool_(not_null(std::move(pool), "StatisticsPool")), unit_(pool_->unit()) {}

void* StatisticsPool::allocate(size_t bytes) {
  void* block = pool_->allocate(bytes);
  const size_t size = in_units(bytes, unit_);
  const size_t now = in_use_.fetch_add(size, std::memory_order_relaxed) + size;
  blocks_.fetch_add(1, std::memory_order_relaxed);
  size_t peak = peak_.load(std::memory_order_relaxed);
  while (peak < now && !peak_.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
  }
  return block;
}

void StatisticsPool::deallocate(void* block, size_t bytes) noexcept {
  if (block == nullptr) return;
  // First, so that the memory is not counted twice when another thread takes it at once.
  in_use_.fetch_sub(in_units(bytes, unit_), std::memory_order_relaxed);
  blocks_.fetch_sub(1, std::memory_order_relaxed);
  pool_->deallocate(block, bytes);
}

PoolStatistics StatisticsPool::statistics() const {
  PoolStatistics out = pool_->statistics();
  out.in_use = in_use_.load(std::memory_order_relaxed);
  out.blocks = blocks_.load(std::memory_order_relaxed);
  out.peak = peak_.load(std::memory_order_relaxed);
  return out;
}

}  // namespace ng
