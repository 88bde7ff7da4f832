// Products with codebooks; and the sums of products of which the columns were split.
#include "kernels/fpx_instances.cuh"

NG_FPX_NF4(F16, f16)
NG_FPX_NF4(Bf16, bf16)

NG_FPX_REDUCE()
