// The calls of the operating system that pools rest on; see pages.hpp.
#include "memory/pages.hpp"

#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

// Of Linux 5.14 and 5.18: headers may be older than the kernel.
constexpr int kMadvPopulateWrite = 23;
constexpr int kMadvDontneedLocked = 24;

// Faulting in takes about 0.1 s a gigabyte and thread; below this a second thread gains little.
constexpr size_t kPopulatePiece = size_t{64} << 20;
constexpr unsigned kPopulateThreads = 16;

// Not MAP_NORESERVE: memory behind a part would then be promised without limit. PROT_NONE alone costs nothing.
constexpr int kReservationFlags = MAP_PRIVATE | MAP_ANONYMOUS;

std::string message_of(int errno_value) { return std::generic_category().message(errno_value); }

// Writes to each page without changing it. The pages must not be in use by another thread.
void touch(PageRange range) noexcept {
  for (size_t at = 0; at < range.size(); at += kPoolAlignment) {
    auto* byte = reinterpret_cast<volatile unsigned char*>(range.data() + at);
    *byte = *byte;
  }
}

// Returns 0 or errno.
int populate_piece(PageRange range) noexcept {
  while (madvise(range.data(), range.size(), kMadvPopulateWrite) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno != EINVAL) return errno;
    touch(range);  // a kernel without the call
    return 0;
  }
  return 0;
}

// What the system can give without killing somebody, as it estimates; all there is where it does not say.
size_t available_memory() {
  std::ifstream file("/proc/meminfo");
  size_t bytes = 0;
  for (std::string line; std::getline(file, line);) {
    for (const std::string_view key : {"MemAvailable:", "SwapFree:"}) {
      if (line.starts_with(key)) bytes += std::strtoull(line.c_str() + key.size(), nullptr, 10) << 10;
    }
  }
  return bytes > 0 ? bytes : ~size_t{0};
}

unsigned usable_cores() noexcept {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof set, &set) == 0 ? static_cast<unsigned>(CPU_COUNT(&set)) : 1;
}

// The system call itself, since the wrapper would need libnuma.
void bind(PageRange range, int node) {
  constexpr int kMpolBind = 2;
  constexpr size_t kWordBits = 8 * sizeof(unsigned long);
  std::vector<unsigned long> mask(static_cast<size_t>(node) / kWordBits + 1);
  mask.back() = 1ul << static_cast<size_t>(node) % kWordBits;
  // The kernel takes the number of bits plus one.
  const long result =
      syscall(SYS_mbind, range.data(), range.size(), kMpolBind, mask.data(), mask.size() * kWordBits + 1, 0);
  if (result == 0 || errno == ENOSYS) return;  // a kernel without NUMA has one node
  throw SystemError(errno, concat("cannot bind memory to NUMA node ", node, ": ", message_of(errno)));
}

}  // namespace

Reservation::Reservation(size_t most) {
  const auto pages = static_cast<size_t>(std::max(sysconf(_SC_PHYS_PAGES), 1l));
  const size_t physical = pages * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  size_ = std::min(std::max(4 * physical, size_t{64} << 30), most);
  // A limit on addresses (ulimit -v) may allow less. One huge page on either side is for alignment and stays empty.
  for (;; size_ /= 2) {
    size_ = size_ / kHugePage * kHugePage;
    NG_CHECK(size_ >= 8 * kHugePage, OutOfMemory, "cannot reserve addresses for a pool: ", message_of(errno));
    mapped_ = size_ + 2 * kHugePage;
    mapping_ = mmap(nullptr, mapped_, PROT_NONE, kReservationFlags, -1, 0);
    if (mapping_ != MAP_FAILED) break;
  }
  data_ = static_cast<std::byte*>(mapping_) + kHugePage - reinterpret_cast<uintptr_t>(mapping_) % kHugePage;
}

Reservation::~Reservation() { munmap(mapping_, mapped_); }

