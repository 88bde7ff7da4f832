// Checks of the arrays of canonical matrices.
#include "kernels/arrays.hpp"

#include "driver/pointer.hpp"

namespace ng::cuda {

Arrays arrays_of(const CanonicalView& matrix, int device) {
  check_pointer(matrix.codes, "codes", device, 1);
  check_pointer(matrix.scales, "scales", device, scale_bytes(matrix.format.scale));
  Arrays arrays{.codes = matrix.codes, .scales = matrix.scales, .zeros = nullptr, .global_scale = nullptr};
  if (matrix.format.element.has_zero_point()) {
    check_pointer(matrix.zeros, "zeros", device, 1);
    arrays.zeros = matrix.zeros;
  }
  if (matrix.format.has_global_scale()) {
    check_pointer(matrix.global_scale, "global_scale", device, sizeof(float));
    arrays.global_scale = matrix.global_scale;
  }
  return arrays;
}

}  // namespace ng::cuda
