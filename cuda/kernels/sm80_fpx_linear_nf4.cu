// Products with codebooks; and the sums of products of which the columns were split.
#include "kernels/fpx_instances.cuh"

NG_FPX_NF4()

NG_FPX_REDUCE()
