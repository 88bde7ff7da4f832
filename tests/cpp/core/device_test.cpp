// The choice of the instruction set.
#include "narrowgauge/device.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

TEST(Device, NamesRoundTrip) {
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx}) EXPECT_EQ(isa_from_name(isa_name(isa)), isa);
  EXPECT_THROW(isa_from_name("sse9"), InvalidArgument);
}

TEST(Device, ForcesWhatTheCpuHas) {
  const Isa before = isa();
  force_isa(Isa::portable);
  EXPECT_EQ(isa(), Isa::portable);
  force_isa(before);
  if (isa_supported() < Isa::avx512) {
    EXPECT_THROW(force_isa(Isa::avx512), InvalidArgument);
  }
}

TEST(Device, FeaturesAgreeWithTheChoice) {
  const std::vector<std::string> features = cpu_features();
  const auto has = [&](const char* name) {
    return std::find(features.begin(), features.end(), name) != features.end();
  };
  EXPECT_EQ(isa_supported() >= Isa::avx2, has("avx2") && has("fma") && has("f16c") && has("bmi2"));
  if (isa_supported() >= Isa::avx512) {
    EXPECT_TRUE(has("avx512_vbmi") && has("avx512_vnni"));
  }
  const bool amx = has("amx_tile") && has("amx_bf16") && has("amx_int8");
  if (isa_supported() >= Isa::avx512) {
    EXPECT_EQ(isa_supported() == Isa::amx, amx && why_no_amx().empty());
  }
  if (!amx) {
    EXPECT_EQ(why_no_amx(), "");
  }
  EXPECT_FALSE(cpu_name().empty());
}

}  // namespace
}  // namespace ng
