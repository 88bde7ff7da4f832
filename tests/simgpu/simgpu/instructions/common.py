"""Decoding helpers that several instructions share: element-wise functions of registers, and 16-bit float operands."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import numerics
from ..machine import Machine
from ..ptx import WIDTH, Instruction, Operand, data_type, items
from ..steps import Lanes, Operation, Reader, Writer

Function = Callable[..., np.ndarray]

FLOAT16 = ("f16", "bf16", "f16x2", "bf16x2")
REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def is_float(type_name: str) -> bool:
    return type_name.startswith(("f", "bf"))


def readers(m: Machine, ins: Instruction, count: int, type_name: str) -> list[Reader]:
    """Of the sources of an instruction whose first operand is its target."""
    return [m.read(arg, type_name) for arg in ins.args[1 : 1 + count]]


def fragment(m: Machine, operand: Operand) -> list[Reader]:
    return [m.read(item, "b32") for item in items(operand)]


def target(m: Machine, ins: Instruction, type_name: str) -> Writer:
    return m.write(ins.args[0], type_name)


def unary(m: Machine, ins: Instruction, function: Function, type_name: str) -> Operation:
    a, write = m.read(ins.args[1], type_name), target(m, ins, type_name)
    return lambda i: write(i, function(a(i)))


def binary(m: Machine, ins: Instruction, function: Function, type_name: str) -> Operation:
    (a, b), write = readers(m, ins, 2, type_name), target(m, ins, type_name)
    return lambda i: write(i, function(a(i), b(i)))


def float16_codec(type_name: str) -> tuple[Function, Function]:
    """Codes (uint16) to float32 and back."""
    if type_name.startswith("bf16"):
        return numerics.bf16_to_f32, numerics.f32_to_bf16
    return lambda codes: codes.view(np.float16).astype(np.float32), numerics.f32_to_f16


def read_float(m: Machine, operand: Operand, type_name: str) -> Reader:
    """Values that numpy can compute with: bf16 becomes float32."""
    read = m.read(operand, type_name)
    if type_name != "bf16":
        return read
    return lambda i: numerics.bf16_to_f32(np.ascontiguousarray(read(i)))


def clamp_unit(x: np.ndarray) -> np.ndarray:
    """.sat: into [0, 1], NaN to 0."""
    one = x.dtype.type(1)
    return np.clip(np.where(np.isnan(x), one - one, x), one - one, one)


def elementwise(m: Machine, ins: Instruction, function: Function, sources: int) -> Operation:
    """An arithmetic instruction of any type. 16-bit floats are computed in float32 and rounded once."""
    type_name = data_type(ins)
    if type_name in FLOAT16:
        _, encode = float16_codec(type_name)
        return float16_elementwise(m, ins, function, encode, sources)
    reads, write = readers(m, ins, sources, type_name), target(m, ins, type_name)
    if type_name == "f32" and ("ftz" in ins.mods or "sat" in ins.mods):
        flush, saturate = "ftz" in ins.mods, "sat" in ins.mods

        def execute(i: Lanes) -> None:
            values = [read(i) for read in reads]
            result = function(*map(numerics.flush, values) if flush else values)
            if saturate:
                result = clamp_unit(result)
            write(i, numerics.flush(result) if flush else result)

        return execute
    if sources == 2:
        a, b = reads
        return lambda i: write(i, function(a(i), b(i)))
    return lambda i: write(i, function(*[read(i) for read in reads]))


def float16_elementwise(m: Machine, ins: Instruction, function: Function, encode: Function, sources: int) -> Operation:
    """The function gets float32 values, of both halves for packed types; `encode` rounds its result."""
    type_name = data_type(ins)
    decode, _ = float16_codec(type_name)
    packed = type_name.endswith("x2")
    bits = f"b{WIDTH[type_name]}"
    reads, write = readers(m, ins, sources, bits), target(m, ins, bits)
    saturate, relu = "sat" in ins.mods, "relu" in ins.mods

    def execute(i: Lanes) -> None:
        codes = [np.ascontiguousarray(array) for array in np.broadcast_arrays(*[read(i) for read in reads])]
        if packed:
            codes = [array.view(np.uint16) for array in codes]
        result = function(*map(decode, codes))
        if saturate:
            result = clamp_unit(result)
        if relu:
            result = np.maximum(np.nan_to_num(result, nan=0.0), 0)
        result = encode(result)
        write(i, result.view(np.uint32) if packed else result)

    return execute
