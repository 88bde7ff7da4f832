// The permission for AMX's tiles, on a CPU that is made to claim every feature (tests/emulated/run): what the choice of
// the instruction set makes of the system's answer. A child for each, since a process asks once.
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "io/system.hpp"
#include "narrowgauge/device.hpp"

namespace ng {
namespace {

bool refused_with(int error) {
  return isa_supported() == Isa::avx512 && isa() == Isa::avx512 &&
         why_no_amx().find(std::string("refuses permission to use tiles: ") + std::strerror(error)) !=
             std::string::npos;
}

TEST(TilePermission, IsAskedFor) {
  EXPECT_EQ(run_in_child([] {
              return answer(SYS_arch_prctl, 0) && isa_supported() == Isa::amx && why_no_amx().empty() ? 0 : 1;
            }),
            0);
}

TEST(TilePermission, RefusedByAContainerLeavesAvx512) {
  EXPECT_EQ(run_in_child([] { return answer(SYS_arch_prctl, EPERM) && refused_with(EPERM) ? 0 : 1; }), 0);
}

TEST(TilePermission, RefusedByTheKernelLeavesAvx512) {
  // ARCH_REQ_XCOMP_PERM of the tiles' data, which a kernel or a CPU without them does not grant.
  const int error = syscall(SYS_arch_prctl, 0x1023L, 18L) == 0 ? 0 : errno;
  if (error == 0) GTEST_SKIP() << "this kernel grants it";
  EXPECT_EQ(run_in_child([error] { return refused_with(error) ? 0 : 1; }), 0);
}

}  // namespace
}  // namespace ng
