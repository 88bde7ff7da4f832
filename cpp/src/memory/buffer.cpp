// Aligned blocks, huge-page advice and the streaming read.
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <utility>

#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;
// Below this the padding to whole huge pages would cost more than the page walks do.
constexpr size_t kHugeBlock = size_t{4} << 20;

}  // namespace

Buffer::Buffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  const size_t alignment = bytes >= kHugeBlock ? kHugePage : kCacheLine;
  const size_t padded = (bytes + alignment - 1) / alignment * alignment;
  NG_CHECK(padded >= bytes, OutOfMemory, "cannot allocate ", bytes, " bytes: the size overflows");
  data_ = static_cast<std::byte*>(std::aligned_alloc(alignment, padded));
  NG_CHECK(data_ != nullptr, OutOfMemory, "cannot allocate ", bytes, " bytes");
  if (bytes >= kHugeBlock) advise_huge_pages(data_, padded);
}

Buffer::~Buffer() { std::free(data_); }

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

void advise_huge_pages(void* data, size_t bytes) noexcept {
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

uint64_t stream_read(const void* data, size_t bytes, Executor& executor) {
  // Long chunks keep each thread's stream sequential for the hardware prefetchers.
  constexpr int64_t kGrain = (int64_t{1} << 20) / static_cast<int64_t>(kCacheLine);
  // Two cache lines in flight per step, summed in eight independent lanes, which compilers vectorise.
  constexpr size_t kWords = 2 * kCacheLine / sizeof(uint64_t);
  NG_CHECK(reinterpret_cast<uintptr_t>(data) % sizeof(uint64_t) == 0, InvalidArgument, "stream_read: data at address ",
           data, "; expected alignment to 8 bytes");
  const auto* base = static_cast<const std::byte*>(data);
  const auto lines = static_cast<int64_t>(bytes / kCacheLine);
  std::atomic<uint64_t> total{0};
  executor.parallel_for(lines, kGrain, [&](int64_t begin, int64_t end) {
    uint64_t lanes[kWords] = {};
    const auto* word = reinterpret_cast<const uint64_t*>(base + static_cast<size_t>(begin) * kCacheLine);
    const auto count = static_cast<size_t>(end - begin) * kCacheLine / sizeof(uint64_t);
    size_t i = 0;
    for (; i + kWords <= count; i += kWords) {
      __builtin_prefetch(word + i + 256);
      __builtin_prefetch(word + i + 264);
      for (size_t lane = 0; lane < kWords; ++lane) lanes[lane] += word[i + lane];
    }
    uint64_t sum = 0;
    for (; i < count; ++i) sum += word[i];
    for (const uint64_t lane : lanes) sum += lane;
    total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total.load();
}

}  // namespace ng
