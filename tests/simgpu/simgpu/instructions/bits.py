"""Operations on bits: and or not shl shf bfe bfi lop3 prmt popc clz bfind brev."""

from __future__ import annotations

import numpy as np

from ..machine import DTYPE, UNSIGNED, Machine
from ..ptx import WIDTH, Imm, Instruction, Pair, bits_type, data_type, expect
from ..steps import Lanes, Operation
from .common import Function, binary, readers, target, unary

_U32, _U64 = np.uint32, np.uint64


def _and(m: Machine, ins: Instruction) -> Operation:
    return binary(m, ins, np.bitwise_and, bits_type(ins))


def _or(m: Machine, ins: Instruction) -> Operation:
    return binary(m, ins, np.bitwise_or, bits_type(ins))


def _xor(m: Machine, ins: Instruction) -> Operation:
    return binary(m, ins, np.bitwise_xor, bits_type(ins))


def _not(m: Machine, ins: Instruction) -> Operation:
    return unary(m, ins, np.invert, bits_type(ins))


def _cnot(m: Machine, ins: Instruction) -> Operation:
    return unary(m, ins, lambda a: (a == 0).astype(a.dtype), bits_type(ins))


def _shl(m: Machine, ins: Instruction) -> Operation:
    return _shift(m, ins, np.left_shift, f"u{WIDTH[data_type(ins)]}")


def _shr(m: Machine, ins: Instruction) -> Operation:
    type_name = data_type(ins)
    return _shift(m, ins, np.right_shift, type_name if type_name.startswith("s") else f"u{WIDTH[type_name]}")


def _shift(m: Machine, ins: Instruction, function: Function, type_name: str) -> Operation:
    """PTX clamps the distance to the width; numpy leaves such shifts undefined."""
    width, dtype = WIDTH[type_name], DTYPE[type_name]
    a, write = m.read(ins.args[1], type_name), target(m, ins, type_name)
    distance = ins.args[2]
    if isinstance(distance, Imm) and distance.value & 0xFFFFFFFF < width:
        constant = np.array([distance.value & 0xFFFFFFFF], dtype)
        return lambda i: write(i, function(a(i), constant))
    b = m.read(distance, "u32")
    signed = type_name.startswith("s")

    def execute(i: Lanes) -> None:
        by, x = b(i), a(i)
        emptied = np.where(x < 0, dtype(-1), dtype(0)) if signed else dtype(0)
        write(i, np.where(by >= width, emptied, function(x, np.minimum(by, width - 1).astype(dtype))))

    return execute


def _shf(m: Machine, ins: Instruction) -> Operation:
    left, wrap = "l" in ins.mods, "wrap" in ins.mods
    (a, b, c), write = readers(m, ins, 3, "u32"), target(m, ins, "u32")

    def execute(i: Lanes) -> None:
        both = (b(i).astype(_U64) << _U64(32)) | a(i).astype(_U64)
        by = (c(i) & _U32(31) if wrap else np.minimum(c(i), _U32(32))).astype(_U64)
        write(i, ((both << by) >> _U64(32) if left else both >> by).astype(_U32))

    return execute


def _bfe(m: Machine, ins: Instruction) -> Operation:
    type_name = data_type(ins)
    width, signed = WIDTH[type_name], type_name.startswith("s")
    a, write = m.read(ins.args[1], type_name), target(m, ins, type_name)
    b, c = (m.read(arg, "u32") for arg in ins.args[2:4])
    one, every = _U64(1), _U64(2**64 - 1)

    def execute(i: Lanes) -> None:
        source = a(i).view(UNSIGNED[width]).astype(_U64)
        start = (b(i) & _U32(255)).astype(np.int64)
        length = (c(i) & _U32(255)).astype(np.int64)
        present = np.minimum(length, np.maximum(width - start, 0))  # of those bits, the ones that the source has
        field = np.where(present > 0, source >> np.minimum(start, 63).astype(_U64), _U64(0))
        mask = np.where(present >= 64, every, (one << np.minimum(present, 63).astype(_U64)) - one)
        field = field & mask
        if signed:
            top = np.maximum(np.minimum(start + length - 1, width - 1), 0)
            negative = ((source >> top.astype(_U64)) & one == one) & (length > 0)
            field = np.where(negative, field | ~mask, field)
        write(i, field.astype(UNSIGNED[width]).view(DTYPE[type_name]))

    return execute


