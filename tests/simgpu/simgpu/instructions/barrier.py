"""Barriers of a block and of a warp: bar barrier.

This file decodes them; who has arrived where is the scheduler's state. A cluster is one block, so its barrier is
another barrier of that block.
"""

from __future__ import annotations

import numpy as np

from ..machine import Machine
from ..ptx import Instruction, choice
from ..steps import Barrier, Lanes, Reduction, Step, WarpSync

_CLUSTER_BARRIER = 100  # outside the numbers that a kernel can name, 0 to 15


def _bar(m: Machine, ins: Instruction) -> Step:
    if "warp" in ins.mods:
        return _bar_warp(m, ins)
    if "cluster" in ins.mods:
        return _bar_cluster(ins)
    args = list(ins.args)
    reduction = None
    if "red" in ins.mods:
        op = choice(ins, ("popc", "and", "or"))
        write = m.write(args.pop(0), "u32" if op == "popc" else "pred")
        reduction = Reduction(op, m.read(args.pop(), "pred"), write)
    zero = np.zeros(1, np.uint32)
    number = m.read(args[0], "u32") if args else lambda i: zero
    threads = m.read(args[1], "u32") if len(args) > 1 else None
    return Barrier(number, threads, "arrive" in ins.mods, reduction)


def _bar_cluster(ins: Instruction) -> Step:
    if "wait" in ins.mods:
        return lambda i: None
    number = np.array([_CLUSTER_BARRIER])
    return Barrier(lambda i: number, arrive_only="arrive" in ins.mods)


def _bar_warp(m: Machine, ins: Instruction) -> WarpSync:
    def execute(i: Lanes, takes_part: np.ndarray) -> None:
        m.now += 1
        m.shared.warp_barrier(np.unique(m.lanes[i] >> 5), m.now)

    return WarpSync(execute, m.read(ins.args[0], "u32"))


INSTRUCTIONS = {"bar": _bar, "barrier": _bar}
