"""The specification of the GPU's packed layout and of linear, in numpy: random matrices in a format, their packed
block, the arguments of a kernel, and the float64 result with the error that linear.hpp allows.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import simgpu

BF16 = ml_dtypes.bfloat16
TILES = {
    8: (4, 1, 4, 3),
    16: (4, 1, 4, 3),
    32: (4, 2, 1, 3),
    64: (2, 8, 1, 3),
    128: (1, 8, 1, 3),
}  # rows of x: row blocks, warps, teams, stages
SCALES = ("row", "fp16", "bf16", "fp32", "e8m0", "e4m3")
REALS = {"float16": 0, "bfloat16": 1, "float32": 2}
NF4 = np.float32(
    [
        *(-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1),
    ]
)


@dataclass(frozen=True)
class Element:
    kind: str  # fp int uint nf4
    bits: int
    exponent: int = 0

    @property
    def mantissa(self) -> int:
        return self.bits - 1 - self.exponent

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @staticmethod
    def parse(text: str) -> Element:
        if text == "nf4":
            return Element("nf4", 4)
        if text.startswith("fp"):
            return Element("fp", int(text[2]), int(text[5]))
        return Element(text.rstrip("0123456789"), int(text[-1]))

    def values(self) -> np.ndarray:
        codes = np.arange(2**self.bits)
        if self.kind == "nf4":
            return NF4.astype(float)
        if self.kind == "uint":
            return codes.astype(float)
        if self.kind == "int":
            return np.where(codes >= 2 ** (self.bits - 1), codes - 2**self.bits, codes).astype(float)
        mantissa, exponent = codes & (2**self.mantissa - 1), codes >> self.mantissa & (2**self.exponent - 1)
        magnitude = np.where(
            exponent == 0,
            np.ldexp(mantissa.astype(float), 1 - self.bias - self.mantissa),
            np.ldexp(2.0**self.mantissa + mantissa, exponent - self.bias - self.mantissa),
        )
        if (self.bits, self.exponent) == (8, 4):
            magnitude[codes & 127 == 127] = np.nan
        if (self.bits, self.exponent) == (8, 5):
            magnitude[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
        return np.where(codes >> (self.bits - 1) == 1, -magnitude, magnitude)

    def is_wide(self) -> bool:
        """Whether fp16 cannot hold all values."""
        return self.kind == "fp" and (self.exponent > 5 or (self.exponent == 5 and self.bits != 8))


def decode_scales(stored: np.ndarray, kind: str) -> np.ndarray:
    if kind == "fp16":
        return stored.view(np.float16).astype(float)
    if kind == "bf16":
        return stored.view(BF16).astype(float)
    if kind in ("fp32", "row"):
        return stored.view(np.float32).astype(float)
    if kind == "e8m0":
        return np.exp2(stored.astype(float) - 127)
    return stored.view(ml_dtypes.float8_e4m3fn).astype(float)


def encode_scales(scales: np.ndarray, kind: str) -> np.ndarray:
    """Bits, in unsigned integers of their width."""
    if kind == "fp16":
        return scales.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        return scales.astype(BF16).view(np.uint16)
    if kind in ("fp32", "row"):
        return scales.astype(np.float32).view(np.uint32)
    if kind == "e8m0":
        return np.uint8(np.clip(np.round(np.log2(scales)) + 127, 0, 254))
    return scales.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


@dataclass
class Matrix:
    element: Element
    group: int  # 0: the row
    kind: str  # of the scales
    codes: np.ndarray  # [rows, cols]
    scales: np.ndarray  # stored bits [rows, groups]
    zeros: np.ndarray | None = None
    global_scale: float = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    def scale_values(self) -> np.ndarray:
        """One for each weight."""
        scales = decode_scales(self.scales, self.kind) * float(np.float32(self.global_scale))
        return np.repeat(scales, self.group or self.shape[1], axis=1)[:, : self.shape[1]]

    def weights(self) -> np.ndarray:
        values = self.element.values()[self.codes]
        if self.zeros is not None:
            values = values - np.repeat(self.zeros, self.group or self.shape[1], axis=1)[:, : self.shape[1]]
        return values * self.scale_values()


def random_matrix(
    rng: np.random.Generator, element: str, group: int, kind: str, rows: int, cols: int, scale: float = 0.02
) -> Matrix:
    e = Element.parse(element)
    finite = np.flatnonzero(np.isfinite(e.values()))
    codes = rng.choice(finite, (rows, cols))
    groups = math.ceil(cols / group) if group else 1
    scale *= min(1, 8 / np.abs(e.values()[finite]).max())
    matrix_scale = np.float32(scale / 16) if kind == "e4m3" else np.float32(1)
    scales = encode_scales((16 if kind == "e4m3" else scale) * rng.uniform(0.5, 2, (rows, groups)), kind)
    zeros = rng.integers(0, 2**e.bits, (rows, groups)).astype(np.uint8) if e.kind == "uint" else None
    return Matrix(e, group, kind, codes, scales, zeros, matrix_scale)


# --- the packed block ------------------------------------------------------------------------------------------------


def places(element: Element) -> tuple[np.ndarray, np.ndarray]:
    """Word, and bit in it, of every bit of the 32 codes of a lane: [pair, half, bit]."""
    bits = element.bits
    word, place = np.zeros((16, 2, bits), int), np.zeros((16, 2, bits), int)
    whole, rest = 16 // bits, 16 % bits
    base = 10 - element.mantissa if element.kind == "fp" else 0
    for pair in range(16):
        for bit in range(bits):
            if element.kind == "nf4":
                for half in range(2):
                    word[pair, half, bit], place[pair, half, bit] = pair // 4, 4 * (2 * (pair % 4) + half) + bit
                continue
            if pair < whole * bits:
                at_word, at = pair // whole, pair % whole * bits + bit
            else:
                index, full = pair - whole * bits, bits // rest
                if bit < full * rest:
                    at_word, at = index * full + bit // rest, whole * bits + bit % rest
                else:
                    last = index * (bits % rest)
                    at_word, at = rest * full + last // rest, whole * bits + last % rest + bit - full * rest
            word[pair, :, bit] = at_word
            place[pair, :, bit] = (np.array([0, 16]) + base + at) % 32
    return word, place


def pack_codes(matrix: Matrix) -> np.ndarray:
    e, (rows, cols) = matrix.element, matrix.shape
    tiles, stages = math.ceil(rows / 64), math.ceil(cols / 64)
    codes = np.zeros((tiles * 64, stages * 64), np.uint32)
    codes[:rows, :cols] = matrix.codes
    if e.kind == "int":
        codes ^= np.uint32(1 << (e.bits - 1))
        codes[rows:], codes[:, cols:] = 0, 0
    blocks = codes.reshape(tiles, 4, 16, stages, 4, 16).transpose(0, 3, 1, 2, 4, 5)  # tile stage block row slice col
    words = np.zeros((tiles, stages, 4, 32, e.bits), np.uint32)
    lane = np.arange(32)
    at_word, at_bit = places(e)
    for pair in range(16):
        for half in range(2):
            row, col = lane // 4 + pair % 2 * 8, lane % 4 * 2 + pair // 2 % 2 * 8 + half
            code = blocks[:, :, :, row, pair // 4, col]
            for bit in range(e.bits):
                words[..., at_word[pair, half, bit]] |= (code >> bit & 1) << np.uint32(at_bit[pair, half, bit])
    pieces, first = [], 0
    for size in (4, 4, 2, 1):  # words that a lane reads together
        if first + size <= e.bits:
            pieces.append(words[..., first : first + size].reshape(tiles, stages, 4, -1))
            first += size
    return np.concatenate(pieces, axis=3).view(np.uint8).ravel()


def by_lane(values: np.ndarray) -> np.ndarray:
    """[rows, groups] to [tiles, groups, 64]: rows 16 b + 8 h + g at 8 g + 2 b + h."""
    rows, groups = values.shape
    padded = np.zeros((math.ceil(rows / 64) * 64, groups), values.dtype)
    padded[:rows] = values
    return padded.reshape(-1, 4, 2, 8, groups).transpose(0, 4, 3, 1, 2).reshape(-1, groups, 64)


def pack_records(matrix: Matrix) -> np.ndarray:
    """uint8 [tiles, groups, bytes]: scales, but for those of rows, and zero points."""
    parts = [] if matrix.group == 0 else [by_lane(matrix.scales)]
    if matrix.zeros is not None:
        parts.append(by_lane(matrix.zeros))
    return np.concatenate([part.view(np.uint8) for part in parts], axis=2) if parts else np.zeros(0, np.uint8)


# --- launches --------------------------------------------------------------------------------------------------------


def _fields(**types: type) -> list[tuple[str, type]]:
    return list(types.items())


_U32, _I32, _F32, _PTR, _I64 = ctypes.c_uint32, ctypes.c_int32, ctypes.c_float, ctypes.c_uint64, ctypes.c_int64


class Output(ctypes.Structure):
    _fields_ = _fields(
        y=_PTR, y_stride=_I64, bias=_PTR, residual=_PTR, residual_stride=_I64, row_scales=_PTR, row_specials=_PTR,
        global_scale=_PTR, factor=_F32, y_type=_I32, bias_type=_I32, residual_type=_I32, m=_I32, n=_I32,
    )  # fmt: skip


class Args(ctypes.Structure):
    _fields_ = _fields(
        codes=_PTR, records=_PTR, x=_PTR, x_stride=_I64, partial=_PTR, out=Output, k=_I32, stages=_I32, tiles=_I32,
        quantum=_I32, groups=_I32, group_slices=_I32, record_bytes=_I32, zeros=_I32, x_aligned=_I32, scale=_I32,
        fold=_F32, mask=_U32 * 5, whole=_U32, sign=_U32, sign_factor=_U32, multiplier=_U32, table=_U32 * 8 * 3,
    )  # fmt: skip


class ReduceArgs(ctypes.Structure):
    _fields_ = _fields(partial=_PTR, splits=_I32, out=Output)


def twice(bits: int) -> int:
    return (bits & 0xFFFF) * 0x10001


def constants(e: Element, bf16: bool, args: Args) -> float:
    """Fills in what decoding needs; the power of two that decoded weights lack."""
    if e.kind == "nf4":
        rest, table = NF4.astype(float) * (1 if bf16 else 256), np.zeros((3, 8), np.uint32)
        for term in range(3 if bf16 else 2):
            part = rest.astype(BF16 if bf16 else np.float16)
            rest = rest - part.astype(float)
            halves = part.view(np.uint16)
            table[term] = np.concatenate([np.uint8(halves & 255), np.uint8(halves >> 8)]).view(np.uint32)
        args.table = ctypes.c_uint32.__mul__(8).__mul__(3).from_buffer_copy(table.tobytes())
        return 1 if bf16 else 2.0**-8
    if e.kind != "fp":
        return 2.0**6 if bf16 else 2.0**24
    base, last = (7 if bf16 else 10) - e.mantissa, (7 if bf16 else 10) + e.exponent
    rest, target = 16 % e.bits, 0
    for piece in range(-(-e.bits // rest) if rest else 0):
        width = min(rest, e.bits - target)
        args.mask[piece] = twice(((1 << width) - 1) << target + base)
        target += width
    args.whole, args.sign = twice(((1 << e.bits) - 1) << base), twice(1 << last)
    args.sign_factor = (1 << 15 - last) - 1
    args.multiplier = twice(127 + 127 - e.bias << 7)
    return 1 if bf16 else 2.0 ** (15 - e.bias)


@dataclass
class Result:
    launches: list[simgpu.Launch]
    y: np.ndarray
    code_bytes: int
    record_bytes: int


def run(
    program: simgpu.Program,
    kernel: str,
    matrix: Matrix,
    x: np.ndarray,
    tile: int,
    *,
    splits: int = 1,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    y_type: type | None = None,
    reducer: simgpu.Program | None = None,
    x_skew: int = 0,
    **options: object,
) -> Result:
    e, (n, k), m = matrix.element, matrix.shape, x.shape[0]
    bf16 = x.dtype == BF16 or e.is_wide()
    device = simgpu.Device(64 << 20)
    codes, records = pack_codes(matrix), pack_records(matrix)
    y = device.empty((m, n), y_type or x.dtype)
    elements = np.concatenate([np.zeros(x_skew, x.dtype), x.ravel()])  # x starts x_skew elements behind an alignment
    x_pointer = device.array(elements, readonly=True).ptr + x_skew * x.itemsize
    args = Args(x=x_pointer, x_stride=k, k=k, stages=-(-k // 64), tiles=-(-n // 64))
    args.codes, args.groups = device.array(codes, readonly=True).ptr, matrix.scales.shape[1]
    args.group_slices = matrix.group // 16 or 1 << 28
    args.quantum = math.lcm(4, matrix.group // 16) // 4 if matrix.group else 1
    args.x_aligned, args.scale = int(k % 8 == 0 and x_skew == 0), SCALES.index(matrix.kind) if matrix.group else 0
    args.zeros = -1 if matrix.zeros is None else matrix.scales.itemsize * 64 if matrix.group else 0
    if records.size:
        args.records, args.record_bytes = device.array(records, readonly=True).ptr, records.shape[2]
    factor = constants(e, bf16, args)
    args.fold = factor if matrix.group else 1
    out = Output(y=y.ptr, y_stride=n, factor=1 if matrix.group else factor, m=m, n=n, y_type=REALS[y.dtype.name])
    if not matrix.group:
        row_scales = np.zeros(-(-n // 64) * 64, np.float32)
        row_scales[:n] = decode_scales(matrix.scales, matrix.kind)[:, 0]
        out.row_scales = device.array(row_scales, readonly=True).ptr
    if matrix.kind == "e4m3":
        out.global_scale = device.array(np.float32([matrix.global_scale]), readonly=True).ptr
    if bias is not None:
        out.bias, out.bias_type = device.array(bias, readonly=True).ptr, REALS[bias.dtype.name]
    if residual is not None:
        out.residual, out.residual_stride = device.array(residual, readonly=True).ptr, n
        out.residual_type = REALS[residual.dtype.name]
    args.out = out
    blocks, warps, teams, stages = TILES[tile]
    weight_rows = blocks * warps * 16
    stage = weight_rows * 8 * e.bits + tile * 128 + weight_rows // 64 * 4 * args.record_bytes
    shared = max(teams * stages * stage, teams * tile * (weight_rows + 4) * 4)
    grid = (-(-n // weight_rows), -(-m // tile), splits)
    if splits > 1:
        partial = device.empty((splits, m, n), np.float32)
        args.partial = partial.ptr
    launches = [program.launch(kernel, grid, warps * teams * 32, [bytes(args)], device, shared=shared, **options)]
    if splits > 1:
        reduction = ReduceArgs(partial=partial.ptr, splits=splits, out=out)
        reduce = (reducer or program).launch
        launches.append(reduce("fpx_reduce", (-(-n // 256), m), 256, [bytes(reduction)], device))
    return Result(launches, y.get(), codes.size, records.size)


# --- the specification -----------------------------------------------------------------------------------------------


def errors(
    matrix: Matrix, x: np.ndarray, y: np.ndarray, bias: np.ndarray | None = None, residual: np.ndarray | None = None
) -> np.ndarray:
    """Errors in units of what linear.hpp allows."""
    w, wide, k = matrix.weights(), x.astype(float), x.shape[1]
    offset = 0 if bias is None else bias.astype(float)
    reference = wide @ w.T + offset + (0 if residual is None else residual.astype(float))
    magnitude = np.abs(wide) @ np.abs(w).T
    unit, least = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134), "float32": (2.0**-24, 2.0**-150)}[
        y.dtype.name
    ]
    bound = 2.0**-24 * (16 + k / 16) * magnitude + unit * np.abs(reference) + least + 2.0**-150 * (16 + k / 16)
    bound += 0 if residual is None else 2.0**-24 * np.abs(offset)
    bound += 2.0**-126 * (np.abs(w) + np.abs(matrix.scale_values())).sum(axis=1)
    return np.abs(y.astype(float) - reference) / bound
