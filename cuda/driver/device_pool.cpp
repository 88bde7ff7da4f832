// DevicePool: granules of device memory in one range of addresses under a SleepingEngine, and the order of streams.
//
// What a stream frees goes into a set of free runs of that stream, in which the suballocator merges and splits it as in
// any other, with one event for the whole set, recorded anew at each free. A stream has two such sets: when somebody
// asks whether its memory is free for all, the set is closed, so that its event stays where it is and passes in time,
// and later frees go into the other one. No event is made while a stream has memory or an earlier one's can be used.
#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "driver/context.hpp"
#include "driver/stream.hpp"
#include "memory/sleeping_engine.hpp"
#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {

using cuda::CaptureExemption;
using cuda::ContextScope;
using cuda::DevicePtr;
using cuda::Result;
using cuda::where_possible;

namespace {

// What a sink is given at once, from one of two buffers.
constexpr size_t kPiece = size_t{16} << 20;

constexpr size_t kMostBytes = (size_t{1} << 31) * kDevicePoolAlignment;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

std::byte* host(DevicePtr pointer) noexcept { return reinterpret_cast<std::byte*>(pointer); }

cuda::AllocationProperties properties_of(int device) noexcept {
  cuda::AllocationProperties properties{};
  properties.type = 1;
  properties.location = {.type = 1, .id = device};
  return properties;
}

// Addresses for twice the memory of a device.
class DeviceSpace {
 public:
  explicit DeviceSpace(int device) : device_(device) {
    const ContextScope context(device);
    const auto properties = properties_of(device);
    NG_CUDA(context.driver(), cuMemGetAllocationGranularity(&granule_, &properties, cuda::kGranularityMinimum));
    NG_CHECK(granule_ % kDevicePoolAlignment == 0, CudaError, "cuda:", device, " maps memory in granules of ", granule_,
             " bytes, expected a multiple of ", kDevicePoolAlignment);
    bytes_ = std::min(round_up(2 * cuda_device(device).memory_bytes, granule_), kMostBytes / granule_ * granule_);
    NG_CUDA(context.driver(), cuMemAddressReserve(&begin_, bytes_, 0, 0, 0));
  }

  ~DeviceSpace() {
    where_possible(device_, [&](const ContextScope& context) { context->cuMemAddressFree(begin_, bytes_); });
  }

  DeviceSpace(const DeviceSpace&) = delete;
  DeviceSpace& operator=(const DeviceSpace&) = delete;

  int device() const noexcept { return device_; }
  DevicePtr begin() const noexcept { return begin_; }
  size_t bytes() const noexcept { return bytes_; }
  size_t granule() const noexcept { return granule_; }

  // All or nothing. Throws OutOfMemory.
  void map(size_t offset, size_t bytes) const {
    const ContextScope context(device_);
    const CaptureExemption exemption(context.driver());
    const auto properties = properties_of(device_);
    size_t mapped = 0;
    try {
      for (; mapped < bytes; mapped += granule_) {
        cuda::MemoryHandle memory = 0;
        NG_CUDA(context.driver(), cuMemCreate(&memory, granule_, &properties, 0));
        const Result result = context->cuMemMap(begin_ + offset + mapped, granule_, 0, memory, 0);
        context->cuMemRelease(memory);  // the mapping keeps it
        cuda::check(result, "cuMemMap");
      }
      const cuda::AccessDescriptor access{.location = properties.location, .flags = 3};
      NG_CUDA(context.driver(), cuMemSetAccess(begin_ + offset, bytes, &access, 1));
    } catch (...) {
      unmap(offset, mapped);
      throw;
    }
  }

  // pre: no work uses the memory.
  void unmap(size_t offset, size_t bytes) const noexcept {
    where_possible(device_, [&](const ContextScope& context) {
      const CaptureExemption exemption(context.driver());
      for (size_t at = 0; at < bytes; at += granule_) context->cuMemUnmap(begin_ + offset + at, granule_);
    });
  }

 private:
  const int device_;
  size_t granule_ = 0;
  size_t bytes_ = 0;
  DevicePtr begin_ = 0;
};

// What is free for one stream, and for others once the event of its set has passed.
struct Lane {
  struct Frees {
    Suballocator::Set set;
    Event event;
  };
  unsigned long long stream = 0;  // its id: handles are used again for other streams
  Frees open;                     // of the last frees
  Frees closed;                   // of those before
};

}  // namespace

