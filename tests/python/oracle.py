"""The formats once more, from their definitions, in exact rational arithmetic: slow, and sharing no code with the core.

Numbers are Fractions, so nothing here rounds but `round_float`. Shared by test_format.py and test_codec.py.
"""

from __future__ import annotations

import bisect
import functools
import math
import re
from fractions import Fraction

import numpy as np

ELEMENTS = [
    *(f"fp{bits}_e{x}m{bits - 1 - x}" for bits in range(3, 9) for x in range(1, bits)),
    *(f"int{bits}" for bits in range(2, 9)),
    *(f"uint{bits}" for bits in range(2, 9)),
    "nf4",
]
SCALES = ["fp32", "fp16", "bf16", "e8m0", "e4m3"]

# Dettmers et al. 2023, appendix E, as the floats that they are.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def bits_of(element: str) -> int:
    return 4 if element == "nf4" else int(re.findall(r"\d+", element)[0])


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


@functools.cache
def values(element: str) -> list[float]:
    """The value of every code, as floats (exact: all fit), with NaN, infinities and signed zeros."""
    if element == "nf4":
        return [float(np.float32(value)) for value in NF4]
    bits = bits_of(element)
    if element.startswith("uint"):
        return [float(code) for code in range(2**bits)]
    if element.startswith("int"):
        return [float(code if code < 2 ** (bits - 1) else code - 2**bits) for code in range(2**bits)]
    x, y = map(int, re.findall(r"\d+", element)[1:])
    bias = 2 ** (x - 1) - 1
    positive = []
    for code in range(2 ** (bits - 1)):
        exponent, mantissa = divmod(code, 2**y)
        if element == "fp8_e5m2" and exponent == 31:
            positive.append(math.inf if mantissa == 0 else math.nan)
        elif element == "fp8_e4m3" and code == 127:
            positive.append(math.nan)
        elif exponent == 0:
            positive.append(float(Fraction(mantissa, 2**y) * power(1 - bias)))
        else:
            positive.append(float((1 + Fraction(mantissa, 2**y)) * power(exponent - bias)))
    return positive + [-value for value in positive]


@functools.cache
def largest(element: str) -> Fraction:
    """What amax maps to."""
    if element.startswith("int"):
        return Fraction(2 ** (bits_of(element) - 1) - 1)
    return max(Fraction(value) for value in values(element) if math.isfinite(value))


def round_float(x: Fraction, mantissa_bits: int, least_exponent: int, most: Fraction) -> Fraction:
    """x to the nearest number with `mantissa_bits` stored bits, ties to even, subnormal below 2**least_exponent,
    saturating at `most`."""
    if x == 0:
        return x
    magnitude = abs(x)
    exponent = max(math.frexp(float(magnitude))[1] - 1 if magnitude >= power(-1000) else -1000, least_exponent)
    while power(exponent) > magnitude and exponent > least_exponent:
        exponent -= 1
    unit = power(exponent - mantissa_bits)
    rounded = min(round(magnitude / unit) * unit, most)  # round() of a Fraction is to even
    return rounded if x > 0 else -rounded


def f32(x: Fraction) -> Fraction:
    return round_float(x, 23, -126, power(128))


_FLOAT_SCALES = {
    "fp32": (23, -126, (2 - power(-23)) * power(127)),
    "fp16": (10, -14, Fraction(65504)),
    "bf16": (7, -126, (2 - power(-7)) * power(127)),
    "e4m3": (3, -6, Fraction(448)),
}


