"""Moves of 8 x 8 matrices of 16-bit elements between shared memory and a warp: ldmatrix stmatrix movmatrix.

Lane l holds elements 2*(l % 4) and 2*(l % 4) + 1 of row l / 4 in one register; transposed, of column l / 4. Lanes 8k to
8k + 7 give the addresses of the rows of matrix k.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import access
from ..machine import Machine
from ..memory import SHARED_WINDOW
from ..ptx import Instruction, Operand, choice, items, state_space
from ..steps import Lanes, WarpSync

_COUNTS = {"x1": 1, "x2": 2, "x4": 4}
_LANE = np.arange(32)
_ROW, _WORD = _LANE // 4, _LANE % 4
_LOW_HALF, _HALF = np.uint32(0xFFFF), np.uint32(16)


def _count(m: Machine, ins: Instruction) -> int:
    if "m8n8" not in ins.mods or "b16" not in ins.mods:
        raise m.unsupported(ins)
    return _COUNTS[choice(ins, _COUNTS)]


def _rows(
    m: Machine, ins: Instruction, operand: Operand, count: int
) -> Callable[[Lanes], tuple[np.ndarray, np.ndarray]]:
    """The lanes that give an address, and the addresses: the rows of all matrices."""
    address = m.address(operand)
    base = SHARED_WINDOW if state_space(ins) == "generic" else 0

    def read(i: Lanes) -> tuple[np.ndarray, np.ndarray]:
        lanes, addresses = m.spread(i, address(i))
        giving = slice(0, 8 * count)
        return lanes.reshape(-1, 32)[:, giving].ravel(), addresses.reshape(-1, 32)[:, giving].ravel() - base

    return read


def _ldmatrix(m: Machine, ins: Instruction) -> WarpSync:
    count, transposed = _count(m, ins), "trans" in ins.mods
    writes = [m.write(item, "b32") for item in items(ins.args[0])]
    rows = _rows(m, ins, ins.args[1], count)

    def execute(i: Lanes, takes_part: np.ndarray) -> None:
        m.now += 1
        lanes, addresses = rows(i)
        offsets = access.check_shared(m, ins, lanes, addresses, 16, "ldmatrix row")
        m.counters.shared_access(ins, "ldmatrix", lanes, addresses, 16, m.lane_count)
        if m.shared.check:
            m.shared.note_read(lanes, offsets, 16, m.now, ins)
        offsets = offsets.reshape(-1, count, 8)
        m.counters.ldmatrix += len(offsets)
        for k, write in enumerate(writes):
            start = offsets[:, k]
            if transposed:
                halves = m.shared.views[2]
                low = halves[start[:, 2 * _WORD] // 2 + _ROW].astype(np.uint32)
                high = halves[start[:, 2 * _WORD + 1] // 2 + _ROW].astype(np.uint32)
                value = low | (high << _HALF)
            else:
                value = m.shared.views[4][start[:, _ROW] // 4 + _WORD]
            write(i, value.ravel())

    return WarpSync(execute, aligned=True)


def _stmatrix(m: Machine, ins: Instruction) -> WarpSync:
    count, transposed = _count(m, ins), "trans" in ins.mods
    reads = [m.read(item, "b32") for item in items(ins.args[1])]
    rows = _rows(m, ins, ins.args[0], count)

    def execute(i: Lanes, takes_part: np.ndarray) -> None:
        m.now += 1
        lanes, addresses = rows(i)
        offsets = access.check_shared(m, ins, lanes, addresses, 16, "stmatrix row")
        m.counters.shared_access(ins, "stmatrix", lanes, addresses, 16, m.lane_count)
        if m.shared.check:
            m.shared.note_write(lanes, offsets, 16, m.now, ins)
        offsets = offsets.reshape(-1, count, 8)
        for k, read in enumerate(reads):
            start = offsets[:, k]
            value = m.spread(i, read(i))[1].reshape(-1, 32)
            if transposed:
                halves = m.shared.views[2]
                halves[start[:, 2 * _WORD] // 2 + _ROW] = (value & _LOW_HALF).astype(np.uint16)
                halves[start[:, 2 * _WORD + 1] // 2 + _ROW] = (value >> _HALF).astype(np.uint16)
            else:
                m.shared.views[4][start[:, _ROW] // 4 + _WORD] = value

    return WarpSync(execute, aligned=True)


def _movmatrix(m: Machine, ins: Instruction) -> WarpSync:
    read, write = m.read(ins.args[1], "b32"), m.write(ins.args[0], "b32")

    def execute(i: Lanes, takes_part: np.ndarray) -> None:
        matrices = np.ascontiguousarray(read(i)).view(np.uint16).reshape(-1, 8, 8)
        write(i, np.ascontiguousarray(matrices.transpose(0, 2, 1)).view(np.uint32).ravel())

    return WarpSync(execute, aligned=True)


INSTRUCTIONS = {"ldmatrix": _ldmatrix, "movmatrix": _movmatrix, "stmatrix": _stmatrix}