class DevicePool::Impl final : private DeviceSpace, public SleepingEngine {
 public:
  using DeviceSpace::begin;
  using DeviceSpace::device;

  explicit Impl(int device)
      : DeviceSpace(device),
        SleepingEngine({.name = "DevicePool",
                        .range_bytes = DeviceSpace::bytes(),
                        .unit_bytes = kDevicePoolAlignment,
                        .granule_bytes = granule(),
                        .growth = 32,
                        .caches = false,
                        .separate_arenas = false}) {}

  ~Impl() {
    where_possible(device(), [&](const ContextScope&) {
      const std::lock_guard lock(mutex_);
      if (state_ != State::awake) return;
      settle();
      for (const Extent arena : extents(false)) unmap(arena.offset, arena.bytes);
    });
  }

  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  size_t allocate_for(size_t bytes, const Stream& stream) {
    NG_CHECK(stream.device() == device(), InvalidArgument, "a pool of cuda:", device(),
             " is asked for memory in the order of a stream of cuda:", stream.device());
    const uint32_t units = units_of(bytes);
    const ContextScope context(device());
    NG_CHECK(!stream.is_capturing(), CudaError, "cannot allocate ", bytes, " bytes on cuda:", device(),
             " in the order of a stream that is being captured into a graph: allocate before the capture");
    const unsigned long long id = id_of(context, stream);
    {
      const std::lock_guard lock(mutex_);
      require(State::awake, "allocate");
      if (const auto first = find(units, id, stream)) return hold({*first, units});
    }
    try {
      std::optional<uint32_t> first;
      while (!first) first = grow(units, bytes);
      return hold({*first, units});
    } catch (const OutOfMemory&) {
      const std::lock_guard lock(mutex_);
      if (const auto first = gather(units, id, stream)) return hold({*first, units});
      throw;
    }
  }

  void deallocate_for(size_t offset, size_t bytes, const Stream& stream) noexcept {
    const std::optional<Run> run = release(offset, bytes);
    if (!run) return;
    // If this fails, nobody knows when the block could be used again: it stays taken.
    where_possible(device(), [&](const ContextScope& context) {
      const bool capturing = stream.is_capturing();
      const unsigned long long id = id_of(context, stream);
      const std::lock_guard lock(mutex_);
      if (state_ != State::awake) {
        blocks_.deallocate(run->first, run->units);  // no work uses a pool that sleeps
        return;
      }
      if (capturing) return;
      Lane::Frees& frees = lane_of(id).open;
      frees.event.record(stream);
      blocks_.deallocate(run->first, run->units, frees.set);
    });
  }

  // What must be done before the pool may sleep.
  void wait_for_device() const {
    const ContextScope context(device());
    cuda::check_device(context->cuCtxSynchronize(), "cuCtxSynchronize", device());
  }

 private:
  static unsigned long long id_of(const ContextScope& context, const Stream& stream) {
    unsigned long long id = 0;
    NG_CUDA(context.driver(), cuStreamGetId(cuda::handle_of(stream), &id));
    return id;
  }

  static bool passed(const ContextScope& context, const Lane::Frees& frees) noexcept {
    return context->cuEventQuery(cuda::handle_of(frees.event)) == Result::success;
  }

  // pre: mutex_ is held, as for all that follows.
  Lane& lane_of(unsigned long long stream) {
    const auto found =
        std::find_if(lanes_.begin(), lanes_.end(), [&](const Lane& lane) { return lane.stream == stream; });
    if (found != lanes_.end()) return *found;
    if (spare_.empty()) {
      spare_.push_back({.stream = stream,
                        .open = {blocks_.make_set(), Event(device())},
                        .closed = {blocks_.make_set(), Event(device())}});
    }
    lanes_.push_back(std::move(spare_.back()));
    spare_.pop_back();
    lanes_.back().stream = stream;
    return lanes_.back();
  }

