"""Comparisons and selections: setp set selp slct testp."""

from __future__ import annotations

import numpy as np

from ..machine import DTYPE, UNSIGNED, Machine
from ..ptx import WIDTH, Imm, Instruction, Pair, bits_type, choice, data_type, types
from ..steps import Lanes, Operation
from .common import Function, is_float, read_float, readers, target

_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _either_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out: np.ndarray = np.isnan(a) | np.isnan(b)
    return out


def _comparison(name: str, type_name: str) -> Function:
    """Ordered comparisons of floats are false with a NaN, the ones that end in u are true."""
    if name == "num":
        return lambda a, b: ~_either_nan(a, b)
    if name == "nan":
        return _either_nan
    if is_float(type_name) and name.endswith("u"):
        ordered = _COMPARISONS[name[:-1]]
        return lambda a, b: ordered(a, b) | _either_nan(a, b)
    if is_float(type_name) and name == "ne":
        return lambda a, b: (a != b) & ~_either_nan(a, b)
    return _COMPARISONS[name]


def _setp(m: Machine, ins: Instruction) -> Operation:
    type_name = data_type(ins)
    if type_name.endswith("x2"):
        raise m.unsupported(ins)
    compare = _comparison(ins.mods[0], type_name)
    if type_name.startswith("b") and type_name != "bf16":
        type_name = f"u{WIDTH[type_name]}"
    a, b = (read_float(m, arg, type_name) for arg in ins.args[1:3])
    result = ins.args[0]
    write = m.write(result.first if isinstance(result, Pair) else result, "pred")
    write_inverse = m.write(result.second, "pred") if isinstance(result, Pair) else None
    logic = _LOGIC.get(ins.mods[1])
    if logic is None and write_inverse is None:
        return lambda i: write(i, compare(a(i), b(i)))
    other = m.read(ins.args[3], "pred") if logic else None

    def execute(i: Lanes) -> None:
        value = compare(a(i), b(i))
        inverse = ~value
        if logic and other:
            before = other(i)
            value, inverse = logic(value, before), logic(inverse, before)
        write(i, value)
        if write_inverse:
            write_inverse(i, inverse)

    return execute


def _set(m: Machine, ins: Instruction) -> Operation:
    result, source = types(ins)
    compare = _comparison(ins.mods[0], source)
    a, b = (read_float(m, arg, source) for arg in ins.args[1:3])
    write = target(m, ins, result)
    true = np.array([1.0], np.float32) if result == "f32" else ~np.zeros(1, UNSIGNED[WIDTH[result]])
    false = np.zeros(1, true.dtype)
    dtype = DTYPE[result]
    return lambda i: write(i, np.where(compare(a(i), b(i)), true, false).view(dtype))


def _selp(m: Machine, ins: Instruction) -> Operation:
    bits = bits_type(ins)
    # A literal is read in the instruction's own type: 1.0 is a float, not the integer 1.
    a, b = (m.read(arg, data_type(ins) if isinstance(arg, Imm) else bits) for arg in ins.args[1:3])
    dtype = DTYPE[bits]
    predicate, write = m.read(ins.args[3], "pred"), target(m, ins, bits)
    return lambda i: write(i, np.where(predicate(i), a(i).view(dtype), b(i).view(dtype)))


def _slct(m: Machine, ins: Instruction) -> Operation:
    result, tested = types(ins)
    (a, b), c, write = readers(m, ins, 2, result), m.read(ins.args[3], tested), target(m, ins, result)
    return lambda i: write(i, np.where(c(i) >= 0, a(i), b(i)))


def _is_normal(x: np.ndarray) -> np.ndarray:
    out: np.ndarray = np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny)
    return out


_TESTS: dict[str, Function] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "notanumber": np.isnan,
    "number": lambda x: ~np.isnan(x),
    "normal": _is_normal,
    "subnormal": lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny),
}


def _testp(m: Machine, ins: Instruction) -> Operation:
    a, write = m.read(ins.args[1], data_type(ins)), target(m, ins, "pred")
    test = _TESTS[choice(ins, _TESTS)]
    return lambda i: write(i, test(a(i)))


INSTRUCTIONS = {"selp": _selp, "set": _set, "setp": _setp, "slct": _slct, "testp": _testp}
