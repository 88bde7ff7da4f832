"""Where the elements of a matrix lie in the registers of a warp, for mma and wgmma.

From the PTX ISA ("Matrix Fragments for mma.m16n8k...", "Register Fragments for wgmma.mma_async.m64nNk..."). With
g = lane / 4, t = lane % 4 and e elements in a 32-bit register, element j of register r is

    A (16 x K)            row g + 8*(r & 1)    column t*e + j + 4*e*(r >> 1)
    B (K x 8)             row t*e + j + 4*e*r  column g
    C, D (16 x 8), 32-bit row g + 8*(r >> 1)   column 2*t + (r & 1)
    C, D (16 x 8), 16-bit row g + 8*r          column 2*t + j

wgmma gives each of its four warps 16 rows of 64, and D's registers repeat for every 8 columns.
"""

from __future__ import annotations

import numpy as np

from . import numerics

_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4

BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "e4m3": 8, "e5m2": 8}


def index_a(k: int, elements: int, registers: int) -> np.ndarray:
    """For each (row, column) of A its place in the order (lane, register, element)."""
    out = np.zeros((16, k), np.int64)
    for r in range(registers):
        for j in range(elements):
            column = _T * elements + j + 4 * elements * (r >> 1)
            out[_G + 8 * (r & 1), column] = (_LANE * registers + r) * elements + j
    return out


def index_b(k: int, elements: int, registers: int) -> np.ndarray:
    """The same for B."""
    out = np.zeros((k, 8), np.int64)
    for r in range(registers):
        for j in range(elements):
            out[_T * elements + j + 4 * elements * r, _G] = (_LANE * registers + r) * elements + j
    return out


def coordinates_c(packed: bool) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of C and D, by (lane, register, element)."""
    r, j = (np.arange(2)[:, None], np.arange(2)) if packed else (np.arange(4)[:, None], np.zeros(1, np.int64))
    lanes = (slice(None), None, None)
    rows = _G[lanes] + 8 * (r if packed else r >> 1) + 0 * j
    columns = 2 * _T[lanes] + (j + 0 * r if packed else r & 1)
    return rows, columns


def coordinates_wgmma_d(registers: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of D within a warp's 16 rows, by (lane, register)."""
    r = np.arange(registers)
    return _G[:, None] + 8 * ((r >> 1) & 1), 2 * _T[:, None] + 8 * (r >> 2) + (r & 1)


def decode(registers: np.ndarray, type_name: str) -> np.ndarray:
    """Values, as float64, of the elements in (warps, 32 lanes, registers): (warps, elements of a warp)."""
    registers = np.ascontiguousarray(registers)
    if type_name == "f16":
        values = registers.view(np.float16)
    elif type_name == "bf16":
        values = numerics.bf16_to_f32(registers.view(np.uint16))
    elif type_name == "tf32":
        values = (registers & np.uint32(0xFFFFE000)).view(np.float32)
    elif type_name in ("s8", "u8"):
        values = registers.view(np.int8 if type_name == "s8" else np.uint8)
    elif type_name in numerics.FP8:
        values = numerics.FP8[type_name][registers.view(np.uint8)]
    else:
        octets = registers.view(np.uint8)
        values = np.stack([octets & 15, octets >> 4], -1).astype(np.int64)
        if type_name == "s4":
            values = np.where(values > 7, values - 16, values)
    return values.astype(np.float64).reshape(len(registers), -1)
