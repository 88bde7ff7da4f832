// The checksum against its definition, the vectors of RFC 3720 and every split, on every instruction set.
#include "io/crc32c.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <string_view>
#include <vector>

#include "narrowgauge/device.hpp"

namespace ng {
namespace {

// Bit by bit.
uint32_t reference(uint32_t crc, std::span<const std::byte> bytes) {
  crc = ~crc;
  for (const std::byte byte : bytes) {
    crc ^= std::to_integer<uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82f63b78u : 0);
  }
  return ~crc;
}

std::vector<std::byte> noise(size_t size) {
  std::vector<std::byte> out(size);
  uint64_t state = 0x9e3779b97f4a7c15u;
  for (std::byte& byte : out) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    byte = static_cast<std::byte>(state >> 56);
  }
  return out;
}

class Crc32c : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > isa_supported()) GTEST_SKIP() << "this CPU lacks " << isa_name(GetParam());
    before_ = isa();
    force_isa(GetParam());
  }
  void TearDown() override {
    if (GetParam() <= isa_supported()) force_isa(before_);
  }

 private:
  Isa before_{};
};

TEST_P(Crc32c, KnownValues) {
  constexpr std::string_view kDigits = "123456789";
  EXPECT_EQ(crc32c(0, std::as_bytes(std::span(kDigits))), 0xe3069283u);
  EXPECT_EQ(crc32c(0, std::vector(32, std::byte{0})), 0x8a9136aau);
  EXPECT_EQ(crc32c(0, std::vector(32, std::byte{0xff})), 0x62a8ab43u);
  std::vector<std::byte> rising(32);
  for (size_t i = 0; i < rising.size(); ++i) rising[i] = static_cast<std::byte>(i);
  EXPECT_EQ(crc32c(0, rising), 0x46dd794eu);
  EXPECT_EQ(crc32c(0, {}), 0u);
}

TEST_P(Crc32c, EveryLengthAndAlignment) {
  const std::vector<std::byte> bytes = noise(1700);
  for (size_t begin = 0; begin < 9; ++begin) {
    for (size_t size = 0; begin + size <= bytes.size(); size += size < 70 ? 1 : 37) {
      const auto part = std::span(bytes).subspan(begin, size);
      ASSERT_EQ(crc32c(7, part), reference(7, part)) << begin << ' ' << size;
    }
  }
}

TEST_P(Crc32c, LongRunsAndEverySplit) {
  const std::vector<std::byte> bytes = noise(3 * 4096 * 3 + 3 * 256 * 2 + 13);
  const uint32_t whole = reference(0, bytes);
  EXPECT_EQ(crc32c(0, bytes), whole);
  for (size_t split = 0; split < bytes.size(); split += 991) {
    EXPECT_EQ(crc32c(crc32c(0, std::span(bytes).first(split)), std::span(bytes).subspan(split)), whole) << split;
  }
  std::vector<std::byte> copy(bytes.size() + 1, std::byte{0x5a});
  EXPECT_EQ(crc32c_copy(0, bytes, copy.data()), whole);
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), copy.begin()));
  EXPECT_EQ(copy.back(), std::byte{0x5a});
}

// Long copies take another way where the target is aligned; what lies beside the target stays.
TEST_P(Crc32c, CopiesOfEveryAlignment) {
  for (const size_t size : {size_t{131072}, size_t{131071}, size_t{200000}, size_t{300}}) {
    const std::vector<std::byte> bytes = noise(size + 1);
    for (const size_t from : {size_t{0}, size_t{1}}) {
      const uint32_t expected = reference(3, std::span(bytes).subspan(from, size));
      for (const size_t to : {size_t{32}, size_t{64}, size_t{33}, size_t{8}}) {
        std::vector<std::byte> memory(size + 128, std::byte{0x5a});
        auto* base = reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(memory.data()) + 31) / 32 * 32);
        EXPECT_EQ(crc32c_copy(3, std::span(bytes).subspan(from, size), base + to), expected);
        EXPECT_TRUE(std::equal(bytes.begin() + static_cast<ptrdiff_t>(from),
                               bytes.begin() + static_cast<ptrdiff_t>(from + size), base + to));
        EXPECT_EQ(base[to - 1], std::byte{0x5a});
        EXPECT_EQ(base[to + size], std::byte{0x5a});
      }
    }
  }
}

TEST_P(Crc32c, EveryFlippedBitIsSeen) {
  std::vector<std::byte> bytes = noise(4096 * 3 + 100);
  const uint32_t whole = crc32c(0, bytes);
  for (size_t bit = 0; bit < bytes.size() * 8; bit += 97) {
    bytes[bit / 8] ^= static_cast<std::byte>(1u << bit % 8);
    EXPECT_NE(crc32c(0, bytes), whole) << bit;
    bytes[bit / 8] ^= static_cast<std::byte>(1u << bit % 8);
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, Crc32c, testing::Values(Isa::portable, Isa::avx2, Isa::avx512),
                         [](const auto& each) { return std::string(isa_name(each.param)); });

}  // namespace
}  // namespace ng
