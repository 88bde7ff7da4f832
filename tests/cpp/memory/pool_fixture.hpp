// What the tests of pools share: blocks with contents of their own, in the memory of whatever pool, and a sink.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "driver/context.hpp"
#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {

constexpr size_t kPage = kPoolAlignment;
constexpr size_t kHuge = size_t{2} << 20;

// Copies to and from memory of a pool, done when they return; on devices in the order of the default stream.
inline void write_to(const Pool&, std::byte* to, const std::vector<std::byte>& bytes) {
  if (!bytes.empty()) std::memcpy(to, bytes.data(), bytes.size());
}

inline void read_from(const Pool&, const std::byte* from, std::vector<std::byte>& bytes) {
  if (!bytes.empty()) std::memcpy(bytes.data(), from, bytes.size());
}

inline cuda::DevicePtr address_on(const std::byte* data) { return reinterpret_cast<cuda::DevicePtr>(data); }

inline void write_to(const DevicePool& pool, std::byte* to, const std::vector<std::byte>& bytes) {
  if (bytes.empty()) return;
  const cuda::ContextScope context(pool.device().gpu);
  NG_CUDA(context.driver(), cuMemcpyHtoDAsync_v2(address_on(to), bytes.data(), bytes.size(), nullptr));
  NG_CUDA(context.driver(), cuStreamSynchronize(nullptr));
}

inline void read_from(const DevicePool& pool, const std::byte* from, std::vector<std::byte>& bytes) {
  if (bytes.empty()) return;
  const cuda::ContextScope context(pool.device().gpu);
  NG_CUDA(context.driver(), cuMemcpyDtoHAsync_v2(bytes.data(), address_on(from), bytes.size(), nullptr));
  NG_CUDA(context.driver(), cuStreamSynchronize(nullptr));
}

template <typename P>
struct BlockOf {
  P* pool;
  std::byte* data;
  size_t bytes;
  uint64_t seed;

  // A value for each page, so that a block of another, or a lost page, is seen.
  void fill() const {
    std::vector<std::byte> contents(bytes);
    for_each_page([&](size_t at, uint64_t value) { std::memcpy(contents.data() + at, &value, sizeof value); });
    write_to(*pool, data, contents);
  }
  bool is_intact() const {
    std::vector<std::byte> contents(bytes);
    read_from(*pool, data, contents);
    bool intact = true;
    for_each_page([&](size_t at, uint64_t value) {
      if (std::memcmp(contents.data() + at, &value, sizeof value) != 0) intact = false;
    });
    return intact;
  }

 private:
  template <typename F>
  void for_each_page(const F& f) const {
    for (size_t at = 0; at + sizeof seed <= bytes; at += kPage) f(at, seed + at);
  }
};

template <typename P>
BlockOf<P> take(P& pool, size_t bytes, uint64_t seed) {
  BlockOf<P> block{&pool, static_cast<std::byte*>(pool.allocate(bytes)), bytes, seed};
  block.fill();
  return block;
}

template <typename P>
void give(P& pool, const BlockOf<P>& block) {
  pool.deallocate(block.data, block.bytes);
}

// Keeps what it is given, and fails on request.
class MapSink final : public PageSink {
 public:
  void put(uint64_t key, std::span<const std::byte> bytes) override {
    if (fail_put_after-- == 0) throw Error("no room");
    EXPECT_TRUE(kept.emplace(key, std::vector(bytes.begin(), bytes.end())).second) << "key " << key << " twice";
  }
  void get(uint64_t key, std::span<std::byte> bytes) override {
    if (fail_get_after-- == 0) throw Error("cannot read");
    const std::vector<std::byte>& found = kept.at(key);
    ASSERT_EQ(found.size(), bytes.size());
    std::copy(found.begin(), found.end(), bytes.begin());
  }

  std::map<uint64_t, std::vector<std::byte>> kept;
  int fail_put_after = -1;
  int fail_get_after = -1;
};

}  // namespace ng
