// The arrays of canonical matrices on a device, as kernels take them.
#pragma once

#include "kernels/quantize_args.hpp"
#include "narrowgauge/quantize.hpp"

namespace ng::cuda {

// Throws InvalidArgument if an array is not memory of the device or not aligned to its elements. Arrays that the Format
// does not have are null. pre: codec::check_canonical; the device's context is current.
Arrays arrays_of(const CanonicalView& matrix, int device);

}  // namespace ng::cuda
