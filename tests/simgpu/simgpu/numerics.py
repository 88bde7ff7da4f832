"""Number formats and roundings that numpy lacks, bit for bit: bf16, tf32, fp8, fused multiply-add, directed rounding.

Everything works on whole arrays. 16-bit floats are carried as their codes (uint16). Sums and products of 32-bit floats
are computed in double precision *rounded to odd*, after which one more rounding to 24 bits or fewer is correct (Boldo
and Melquiond, "Emulation of FMA and correctly rounded sums", 2008). No packed or array layouts here.
"""

from __future__ import annotations

import numpy as np

_u16, _u32, _f32, _f64 = np.uint16, np.uint32, np.float32, np.float64

SMALLEST_NORMAL = np.finfo(_f32).tiny


def bf16_to_f32(codes: np.ndarray) -> np.ndarray:
    out: np.ndarray = (codes.astype(_u32) << _u32(16)).view(_f32)
    return out


def f32_to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    bits = np.ascontiguousarray(x, _f32).view(_u32)
    if mode != "rz":  # half a unit, or a little less where the code is even
        bits = bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))
    out: np.ndarray = np.where(np.isnan(x), _u32(0x7FFF), bits >> _u32(16)).astype(_u16)
    return out


def f64_to_bf16(x: np.ndarray) -> np.ndarray:
    return f32_to_bf16(_f64_to_f32_odd(np.asarray(x, _f64)))


def f32_to_f16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Codes of the nearest half, or with rz of the one toward zero."""
    half = x.astype(np.float16)
    codes = np.ascontiguousarray(half).view(_u16)
    if mode != "rz":
        return codes
    too_large = np.abs(half.astype(_f32)) > np.abs(x)
    return np.where(too_large & np.isfinite(x), codes - _u16(1), codes)


def f32_to_tf32(x: np.ndarray) -> np.ndarray:
    """cvt.rna: ties away from zero."""
    bits = np.ascontiguousarray(x, _f32).view(_u32)
    out: np.ndarray = ((bits + _u32(0x1000)) & _u32(0xFFFFE000)).view(_f32)
    return out


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal f32 to zero of the same sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(_f32(0), x), x).astype(_f32)


def _to_odd(bits: np.ndarray, nearest: np.ndarray, error: np.ndarray) -> np.ndarray:
    """The integer codes of `nearest`, moved to the odd neighbour on the side of `error` where it is not exact."""
    inexact_even = (error != 0) & ((bits & 1) == 0) & np.isfinite(nearest)
    outward = np.signbit(error) == np.signbit(nearest)
    return np.where(inexact_even, np.where(outward, bits + 1, bits - 1), bits)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded sum and its exact error (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def fma_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a*b + c in double precision, rounded to odd. pre: a*b is exact in it (at most 26 significant bits each)."""
    total, error = _two_sum(a.astype(_f64) * b.astype(_f64), np.asarray(c, _f64))
    bits = np.ascontiguousarray(total, _f64).view(np.int64)
    return _to_odd(bits, total, np.where(np.isfinite(error), error, 0.0)).view(_f64)


def _f64_to_f32_odd(x: np.ndarray) -> np.ndarray:
    nearest = np.atleast_1d(x.astype(_f32))
    return _to_odd(nearest.view(np.int32), nearest, x - nearest.astype(_f64)).astype(np.int32).view(_f32)


def round_f32(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Double precision to single: to nearest even (rn), toward zero (rz), down (rm) or up (rp)."""
    nearest = x.astype(_f32)
    if mode == "rn":
        return nearest
    wide = nearest.astype(_f64)
    if mode == "rz":
        return np.where(np.abs(wide) > np.abs(x), np.nextafter(nearest, _f32(0)), nearest)
    if mode == "rm":
        return np.where(wide > x, np.nextafter(nearest, _f32(-np.inf)), nearest)
    return np.where(wide < x, np.nextafter(nearest, _f32(np.inf)), nearest)


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str = "rn") -> np.ndarray:
    return round_f32(fma_odd(a, b, c), mode)


def fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Correctly rounded but for subnormal and overflowing intermediate values (Dekker's product)."""

    def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        t = x * 134217729.0
        high = t - (t - x)
        return high, x - high

    product = a * b
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    product_error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total, error = _two_sum(product, c)
    correction = np.where(np.isfinite(product_error), product_error, 0.0) + np.where(np.isfinite(error), error, 0.0)
    return np.where(np.isfinite(total), total + correction, total)


def _fp8_values(exponent_bits: int, mantissa_bits: int, ieee: bool) -> np.ndarray:
    """The value of each code. Without `ieee` the top exponent holds numbers and only the last mantissa is NaN."""
    values = np.zeros(256, _f32)
    bias = (1 << (exponent_bits - 1)) - 1
    top = (1 << exponent_bits) - 1
    for code in range(256):
        exponent = (code >> mantissa_bits) & top
        mantissa = code & ((1 << mantissa_bits) - 1)
        if ieee and exponent == top:
            value = float("nan") if mantissa else float("inf")
        elif not ieee and (code & 0x7F) == 0x7F:
            value = float("nan")
        elif exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        negative = code & 0x80 and not np.isnan(value)  # NaN has one sign
        values[code] = -value if negative else value
    return values


FP8 = {"e4m3": _fp8_values(4, 3, ieee=False), "e5m2": _fp8_values(5, 2, ieee=True)}
_FP8_LARGEST = {"e4m3": 0x7E, "e5m2": 0x7B}


def f32_to_fp8(x: np.ndarray, kind: str) -> np.ndarray:
    """cvt.rn.satfinite: nearest even, saturating; NaN to 0x7f."""
    largest = _FP8_LARGEST[kind]
    values = FP8[kind][: largest + 1].astype(_f64)
    magnitude = np.where(np.isnan(x), 0, np.minimum(np.abs(x.astype(_f64)), values[-1]))
    above = np.clip(np.searchsorted(values, magnitude, "left"), 0, largest)
    below = np.maximum(above - 1, 0)
    to_above, to_below = values[above] - magnitude, magnitude - values[below]
    take_below = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    code = np.where((values[above] == magnitude) | ~take_below, above, below).astype(np.uint8)
    code = np.where(np.isnan(x), np.uint8(0x7F), code)
    out: np.ndarray = (code | (np.signbit(x).astype(np.uint8) << np.uint8(7))).astype(np.uint8)
    return out
