// Products with codebooks; and the sums of products of which the columns were split.
#include "kernels/fpx_instances.cuh"

NG_FPX_NF4(F16, f16)
NG_FPX_NF4(Bf16, bf16)

extern "C" __global__ void __launch_bounds__(256) fpx_reduce(const __grid_constant__ ng::cuda::FpxReduceArgs args) {
  ng::cuda::fpx_reduce(args);
}