def log2_floor(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if power(exponent) <= x else exponent - 1


def scale_of(kind: str, element: str, width: Fraction, global_scale: Fraction, ceil: bool = False) -> Fraction:
    """The stored scale for a group whose amax (uintN: hi - lo) is `width`."""
    most = largest(element)
    if kind != "e8m0":
        return round_float(width / (most * global_scale), *_FLOAT_SCALES[kind]) if width and global_scale else width * 0
    if width == 0:
        return power(-127)
    exponent = -log2_floor(most / width) if ceil else log2_floor(width) - log2_floor(most)
    return power(min(max(exponent, -127), 127))


@functools.cache
def exact_values(element: str) -> list[Fraction]:
    """The values of the codes among which code_of chooses, ascending: the magnitudes of fp elements."""
    table = values(element)
    codes = table if element == "nf4" else table[: len(table) // 2]
    return [Fraction(value) for value in codes if math.isfinite(value)]


def code_of(element: str, quotient: Fraction, negative: bool, zero: int = 0, full_range: bool = False) -> int:
    """The code nearest to the quotient, a tie to the even code; `negative` gives the sign of zeros."""
    bits = bits_of(element)
    if element.startswith("uint"):
        return min(max(round(quotient) + zero, 0), 2**bits - 1)
    if element.startswith("int"):
        most = 2 ** (bits - 1) - 1
        return min(max(round(quotient), -most - full_range), most) % 2**bits
    table = exact_values(element)
    target = quotient if element == "nf4" else abs(quotient)
    above = min(max(bisect.bisect_left(table, target), 1), len(table) - 1)
    below = above - 1
    to_above, to_below = abs(table[above] - target), abs(target - table[below])
    # With no mantissa bits all significands are odd, and IEEE 754 sends ties between them to the larger magnitude.
    tie_goes_up = above % 2 == 0 or (element.endswith("m0") and below > 0)
    code = above if to_above < to_below or (to_above == to_below and tie_goes_up) else below
    return code + (2 ** (bits - 1) if negative and element != "nf4" else 0)


def unpack(codes: np.ndarray, bits: int, cols: int) -> np.ndarray:
    """u8 [rows, row_bytes] to one code an entry, [rows, cols]: each row is one little-endian number."""
    numbers = [int.from_bytes(row.tobytes(), "little") for row in codes]
    return np.array([[number >> (bits * i) & (2**bits - 1) for i in range(cols)] for number in numbers], dtype=np.int64)


def quantize(
    w: np.ndarray, element: str, group: int, scale: str, *, full_range: bool = False, e8m0_ceil: bool = False
) -> tuple[np.ndarray, list[list[Fraction]], list[list[int]], Fraction]:
    """Codes [rows, cols], stored scales and zeros [rows][groups], global scale, of w [rows, cols] (float32)."""
    rows, cols = w.shape
    group = group or max(cols, 1)
    exact = [[Fraction(float(value)) for value in row] for row in w]
    unsigned = element.startswith("uint")

    def width(part: list[Fraction]) -> Fraction:
        low, high = min(part, default=Fraction(0)), max(part, default=Fraction(0))
        return max(high, Fraction(0)) - min(low, Fraction(0)) if unsigned else max(abs(low), abs(high))

    global_scale = Fraction(1)
    if scale == "e4m3":
        global_scale = f32(width([value for row in exact for value in row]) / (largest(element) * 448))
    codes = np.zeros((rows, cols), dtype=np.int64)
    scales: list[list[Fraction]] = [[] for _ in range(rows)]
    zeros: list[list[int]] = [[] for _ in range(rows)]
    for r, row in enumerate(exact):
        for begin in range(0, cols, group):
            part = row[begin : begin + group]
            stored = scale_of(scale, element, width(part), global_scale, e8m0_ceil)
            step = f32(stored * global_scale)
            empty = step == 0 or width(part) == 0
            zero = 0
            if unsigned and step:
                zero = min(round(f32(-min(*part, Fraction(0)) / step)), 2 ** bits_of(element) - 1)
            scales[r].append(stored if step else stored * 0)
            zeros[r].append(zero)
            for c, value in enumerate(part, begin):
                if not empty:
                    codes[r, c] = code_of(element, f32(value / step), bool(np.signbit(w[r, c])), zero, full_range)
    return codes, scales, zeros, global_scale


def philox(counter: int, key: int) -> list[int]:
    """Philox-4x32-10 of Salmon et al. 2011."""
    mask = 2**32 - 1
    c = [counter & mask, counter >> 32, 0, 0]
    k = [key & mask, key >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c
