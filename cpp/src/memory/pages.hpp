// Pages of host memory: the calls of the operating system that pools rest on, each with its contract.
//
// Addresses are reserved first and cost nothing; commit() puts memory behind a part of them. Ranges are whole huge
// pages (2 MiB). Nothing here locks: ranges given to concurrent calls must not overlap.
#pragma once

#include <cstddef>
#include <span>

namespace ng {

inline constexpr size_t kHugePage = size_t{2} << 20;

using PageRange = std::span<std::byte>;

// A range of addresses aligned to 2 MiB, without memory at first and without a neighbour whose pages could be counted
// as its own. Unmapped, memory included, by the destructor.
class Reservation {
 public:
  // Several times the physical memory, since freed addresses can be scattered, but not above `most`; less where the
  // system grants less. Throws OutOfMemory.
  explicit Reservation(size_t most);
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  std::byte* data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }

 private:
  void* mapping_ = nullptr;
  size_t mapped_ = 0;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

struct PagePolicy {
  bool huge_pages;
  int numa_node;  // -1: any
};

// Puts memory behind reserved addresses and faults it in, on several threads where it is much. After a failure the
// range is as before. Throws OutOfMemory, or SystemError if the kernel refuses the node.
void commit(PageRange range, const PagePolicy& policy);

// Faults a committed range in, contents kept. Throws OutOfMemory.
void populate(PageRange range);

// Gives the memory back and keeps the range committed: it reads as zeros. Returns 0 or errno.
int discard(PageRange range) noexcept;

// Gives the memory back; the addresses stay reserved.
void decommit(PageRange range) noexcept;

// Bytes of a range that lie in huge pages now (AnonHugePages of /proc/self/smaps). Throws Error if it cannot be
// read.
size_t bytes_in_huge_pages(PageRange range);

}  // namespace ng
