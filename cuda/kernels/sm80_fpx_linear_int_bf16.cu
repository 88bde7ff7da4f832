// Products of bf16 activations and integers.
#include "kernels/fpx_instances.cuh"

NG_FPX_INT(Bf16, bf16, 2)
NG_FPX_INT(Bf16, bf16, 3)
NG_FPX_INT(Bf16, bf16, 4)
NG_FPX_INT(Bf16, bf16, 5)
NG_FPX_INT(Bf16, bf16, 6)
NG_FPX_INT(Bf16, bf16, 7)
NG_FPX_INT(Bf16, bf16, 8)
