// Instances of fpx_linear.cuh: one kernel for each width and way of decoding, activation type and tile. Scales, groups,
// exponents and the types of y and bias are told at run time. Each sm80_fpx_linear_*.cu is one image of them.
#pragma once

#include "kernels/fpx_linear.cuh"

// Activation type as a type and as the host names it, element as the host names it, tile, its rows of x, decoder.
#define NG_FPX_KERNEL(X, x_name, element, tile, rows, ...)                                                     \
  extern "C" __global__ void __launch_bounds__(ng::cuda::kTiles[tile].threads(),                               \
                                               ng::cuda::kTiles[tile].resident(ng::cuda::__VA_ARGS__::kTerms)) \
      fpx_linear_##x_name##_##element##_m##rows(const __grid_constant__ ng::cuda::FpxArgs args) {              \
    ng::cuda::fpx_linear<ng::cuda::__VA_ARGS__, ng::cuda::X, tile>(args);                                      \
  }

#define NG_FPX_TILES(X, x_name, element, ...)           \
  NG_FPX_KERNEL(X, x_name, element, 0, 8, __VA_ARGS__)  \
  NG_FPX_KERNEL(X, x_name, element, 1, 16, __VA_ARGS__) \
  NG_FPX_KERNEL(X, x_name, element, 3, 64, __VA_ARGS__) \
  NG_FPX_KERNEL(X, x_name, element, 4, 128, __VA_ARGS__)

// Which tiles: fpx_has_tile.
#define NG_FPX_FP(X, x_name, bits)                               \
  NG_FPX_TILES(X, x_name, fp##bits, DecodeFp<ng::cuda::X, bits>) \
  NG_FPX_KERNEL(X, x_name, fp##bits, 2, 32, DecodeFp<ng::cuda::X, bits>)
#define NG_FPX_FP_WIDE(bits)                                                           \
  NG_FPX_KERNEL(F16Wide, f16_wide, fp##bits, 0, 8, DecodeFp<ng::cuda::F16Wide, bits>)  \
  NG_FPX_KERNEL(F16Wide, f16_wide, fp##bits, 2, 32, DecodeFp<ng::cuda::F16Wide, bits>) \
  NG_FPX_KERNEL(F16Wide, f16_wide, fp##bits, 3, 64, DecodeFp<ng::cuda::F16Wide, bits>)
#define NG_FPX_INT(X, x_name, bits)                                \
  NG_FPX_TILES(X, x_name, int##bits, DecodeInt<ng::cuda::X, bits>) \
  NG_FPX_KERNEL(X, x_name, int##bits, 2, 32, DecodeInt<ng::cuda::X, bits>)
#define NG_FPX_NF4()                                                 \
  NG_FPX_TILES(F16, f16, nf4, DecodeCodebook<ng::cuda::F16>)         \
  NG_FPX_KERNEL(F16, f16, nf4, 2, 32, DecodeCodebook<ng::cuda::F16>) \
  NG_FPX_TILES(Bf16, bf16, nf4, DecodeCodebook<ng::cuda::Bf16>)

#define NG_FPX_REDUCE()                                                                                                \
  extern "C" __global__ void __launch_bounds__(256) fpx_reduce(const __grid_constant__ ng::cuda::FpxReduceArgs args) { \
    ng::cuda::fpx_reduce(args);                                                                                        \
  }