def _bfi(m: Machine, ins: Instruction) -> Operation:
    bits = bits_type(ins)
    width, dtype = WIDTH[bits], DTYPE[bits]
    (a, b), write = readers(m, ins, 2, bits), target(m, ins, bits)
    c, d = (m.read(arg, "u32") for arg in ins.args[3:5])

    def execute(i: Lanes) -> None:
        start, length = c(i) & _U32(255), d(i) & _U32(255)
        shift = np.minimum(start, width - 1).astype(dtype)
        mask = np.where(
            length >= width, ~dtype(0), (dtype(1) << np.minimum(length, width - 1).astype(dtype)) - dtype(1)
        )
        mask = np.where(start >= width, dtype(0), mask << shift)
        write(i, (b(i) & ~mask) | ((a(i) << shift) & mask))

    return execute


# Functions of two bits by their truth table, bit a << 1 | b of the index; 0 has none, which saves operations.
_TWO_BITS: dict[int, Function] = {
    0b0001: lambda a, b: ~(a | b),
    0b0010: lambda a, b: ~a & b,
    0b0011: lambda a, b: ~a,
    0b0100: lambda a, b: a & ~b,
    0b0101: lambda a, b: ~b,
    0b0110: lambda a, b: a ^ b,
    0b0111: lambda a, b: ~(a & b),
    0b1000: lambda a, b: a & b,
    0b1001: lambda a, b: ~(a ^ b),
    0b1010: lambda a, b: b,
    0b1011: lambda a, b: ~a | b,
    0b1100: lambda a, b: a,
    0b1101: lambda a, b: a | ~b,
    0b1110: lambda a, b: a | b,
    0b1111: lambda a, b: ~(a ^ a),
}

# The tables that compilers and unpacking code use most, in fewer operations than the general form.
_THREE_BITS: dict[int, Function] = {
    0xC0: lambda a, b, c: a & b,
    0xEA: lambda a, b, c: (a & b) | c,
    0xFE: lambda a, b, c: a | b | c,
    0x96: lambda a, b, c: a ^ b ^ c,
    0xF8: lambda a, b, c: a | (b & c),
}


def _logic_function(table: int) -> Function:
    """Of three bits, bit a << 2 | b << 1 | c of `table`: one function of a and b where c is set, another where not."""
    if table in _THREE_BITS:
        return _THREE_BITS[table]
    where_set = _TWO_BITS.get(sum((table >> (ab << 1 | 1) & 1) << ab for ab in range(4)))
    where_clear = _TWO_BITS.get(sum((table >> (ab << 1) & 1) << ab for ab in range(4)))
    if where_set and where_clear:
        return lambda a, b, c: (where_clear(a, b) & ~c) | (where_set(a, b) & c)
    if where_set:
        return lambda a, b, c: where_set(a, b) & c
    if where_clear:
        return lambda a, b, c: where_clear(a, b) & ~c
    return lambda a, b, c: a ^ a


def _lop3(m: Machine, ins: Instruction) -> Operation:
    function = _logic_function(expect(ins.args[4], Imm).value & 255)
    a, b, c = readers(m, ins, 3, "b32")
    result = ins.args[0]
    if not isinstance(result, Pair):
        write = m.write(result, "b32")
        return lambda i: write(i, function(a(i), b(i), c(i)))
    write, write_predicate = m.write(result.first, "b32"), m.write(result.second, "pred")
    predicate = m.read(ins.args[5], "pred")
    combine = np.logical_or if "or" in ins.mods else np.logical_and

    def execute(i: Lanes) -> None:
        value = np.asarray(function(a(i), b(i), c(i)))
        was = predicate(i)
        write(i, value)
        write_predicate(i, combine(value != 0, was))

    return execute


