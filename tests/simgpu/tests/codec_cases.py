"""Small runs of the library's kernels that code, pack and carry matrices, for `python -m simgpu mutate|report`.

Every kernel runs on rows that are aligned and on rows that begin anywhere, whose edges and parts take other paths;
quantizing ones also with scales so small that elements are divided slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import simgpu
from shipped import FLAGS
from test_pack import ELEMENTS, PackCase
from test_quantize import COLS, SIZES, dequantize, quantize
from test_wire import finish, keep_error, prepare

ROWS, RAGGED = 2, 3001


def declare(
    image: str, kernel: str, elements: int, run: Callable[..., simgpu.Launch], *args: Any, **options: Any
) -> simgpu.Case:
    case = simgpu.case(f"../../../cuda/kernels/{image}.cu", kernel, elements=elements, flags=FLAGS)
    return case(lambda program: run(program, *args, **options).clean())


# Runs of kinds of elements, bits, groups and lengths of rows. Codes of 4 and 8 bits are each a lane's own on their way
# through shared memory; those of other widths share words and pieces.
GROUPS = [
    ((0, 6, 128, ROWS, COLS), {}),
    ((2, 3, 32, ROWS, RAGGED), {}),
    ((3, 4, 64, ROWS, COLS), {}),
    ((0, 6, 128, ROWS, COLS), {"tiny": True}),
]
# Where the row is the group, rows of one tile for each warp and of several.
ROW = [
    ((1, 7, 0, ROWS, COLS), {}),
    ((0, 6, 0, ROWS, RAGGED), {"warps": 2}),
    ((1, 7, 0, ROWS, COLS), {"tiny": True}),
]

quantizing = [
    declare("sm80_quantize", f"{name}_{dtype}", ROWS * args[-1], quantize, name, dtype, *args, **options)
    for kernel, runs in (("quantize_groups", GROUPS), ("quantize_rows", ROW))
    for name, dtype in product((kernel, f"{kernel}_stochastic"), SIZES)
    for args, options in runs
]
ranges = [
    declare("sm80_quantize", f"matrix_range_{dtype}", ROWS * cols, quantize, "matrix_range", dtype, 0, 4, 16, 4, cols)
    for dtype, cols in product(SIZES, (COLS, RAGGED))
]
dequantizing = [
    declare("sm80_quantize", f"{name}_{dtype}", ROWS * cols, dequantize, name, dtype, kind, bits, peers, ROWS, cols)
    for (name, peers), dtype in product((("dequantize", 1), ("dequantize_sum", 2)), SIZES)
    for kind, bits, cols in ((0, 6, COLS), (2, 5, RAGGED))
]


def pack(program: simgpu.Program, name: str, element: str, rows: int, cols: int) -> simgpu.Launch:
    return PackCase(element, 32, "fp16", rows, cols).run(program, name)


packing = [
    declare("sm80_pack", f"{name}_{suffix}", 16 * 2100, pack, name, element, 16, 2100)
    for element, suffix in zip(ELEMENTS, ("2", "3", "4", "nf4", "5", "6", "7", "8"), strict=True)
    for name in ("pack_codes", "unpack_codes")
] + [
    declare("sm80_pack", name, 2 * 64 * 64, pack, name, "uint4", 64, 2048)
    for name in ("pack_records", "unpack_records")
]

wire = [declare("sm80_wire", kernel.__name__, 1111, kernel, 1111) for kernel in (prepare, keep_error, finish)]
