"""cvt: conversions between number formats.

Rounding down or up (rm, rp) is supported to integers only, toward zero (rz) also to 16-bit floats; the rest is refused
when the kernel is decoded, never rounded to nearest instead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import numerics
from ..machine import DTYPE, Machine
from ..ptx import WIDTH, Instruction, types
from ..steps import Lanes, Operation
from .common import Function, clamp_unit, read_float, target

_FP8_PAIRS = ("e4m3x2", "e5m2x2")
_ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOATS = ("f16", "bf16", "f32", "f64")


def _cvt(m: Machine, ins: Instruction) -> Operation:
    if ins.mods[0] == "pack":
        return _pack(m, ins)
    result, source = [mod for mod in ins.mods if mod in WIDTH or mod in _FP8_PAIRS]
    if result in ("f16x2", "bf16x2") and source == "f32":
        return _to_float16_pair(m, ins, result)
    if result in _FP8_PAIRS:
        return _to_fp8_pair(m, ins, result[:4], source)
    if source in _FP8_PAIRS:
        return _from_fp8_pair(m, ins, source[:4])
    if result == "tf32":
        a, write = m.read(ins.args[1], "f32"), target(m, ins, "b32")
        return lambda i: write(i, numerics.f32_to_tf32(a(i)).view(np.uint32))
    if source in _FLOATS:
        return _float_to_float(m, ins, result, source) if result in _FLOATS else _to_integer(m, ins, result, source)
    if result in _FLOATS:
        return _integer_to_float(m, ins, result, source)
    return _integer_to_integer(m, ins, result, source)


def _rounding(ins: Instruction) -> str:
    return next((mod for mod in ins.mods if mod in _ROUNDINGS), "")


def _read_two(m: Machine, ins: Instruction) -> Callable[[Lanes], list[np.ndarray]]:
    """Both sources of a packing conversion, the upper one first."""
    a, b = (m.read(arg, "f32") for arg in ins.args[1:3])
    relu = "relu" in ins.mods

    def read(i: Lanes) -> list[np.ndarray]:
        values = [np.ascontiguousarray(array) for array in np.broadcast_arrays(a(i), b(i))]
        return [np.fmax(array, np.float32(0)) for array in values] if relu else values

    return read


def _to_float16_pair(m: Machine, ins: Instruction, result: str) -> Operation:
    read, write = _read_two(m, ins), target(m, ins, "b32")
    encode = numerics.f32_to_bf16 if result == "bf16x2" else numerics.f32_to_f16
    mode = "rz" if _rounding(ins) == "rz" else "rn"

    def execute(i: Lanes) -> None:
        upper, lower = (encode(array, mode).astype(np.uint32) for array in read(i))
        write(i, (upper << np.uint32(16)) | lower)

    return execute


def _to_fp8_pair(m: Machine, ins: Instruction, kind: str, source: str) -> Operation:
    write = target(m, ins, "b16")
    if source == "f32":
        read = _read_two(m, ins)

        def execute(i: Lanes) -> None:
            upper, lower = (numerics.f32_to_fp8(array, kind).astype(np.uint16) for array in read(i))
            write(i, (upper << np.uint16(8)) | lower)

        return execute
    a = m.read(ins.args[1], "b32")

    def execute_packed(i: Lanes) -> None:
        halves = np.ascontiguousarray(a(i)).view(np.float16).astype(np.float32)
        write(i, numerics.f32_to_fp8(halves, kind).view(np.uint16))

    return execute_packed


def _from_fp8_pair(m: Machine, ins: Instruction, kind: str) -> Operation:
    halves = numerics.FP8[kind].astype(np.float16).view(np.uint16)
    a, write = m.read(ins.args[1], "b16"), target(m, ins, "b32")
    return lambda i: write(i, halves[np.ascontiguousarray(a(i)).view(np.uint8)].view(np.uint32))


def _float_to_float(m: Machine, ins: Instruction, result: str, source: str) -> Operation:
    a, write = read_float(m, ins.args[1], source), target(m, ins, result)
    mode = _rounding(ins)
    to_integer = _TO_INTEGER.get(mode)
    flush = "ftz" in ins.mods
    saturate, relu = "sat" in ins.mods or "satfinite" in ins.mods, "relu" in ins.mods
    encode = _float_encoder(m, ins, result, source, mode)

    def execute(i: Lanes) -> None:
        x = a(i)
        if x.dtype == np.float16:
            x = x.astype(np.float32)
        if flush and x.dtype == np.float32:
            x = numerics.flush(x)
        if to_integer:
            x = to_integer(x)
        if saturate:
            x = clamp_unit(x)
        if relu:
            x = np.fmax(x, x.dtype.type(0))
        x = encode(x)
        write(i, numerics.flush(x) if flush and result == "f32" else x)

    return execute


def _float_encoder(m: Machine, ins: Instruction, result: str, source: str, mode: str) -> Function:
    toward_zero = mode == "rz"
    if result == "bf16" and source == "f64":
        return numerics.f64_to_bf16
    if result == "bf16":
        return lambda x: numerics.f32_to_bf16(x, "rz" if toward_zero else "rn")
    if result == "f16" and toward_zero:
        return lambda x: numerics.f32_to_f16(x, "rz").view(np.float16)
    if mode in ("rm", "rp") or (toward_zero and WIDTH[result] < WIDTH[source]):
        raise m.unsupported(ins, f"rounding {mode} to {result}")
    dtype = DTYPE[result]
    return lambda x: x.astype(dtype)


def _to_integer(m: Machine, ins: Instruction, result: str, source: str) -> Operation:
    """Saturates; NaN becomes 0."""
    a, write = read_float(m, ins.args[1], source), target(m, ins, result)
    rounded = _TO_INTEGER.get(_rounding(ins), np.trunc)
    dtype = DTYPE[result]
    info = np.iinfo(dtype)
    # The largest integers of 64 bits have no double: compared as doubles, converted only where they are inside.
    least, most = float(info.min), float(info.max)

    def execute(i: Lanes) -> None:
        x = rounded(a(i).astype(np.float64))
        x = np.where(np.isnan(x), 0.0, x)
        inside = (x < most) & (x > least)
        outside = np.where(x >= most, dtype(info.max), dtype(info.min))
        write(i, np.where(inside, np.where(inside, x, 0).astype(dtype), outside))

    return execute


def _integer_to_float(m: Machine, ins: Instruction, result: str, source: str) -> Operation:
    a, write = m.read(ins.args[1], source), target(m, ins, result)
    if result == "bf16":
        return lambda i: write(i, numerics.f64_to_bf16(a(i).astype(np.float64)))
    if result == "f16":
        return lambda i: write(i, a(i).astype(np.float64).astype(np.float16))
    dtype = DTYPE[result]
    return lambda i: write(i, a(i).astype(dtype))


def _integer_to_integer(m: Machine, ins: Instruction, result: str, source: str) -> Operation:
    a, write = m.read(ins.args[1], source), target(m, ins, result)
    dtype, source_dtype = DTYPE[result], DTYPE[source]
    if "sat" not in ins.mods:
        return lambda i: write(i, a(i).astype(dtype))
    have, want = np.iinfo(source_dtype), np.iinfo(dtype)
    least, most = source_dtype(max(have.min, want.min)), source_dtype(min(have.max, want.max))
    return lambda i: write(i, np.clip(a(i), least, most).astype(dtype))


def _pack(m: Machine, ins: Instruction) -> Operation:
    """cvt.pack.sat: two saturated integers in the low bits of the result, above them the low bits of a third."""
    result, source = types(ins)[:2]
    info, width = np.iinfo(DTYPE[result]), WIDTH[result]
    a, b = (m.read(arg, source) for arg in ins.args[1:3])
    rest = m.read(ins.args[3], "b32") if len(ins.args) > 3 else None
    write = target(m, ins, "b32")
    mask = np.uint32((1 << width) - 1)

    def saturated(values: np.ndarray) -> np.ndarray:
        out: np.ndarray = np.clip(values.astype(np.int64), info.min, info.max).astype(np.uint32) & mask
        return out

    def execute(i: Lanes) -> None:
        packed = (saturated(a(i)) << np.uint32(width)) | saturated(b(i))
        if rest is not None:
            packed = packed | (rest(i) << np.uint32(2 * width))
        write(i, packed)

    return execute


INSTRUCTIONS = {"cvt": _cvt}
