// Products of fp16 activations and integers.
#include "kernels/fpx_instances.cuh"

NG_FPX_INT(F16, f16, 2)
NG_FPX_INT(F16, f16, 3)
NG_FPX_INT(F16, f16, 4)
NG_FPX_INT(F16, f16, 5)
NG_FPX_INT(F16, f16, 6)
NG_FPX_INT(F16, f16, 7)
NG_FPX_INT(F16, f16, 8)
