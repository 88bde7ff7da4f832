"""What the library's quantize and dequantize kernels cost, by the simulator's counters.

That their results are right is shown through the library (tests/cpp/quantize/cuda_quantize_test.cpp). Here a matrix
that is aligned and fills the kernels is quantized, and its counters are compared with what cannot be avoided.
"""

from __future__ import annotations

import ctypes
import shutil
from ctypes import c_bool, c_double, c_float, c_int32, c_int64, c_uint8, c_uint32, c_uint64

import numpy as np
import pytest
import simgpu
from shipped import image

ROWS, COLS, PEERS = 16, 4096, 64
SIZES = {"f32": 4, "f16": 2, "bf16": 2}


def structure(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


# The structs of cuda/kernels/quantize_args.hpp.
Shape = structure(
    "Shape",
    **dict.fromkeys(("rows", "cols", "stride", "row_bytes", "groups"), c_int64),
    **dict.fromkeys(("tiles", "tile_elements", "tile_groups", "group_step", "group_units", "group_magic"), c_int32),
    warps_along=c_int32,
)
Arrays = structure("Arrays", **dict.fromkeys(("codes", "scales", "zeros", "global_scale"), c_int64))
Floating = structure(
    "Floating", **dict.fromkeys(("bits", "mantissa_bits", "max_bits", "min_exponent", "rebias", "special"), c_int32)
)
Element = structure(
    "Element",
    kind=c_uint8,
    bits=c_int32,
    low=c_int32,
    high=c_int32,
    fp=Floating,
    values=c_float * 16,
    thresholds=c_float * 16,
)
ScaleCoding = structure(
    "ScaleCoding",
    type=c_uint8,
    ceil=c_bool,
    few_bits=c_bool,
    shift=c_int32,
    least=c_int64,
    most=c_double,
    divisor=c_double,
    nan=c_uint32,
)
QuantizeArgs = structure(
    "QuantizeArgs",
    weights=c_int64,
    out=Arrays,
    shape=Shape,
    element=Element,
    scale=ScaleCoding,
    saturate=c_bool,
    keep=c_bool,
    seed=c_uint64,
    first_index=c_int64,
    origin=c_uint64,
)
DequantizeArgs = structure(
    "DequantizeArgs",
    out=c_int64,
    shape=Shape,
    element=Element,
    scale=c_uint8,
    divisor=c_float,
    peers=c_int32,
    peer=Arrays * PEERS,
)


def element(kind: int, bits: int) -> ctypes.Structure:
    """fp with two exponent bits (kind 0), int (1), uint (2) or nf4 (3)."""
    out = Element(kind=kind, bits=bits, low=1 - (1 << bits - 1), high=(1 << bits - 1) - 1)
    if kind == 0:
        most = np.float32(4 - 2.0 ** (4 - bits))
        out.fp = Floating(bits, bits - 3, int(most.view(np.int32)), 127 << 23, 126 << 23, 256)
    if kind == 2:
        out.low, out.high = 0, (1 << bits) - 1
    for i in range(16):
        out.values[i], out.thresholds[i] = i / 7.5 - 1, (i + 0.5) / 7.5 - 1
    return out


def shape(bits: int, group: int, rows: int, cols: int) -> ctypes.Structure:
    """`group` 0 is the row."""
    units, tiles = group // 16 or 64, -(-cols // 1024)
    return Shape(
        rows, cols, cols, -(-cols * bits // 8), -(-cols // (group or cols)), tiles, 1024, 64 // units,
        64 // units if group else 0, units, 65536 // units + 1, 2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def program() -> simgpu.Program:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    return image("sm80_quantize")


class Matrix:
    """A canonical matrix with scales of 16 bits, on a device, and how many bytes it has."""

    def __init__(self, device: simgpu.Device, bits: int, group: int, zeros: bool, rows: int, cols: int) -> None:
        rng = np.random.default_rng(bits)
        groups, row_bytes = -(-cols // (group or cols)), -(-cols * bits // 8)
        self.buffers = [
            device.array(rng.integers(0, 256, rows * row_bytes, dtype=np.uint8)),
            device.array(rng.uniform(0.5, 1, rows * groups).astype(np.float16).view(np.uint16)),
        ]
        if zeros:
            self.buffers.append(device.array(rng.integers(0, 1 << bits, rows * groups, dtype=np.uint8)))
        pointers = [buffer.ptr for buffer in self.buffers] + [0, 0]
        self.arrays = Arrays(*pointers[:3], 0)
        self.bytes = rows * row_bytes + rows * groups * (3 if zeros else 2)


def check(launch: simgpu.Launch, ideal: int, instructions: float) -> None:
    launch.clean()
    elements = ROWS * COLS
    counters = launch.counters
    moved = 32 * sum(seen.sectors for seen in counters.global_accesses.values())
    per_element = launch.totals["thread_instructions"] / elements
    print(f"{launch.kernel.name}: {per_element:.1f} instructions an element, {moved / ideal:.3f} of the ideal bytes")
    assert moved <= 1.05 * ideal
    assert counters.hot_conflicts() == []
    assert per_element <= instructions
    for seen in counters.global_accesses.values():
        # All but the scales, which are less than a sector.
        assert seen.sector_use == 1 or 32 * seen.sectors < 0.05 * ideal, seen.ins.text


def quantize(
    program: simgpu.Program,
    name: str,
    dtype: str,
    kind: int,
    bits: int,
    group: int,
    rows: int = ROWS,
    cols: int = COLS,
    *,
    tiny: bool = False,
    warps: int = 4,
) -> simgpu.Launch:
    """tiny: elements and scales are too small for the quick division. warps: of a block, where a block has a row."""
    device = simgpu.Device()
    weights = np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)
    if tiny:
        weights *= np.float32(2.0**-20)
    raw = weights.view(np.uint32) >> 16 if dtype == "bf16" else weights.astype({"f32": "f4", "f16": "f2"}[dtype])
    source = device.array(raw.astype(np.uint16) if dtype == "bf16" else raw, readonly=True)
    matrix = Matrix(device, bits, group, kind == 2, rows, cols)
    most = 2.0**20 if tiny else {0: 4.0, 3: 1.0}.get(kind, 1 << bits - 1)
    fp16, bf16 = (1, False, True, 42, (1023 - 14) << 52, 65504.0), (2, False, True, 45, (1023 - 126) << 52, 3.39e38)
    scale = ScaleCoding(*(bf16 if tiny else fp16), most, 0x7FC0 if tiny else 0x7E00)
    args = QuantizeArgs(
        source.ptr, matrix.arrays, shape(bits, group, rows, cols), element(kind, bits), scale, False, False, 1, 0
    )
    if name == "matrix_range":
        args.out.global_scale = device.zeros(1, np.float32).ptr
    assert program.find(f"{name}_{dtype}").params[0].size == ctypes.sizeof(args)
    grid, block = ((1, rows // 2), 256) if group else (rows, 32 * warps)
    launch = program.launch(f"{name}_{dtype}", grid, block, [bytes(args)], device)
    launch.ideal = rows * cols * SIZES[dtype] + (0 if name == "matrix_range" else matrix.bytes)
    return launch


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("kind, bits, group", [(0, 6, 128), (1, 8, 64), (2, 4, 32), (0, 5, 64), (3, 4, 64), (0, 4, 16)])
def test_quantizing_groups(program: simgpu.Program, dtype: str, kind: int, bits: int, group: int) -> None:
    launch = quantize(program, "quantize_groups", dtype, kind, bits, group)
    check(launch, launch.ideal, instructions=80 if kind == 3 else 60)


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("bits", [2, 3, 7, 8])
def test_quantizing_rows(program: simgpu.Program, dtype: str, bits: int) -> None:
    launch = quantize(program, "quantize_rows", dtype, 1, bits, 0)
    check(launch, launch.ideal, instructions=60)


@pytest.mark.parametrize("dtype", SIZES)
def test_finding_the_range_of_a_matrix(program: simgpu.Program, dtype: str) -> None:
    launch = quantize(program, "matrix_range", dtype, 0, 4, 16)
    check(launch, launch.ideal, instructions=20)


@pytest.mark.parametrize("dtype", SIZES)
def test_quantizing_stochastically(program: simgpu.Program, dtype: str) -> None:
    launch = quantize(program, "quantize_groups_stochastic", dtype, 0, 6, 128)
    check(launch, launch.ideal, instructions=130)


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("kind, bits", [(0, bits) for bits in range(3, 9)] + [(1, 2), (1, 8), (2, 4), (3, 4)])
def test_dequantizing(program: simgpu.Program, dtype: str, kind: int, bits: int) -> None:
    launch = dequantize(program, "dequantize", dtype, kind, bits, peers=1)
    check(launch, launch.ideal, instructions=25)


@pytest.mark.parametrize("dtype", SIZES)
def test_adding_peers(program: simgpu.Program, dtype: str) -> None:
    launch = dequantize(program, "dequantize_sum", dtype, 1, 8, peers=4)
    check(launch, launch.ideal, instructions=80)


def dequantize(
    program: simgpu.Program, name: str, dtype: str, kind: int, bits: int, peers: int, rows: int = ROWS, cols: int = COLS
) -> simgpu.Launch:
    device = simgpu.Device()
    matrices = [Matrix(device, bits, 64, kind == 2, rows, cols) for _ in range(peers)]
    out = device.empty(rows * cols * SIZES[dtype], np.uint8)
    arrays = (Arrays * PEERS)(*[matrix.arrays for matrix in matrices])
    args = DequantizeArgs(out.ptr, shape(bits, 64, rows, cols), element(kind, bits), 1, 1, peers, arrays)
    assert program.find(f"{name}_{dtype}").params[0].size == ctypes.sizeof(args)
    launch = program.launch(f"{name}_{dtype}", (1, rows // 2), 256, [bytes(args)], device)
    launch.ideal = peers * matrices[0].bytes + out.nbytes
    return launch
