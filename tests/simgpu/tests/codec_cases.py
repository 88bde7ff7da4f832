"""Small runs of the library's quantize and dequantize kernels, for `python -m simgpu mutate|report`."""

from __future__ import annotations

import simgpu
from shipped import FLAGS
from test_quantize import COLS, dequantize, quantize

SOURCE = "../../../cuda/kernels/sm80_quantize.cu"
ROWS = 2
ELEMENTS = ROWS * COLS


@simgpu.case(SOURCE, "quantize_groups_bf16", elements=ELEMENTS, flags=FLAGS)
def groups(program: simgpu.Program) -> simgpu.Launch:
    return quantize(program, "quantize_groups", "bf16", 0, 6, 128, rows=ROWS).clean()


@simgpu.case(SOURCE, "quantize_groups_f32", elements=ELEMENTS, flags=FLAGS)
def groups_of_a_codebook(program: simgpu.Program) -> simgpu.Launch:
    return quantize(program, "quantize_groups", "f32", 3, 4, 64, rows=ROWS).clean()


@simgpu.case(SOURCE, "quantize_groups_stochastic_f16", elements=ELEMENTS, flags=FLAGS)
def groups_stochastic(program: simgpu.Program) -> simgpu.Launch:
    return quantize(program, "quantize_groups_stochastic", "f16", 2, 4, 32, rows=ROWS).clean()


@simgpu.case(SOURCE, "quantize_rows_f16", elements=ELEMENTS, flags=FLAGS)
def rows(program: simgpu.Program) -> simgpu.Launch:
    return quantize(program, "quantize_rows", "f16", 1, 7, 0, rows=ROWS).clean()


@simgpu.case(SOURCE, "dequantize_bf16", elements=ELEMENTS, flags=FLAGS)
def back(program: simgpu.Program) -> simgpu.Launch:
    return dequantize(program, "dequantize", "bf16", 0, 6, peers=1, rows=ROWS).clean()


@simgpu.case(SOURCE, "dequantize_f32", elements=ELEMENTS, flags=FLAGS)
def back_with_zeros(program: simgpu.Program) -> simgpu.Launch:
    return dequantize(program, "dequantize", "f32", 2, 4, peers=1, rows=ROWS).clean()


@simgpu.case(SOURCE, "dequantize_sum_f32", elements=ELEMENTS, flags=FLAGS)
def sum_of_peers(program: simgpu.Program) -> simgpu.Launch:
    return dequantize(program, "dequantize_sum", "f32", 0, 5, peers=4, rows=ROWS).clean()


# Rows that begin anywhere, so that their edges and parts take the paths for what is not aligned.
RAGGED = 3001


@simgpu.case(SOURCE, "quantize_groups_f16", elements=ROWS * RAGGED, flags=FLAGS)
def ragged_groups(program: simgpu.Program) -> simgpu.Launch:
    return quantize(program, "quantize_groups", "f16", 2, 3, 32, rows=ROWS, cols=RAGGED).clean()


@simgpu.case(SOURCE, "quantize_rows_f32", elements=ROWS * RAGGED, flags=FLAGS)
def ragged_rows(program: simgpu.Program) -> simgpu.Launch:
    return quantize(program, "quantize_rows", "f32", 0, 6, 0, rows=ROWS, cols=RAGGED).clean()


@simgpu.case(SOURCE, "dequantize_f16", elements=ROWS * RAGGED, flags=FLAGS)
def ragged_back(program: simgpu.Program) -> simgpu.Launch:
    return dequantize(program, "dequantize", "f16", 3, 4, peers=1, rows=ROWS, cols=RAGGED).clean()


@simgpu.case(SOURCE, "dequantize_sum_bf16", elements=ROWS * RAGGED, flags=FLAGS)
def ragged_sum(program: simgpu.Program) -> simgpu.Launch:
    return dequantize(program, "dequantize_sum", "bf16", 1, 7, peers=2, rows=ROWS, cols=RAGGED).clean()
