// Copies and fills, and the entry points of memory.
//
// As on hardware, a copy from pageable host memory has read it when the call returns, one to pageable host memory is
// complete then, and pinned memory is read and written when the copy's turn comes. Whether what a copy reads is
// initialised is copied too: kernels, not copies, are asked for it.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "capture.hpp"
#include "driver.hpp"
#include "entry.hpp"
#include "memory.hpp"
#include "stream.hpp"

namespace ng::cuda {
namespace {

void* host(DevicePtr pointer) { return reinterpret_cast<void*>(pointer); }
DevicePtr address(const void* pointer) { return reinterpret_cast<DevicePtr>(pointer); }

// When the work's turn comes, what was accessible at the call may no longer be.
void require_accessible(const DeviceMemory& memory, DevicePtr pointer, size_t bytes, const char* what) {
  if (memory.accessible(pointer, bytes)) return;
  report(std::string(what) + " of " + std::to_string(bytes) + " bytes at device address " + std::to_string(pointer) +
         ": not mapped any more when its turn comes");
  fail(Result::illegal_address);
}

void require_pinned(DevicePtr pointer, size_t bytes) {
  if (pinned_memory().contains(host(pointer), bytes)) return;
  report("a copy of " + std::to_string(bytes) + " bytes: its pinned host memory was freed before its turn came");
  fail(Result::illegal_address);
}

void copy_now(DevicePtr to, DevicePtr from, size_t bytes) {
  DeviceMemory* const target = memory_of(to);
  DeviceMemory* const source = memory_of(from);
  if (target != nullptr) require_accessible(*target, to, bytes, "copy to");
  if (source != nullptr) require_accessible(*source, from, bytes, "copy from");
  std::memmove(target != nullptr ? target->contents(to) : host(to),
               source != nullptr ? source->contents(from) : host(from), bytes);
  if (target == nullptr) return;
  unsigned char* const written = target->shadow(to);
  if (source == nullptr) {
    for (size_t i = 0; i < bytes; ++i) written[i] |= kInitialised;
    return;
  }
  const unsigned char* const read = source->shadow(from);
  for (size_t i = 0; i < bytes; ++i) {
    written[i] = static_cast<unsigned char>((written[i] & ~kInitialised) | (read[i] & kInitialised));
  }
}

void copy(StreamOfDriver& stream, DevicePtr to, DevicePtr from, size_t bytes) {
  if (bytes == 0) return;
  DeviceMemory* const target = memory_of(to);
  DeviceMemory* const source = memory_of(from);
  require(target == nullptr || target->accessible(to, bytes));
  require(source == nullptr || source->accessible(from, bytes));
  const bool to_pageable = target == nullptr && !pinned_memory().contains(host(to), bytes);
  const bool from_pageable = source == nullptr && !pinned_memory().contains(host(from), bytes);
  if (to_pageable || from_pageable) {
    const std::lock_guard lock(scheduler().mutex);
    forbid_wait(stream);  // pageable memory cannot be part of a graph
  }
  std::shared_ptr<std::vector<unsigned char>> staged;
  if (from_pageable) {
    const auto* begin = static_cast<const unsigned char*>(host(from));
    staged = std::make_shared<std::vector<unsigned char>>(begin, begin + bytes);
    from = address(staged->data());
  }
  const bool to_pinned = target == nullptr && !to_pageable;
  const bool from_pinned = source == nullptr && !from_pageable;
  const auto task = enqueue(stream, {[=] {
                              if (to_pinned) require_pinned(to, bytes);
                              if (from_pinned) require_pinned(from, bytes);
                              copy_now(to, from, bytes);
                              (void)staged;
                            }});
  if (to_pageable) {
    wait_for({task});
    stream.context->check();
  }
}

void require_device(DevicePtr pointer) { require(memory_of(pointer) != nullptr); }
void require_host(const void* pointer) { require(pointer != nullptr && memory_of(address(pointer)) == nullptr); }

DeviceMemory& memory_at(DevicePtr pointer) {
  DeviceMemory* const memory = memory_of(pointer);
  require(memory != nullptr);
  return *memory;
}

DeviceMemory& memory_at(const MemoryLocation& location) {
  require(location.type == 1);
  return device(location.id).memory;
}

}  // namespace

// --- entry points ------------------------------------------------------------------------------------------------

Result cuMemGetInfo_v2(size_t* free, size_t* total) {
  return entry_in_context([&](ContextOfDriver& context) {
    *free = context.memory.free_bytes();
    *total = settings().memory;
  });
}

Result cuMemHostAlloc(void** pointer, size_t bytes, unsigned flags) {
  return entry_in_context([&](ContextOfDriver&) {
    require((flags & ~7u) == 0);
    forbid_while_capturing();
    *pointer = pinned_memory().allocate(bytes);
  });
}

Result cuMemFreeHost(void* pointer) {
  return entry_in_context([&](ContextOfDriver&) {
    forbid_while_capturing();
    pinned_memory().deallocate(pointer);
  });
}

Result cuMemcpyAsync(DevicePtr to, DevicePtr from, size_t bytes, StreamHandle stream) {
  return entry_in_context([&](ContextOfDriver& context) { copy(*stream_of(stream, context), to, from, bytes); });
}

Result cuMemcpyHtoDAsync_v2(DevicePtr to, const void* from, size_t bytes, StreamHandle stream) {
  return entry_in_context([&](ContextOfDriver& context) {
    require_device(to);
    require_host(from);
    copy(*stream_of(stream, context), to, address(from), bytes);
  });
}

Result cuMemcpyDtoHAsync_v2(void* to, DevicePtr from, size_t bytes, StreamHandle stream) {
  return entry_in_context([&](ContextOfDriver& context) {
    require_host(to);
    require_device(from);
    copy(*stream_of(stream, context), address(to), from, bytes);
  });
}

Result cuMemsetD8Async(DevicePtr to, unsigned char value, size_t count, StreamHandle stream) {
  return entry_in_context([&](ContextOfDriver& context) {
    DeviceMemory& memory = memory_at(to);
    require(memory.accessible(to, count));
    if (count == 0) return;
    enqueue(*stream_of(stream, context), {[&memory, to, value, count] {
      require_accessible(memory, to, count, "fill");
      std::memset(memory.contents(to), value, count);
      unsigned char* const written = memory.shadow(to);
      for (size_t i = 0; i < count; ++i) written[i] |= kInitialised;
    }});
  });
}

Result cuPointerGetAttribute(void* value, PointerAttribute attribute, DevicePtr pointer) {
  return entry_in_context([&](ContextOfDriver& current) {
    DeviceMemory* const memory = memory_of(pointer);
    const auto [begin, bytes] =
        memory != nullptr ? memory->mapping_of(pointer) : pinned_memory().range_of(host(pointer));
    require(bytes > 0);
    const int ordinal =
        memory != nullptr ? static_cast<int>((memory->base() - kFirstAddress) / kWindowBytes) : current.ordinal;
    switch (attribute) {
      case PointerAttribute::context: *static_cast<Context*>(value) = &device(ordinal); return;
      case PointerAttribute::memory_type:
        *static_cast<MemoryType*>(value) = memory != nullptr ? MemoryType::device : MemoryType::host;
        return;
      case PointerAttribute::device_ordinal: *static_cast<int*>(value) = ordinal; return;
      case PointerAttribute::range_begin: *static_cast<DevicePtr*>(value) = begin; return;
      case PointerAttribute::range_bytes: *static_cast<size_t*>(value) = bytes; return;
    }
    fail(Result::invalid_value);
  });
}

// On the current context's device: its window is where its memory can be mapped.
Result cuMemAddressReserve(DevicePtr* pointer, size_t bytes, size_t alignment, DevicePtr, unsigned long long flags) {
  return entry_in_context([&](ContextOfDriver& context) {
    require(flags == 0);
    *pointer = context.memory.reserve(bytes, alignment);
  });
}

Result cuMemAddressFree(DevicePtr pointer, size_t bytes) {
  return entry_in_context([&](ContextOfDriver&) { memory_at(pointer).release_range(pointer, bytes); });
}

Result cuMemCreate(MemoryHandle* handle, size_t bytes, const AllocationProperties* properties,
                   unsigned long long flags) {
  return entry_in_context([&](ContextOfDriver&) {
    require(flags == 0 && properties != nullptr && properties->type == 1 && bytes > 0 && bytes % kGranularity == 0);
    require(properties->requested_handle_types == 0, Result::not_supported);
    auto physical = std::make_shared<Physical>(memory_at(properties->location), bytes);
    *handle = address(registry<Physical>().add(std::move(physical)));
  });
}

Result cuMemRelease(MemoryHandle handle) {
  return entry_in_context([&](ContextOfDriver&) {
    registry<Physical>().remove(static_cast<Physical*>(host(handle)), Result::invalid_value);
  });
}

Result cuMemMap(DevicePtr pointer, size_t bytes, size_t offset, MemoryHandle handle, unsigned long long flags) {
  return entry_in_context([&](ContextOfDriver&) {
    require(offset == 0 && flags == 0);
    auto physical = registry<Physical>().find(static_cast<Physical*>(host(handle)), Result::invalid_value);
    memory_at(pointer).map(pointer, bytes, std::move(physical));
  });
}

Result cuMemUnmap(DevicePtr pointer, size_t bytes) {
  return entry_in_context([&](ContextOfDriver&) { memory_at(pointer).unmap(pointer, bytes); });
}

Result cuMemSetAccess(DevicePtr pointer, size_t bytes, const AccessDescriptor* descriptors, size_t count) {
  return entry_in_context([&](ContextOfDriver&) {
    DeviceMemory& memory = memory_at(pointer);
    for (size_t i = 0; i < count; ++i) {
      require(descriptors[i].flags == 0 || descriptors[i].flags == 3, Result::not_supported);
      // No device reads another's memory.
      require(&memory_at(descriptors[i].location) == &memory, Result::not_supported);
      memory.set_access(pointer, bytes, descriptors[i].flags == 3);
    }
  });
}

Result cuMemGetAllocationGranularity(size_t* bytes, const AllocationProperties* properties, int option) {
  return entry([&] {
    require(properties != nullptr && (option == kGranularityMinimum || option == kGranularityRecommended));
    *bytes = kGranularity;
  });
}

}  // namespace ng::cuda
