// Products of fp16 activations and fp elements that fp16 can hold.
#include "kernels/fpx_instances.cuh"

NG_FPX_FP(F16, f16, 3)
NG_FPX_FP(F16, f16, 4)
NG_FPX_FP(F16, f16, 5)
NG_FPX_FP(F16, f16, 6)
NG_FPX_FP(F16, f16, 7)
NG_FPX_FP(F16, f16, 8)
