// HostPool: the pages of a reserved range of addresses under a SleepingEngine.
#include <algorithm>
#include <string>
#include <vector>

#include "memory/pages.hpp"
#include "memory/sleeping_engine.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

// The pages of a pool are counted in 31 bits.
constexpr size_t kMostBytes = (size_t{1} << 31) * kPoolAlignment;

// The node to bind to, or -1 where there is no choice: a container may forbid the call.
int checked_node(int node) {
  if (node == -1) return -1;
  const std::vector<int> nodes = numa_nodes();
  std::string known;
  for (const int each : nodes) known += (known.empty() ? "" : ", ") + std::to_string(each);
  NG_CHECK(std::find(nodes.begin(), nodes.end(), node) != nodes.end(), InvalidArgument, "there is no NUMA node ", node,
           "; this machine has ", known);
  return nodes.size() > 1 ? node : -1;
}

// Its own base, since the engine must know how long the range is.
struct HostSpace {
  Reservation space{kMostBytes};
};

}  // namespace

class HostPool::Impl final : private HostSpace, public SleepingEngine {
 public:
  explicit Impl(const HostPoolOptions& options)
      : SleepingEngine({.name = "HostPool",
                        .range_bytes = space.size(),
                        .unit_bytes = kPoolAlignment,
                        .granule_bytes = kHugePage,
                        .growth = 8,
                        .caches = true,
                        .separate_arenas = false}),
        policy_{options.huge_pages, checked_node(options.numa_node)} {}

  std::byte* data() const noexcept { return space.data(); }
  size_t huge_page_bytes() const { return bytes_in_huge_pages({space.data(), space.size()}); }

 private:
  PageRange range_of(Extent extent) const noexcept { return {data() + extent.offset, extent.bytes}; }

  void commit(Extent arena) override { ng::commit(range_of(arena), policy_); }
  void decommit(Extent extent) noexcept override { ng::decommit(range_of(extent)); }

  void put(PageSink& sink, const std::vector<Extent>& extents) override {
    for (const Extent extent : extents) sink.put(extent.offset / kPoolAlignment, range_of(extent));
  }
  void get(PageSink& sink, const std::vector<Extent>& extents) override {
    for (const Extent extent : extents) sink.get(extent.offset / kPoolAlignment, range_of(extent));
  }
  int discard(Extent arena) noexcept override { return ng::discard(range_of(arena)); }
  void restore(Extent arena) override {
    try {
      populate(range_of(arena));
    } catch (...) {
      discard(arena);
      throw;
    }
  }

  const PagePolicy policy_;
};

HostPool::HostPool(const HostPoolOptions& options) : impl_(std::make_unique<Impl>(options)) {}
HostPool::~HostPool() = default;

void* HostPool::allocate(size_t bytes) { return impl_->data() + impl_->allocate(bytes); }

void HostPool::deallocate(void* block, size_t bytes) noexcept {
  if (block == nullptr) return;
  impl_->deallocate(reinterpret_cast<uintptr_t>(block) - reinterpret_cast<uintptr_t>(impl_->data()), bytes);
}

PoolStatistics HostPool::statistics() const { return impl_->statistics(); }
size_t HostPool::trim() { return impl_->trim(); }
void HostPool::sleep() { impl_->sleep(nullptr); }

void HostPool::sleep(std::shared_ptr<PageSink> sink) {
  NG_CHECK(sink != nullptr, InvalidArgument, "sleep: the sink is null");
  impl_->sleep(std::move(sink));
}

void HostPool::wake() { impl_->wake(); }
bool HostPool::is_asleep() const { return impl_->is_asleep(); }
size_t HostPool::huge_page_bytes() const { return impl_->huge_page_bytes(); }

}  // namespace ng
