"""Arithmetic of integers and floating-point numbers: add mul mad fma div min rcp ex2 dp4a ...

Approximate functions (rcp.approx, ex2.approx, tanh.approx, ...) give the exact value, rounded: hardware may differ in
the last bits. Directed rounding (rz, rm, rp) exists for add, sub, mul and fma of f32 only.
"""

from __future__ import annotations

import numpy as np

from .. import numerics
from ..machine import DTYPE, UNSIGNED, Machine
from ..ptx import WIDTH, Instruction, data_type
from ..steps import Lanes, Operation
from .common import Function, binary, elementwise, float16_elementwise, is_float, readers, target, unary

_DIRECTED = ("rz", "rm", "rp")


def _rounding(m: Machine, ins: Instruction) -> str:
    mode = next((mod for mod in ins.mods if mod in _DIRECTED), "rn")
    if mode != "rn" and data_type(ins) != "f32":
        raise m.unsupported(ins, f"rounding {mode} of {data_type(ins)}")
    return mode


def _add(m: Machine, ins: Instruction) -> Operation:
    if "cc" in ins.mods:
        return _add_carry_out(m, ins)
    return _sum(m, ins, np.add)


def _sub(m: Machine, ins: Instruction) -> Operation:
    if "cc" in ins.mods:
        raise m.unsupported(ins)
    return _sum(m, ins, np.subtract)


def _sum(m: Machine, ins: Instruction, function: Function) -> Operation:
    type_name = data_type(ins)
    if "sat" in ins.mods and type_name == "s32":
        limits = np.iinfo(np.int32)
        return binary(
            m,
            ins,
            lambda a, b: np.clip(function(a.astype(np.int64), b), limits.min, limits.max).astype(np.int32),
            type_name,
        )
    mode = _rounding(m, ins)
    if mode != "rn":
        sign = np.float32(1 if function is np.add else -1)
        return elementwise(m, ins, lambda a, b: numerics.fma_f32(b, sign, a, mode), 2)
    return elementwise(m, ins, function, 2)


def _add_carry_out(m: Machine, ins: Instruction) -> Operation:
    type_name = f"u{WIDTH[data_type(ins)]}"
    (a, b), write = readers(m, ins, 2, type_name), target(m, ins, type_name)

    def execute(i: Lanes) -> None:
        first = a(i)
        total = first + b(i)
        m.carry[i] = total < first
        write(i, total)

    return execute


def _addc(m: Machine, ins: Instruction) -> Operation:
    type_name = f"u{WIDTH[data_type(ins)]}"
    (a, b), write = readers(m, ins, 2, type_name), target(m, ins, type_name)
    dtype, carry_out = DTYPE[type_name], "cc" in ins.mods

    def execute(i: Lanes) -> None:
        first = a(i)
        partial = first + b(i)
        total = partial + m.carry[i].astype(dtype)
        if carry_out:
            m.carry[i] = (partial < first) | (total < partial)
        write(i, total)

    return execute


def _high_64(a: np.ndarray, b: np.ndarray, signed: bool) -> np.ndarray:
    """The upper half of a 128-bit product, from four products of 32-bit halves."""
    a, b = np.broadcast_arrays(a, b)
    x, y = a.view(np.uint64), b.view(np.uint64)
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x_low, x_high, y_low, y_high = x & mask, x >> half, y & mask, y >> half
    middle = x_high * y_low + ((x_low * y_low) >> half)
    lower = x_low * y_high + (middle & mask)
    high = x_high * y_high + (middle >> half) + (lower >> half)
    if signed:
        zero = np.uint64(0)
        high = high - np.where(x.view(np.int64) < 0, y, zero) - np.where(y.view(np.int64) < 0, x, zero)
    out: np.ndarray = high.view(a.dtype)
    return out


def _product(ins: Instruction) -> tuple[Function, str]:
    """The function of an integer multiplication, and the type of its result."""
    type_name = data_type(ins)
    width, signed = WIDTH[type_name], type_name.startswith("s")
    if "wide" not in ins.mods and "hi" not in ins.mods:
        return np.multiply, type_name
    if width == 64:
        return lambda a, b: _high_64(a, b, signed), type_name
    wide_name = f"{'s' if signed else 'u'}{2 * width}"
    wide, narrow = DTYPE[wide_name], DTYPE[type_name]
    if "wide" in ins.mods:
        return lambda a, b: a.astype(wide) * b.astype(wide), wide_name
    return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(width)).astype(narrow), type_name


def _mul(m: Machine, ins: Instruction) -> Operation:
    type_name = data_type(ins)
    if is_float(type_name):
        mode = _rounding(m, ins)
        if mode != "rn":
            return elementwise(m, ins, lambda a, b: numerics.fma_f32(a, b, np.float32(-0.0), mode), 2)
        return elementwise(m, ins, np.multiply, 2)
    function, result = _product(ins)
    (a, b), write = readers(m, ins, 2, type_name), target(m, ins, result)
    return lambda i: write(i, function(a(i), b(i)))


def _mad(m: Machine, ins: Instruction) -> Operation:
    type_name = data_type(ins)
    if is_float(type_name):
        return _fma(m, ins)
    if "cc" in ins.mods or "sat" in ins.mods:
        raise m.unsupported(ins)
    function, result = _product(ins)
    (a, b), c, write = readers(m, ins, 2, type_name), m.read(ins.args[3], result), target(m, ins, result)
    return lambda i: write(i, function(a(i), b(i)) + c(i))


def _fma(m: Machine, ins: Instruction) -> Operation:
    type_name, mode = data_type(ins), _rounding(m, ins)
    if type_name == "f32":
        return elementwise(m, ins, lambda a, b, c: numerics.fma_f32(a, b, c, mode), 3)
    if type_name == "f64":
        return elementwise(m, ins, numerics.fma_f64, 3)
    encode = numerics.f64_to_bf16 if type_name.startswith("bf") else numerics.f32_to_f16
    return float16_elementwise(m, ins, numerics.fma_odd, encode, 3)


