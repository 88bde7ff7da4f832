// The seam to the operating system: what each call promises of a range's contents and memory.
#include "memory/pages.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

size_t resident_pages(PageRange range) {
  std::vector<unsigned char> pages(range.size() / kPoolAlignment);
  EXPECT_EQ(mincore(range.data(), range.size(), pages.data()), 0);
  return static_cast<size_t>(std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; }));
}

TEST(Pages, ComeAndGo) {
  const Reservation space(size_t{1} << 30);
  EXPECT_EQ(space.size(), size_t{1} << 30);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(space.data()) % kHugePage, 0u);
  const PageRange range(space.data() + 4 * kHugePage, 3 * kHugePage);
  for (const bool huge_pages : {true, false}) {
    commit(range, {huge_pages, -1});
    EXPECT_EQ(resident_pages(range), range.size() / kPoolAlignment);
    EXPECT_LE(bytes_in_huge_pages(range), huge_pages ? range.size() : 0);
    std::fill(range.begin(), range.end(), std::byte{5});
    populate(range);  // keeps contents
    EXPECT_EQ(std::count(range.begin(), range.end(), std::byte{5}), static_cast<int64_t>(range.size()));
    EXPECT_EQ(discard(range), 0);
    EXPECT_EQ(resident_pages(range), 0u);
    EXPECT_EQ(std::count(range.begin(), range.end(), std::byte{0}), static_cast<int64_t>(range.size()));
    decommit(range);
    EXPECT_EQ(resident_pages(range), 0u);
  }
}

TEST(Pages, BindToANode) {
  const Reservation space(size_t{1} << 30);
  const PageRange range(space.data(), kHugePage);
  try {
    commit(range, {true, numa_nodes().back()});
  } catch (const SystemError& error) {
    if (error.errno_value() == EPERM) GTEST_SKIP() << error.what();
    throw;
  }
  EXPECT_EQ(resident_pages(range), kHugePage / kPoolAlignment);
  decommit(range);
  EXPECT_THROW(commit(range, {true, 1000}), SystemError);
  // Undone: the range can be committed again.
  commit(range, {true, -1});
}

// Not by killing the process, as the first use of memory that was promised but is not there would.
TEST(Pages, MoreThanThereIsIsRefused) {
  const Reservation space(size_t{1} << 42);
  const size_t physical = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (space.size() < 2 * physical) GTEST_SKIP() << "the system grants " << space.size() << " bytes of addresses";
  EXPECT_THROW(commit({space.data(), space.size()}, {true, -1}), OutOfMemory);
  // Less than the physical memory, and more than is free of it.
  EXPECT_THROW(commit({space.data(), physical / kHugePage * kHugePage}, {true, -1}), OutOfMemory);
  commit({space.data(), kHugePage}, {true, -1});
}

}  // namespace
}  // namespace ng
