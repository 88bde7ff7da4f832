// Windows of device memory, and pinned host memory.
#include "memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "driver.hpp"
#include "settings.hpp"

namespace ng::cuda {
namespace {

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// What is read before it is written: NaN in every floating-point type.
constexpr unsigned char kPoison = 0xff;

}  // namespace

Physical::Physical(DeviceMemory& memory_, size_t bytes_) : memory(memory_), bytes(bytes_) {
  if (memory.used_.fetch_add(bytes) + bytes > settings().memory) {
    memory.used_.fetch_sub(bytes);
    fail(Result::out_of_memory);
  }
}

Physical::~Physical() { memory.used_.fetch_sub(bytes); }

Window::Window() {
  file_ = inherited_file(memfd_create("simgpu", MFD_CLOEXEC));
  require(file_ >= 0 && ftruncate(file_, 2 * kWindowBytes) == 0, Result::out_of_memory);
  void* mapping = mmap(nullptr, 2 * kWindowBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file_, 0);
  require(mapping != MAP_FAILED, Result::out_of_memory);
  madvise(mapping, 2 * kWindowBytes, MADV_DONTDUMP);
  contents_ = static_cast<unsigned char*>(mapping);
}

void Window::discard(size_t offset, size_t bytes) const {
  for (const size_t begin : {offset, offset + kWindowBytes}) {
    require(fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(begin),
                      static_cast<off_t>(bytes)) == 0,
            Result::unknown);
  }
  for (size_t granule = offset; granule < offset + bytes; granule += kGranularity) *shadow(granule) = kFreed;
}

DeviceMemory::DeviceMemory(int ordinal) : base_(kFirstAddress + static_cast<DevicePtr>(ordinal) * kWindowBytes) {}

size_t DeviceMemory::free_bytes() const { return settings().memory - used_.load(); }

DevicePtr DeviceMemory::reserve(size_t bytes, size_t alignment) {
  require(bytes > 0 && bytes % kGranularity == 0 && (alignment & (alignment - 1)) == 0);
  alignment = std::max(alignment, kGranularity);
  const std::lock_guard lock(mutex_);
  // The first gap that leaves a granule before and after: what runs over an end meets nothing.
  DevicePtr pointer = round_up(base_ + kGranularity, alignment);
  for (const auto& [begin, size] : reservations_) {
    if (pointer + bytes + kGranularity <= begin) break;
    pointer = round_up(begin + size + kGranularity, alignment);
  }
  require(bytes < kWindowBytes && pointer + bytes + kGranularity <= base_ + kWindowBytes, Result::out_of_memory);
  reservations_.emplace(pointer, bytes);
  return pointer;
}

void DeviceMemory::release_range(DevicePtr pointer, size_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto found = reservations_.find(pointer);
  require(found != reservations_.end() && found->second == bytes);
  const auto mapped = mappings_.lower_bound(pointer);
  require(mapped == mappings_.end() || mapped->first >= pointer + bytes);
  reservations_.erase(found);
}

void DeviceMemory::map(DevicePtr pointer, size_t bytes, std::shared_ptr<Physical> physical) {
  require(&physical->memory == this && bytes > 0 && bytes == physical->bytes && pointer % kGranularity == 0);
  const std::lock_guard lock(mutex_);
  auto reserved = reservations_.upper_bound(pointer);
  require(reserved != reservations_.begin());
  --reserved;
  require(pointer + bytes <= reserved->first + reserved->second);
  const auto next = mappings_.lower_bound(pointer);
  require(next == mappings_.end() || next->first >= pointer + bytes);
  if (next != mappings_.begin()) {
    const auto before = std::prev(next);
    require(before->first + before->second.bytes <= pointer);
  }
  require(!physical->mapped, Result::not_supported);
  for (size_t granule = 0; granule < bytes; granule += kGranularity) *shadow(pointer + granule) = 0;
  if (physical->contents.empty()) {
    std::memset(contents(pointer), kPoison, bytes);
  } else {
    std::memcpy(contents(pointer), physical->contents.data(), bytes);
    std::memcpy(shadow(pointer), physical->shadow.data(), bytes);
    physical->contents = {};
    physical->shadow = {};
  }
  physical->mapped = true;
  mappings_.emplace(pointer, Mapping{bytes, std::move(physical), false});
}

std::pair<DeviceMemory::Mappings::iterator, DeviceMemory::Mappings::iterator> DeviceMemory::exact(DevicePtr pointer,
                                                                                                  size_t bytes) {
  const auto first = mappings_.find(pointer);
  auto last = first;
  DevicePtr end = pointer;
  while (last != mappings_.end() && last->first == end && end < pointer + bytes) {
    end += last->second.bytes;
    ++last;
  }
  require(bytes > 0 && end == pointer + bytes);
  return {first, last};
}

void DeviceMemory::unmap(DevicePtr pointer, size_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto [first, last] = exact(pointer, bytes);
  for (auto mapping = first; mapping != last; ++mapping) {
    const DevicePtr begin = mapping->first;
    const size_t size = mapping->second.bytes;
    Physical& physical = *mapping->second.physical;
    physical.mapped = false;
    if (mapping->second.physical.use_count() > 1) {  // its handle lives: it may be mapped again
      physical.contents.assign(contents(begin), contents(begin) + size);
      physical.shadow.assign(shadow(begin), shadow(begin) + size);
      for (unsigned char& byte : physical.shadow) byte &= kInitialised;
    }
    window_.discard(begin - base_, size);
  }
  mappings_.erase(first, last);
}

