"""Atomic operations on global and shared memory: atom red.

Lanes that name the same address take turns, lowest lane first: one round serves one lane of each address. Atomics are
never in a race with each other; as accesses to shared memory they are checked against plain writes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import access
from ..machine import DTYPE, UNSIGNED, Machine
from ..ptx import WIDTH, Imm, Instruction, Operand, bits_type, choice, data_type, items, state_space
from ..steps import ALL, Lanes, Operation, Writer
from .common import FLOAT16, REDUCTIONS, Function, float16_codec

_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


def _combination(op: str, type_name: str) -> Function:
    """(old value, operand, second operand of cas) -> new value, all as unsigned bits."""
    unsigned, dtype = UNSIGNED[WIDTH[type_name]], DTYPE[type_name]
    zero, one = unsigned(0), unsigned(1)
    if op == "exch":
        return lambda old, b, c: b
    if op == "cas":
        return lambda old, b, c: np.asarray(np.where(old == b, c, old))
    if op == "inc":
        return lambda old, b, c: np.where(old >= b, zero, old + one)
    if op == "dec":
        return lambda old, b, c: np.where((old == 0) | (old > b), b, old - one)
    if type_name in FLOAT16:
        function = REDUCTIONS[op]
        decode, encode = float16_codec(type_name)

        def combine(old: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            halves = (decode(np.ascontiguousarray(array).view(np.uint16)) for array in (old, b))
            return encode(function(*halves)).view(unsigned)

        return combine
    function = REDUCTIONS[op]
    return lambda old, b, c: function(old.view(dtype), b.view(dtype)).view(unsigned)


def _atom(m: Machine, ins: Instruction) -> Operation:
    writes = [m.write(item, bits_type(ins)) for item in items(ins.args[0])]
    return _atomic(m, ins, ins.args[1:], writes)


def _red(m: Machine, ins: Instruction) -> Operation:
    if "async" in ins.mods:
        raise m.unsupported(ins)
    return _atomic(m, ins, ins.args, [])


def _atomic(m: Machine, ins: Instruction, args: Sequence[Operand], writes: list[Writer]) -> Operation:
    """args: address, operand, and the second operand of cas. `writes` get the old values."""
    space, op, type_name, bits = state_space(ins), choice(ins, _ATOMICS), data_type(ins), bits_type(ins)
    address = m.address(args[0])
    reads = [m.read(item, type_name if isinstance(item, Imm) else bits) for item in items(args[1])]
    read_second = m.read(args[2], bits) if op == "cas" else None
    unsigned, element = UNSIGNED[WIDTH[type_name]], WIDTH[type_name] // 8
    combine = _combination(op, type_name)

    def execute(i: Lanes) -> None:
        lanes, addresses = m.spread(i, address(i))
        m.now += 1
        operands = [np.broadcast_to(read(i).view(unsigned), lanes.shape) for read in reads]
        second = np.broadcast_to(read_second(i), lanes.shape) if read_second else operands[0]
        old = np.empty((len(reads), len(lanes)), unsigned)
        parts = access.split_generic(addresses) if space == "generic" else [(space, ALL, addresses)]
        for part, which, inside in parts:
            views, offsets = _prepare(m, ins, part, lanes[which], inside, element * len(reads))
            view, at = views[element], offsets // element
            waiting = np.arange(len(lanes))[which]
            while len(waiting):
                _, chosen = np.unique(at, return_index=True)
                turn = waiting[chosen]
                for k, operand in enumerate(operands):
                    old[k, turn] = view[at[chosen] + k]
                    view[at[chosen] + k] = combine(old[k, turn], operand[turn], second[turn])
                left = np.ones(len(at), bool)
                left[chosen] = False
                waiting, at = waiting[left], at[left]
                m.counters.atomic_rounds += 1
        for k, write in enumerate(writes):
            write(i, old[k])

    return execute


def _prepare(
    m: Machine, ins: Instruction, space: str, lanes: np.ndarray, addresses: np.ndarray, size: int
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    if space == "global":
        offsets = access.check_global(m, ins, lanes, addresses, size, "exchange" if "exch" in ins.mods else "atomic")
        m.counters.global_access(ins, "atomic", lanes, offsets, size)
        m.device.mark_initialised(offsets, size)
        return m.device.views, offsets
    if space == "local":
        m.fail(ins, f"atomic operation on local memory at {addresses[0]:#x}", lanes[0])
    offsets = access.check_shared(m, ins, lanes, addresses, size, "atomic")
    m.counters.shared_access(ins, "atomic", lanes, addresses, size, m.lane_count)
    if m.shared.check:
        m.shared.note_atomic(lanes, offsets, size, m.now, ins)
    return m.shared.views, offsets


INSTRUCTIONS = {"atom": _atom, "red": _red}