void commit(PageRange range, const PagePolicy& policy) {
  NG_CHECK(mprotect(range.data(), range.size(), PROT_READ | PROT_WRITE) == 0, OutOfMemory, message_of(errno));
  try {
    madvise(range.data(), range.size(), policy.huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);  // advisory
    if (policy.numa_node >= 0) bind(range, policy.numa_node);
    populate(range);
  } catch (...) {
    decommit(range);
    throw;
  }
}

void populate(PageRange range) {
  // A page that cannot be had kills the process instead of failing the call, so ask first.
  const size_t available = available_memory();
  NG_CHECK(range.size() <= available, OutOfMemory, range.size(), " bytes of memory are needed and the system has ",
           available, " available");
  const size_t pieces = (range.size() + kPopulatePiece - 1) / kPopulatePiece;
  std::atomic<size_t> next{0};
  std::atomic<int> error{0};
  const auto work = [&] {
    for (size_t piece = next++; piece < pieces && error == 0; piece = next++) {
      const size_t begin = piece * kPopulatePiece;
      const int result = populate_piece(range.subspan(begin, std::min(kPopulatePiece, range.size() - begin)));
      if (result != 0) error = result;
    }
  };
  // Threads of its own: the executor's may be waiting for the pool that is growing.
  std::vector<std::thread> helpers;
  const size_t count = std::min({pieces, size_t{usable_cores()}, size_t{kPopulateThreads}});
  while (helpers.size() + 1 < count) {
    try {
      helpers.emplace_back(work);
    } catch (const std::exception&) {
      break;  // fewer then
    }
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  NG_CHECK(error == 0, OutOfMemory, message_of(error));
}

int discard(PageRange range) noexcept {
  // MADV_FREE would leave the pages until the system needs them. Locked pages (mlockall) need the newer call.
  if (madvise(range.data(), range.size(), kMadvDontneedLocked) == 0) return 0;
  return madvise(range.data(), range.size(), MADV_DONTNEED) == 0 ? 0 : errno;
}

void decommit(PageRange range) noexcept {
  // A new mapping, not mprotect: it also returns what the system had promised for the range (strict overcommit).
  if (mmap(range.data(), range.size(), PROT_NONE, kReservationFlags | MAP_FIXED, -1, 0) != MAP_FAILED) return;
  madvise(range.data(), range.size(), MADV_DONTNEED);  // too many mappings for a split
}

size_t bytes_in_huge_pages(PageRange range) {
  std::ifstream file("/proc/self/smaps");
  NG_CHECK(file, Error, "cannot read /proc/self/smaps");
  const auto begin = reinterpret_cast<uintptr_t>(range.data());
  constexpr std::string_view kKey = "AnonHugePages:";
  size_t bytes = 0;
  bool inside = false;
  for (std::string line; std::getline(file, line);) {
    // A mapping's first line is "7f00-7f20 rw-p ...", those that follow are "Key: number kB".
    char* rest = nullptr;
    const uintptr_t first = std::strtoull(line.c_str(), &rest, 16);
    if (*rest == '-') {
      inside = first >= begin && std::strtoull(rest + 1, nullptr, 16) <= begin + range.size();
    } else if (inside && line.starts_with(kKey)) {
      bytes += std::strtoull(line.c_str() + kKey.size(), nullptr, 10) << 10;
    }
  }
  return bytes;
}

std::vector<int> numa_nodes() {
  // A list of ranges: "0-1,3".
  std::ifstream file("/sys/devices/system/node/online");
  std::vector<int> nodes;
  for (std::string part; std::getline(file, part, ',');) {
    char* rest = nullptr;
    const long first = std::strtol(part.c_str(), &rest, 10);
    const long last = *rest == '-' ? std::strtol(rest + 1, nullptr, 10) : first;
    for (long node = first; node <= last; ++node) nodes.push_back(static_cast<int>(node));
  }
  if (nodes.empty()) nodes.push_back(0);
  return nodes;
}

}  // namespace ng