  // Without growing: what the stream has freed itself, what is everybody's, and what another stream has freed, which
  // this one then waits for.
  std::optional<uint32_t> find(uint32_t units, unsigned long long id, const Stream& stream) {
    for (const Lane& lane : lanes_) {
      if (lane.stream != id) continue;
      for (const Lane::Frees* frees : {&lane.open, &lane.closed}) {
        if (const auto first = blocks_.allocate(units, frees->set)) return first;
      }
    }
    if (const auto first = blocks_.allocate(units)) return first;
    reclaim();
    if (const auto first = blocks_.allocate(units)) return first;
    for (const Lane& lane : lanes_) {
      for (const Lane::Frees* frees : {&lane.closed, &lane.open}) {
        if (const auto first = blocks_.allocate(units, frees->set)) {
          wait(stream, *frees, {*first, units});
          return first;
        }
      }
    }
    return std::nullopt;
  }

  // Where nothing else is left: all that is free, of whatever stream, merged into the stream's own.
  std::optional<uint32_t> gather(uint32_t units, unsigned long long id, const Stream& stream) {
    if (state_ != State::awake || blocks_.known_units() - blocks_.live_units() < units) return std::nullopt;
    Lane::Frees& own = lane_of(id).open;
    const auto for_each_other = [&](const auto& f) {
      for (const Lane& lane : lanes_) {
        for (const Lane::Frees* frees : {&lane.closed, &lane.open}) {
          if (frees != &own && blocks_.free_units(frees->set) > 0) f(*frees);
        }
      }
    };
    for_each_other([&](const Lane::Frees& frees) { stream.wait(frees.event); });
    own.event.record(stream);  // from here on nothing fails
    for_each_other([&](const Lane::Frees& frees) { blocks_.move(frees.set, own.set); });
    blocks_.move(Suballocator::kShared, own.set);
    return blocks_.allocate(units, own.set);
  }

  // Makes the stream wait for the free of a block that was taken from another's; gives it back if that fails.
  void wait(const Stream& stream, const Lane::Frees& frees, Run taken) {
    try {
      stream.wait(frees.event);
    } catch (...) {
      blocks_.deallocate(taken.first, taken.units, frees.set);
      throw;
    }
  }

  // Makes everybody's what all work has passed. Never waits.
  void reclaim() noexcept override {
    if (lanes_.empty()) return;
    where_possible(device(), [&](const ContextScope& context) {
      const CaptureExemption exemption(context.driver());
      std::erase_if(lanes_, [&](Lane& lane) {
        for (;;) {
          if (blocks_.free_units(lane.closed.set) == 0) {
            if (blocks_.free_units(lane.open.set) == 0) break;
            std::swap(lane.open, lane.closed);
          }
          if (!passed(context, lane.closed)) return false;
          blocks_.move(lane.closed.set, Suballocator::kShared);
        }
        spare_.push_back(std::move(lane));
        return true;
      });
    });
  }

  // Waits for all frees.
  void settle() override {
    for (Lane& lane : lanes_) {
      for (const Lane::Frees* frees : {&lane.closed, &lane.open}) {
        if (blocks_.free_units(frees->set) == 0) continue;
        const ContextScope context(device());
        const CaptureExemption exemption(context.driver());
        cuda::check_device(context->cuEventSynchronize(cuda::handle_of(frees->event)), "cuEventSynchronize", device());
        blocks_.move(frees->set, Suballocator::kShared);
      }
    }
  }

  void commit(Extent arena) override { map(arena.offset, arena.bytes); }
  void decommit(Extent extent) noexcept override { unmap(extent.offset, extent.bytes); }
  void restore(Extent arena) override { map(arena.offset, arena.bytes); }
  int discard(Extent arena) noexcept override {
    unmap(arena.offset, arena.bytes);
    return 0;
  }

  // Two buffers in turn: while the sink has one, the device fills or reads the other.
  struct Staging {
    explicit Staging(int device)
        : stream(Stream::create(device)), pool(device), buffer(static_cast<std::byte*>(pool.allocate(2 * kPiece))) {}
    ~Staging() {
      // After an error of the sink a copy may be under way. The context is current.
      cuda::driver()->cuStreamSynchronize(cuda::handle_of(stream));
      pool.deallocate(buffer, 2 * kPiece);
    }
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;

    Stream stream;
    PinnedPool pool;
    std::byte* buffer;
  };

  static std::vector<Extent> pieces_of(const std::vector<Extent>& extents) {
    std::vector<Extent> pieces;
    for (const Extent extent : extents) {
      for (size_t at = 0; at < extent.bytes; at += kPiece) {
        pieces.push_back({extent.offset + at, std::min(kPiece, extent.bytes - at)});
      }
    }
    return pieces;
  }

