// Products of bf16 activations and fp elements, and of fp16 ones with elements that need the range of bf16.
#include "kernels/fpx_instances.cuh"

NG_FPX_FP(Bf16, bf16, 3)
NG_FPX_FP(Bf16, bf16, 4)
NG_FPX_FP(Bf16, bf16, 5)
NG_FPX_FP(Bf16, bf16, 6)
NG_FPX_FP(Bf16, bf16, 7)
NG_FPX_FP(Bf16, bf16, 8)
NG_FPX_FP_WIDE(6)
NG_FPX_FP_WIDE(7)
NG_FPX_FP_WIDE(8)
