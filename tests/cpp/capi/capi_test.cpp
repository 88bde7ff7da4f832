// The C interface.
#include <gtest/gtest.h>

#include "narrowgauge/narrowgauge.h"

TEST(CApi, Version) { EXPECT_STREQ(ng_version(), NARROWGAUGE_VERSION); }
