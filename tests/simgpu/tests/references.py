"""References for scalar instructions, in plain Python integers and exact fractions, and inputs to compare on.

A floating-point format is (mantissa bits, exponent bits). None means that the reference says nothing about an input.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np

COUNT = 256
F32, F16, BF16 = (23, 8), (10, 5), (7, 8)

Format = tuple[int, int]
Reference = Callable[[int, int, int], int | None]

# Values at which instructions change their behaviour.
_EDGES = {
    16: [0, 1, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x8000, 0x8001, 0x03FF, 0xFBFF, 0xFFFF],
    32: [
        *(0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF),
        *(0x3F800000, 0x7F800000, 0x7FC00000, 0x00800000, 0x007FFFFF, 0x33800000),
    ],
    64: [0, 1, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 2**64 - 1, 0x3FF0000000000000],
}


def edges_and_noise(width: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    values = _EDGES[width] + [rng.getrandbits(width) for _ in range(COUNT - len(_EDGES[width]))]
    rng.shuffle(values)
    return values


def _f32_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def moderate(width: int, operand: int) -> list[int]:
    """Floats of moderate size, so that sums and products do not all overflow or vanish."""
    rng = random.Random(100 + operand)
    if width == 32:
        return [_f32_bits(rng.choice([-1, 1]) * rng.random() * 2.0 ** rng.randint(-12, 12)) for _ in range(COUNT)]
    values = [rng.choice([-1, 1]) * rng.random() * 2.0 ** rng.randint(-6, 5) for _ in range(COUNT)]
    return [int(np.float16(value).view(np.uint16)) for value in values]


def moderate_bf16(width: int, operand: int) -> list[int]:
    rng = random.Random(300 + operand)
    return [_f32_bits(rng.choice([-1, 1]) * rng.random() * 2.0 ** rng.randint(-8, 8)) >> 16 for _ in range(COUNT)]


def near_ties(width: int, operand: int) -> list[int]:
    """Operands of a fused multiply-add whose result lies next to a rounding tie."""
    rng = random.Random(200 + operand)
    if operand == 2:
        return [(0x3F800000 + 2**23 * 12) | 1] * COUNT
    return [0x3F800000 | rng.getrandbits(23) | 1 for _ in range(COUNT)]


def signed(x: int, width: int = 32) -> int:
    return x - (1 << width) if x >> (width - 1) else x


def lop3(table: int) -> Reference:
    def reference(a: int, b: int, c: int) -> int:
        bits = (table >> (((a >> k) & 1) << 2 | ((b >> k) & 1) << 1 | ((c >> k) & 1)) & 1 for k in range(32))
        return sum(bit << k for k, bit in enumerate(bits))

    return reference


def prmt(a: int, b: int, c: int, mode: str | None = None) -> int:
    source = [(a | b << 32) >> (8 * k) & 255 for k in range(8)]
    q = c & 3
    selectors = {
        None: [c >> (4 * k) & 15 for k in range(4)],
        "f4e": [q, q + 1, q + 2, q + 3],
        "b4e": [(q - k) & 7 for k in range(4)],
        "rc8": [q] * 4,
        "ecl": [max(0, q), max(1, q), max(2, q), 3],
        "ecr": [0, min(1, q), min(2, q), min(3, q)],
        "rc16": [0, 1, 0, 1] if q % 2 == 0 else [2, 3, 2, 3],
    }[mode]
    out = 0
    for k, selector in enumerate(selectors):
        byte = source[selector & 7]
        if selector & 8:  # the byte's sign in every bit
            byte = 255 if byte & 128 else 0
        out |= byte << (8 * k)
    return out


def bfe_signed(a: int, b: int, c: int) -> int:
    start, length = b & 255, c & 255
    sign = 0 if length == 0 else (a >> min(start + length - 1, 31)) & 1
    return sum(((a >> (start + k)) & 1 if k < length and start + k <= 31 else sign) << k for k in range(32))


def bfi(a: int, b: int, start: int, length: int) -> int:
    out = b
    for k in range(length & 255):
        at = (start & 255) + k
        if at > 31:
            break
        out = out & ~(1 << at) | ((a >> k) & 1) << at
    return out


def value(bits: int, fmt: Format) -> Fraction | None:
    """The number that a code stands for; None for infinities and NaN."""
    mantissa_bits, exponent_bits = fmt
    exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = Fraction(bits & ((1 << mantissa_bits) - 1), 1 << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == (1 << exponent_bits) - 1:
        return None
    if exponent == 0:
        magnitude = mantissa * Fraction(2) ** (1 - bias)
    else:
        magnitude = (1 + mantissa) * Fraction(2) ** (exponent - bias)
    return -magnitude if bits >> (mantissa_bits + exponent_bits) else magnitude


def rounded(x: Fraction, fmt: Format, mode: str = "rn", negative_zero: bool = False) -> int:
    """The code of the nearest value, ties to even; or toward zero (rz), down (rm), up (rp)."""
    mantissa_bits, exponent_bits = fmt
    bias = (1 << (exponent_bits - 1)) - 1
    negative = x < 0 or (x == 0 and negative_zero)
    sign = negative << (mantissa_bits + exponent_bits)
    magnitude = abs(x)
    if magnitude == 0:
        return sign
    start = math.floor(math.log2(float(magnitude))) if magnitude > Fraction(1, 2**1000) else -1000
    exponent = max(start, 1 - bias)
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > 1 - bias and magnitude < Fraction(2) ** exponent:
        exponent -= 1
    scaled = magnitude / Fraction(2) ** (exponent - mantissa_bits)
    integer = scaled.numerator // scaled.denominator
    rest = scaled - integer
    half = Fraction(1, 2)
    away = {"rz": False, "rm": negative and rest > 0, "rp": not negative and rest > 0}
    integer += away.get(mode, rest > half or (rest == half and integer % 2 == 1))
    subnormal = integer < (1 << mantissa_bits) and exponent == 1 - bias
    bits = integer if subnormal else integer + ((exponent + bias - 1) << mantissa_bits)
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits
    if bits >= infinity:
        bits = infinity if mode == "rn" or away[mode] else infinity - 1
    return bits | sign


def binary(fmt: Format, function: Callable[[Fraction, Fraction], Fraction], mode: str = "rn") -> Reference:
    def reference(a: int, b: int, c: int) -> int | None:
        x, y = value(a, fmt), value(b, fmt)
        if x is None or y is None or function(x, y) == 0:
            return None
        return rounded(function(x, y), fmt, mode)

    return reference


def fma(fmt: Format, mode: str = "rn") -> Reference:
    def reference(a: int, b: int, c: int) -> int | None:
        x, y, z = value(a, fmt), value(b, fmt), value(c, fmt)
        if x is None or y is None or z is None or x * y + z == 0:
            return None
        return rounded(x * y + z, fmt, mode)

    return reference


def convert(source: Format, target: Format) -> Reference:
    def reference(a: int, b: int, c: int) -> int | None:
        x = value(a, source)
        return None if x is None else rounded(x, target, negative_zero=bool(a >> sum(source)))

    return reference
