"""Moves of values and addresses (mov cvta isspacep mapa), flow of control (bra ret trap call), and what does nothing
here: hints, cache control, and fences, because memory is never reordered."""

from __future__ import annotations

import numpy as np

from .. import access
from ..machine import DTYPE, Machine
from ..memory import LOCAL_WINDOW, SHARED_WINDOW
from ..ptx import WIDTH, Imm, Instruction, Sym, Vec, bits_type, data_type, expect, state_space
from ..steps import Branch, Exit, Lanes, Operation
from .common import Function, target


def _mov(m: Machine, ins: Instruction) -> Operation:
    result, source = ins.args
    if isinstance(result, Vec):
        return _unpack(m, ins)
    if isinstance(source, Vec):
        return _pack(m, ins)
    bits = bits_type(ins)
    write = m.write(result, bits)
    if isinstance(source, Imm) and source.float_type == "f64" and data_type(ins) == "f32":
        value = m.constant(source, "f32")
        return lambda i: write(i, value)
    read = m.read(source, bits)
    return lambda i: write(i, read(i))


def _unpack(m: Machine, ins: Instruction) -> Operation:
    result, source = expect(ins.args[0], Vec), ins.args[1]
    bits = bits_type(ins)
    width = WIDTH[bits] // len(result.items)
    read = m.read(source, bits)
    writes = [m.write(item, f"b{width}") for item in result.items]
    whole, part = DTYPE[bits], DTYPE[f"b{width}"]

    def execute(i: Lanes) -> None:
        value = read(i)
        for k, write in enumerate(writes):
            write(i, (value >> whole(width * k)).astype(part))

    return execute


def _pack(m: Machine, ins: Instruction) -> Operation:
    result, source = ins.args[0], expect(ins.args[1], Vec)
    bits = bits_type(ins)
    width = WIDTH[bits] // len(source.items)
    reads = [m.read(item, f"b{width}") for item in source.items]
    write = m.write(result, bits)
    whole = DTYPE[bits]

    def execute(i: Lanes) -> None:
        value = reads[0](i).astype(whole)
        for k, read in enumerate(reads[1:], 1):
            value = value | (read(i).astype(whole) << whole(width * k))
        write(i, value)

    return execute


def _cvta(m: Machine, ins: Instruction) -> Operation:
    """Global and constant addresses are generic ones; shared and local memory lie in windows."""
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(state_space(ins), 0)
    type_name = f"u{WIDTH[data_type(ins)]}"
    read, write = m.read(ins.args[1], type_name), target(m, ins, type_name)
    if window == 0:
        return lambda i: write(i, read(i))
    base = np.array([(-window if "to" in ins.mods else window) & (2**64 - 1)], np.uint64)
    return lambda i: write(i, read(i) + base)


_SPACE_TESTS: dict[str, Function] = {
    "shared": access.in_shared,
    "local": access.in_local,
    "global": lambda a: ~(access.in_shared(a) | access.in_local(a)),
    "const": lambda a: np.zeros(a.shape, bool),
    "param": lambda a: np.zeros(a.shape, bool),
}


def _isspacep(m: Machine, ins: Instruction) -> Operation:
    read, write = m.read(ins.args[1], "s64"), target(m, ins, "pred")
    test = _SPACE_TESTS[state_space(ins)]
    return lambda i: write(i, test(read(i)))


def _mapa(m: Machine, ins: Instruction) -> Operation:
    """The same address in another block of the cluster: a cluster is one block."""
    type_name = data_type(ins)
    read, write = m.read(ins.args[1], type_name), target(m, ins, type_name)
    return lambda i: write(i, read(i))


def _createpolicy(m: Machine, ins: Instruction) -> Operation:
    write = target(m, ins, "b64")
    return lambda i: write(i, np.zeros(1, np.uint64))


def _nothing(m: Machine, ins: Instruction) -> Operation:
    return lambda i: None


def _bra(m: Machine, ins: Instruction) -> Branch:
    return Branch(ins.target)


def _exit(m: Machine, ins: Instruction) -> Exit:
    return Exit()


def _stop(m: Machine, ins: Instruction, why: str) -> Operation:
    def execute(i: Lanes) -> None:
        m.fail(ins, why, m.lanes[i][0])

    return execute


def _trap(m: Machine, ins: Instruction) -> Operation:
    return _stop(m, ins, "trap")


def _call(m: Machine, ins: Instruction) -> Operation:
    callee = expect(ins.args[0], Sym).name
    if "__assertfail" in callee:
        return _stop(m, ins, "device assert failed")
    if "vprintf" in callee:
        return _nothing(m, ins)
    raise m.unsupported(ins, "a call of a device function that was not inlined")


INSTRUCTIONS = {
    "applypriority": _nothing,
    "bra": _bra,
    "brkpt": _trap,
    "call": _call,
    "createpolicy": _createpolicy,
    "cvta": _cvta,
    "discard": _nothing,
    "exit": _exit,
    "fence": _nothing,
    "griddepcontrol": _nothing,
    "isspacep": _isspacep,
    "mapa": _mapa,
    "membar": _nothing,
    "mov": _mov,
    "nanosleep": _nothing,
    "pmevent": _nothing,
    "prefetch": _nothing,
    "prefetchu": _nothing,
    "ret": _exit,
    "setmaxnreg": _nothing,
    "trap": _trap,
}
