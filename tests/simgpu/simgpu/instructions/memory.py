"""Loads and stores: ld st."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import access
from ..machine import DTYPE, UNSIGNED, Machine
from ..ptx import WIDTH, Addr, Imm, Instruction, Reg, Sym, bits_type, data_type, expect, items, state_space
from ..steps import Lanes, Operation


def _ld(m: Machine, ins: Instruction) -> Operation:
    space, type_name = state_space(ins), data_type(ins)
    if type_name == "b128":
        raise m.unsupported(ins)
    element = WIDTH[type_name] // 8
    # Integers keep their sign, since the register may be wider than they are.
    raw = type_name if type_name[0] in "su" else bits_type(ins)
    writes = [m.write(item, raw) for item in items(ins.args[0])]
    dtype, count = DTYPE[raw], len(writes)
    if space == "param" and isinstance(expect(ins.args[1], Addr).base, Reg):
        return _ld_parameters(m, ins, element * count, dtype, writes)
    if space == "param":
        values = _parameter(m, expect(ins.args[1], Addr), element * count).view(dtype)

        def execute_param(i: Lanes) -> None:
            for k, write in enumerate(writes):
                write(i, values[k : k + 1])

        return execute_param
    address = m.address(ins.args[1])

    def execute(i: Lanes) -> None:
        lanes, addresses = m.spread(i, address(i))
        loaded = access.load(m, ins, space, lanes, addresses, element, count)
        for k, write in enumerate(writes):
            write(i, np.ascontiguousarray(loaded[:, k]).view(dtype))

    return execute


def _parameter(m: Machine, address: Addr, size: int) -> np.ndarray:
    """The bytes of a parameter; zeros for the result of a call, since the calls that are not refused do nothing."""
    offset = m.launch.param_offset(expect(address.base, Sym).name)
    if offset is None:
        return np.zeros(size, np.uint8)
    return np.frombuffer(m.launch.params, np.uint8, size, offset + address.offset)


def _ld_parameters(
    m: Machine, ins: Instruction, size: int, dtype: type, writes: list[Callable[[Lanes, np.ndarray], None]]
) -> Operation:
    """From an address in a register: an entry of an array in a parameter."""
    address, params = m.address(ins.args[1]), np.frombuffer(m.launch.params, np.uint8)

    def execute(i: Lanes) -> None:
        lanes, offsets = m.spread(i, address(i))
        bad = (offsets < 0) | (offsets + size > params.size) | (offsets % size != 0)
        if bad.any():
            k = int(np.argmax(bad))
            m.fail(ins, f"read of {size} bytes at {offsets[k]} of {params.size} bytes of parameters", lanes[k])
        loaded: np.ndarray = params[offsets[:, None] + np.arange(size)].view(dtype)
        for column, write in enumerate(writes):
            write(i, np.ascontiguousarray(loaded[:, column]))

    return execute


def _st(m: Machine, ins: Instruction) -> Operation:
    space = state_space(ins)
    if space == "param":  # an argument of a call, which is refused or does nothing
        return lambda i: None
    dtype = UNSIGNED[WIDTH[data_type(ins)]]
    reads = [m.read(item, data_type(ins) if isinstance(item, Imm) else bits_type(ins)) for item in items(ins.args[1])]
    address = m.address(ins.args[0])

    def execute(i: Lanes) -> None:
        lanes, addresses = m.spread(i, address(i))
        values = np.empty((len(lanes), len(reads)), dtype)
        for k, read in enumerate(reads):
            values[:, k] = read(i).view(dtype)
        access.store(m, ins, space, lanes, addresses, values)

    return execute


INSTRUCTIONS = {"ld": _ld, "ldu": _ld, "st": _st}
