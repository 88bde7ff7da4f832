"""Exchange between the lanes of a warp: shfl vote match redux elect activemask.

The scheduler brings together the lanes that an instruction's membermask names; the functions here see all of them at
once and need no memory.
"""

from __future__ import annotations

import numpy as np

from ..machine import UNSIGNED, Machine
from ..ptx import WIDTH, Instruction, Pair, Reg, bits_type, choice, data_type, expect
from ..steps import ALL, Lanes, Operation, Reader, WarpSync
from .common import REDUCTIONS, target

_FIVE_BITS = np.uint32(31)


def _members(m: Machine, ins: Instruction) -> Reader | None:
    return m.read(ins.args[-1], "u32") if "sync" in ins.mods else None


def _shfl(m: Machine, ins: Instruction) -> WarpSync:
    mode = choice(ins, ("up", "down", "bfly", "idx"))
    result = ins.args[0]
    write = m.write(result.first if isinstance(result, Pair) else result, "b32")
    write_inside = m.write(result.second, "pred") if isinstance(result, Pair) else None
    source = ins.args[1]
    values, b, c = m.read(source, "b32"), m.read(ins.args[2], "u32"), m.read(ins.args[3], "u32")

    def execute(i: Lanes, takes_part: np.ndarray) -> None:
        lane = m.lane_in_warp[i].astype(np.int64)
        by = (b(i) & _FIVE_BITS).astype(np.int64)
        control = c(i)
        clamp = (control & _FIVE_BITS).astype(np.int64)
        segment = ((control >> np.uint32(8)) & _FIVE_BITS).astype(np.int64)
        limit = (lane & segment) | (clamp & ~segment)
        if mode == "up":
            other = lane - by
        elif mode == "down":
            other = lane + by
        elif mode == "bfly":
            other = lane ^ by
        else:
            other = (lane & segment) | (by & ~segment)
        inside = other >= limit if mode == "up" else other <= limit
        other = np.where(inside, other, lane)
        lanes = m.lanes[i]
        read_from = (lanes & ~31) | other
        absent = ~takes_part[read_from]
        if absent.any():
            k = np.argmax(absent)
            m.hazard("shfl reads a lane that does not take part", ins, lanes[k], other=int(read_from[k]))
        every = values(ALL) if isinstance(source, Reg) else np.broadcast_to(values(ALL), (m.lane_count,))
        write(i, every[read_from])
        if write_inside:
            write_inside(i, inside)

    return WarpSync(execute, _members(m, ins))


def _ballot(m: Machine, i: Lanes, predicate: np.ndarray) -> np.ndarray:
    """For each lane, the predicates of its warp as a mask."""
    lanes = m.lanes[i]
    bits = np.zeros(m.lane_count, np.uint64)
    bits[lanes] = np.where(predicate, np.uint64(1) << (lanes & 31).astype(np.uint64), np.uint64(0))
    out: np.ndarray = bits.reshape(-1, 32).sum(1, dtype=np.uint64).astype(np.uint32)[lanes >> 5]
    return out


def _present(m: Machine, i: Lanes) -> np.ndarray:
    return _ballot(m, i, np.ones(len(m.lanes[i]), bool))


def _vote(m: Machine, ins: Instruction) -> WarpSync:
    mode = choice(ins, ("ballot", "any", "all", "uni"))
    read = m.read(ins.args[1], "pred")
    write = target(m, ins, "b32" if mode == "ballot" else "pred")

    def execute(i: Lanes, takes_part: np.ndarray) -> None:
        ballot = _ballot(m, i, m.spread(i, read(i))[1])
        if mode == "ballot":
            write(i, ballot)
        elif mode == "any":
            write(i, ballot != 0)
        else:
            unanimous = ballot == _present(m, i)
            write(i, unanimous if mode == "all" else unanimous | (ballot == 0))

    return WarpSync(execute, _members(m, ins))


def _activemask(m: Machine, ins: Instruction) -> Operation:
    write = target(m, ins, "b32")
    return lambda i: write(i, _present(m, i))


def _match(m: Machine, ins: Instruction) -> WarpSync:
    bits = bits_type(ins)
    result = ins.args[0]
    write = m.write(result.first if isinstance(result, Pair) else result, "b32")
    write_same = m.write(result.second, "pred") if isinstance(result, Pair) else None
    read = m.read(ins.args[1], bits)
    any_match = "any" in ins.mods
    lane_bits = np.uint64(1) << np.arange(32, dtype=np.uint64)

    def execute(i: Lanes, takes_part: np.ndarray) -> None:
        lanes = m.lanes[i]
        values = np.zeros(m.lane_count, UNSIGNED[WIDTH[bits]])
        values[lanes] = read(i)
        by_warp, present = values.reshape(-1, 32), m.mask(lanes).reshape(-1, 32)
        equal = (by_warp[:, :, None] == by_warp[:, None, :]) & present[:, None, :]
        masks = (equal * lane_bits).sum(2, dtype=np.uint64).astype(np.uint32).ravel()[lanes]
        if any_match:
            write(i, masks)
            return
        everyone = _present(m, i)
        write(i, np.where(masks == everyone, everyone, np.uint32(0)))
        if write_same:
            write_same(i, masks == everyone)

    return WarpSync(execute, _members(m, ins))


def _redux(m: Machine, ins: Instruction) -> WarpSync:
    type_name = data_type(ins)
    function = REDUCTIONS[choice(ins, REDUCTIONS)]
    read, write = m.read(ins.args[1], type_name), target(m, ins, type_name)

    def execute(i: Lanes, takes_part: np.ndarray) -> None:
        lanes, values = m.spread(i, read(i))
        _, first, warp = np.unique(lanes >> 5, return_index=True, return_inverse=True)
        write(i, function.reduceat(values, first)[warp].astype(values.dtype))

    return WarpSync(execute, _members(m, ins))


def _elect(m: Machine, ins: Instruction) -> WarpSync:
    result = expect(ins.args[0], Pair)
    write, write_leads = m.write(result.first, "b32"), m.write(result.second, "pred")

    def execute(i: Lanes, takes_part: np.ndarray) -> None:
        lanes = m.lanes[i]
        _, first, warp = np.unique(lanes >> 5, return_index=True, return_inverse=True)
        leader = lanes[first][warp]
        write(i, (leader & 31).astype(np.uint32))
        write_leads(i, lanes == leader)

    return WarpSync(execute, _members(m, ins))


INSTRUCTIONS = {
    "activemask": _activemask,
    "elect": _elect,
    "match": _match,
    "redux": _redux,
    "shfl": _shfl,
    "vote": _vote,
}