def _div(m: Machine, ins: Instruction) -> Operation:
    type_name = data_type(ins)
    if is_float(type_name):
        _refuse_directed(m, ins)
        return elementwise(m, ins, np.divide, 2)

    def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = np.broadcast_arrays(a, b)
        zero = b == 0
        divisor = np.where(zero, b.dtype.type(1), b)
        quotient = (a - np.fmod(a, divisor)) // divisor
        out: np.ndarray = np.where(zero, ~b.dtype.type(0), quotient)
        return out

    return binary(m, ins, divide, type_name)


def _rem(m: Machine, ins: Instruction) -> Operation:
    def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        zero = b == 0
        return np.where(zero, a, np.fmod(a, np.where(zero, b.dtype.type(1), b)))

    return binary(m, ins, remainder, data_type(ins))


def _refuse_directed(m: Machine, ins: Instruction) -> None:
    mode = next((mod for mod in ins.mods if mod in _DIRECTED), None)
    if mode:
        raise m.unsupported(ins, f"rounding {mode}")


def _abs(m: Machine, ins: Instruction) -> Operation:
    return elementwise(m, ins, np.abs, 1)


def _neg(m: Machine, ins: Instruction) -> Operation:
    signs = {"f16": 0x8000, "bf16": 0x8000, "f16x2": 0x80008000, "bf16x2": 0x80008000}.get(data_type(ins))
    if signs is None:
        return elementwise(m, ins, np.negative, 1)
    bits = f"b{WIDTH[data_type(ins)]}"
    sign = DTYPE[bits](signs)
    return unary(m, ins, lambda a: a ^ sign, bits)


def _extreme(m: Machine, ins: Instruction, function: Function, ignoring_nan: Function) -> Operation:
    if is_float(data_type(ins)) and "NaN" not in ins.mods:
        function = ignoring_nan
    if len(ins.args) == 3:
        return elementwise(m, ins, function, 2)
    return elementwise(m, ins, lambda a, b, c: function(function(a, b), c), 3)


def _min(m: Machine, ins: Instruction) -> Operation:
    return _extreme(m, ins, np.minimum, np.fmin)


def _max(m: Machine, ins: Instruction) -> Operation:
    return _extreme(m, ins, np.maximum, np.fmax)


def _in_double(m: Machine, ins: Instruction, function: Function) -> Operation:
    """Correctly rounded for f32 and 16-bit types, as far as the double function is exact enough."""
    _refuse_directed(m, ins)
    if data_type(ins) == "f64":
        return elementwise(m, ins, function, 1)
    return elementwise(m, ins, lambda x: function(x.astype(np.float64)).astype(np.float32), 1)


def _rcp(m: Machine, ins: Instruction) -> Operation:
    return _in_double(m, ins, lambda x: 1.0 / x)


def _sqrt(m: Machine, ins: Instruction) -> Operation:
    return _in_double(m, ins, np.sqrt)


def _rsqrt(m: Machine, ins: Instruction) -> Operation:
    return _in_double(m, ins, lambda x: 1.0 / np.sqrt(x))


def _ex2(m: Machine, ins: Instruction) -> Operation:
    return _in_double(m, ins, np.exp2)


def _lg2(m: Machine, ins: Instruction) -> Operation:
    return _in_double(m, ins, np.log2)


def _sin(m: Machine, ins: Instruction) -> Operation:
    return _in_double(m, ins, np.sin)


def _cos(m: Machine, ins: Instruction) -> Operation:
    return _in_double(m, ins, np.cos)


def _tanh(m: Machine, ins: Instruction) -> Operation:
    return _in_double(m, ins, np.tanh)


def _copysign(m: Machine, ins: Instruction) -> Operation:
    return elementwise(m, ins, lambda sign, magnitude: np.copysign(magnitude, sign), 2)


def _sad(m: Machine, ins: Instruction) -> Operation:
    type_name = data_type(ins)
    (a, b, c), write = readers(m, ins, 3, type_name), target(m, ins, type_name)

    def execute(i: Lanes) -> None:
        x, y = a(i), b(i)
        write(i, c(i) + np.where(x < y, y - x, x - y))

    return execute


def _dp4a(m: Machine, ins: Instruction) -> Operation:
    first, second = (np.int8 if mod == "s32" else np.uint8 for mod in ins.mods if mod in ("s32", "u32"))
    reads, write = readers(m, ins, 3, "b32"), target(m, ins, "b32")

    def execute(i: Lanes) -> None:
        a, b, c = [np.ascontiguousarray(array) for array in np.broadcast_arrays(*[read(i) for read in reads])]
        products = a.view(first).reshape(-1, 4).astype(np.int64) * b.view(second).reshape(-1, 4)
        write(i, ((products.sum(1) + c.view(np.int32)) & 0xFFFFFFFF).astype(UNSIGNED[32]))

    return execute


INSTRUCTIONS = {
    "abs": _abs,
    "add": _add,
    "addc": _addc,
    "copysign": _copysign,
    "cos": _cos,
    "div": _div,
    "dp4a": _dp4a,
    "ex2": _ex2,
    "fma": _fma,
    "lg2": _lg2,
    "mad": _mad,
    "max": _max,
    "min": _min,
    "mul": _mul,
    "neg": _neg,
    "rcp": _rcp,
    "rem": _rem,
    "rsqrt": _rsqrt,
    "sad": _sad,
    "sin": _sin,
    "sqrt": _sqrt,
    "sub": _sub,
    "tanh": _tanh,
}
