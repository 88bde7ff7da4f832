"""mma.sync: the matrix multiplication of a warp, dense, m16n8.

The products of one instruction are summed in double precision with C and rounded once. Hardware keeps fewer bits and
truncates, so results agree within some 2**-22 of the sum of magnitudes, not bit for bit.
"""

from __future__ import annotations

import re

import numpy as np

from .. import fragments
from ..machine import Machine
from ..ptx import Instruction, items
from ..steps import Lanes, Reader, WarpSync
from .common import Function, fragment

_RESULTS = ("f16", "f32", "s32")


def gather(reads: list[Reader], i: Lanes) -> np.ndarray:
    """Registers as (warps, 32 lanes, registers)."""
    columns = np.broadcast_arrays(*[read(i) for read in reads])
    return np.stack(columns, -1).reshape(-1, 32, len(reads))


def _mma(m: Machine, ins: Instruction) -> WarpSync:
    shape = re.search(r"\.m16n8k(\d+)\.", ins.op)
    types = [mod for mod in ins.mods if mod in fragments.BITS or mod in _RESULTS]
    special = any(mod.startswith(("sp", "kind")) for mod in ins.mods)
    if shape is None or special or len(types) != 4 or types[0] not in _RESULTS or "row" not in ins.mods:
        raise m.unsupported(ins)
    k = int(shape.group(1))
    d_type, a_type, b_type, _ = types
    elements = 32 // fragments.BITS[a_type]
    a_count, b_count = 16 * k // 32 // elements, 8 * k // 32 // elements
    a_reads, b_reads, c_reads = (fragment(m, arg) for arg in ins.args[1:4])
    writes = [m.write(item, "b32") for item in items(ins.args[0])]
    if len(a_reads) != a_count or len(b_reads) != b_count:
        raise m.unsupported(ins, f"mma with {len(a_reads)} and {len(b_reads)} registers, not {a_count} and {b_count},")
    a_index = fragments.index_a(k, elements, a_count)
    b_index = fragments.index_b(k, elements, b_count)
    rows, columns = fragments.coordinates_c(packed=d_type == "f16")
    decode, encode = _accumulator(d_type, "satfinite" in ins.mods)
    macs = 16 * 8 * k

    def execute(i: Lanes, takes_part: np.ndarray) -> None:
        a = fragments.decode(gather(a_reads, i), a_type)[:, a_index]
        b = fragments.decode(gather(b_reads, i), b_type)[:, b_index]
        c = decode(gather(c_reads, i))
        d = encode(np.matmul(a, b)[:, rows, columns] + c)
        for r, write in enumerate(writes):
            write(i, np.ascontiguousarray(d[:, :, r]).ravel())
        m.counters.multiplied(len(d), macs)

    return WarpSync(execute, aligned=True)


def _accumulator(type_name: str, saturate: bool) -> tuple[Function, Function]:
    """Registers (warps, lanes, registers) to values (..., elements of a register), and back."""
    if type_name == "f16":
        return (
            lambda c: np.ascontiguousarray(c).view(np.float16).reshape(*c.shape, 2).astype(np.float64),
            lambda d: np.ascontiguousarray(d.astype(np.float16)).view(np.uint32)[..., 0],
        )
    if type_name == "f32":
        return (
            lambda c: c.view(np.float32).astype(np.float64)[..., None],
            lambda d: d[..., 0].astype(np.float32).view(np.uint32),
        )
    limits = np.iinfo(np.int32)

    def encode(d: np.ndarray) -> np.ndarray:
        if saturate:
            d = np.clip(d, limits.min, limits.max)
        return (d[..., 0].astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)

    return lambda c: c.view(np.int32).astype(np.float64)[..., None], encode


INSTRUCTIONS = {"mma": _mma}
