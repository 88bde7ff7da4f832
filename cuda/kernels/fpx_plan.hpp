// Which tile and how many ranges of columns a product gets: a pure function of its shape and the device.
#pragma once

#include <cstdint>

#include "kernels/fpx_args.hpp"
#include "narrowgauge/format.hpp"

namespace ng::cuda {

struct FpxPlan {
  int tile = 0;    // of kTiles
  int splits = 1;  // ranges of columns, the sums of which are added by another kernel
};

// The fewest stages from which ranges of columns can be made: one starts where a group does.
int64_t fpx_quantum(const Format& format);

// For x [m, k] and weights [n, k], all positive, on a device of so many multiprocessors.
FpxPlan fpx_plan(int64_t m, int64_t n, int64_t k, const Format& format, int multiprocessors);

}  // namespace ng::cuda