# prmt's named modes: the byte that each of the four result bytes takes, by the two low bits of the selector.
_BYTES = {
    "f4e": [[(s + k) & 7 for k in range(4)] for s in range(4)],
    "b4e": [[(s - k) & 7 for k in range(4)] for s in range(4)],
    "rc8": [[s] * 4 for s in range(4)],
    "ecl": [[max(k, s) for k in range(4)] for s in range(4)],
    "ecr": [[min(k, s) for k in range(4)] for s in range(4)],
    "rc16": [[0, 1, 0, 1], [2, 3, 2, 3]] * 2,
}


def _prmt(m: Machine, ins: Instruction) -> Operation:
    (a, b, c), write = readers(m, ins, 3, "b32"), target(m, ins, "b32")
    mode = next((mod for mod in ins.mods if mod in _BYTES), None)
    table = np.array(_BYTES[mode], _U64) if mode else None

    def pick(both: np.ndarray, selector: np.ndarray) -> np.ndarray:
        byte = (both >> (_U64(8) * (selector & _U64(7)))) & _U64(255)
        sign = np.where((byte & _U64(128)) != 0, _U64(255), _U64(0))
        out: np.ndarray = np.where((selector & _U64(8)) != 0, sign, byte)
        return out

    def execute(i: Lanes) -> None:
        both = a(i).astype(_U64) | (b(i).astype(_U64) << _U64(32))
        selectors = c(i).astype(_U64)
        out = _U64(0)
        for k in range(4):
            if table is None:
                selector = (selectors >> _U64(4 * k)) & _U64(15)
            else:
                selector = table[(selectors & _U64(3)).astype(np.int64), k]
            out = out | (pick(both, selector) << _U64(8 * k))
        write(i, out.astype(_U32))

    return execute


def _popc(m: Machine, ins: Instruction) -> Operation:
    a, write = m.read(ins.args[1], bits_type(ins)), target(m, ins, "u32")
    return lambda i: write(i, np.bitwise_count(a(i)).astype(_U32))


def _highest_bit(x: np.ndarray) -> np.ndarray:
    """Index of the highest set bit of uint64, -1 for 0."""
    filled = x.copy()
    for by in (1, 2, 4, 8, 16, 32):
        filled |= filled >> _U64(by)
    out: np.ndarray = np.bitwise_count(filled).astype(np.int64) - 1
    return out


def _clz(m: Machine, ins: Instruction) -> Operation:
    width = WIDTH[data_type(ins)]
    a, write = m.read(ins.args[1], bits_type(ins)), target(m, ins, "u32")
    return lambda i: write(i, (width - 1 - _highest_bit(a(i).astype(_U64))).astype(_U32))


def _bfind(m: Machine, ins: Instruction) -> Operation:
    type_name = data_type(ins)
    width, signed, as_shift = WIDTH[type_name], type_name.startswith("s"), "shiftamt" in ins.mods
    a, write = m.read(ins.args[1], type_name), target(m, ins, "u32")

    def execute(i: Lanes) -> None:
        x = a(i)
        if signed:
            x = np.where(x < 0, ~x, x)
        index = _highest_bit(x.view(UNSIGNED[width]).astype(_U64))
        if as_shift:
            index = np.where(index < 0, -1, width - 1 - index)
        write(i, index.astype(np.int64).astype(_U32))

    return execute


def _brev(m: Machine, ins: Instruction) -> Operation:
    width = WIDTH[data_type(ins)]
    dtype = UNSIGNED[width]

    def reverse(x: np.ndarray) -> np.ndarray:
        out = np.zeros_like(x)
        for k in range(width):
            out |= ((x >> dtype(k)) & dtype(1)) << dtype(width - 1 - k)
        return out

    return unary(m, ins, reverse, bits_type(ins))


INSTRUCTIONS = {
    "and": _and,
    "bfe": _bfe,
    "bfi": _bfi,
    "bfind": _bfind,
    "brev": _brev,
    "clz": _clz,
    "cnot": _cnot,
    "lop3": _lop3,
    "not": _not,
    "or": _or,
    "popc": _popc,
    "prmt": _prmt,
    "shf": _shf,
    "shl": _shl,
    "shr": _shr,
    "xor": _xor,
}