void DeviceMemory::set_access(DevicePtr pointer, size_t bytes, bool accessible_) {
  const std::lock_guard lock(mutex_);
  const auto [first, last] = exact(pointer, bytes);
  for (auto mapping = first; mapping != last; ++mapping) mapping->second.accessible = accessible_;
  unsigned char* bytes_shadow = shadow(pointer);
  const unsigned char set = accessible_ ? kAllocated : 0;
  for (size_t i = 0; i < bytes; ++i)
    bytes_shadow[i] = static_cast<unsigned char>((bytes_shadow[i] & kInitialised) | set);
}

DeviceMemory::Mappings::const_iterator DeviceMemory::holding(DevicePtr pointer) const {
  auto found = mappings_.upper_bound(pointer);
  if (found == mappings_.begin()) return mappings_.end();
  --found;
  return pointer < found->first + found->second.bytes ? found : mappings_.end();
}

std::pair<DevicePtr, size_t> DeviceMemory::mapping_of(DevicePtr pointer) const {
  const std::lock_guard lock(mutex_);
  const auto found = holding(pointer);
  return found == mappings_.end() ? std::pair<DevicePtr, size_t>{} : std::pair{found->first, found->second.bytes};
}

std::vector<DevicePtr> DeviceMemory::allocate_variables(
    const std::vector<std::pair<size_t, size_t>>& sizes_and_alignments) {
  if (sizes_and_alignments.empty()) return {};
  constexpr size_t kGap = 512;  // between variables: what runs over an end meets nothing
  std::vector<size_t> offsets;
  size_t end = 0;
  for (const auto& [size, alignment] : sizes_and_alignments) {
    offsets.push_back(round_up(end, std::max<size_t>(256, alignment)));
    end = offsets.back() + size + kGap;
  }
  const size_t bytes = round_up(end, kGranularity);
  auto physical = std::make_shared<Physical>(*this, bytes);
  const DevicePtr first = reserve(bytes, kGranularity);
  map(first, bytes, std::move(physical));
  {
    const std::lock_guard lock(mutex_);
    mappings_.at(first).accessible = true;
  }
  std::vector<DevicePtr> pointers;
  for (size_t i = 0; i < offsets.size(); ++i) {
    pointers.push_back(first + offsets[i]);
    std::memset(shadow(pointers.back()), kAllocated | kInitialised, sizes_and_alignments[i].first);
  }
  return pointers;
}

void DeviceMemory::deallocate_variables(DevicePtr first) {
  const size_t bytes = mapping_of(first).second;
  unmap(first, bytes);
  release_range(first, bytes);
}

bool DeviceMemory::accessible(DevicePtr pointer, size_t bytes) const {
  const std::lock_guard lock(mutex_);
  size_t left = bytes;
  for (auto mapping = holding(pointer); left > 0; mapping = holding(pointer)) {
    if (mapping == mappings_.end() || !mapping->second.accessible) return false;
    const size_t here = std::min(left, mapping->first + mapping->second.bytes - pointer);
    pointer += here;
    left -= here;
  }
  return true;
}

DeviceMemory* memory_of(DevicePtr pointer) {
  if (pointer < kFirstAddress) return nullptr;
  const DevicePtr ordinal = (pointer - kFirstAddress) / kWindowBytes;
  return ordinal < static_cast<DevicePtr>(settings().devices) ? &device(static_cast<int>(ordinal)).memory : nullptr;
}

void* PinnedMemory::allocate(size_t bytes) {
  require(bytes > 0);
  const std::lock_guard lock(mutex_);
  // The first gap that leaves a granule before and after, as for device memory.
  size_t offset = kGranularity;
  for (const auto& [begin, size] : ranges_) {
    if (offset + round_up(bytes, kGranularity) + kGranularity <= begin - base()) break;
    offset = begin - base() + round_up(size, kGranularity) + kGranularity;
  }
  require(bytes < kWindowBytes && offset + round_up(bytes, kGranularity) + kGranularity <= kWindowBytes,
          Result::out_of_memory);
  void* const pointer = window_.contents(offset);
  require(mprotect(pointer, round_up(bytes, kGranularity), PROT_READ | PROT_WRITE) == 0, Result::out_of_memory);
  std::memset(window_.shadow(offset), kAllocated | kInitialised, bytes);
  ranges_.emplace(reinterpret_cast<uintptr_t>(pointer), bytes);
  return pointer;
}

void PinnedMemory::deallocate(void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const std::lock_guard lock(mutex_);
  const auto found = ranges_.find(address);
  require(found != ranges_.end());
  const size_t size = round_up(found->second, kGranularity);
  window_.discard(address - base(), size);
  mprotect(pointer, size, PROT_NONE);  // the host too is stopped if it uses it
  ranges_.erase(found);
}

bool PinnedMemory::contains(const void* pointer, size_t bytes) const {
  const auto [begin, size] = range_of(pointer);
  return size > 0 && reinterpret_cast<uintptr_t>(pointer) - begin <= size - std::min(size, bytes) && bytes <= size;
}

std::pair<DevicePtr, size_t> PinnedMemory::range_of(const void* pointer) const {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const std::lock_guard lock(mutex_);
  auto found = ranges_.upper_bound(address);
  if (found == ranges_.begin()) return {0, 0};
  --found;
  if (address - found->first >= found->second) return {0, 0};
  return {found->first, found->second};
}

PinnedMemory& pinned_memory() {
  static PinnedMemory& instance = *new PinnedMemory;  // lives until the process ends: threads may still run
  return instance;
}

}  // namespace ng::cuda
