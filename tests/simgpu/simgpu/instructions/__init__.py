"""Every instruction that the simulator executes, by base opcode, and how one is decoded.

Each file of this package turns the instructions of one subject into steps: plain functions of lanes for most, records
for the few that the scheduler must act on (steps.py). What an instruction does not support it refuses here, before the
kernel runs, with the PTX line.
"""

from __future__ import annotations

from collections.abc import Callable

from ..machine import Machine
from ..ptx import Instruction, Reg
from ..steps import Lanes, Operation, Step
from . import (
    arithmetic,
    async_copy,
    atomics,
    barrier,
    bits,
    compare,
    convert,
    matrix,
    mbarrier,
    memory,
    mma,
    moves,
    warp,
    wgmma,
)

_FILES = (
    arithmetic,
    async_copy,
    atomics,
    barrier,
    bits,
    compare,
    convert,
    matrix,
    mbarrier,
    memory,
    mma,
    moves,
    warp,
    wgmma,
)
INSTRUCTIONS: dict[str, Callable[[Machine, Instruction], Step]] = {
    base: decoder for file in _FILES for base, decoder in file.INSTRUCTIONS.items()
}


# What always becomes an operation. In large kernels, of which a launch executes a small part, these are decoded when
# they are first executed.
_PLAIN = {base for file in (arithmetic, bits, compare, convert, memory) for base in file.INSTRUCTIONS} | {"mov"}
_LARGE = 1000


def decode(m: Machine, ins: Instruction) -> Step:
    later = ins.base in _PLAIN and len(m.kernel.code) > _LARGE
    return _when_executed(m, ins) if later else _decode(m, ins)


def _when_executed(m: Machine, ins: Instruction) -> Operation:
    operation: Step | None = None

    def execute(i: Lanes) -> None:
        nonlocal operation
        if operation is None:
            operation = _decode(m, ins)
        assert callable(operation)  # as all of _PLAIN become
        operation(i)

    return execute


def _decode(m: Machine, ins: Instruction) -> Step:
    if ins.base not in INSTRUCTIONS:
        raise m.unsupported(ins)
    try:
        step = INSTRUCTIONS[ins.base](m, ins)
    except (KeyError, IndexError, AttributeError, ValueError, StopIteration) as error:
        raise m.unsupported(ins, f"this form of {ins.base}") from error
    if not callable(step):
        return step
    if ins.base != "wgmma":
        step = wgmma.watch_accumulators(m, ins, step)
    return step if ins.guard is None else _guarded(m, ins.guard, step)


def _guarded(m: Machine, guard: Reg, operation: Operation) -> Operation:
    """The operation on those lanes whose predicate holds. Other steps are guarded by the scheduler."""
    predicate, negated = m.registers[guard.name], guard.negated

    def execute(i: Lanes) -> None:
        holds = predicate[i]
        if negated:
            holds = ~holds
        if holds.all():
            operation(i)
        elif holds.any():
            operation(m.lanes[i][holds])

    return execute