  void put(PageSink& sink, const std::vector<Extent>& extents) override {
    const std::vector<Extent> pieces = pieces_of(extents);
    if (pieces.empty()) return;
    const ContextScope context(device());
    const Staging staging(device());
    const auto handle = cuda::handle_of(staging.stream);
    const auto buffer = [&](size_t i) { return staging.buffer + i % 2 * kPiece; };
    const auto copy = [&](size_t i) {
      NG_CUDA(context.driver(), cuMemcpyDtoHAsync_v2(buffer(i), begin() + pieces[i].offset, pieces[i].bytes, handle));
    };
    copy(0);
    for (size_t i = 0; i < pieces.size(); ++i) {
      NG_CUDA(context.driver(), cuStreamSynchronize(handle));
      if (i + 1 < pieces.size()) copy(i + 1);
      sink.put(pieces[i].offset / kDevicePoolAlignment, {buffer(i), pieces[i].bytes});
    }
  }

  void get(PageSink& sink, const std::vector<Extent>& extents) override {
    const std::vector<Extent> pieces = pieces_of(extents);
    if (pieces.empty()) return;
    const ContextScope context(device());
    const Staging staging(device());
    const auto handle = cuda::handle_of(staging.stream);
    for (size_t i = 0; i < pieces.size(); ++i) {
      std::byte* buffer = staging.buffer + i % 2 * kPiece;
      sink.get(pieces[i].offset / kDevicePoolAlignment, {buffer, pieces[i].bytes});
      NG_CUDA(context.driver(), cuStreamSynchronize(handle));  // the copy before, of the other buffer
      NG_CUDA(context.driver(), cuMemcpyHtoDAsync_v2(begin() + pieces[i].offset, buffer, pieces[i].bytes, handle));
    }
    NG_CUDA(context.driver(), cuStreamSynchronize(handle));
  }

  std::vector<Lane> lanes_;  // of streams that have freed something; guarded by mutex_, like
  std::vector<Lane> spare_;  // those with nothing, for the next streams
};

DevicePool::DevicePool(int device) : impl_(std::make_unique<Impl>(device)) {}
DevicePool::~DevicePool() = default;

void* DevicePool::allocate(size_t bytes) {
  cuda::require_driver();  // not in a forked child
  return host(impl_->begin() + impl_->allocate(bytes));
}

void DevicePool::deallocate(void* block, size_t bytes) noexcept {
  if (block != nullptr) impl_->deallocate(reinterpret_cast<DevicePtr>(block) - impl_->begin(), bytes);
}

void* DevicePool::allocate(size_t bytes, const Stream& stream) {
  return host(impl_->begin() + impl_->allocate_for(bytes, stream));
}

void DevicePool::deallocate(void* block, size_t bytes, const Stream& stream) noexcept {
  if (block != nullptr) impl_->deallocate_for(reinterpret_cast<DevicePtr>(block) - impl_->begin(), bytes, stream);
}

PoolStatistics DevicePool::statistics() const { return impl_->statistics(); }
Device DevicePool::device() const noexcept { return {impl_->device()}; }
size_t DevicePool::trim() { return impl_->trim(); }

void DevicePool::sleep() {
  impl_->wait_for_device();
  impl_->sleep(nullptr);
}

void DevicePool::sleep(std::shared_ptr<PageSink> sink) {
  NG_CHECK(sink != nullptr, InvalidArgument, "sleep: the sink is null");
  impl_->wait_for_device();
  impl_->sleep(std::move(sink));
}

void DevicePool::wake() { impl_->wake(); }
bool DevicePool::is_asleep() const { return impl_->is_asleep(); }

StreamPool::StreamPool(std::shared_ptr<DevicePool> pool, Stream stream)
    : pool_(std::move(pool)), stream_(std::move(stream)) {
  NG_CHECK(pool_ != nullptr, InvalidArgument, "StreamPool: the pool is null");
  NG_CHECK(stream_.device() == pool_->device().gpu, InvalidArgument, "StreamPool: a pool of ", pool_->device().str(),
           " and a stream of cuda:", stream_.device());
}

}  // namespace ng
