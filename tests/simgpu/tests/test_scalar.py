"""Scalar instructions against references written in plain Python integers and exact fractions.

Each case is a few instructions on raw bits, run for many inputs at once. Where ptxas is installed it must accept the
PTX, so that no test passes on text that is not PTX.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import references as ref
import simgpu
from references import BF16, F16, F32, signed

ALL_ONES = 0xFFFFFFFF

_KERNEL = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd)
{{
  .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %l<9>; .reg .b64 %rd<9>; .reg .pred %p<4>;
  mov.u32 %r0, %tid.x;
  ld.param.u64 %rd1, [pa]; ld.param.u64 %rd2, [pb]; ld.param.u64 %rd3, [pc]; ld.param.u64 %rd4, [pd];
  mad.wide.u32 %rd1, %r0, {bytes[0]}, %rd1; ld.global.b{bits[0]} {a}, [%rd1];
  mad.wide.u32 %rd2, %r0, {bytes[1]}, %rd2; ld.global.b{bits[1]} {b}, [%rd2];
  mad.wide.u32 %rd3, %r0, {bytes[2]}, %rd3; ld.global.b{bits[2]} {c}, [%rd3];
  {body}
  mad.wide.u32 %rd4, %r0, {bytes[3]}, %rd4; st.global.b{bits[3]} [%rd4], {d};
  ret;
}}
"""


def kernel(body: str, bits: tuple[int, int, int, int]) -> str:
    """d[i] = body(a[i], b[i], c[i]) on raw bits of the given widths."""
    prefix = {16: "%h", 32: "%r", 64: "%l"}
    names = {name: f"{prefix[width]}{k}" for k, (name, width) in enumerate(zip("abcd", bits, strict=True), 1)}
    return _KERNEL.format(body=body.format(**names), bits=bits, bytes=[width // 8 for width in bits], **names)


@cache
def complaint(text: str) -> str:
    """What ptxas has against a PTX text; nothing where it is not installed."""
    if shutil.which("ptxas") is None:
        return ""
    command = ["ptxas", "-arch=sm_80", "-o", "/dev/null", "-"]
    return subprocess.run(command, input=text, text=True, capture_output=True).stderr


def check(
    body: str,
    reference: ref.Reference,
    bits: tuple[int, int, int, int] = (32, 32, 32, 32),
    inputs: Callable[[int, int], list[int]] = ref.edges_and_noise,
    assemble: bool = True,
) -> None:
    text = kernel(body, bits)
    assert not assemble or complaint(text) == ""
    device = simgpu.Device(1 << 20)
    values = [inputs(width, k) for k, width in enumerate(bits[:3])]
    buffers = [device.array(np.array(v, f"u{width // 8}")) for v, width in zip(values, bits, strict=False)]
    out = device.empty(ref.COUNT, f"u{bits[3] // 8}")
    simgpu.Program(text).launch("k", 1, ref.COUNT, [*buffers, out], device)
    for operands, got in zip(zip(*values, strict=True), out.get().tolist(), strict=True):
        expected = reference(*operands)
        if expected is not None:
            expected &= 2 ** bits[3] - 1
            assert got == expected, f"{body} of {[hex(x) for x in operands]}: {got:#x}, not {expected:#x}"


def small_and_large(width: int, operand: int) -> list[int]:
    """Many operands below 40, for shifts and fields."""
    return [v if k % 3 else v % 40 for k, v in enumerate(ref.edges_and_noise(width, 10 + operand))]


@pytest.mark.parametrize("table", [*range(0, 256, 7), 0xC0, 0xEA, 0xFE, 0x96, 0xF8, 0x80, 0xCA, 0xE8, 0x6A, 0xFF])
def test_lop3(table: int) -> None:
    # That one table is legal PTX shows it for all.
    check(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", ref.lop3(table), assemble=table == 0)


@pytest.mark.parametrize("mode", [None, "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"])
def test_prmt(mode: str | None) -> None:
    suffix = f".{mode}" if mode else ""
    check(f"prmt.b32{suffix} {{d}}, {{a}}, {{b}}, {{c}};", lambda a, b, c: ref.prmt(a, b, c, mode))


def clamp8(x: int) -> int:
    return max(-128, min(127, x))


def quotient(a: int, b: int, c: int) -> int | None:
    x, y = signed(a), signed(b)
    if y == 0 or (a == 0x80000000 and b == ALL_ONES):
        return None
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def dp4a(a: int, b: int, c: int) -> int:
    return c + sum(signed(a >> 8 * k & 255, 8) * signed(b >> 8 * k & 255, 8) for k in range(4))


INTEGER = {
    "add.s32 {d}, {a}, {b};": lambda a, b, c: a + b,
    "sub.s32 {d}, {a}, {b};": lambda a, b, c: a - b,
    "mul.lo.s32 {d}, {a}, {b};": lambda a, b, c: a * b,
    "mul.hi.u32 {d}, {a}, {b};": lambda a, b, c: (a * b) >> 32,
    "mul.hi.s32 {d}, {a}, {b};": lambda a, b, c: (signed(a) * signed(b)) >> 32,
    "mad.lo.s32 {d}, {a}, {b}, {c};": lambda a, b, c: a * b + c,
    "mad.hi.u32 {d}, {a}, {b}, {c};": lambda a, b, c: ((a * b) >> 32) + c,
    "min.s32 {d}, {a}, {b};": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 {d}, {a}, {b};": lambda a, b, c: max(a, b),
    "div.s32 {d}, {a}, {b};": quotient,
    "div.u32 {d}, {a}, {b};": lambda a, b, c: None if b == 0 else a // b,
    "rem.u32 {d}, {a}, {b};": lambda a, b, c: None if b == 0 else a % b,
    "rem.s32 {d}, {a}, {b};": lambda a, b, c: None if b in (0, ALL_ONES) else int(math.fmod(signed(a), signed(b))),
    "shl.b32 {d}, {a}, {b};": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 {d}, {a}, {b};": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32 {d}, {a}, {b};": lambda a, b, c: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 {d}, {a}, {b}, {c};": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.wrap.b32 {d}, {a}, {b}, {c};": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.l.clamp.b32 {d}, {a}, {b}, {c};": lambda a, b, c: ((b << 32 | a) << min(c, 32)) >> 32,
    "shf.r.clamp.b32 {d}, {a}, {b}, {c};": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32 {d}, {a}, {b}, {c};": lambda a, b, c: (a >> min(b & 255, 40)) & ((1 << (c & 255)) - 1),
    "bfe.s32 {d}, {a}, {b}, {c};": ref.bfe_signed,
    "bfi.b32 {d}, {a}, {b}, 5, 7;": lambda a, b, c: ref.bfi(a, b, 5, 7),
    "bfi.b32 {d}, {a}, {b}, {c}, 11;": lambda a, b, c: ref.bfi(a, b, c, 11),
    "popc.b32 {d}, {a};": lambda a, b, c: a.bit_count(),
    "clz.b32 {d}, {a};": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 {d}, {a};": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 {d}, {a};": lambda a, b, c: a.bit_length() - 1,
    "bfind.s32 {d}, {a};": lambda a, b, c: (a if signed(a) >= 0 else ~a & ALL_ONES).bit_length() - 1,
    "not.b32 {d}, {a};": lambda a, b, c: ~a,
    "abs.s32 {d}, {a};": lambda a, b, c: abs(signed(a)),
    "neg.s32 {d}, {a};": lambda a, b, c: -a,
    "sad.u32 {d}, {a}, {b}, {c};": lambda a, b, c: c + abs(a - b),
    "dp4a.s32.s32 {d}, {a}, {b}, {c};": dp4a,
    "setp.lt.s32 %p1, {a}, {b}; selp.b32 {d}, {c}, 7, %p1;": lambda a, b, c: c if signed(a) < signed(b) else 7,
    "setp.hi.u32 %p1, {a}, {b}; setp.ne.and.b32 %p2|%p3, {c}, 0, %p1; selp.b32 {d}, 1, 2, %p2; @%p3 mov.u32 {d}, 3;": (
        lambda a, b, c: (3 if c == 0 else 1) if a > b else 2
    ),
    "cvt.sat.s8.s32 %r5, {a}; mov.u32 {d}, %r5;": lambda a, b, c: clamp8(signed(a)),
    "cvt.pack.sat.s8.s32.b32 {d}, {a}, {b}, {c};": (
        lambda a, b, c: (c & 0xFFFF) << 16 | (clamp8(signed(a)) & 255) << 8 | (clamp8(signed(b)) & 255)
    ),
}


@pytest.mark.parametrize("body", INTEGER, ids=lambda body: body.split(";")[0])
def test_integer(body: str) -> None:
    check(body, INTEGER[body])
    check(body, INTEGER[body], inputs=small_and_large)


def test_wide() -> None:
    def short_shifts(width: int, operand: int) -> list[int]:
        return [x % 70 if width == 32 else x for x in ref.edges_and_noise(width, operand)]

    check("mul.wide.s32 {d}, {a}, {b};", lambda a, b, c: signed(a) * signed(b), (32, 32, 32, 64))
    check("mad.wide.u32 {d}, {a}, {b}, {c};", lambda a, b, c: a * b + c, (32, 32, 64, 64))
    check("mul.hi.u64 {d}, {a}, {b};", lambda a, b, c: (a * b) >> 64, (64, 64, 32, 64))
    check("mul.hi.s64 {d}, {a}, {b};", lambda a, b, c: (signed(a, 64) * signed(b, 64)) >> 64, (64, 64, 32, 64))
    check("shl.b64 {d}, {a}, {b};", lambda a, b, c: a << b if b < 64 else 0, (64, 32, 32, 64), short_shifts)
    check("cvt.s64.s32 {d}, {a};", lambda a, b, c: signed(a), (32, 32, 32, 64))
    check("cvt.u64.u32 {d}, {a};", lambda a, b, c: a, (32, 32, 32, 64))
    check("cvt.s32.s16 {d}, {a};", lambda a, b, c: signed(a, 16), (16, 32, 32, 32))


@pytest.mark.parametrize("inputs", [ref.edges_and_noise, ref.moderate, ref.near_ties])
def test_f32(inputs: Callable[[int, int], list[int]]) -> None:
    check("add.rn.f32 {d}, {a}, {b};", ref.binary(F32, lambda x, y: x + y), inputs=inputs)
    check("mul.rn.f32 {d}, {a}, {b};", ref.binary(F32, lambda x, y: x * y), inputs=inputs)
    check("fma.rn.f32 {d}, {a}, {b}, {c};", ref.fma(F32), inputs=inputs)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode: str) -> None:
    for inputs in (ref.edges_and_noise, ref.moderate, ref.near_ties):
        check(f"add.{mode}.f32 {{d}}, {{a}}, {{b}};", ref.binary(F32, lambda x, y: x + y, mode), inputs=inputs)
        check(f"sub.{mode}.f32 {{d}}, {{a}}, {{b}};", ref.binary(F32, lambda x, y: x - y, mode), inputs=inputs)
        check(f"mul.{mode}.f32 {{d}}, {{a}}, {{b}};", ref.binary(F32, lambda x, y: x * y, mode), inputs=inputs)
        check(f"fma.{mode}.f32 {{d}}, {{a}}, {{b}}, {{c}};", ref.fma(F32, mode), inputs=inputs)


def test_16_bit_floats() -> None:
    halves = (16, 16, 16, 16)
    for inputs in (ref.edges_and_noise, ref.moderate):
        check("add.rn.f16 {d}, {a}, {b};", ref.binary(F16, lambda x, y: x + y), halves, inputs)
        check("mul.rn.f16 {d}, {a}, {b};", ref.binary(F16, lambda x, y: x * y), halves, inputs)
        check("fma.rn.f16 {d}, {a}, {b}, {c};", ref.fma(F16), halves, inputs)
    for inputs in (ref.edges_and_noise, ref.moderate_bf16):
        check("fma.rn.bf16 {d}, {a}, {b}, {c};", ref.fma(BF16), halves, inputs)


def test_packed_half() -> None:
    def pair(a: int, b: int, c: int) -> int | None:
        halves = [ref.fma(F16)(a >> shift & 0xFFFF, b >> shift & 0xFFFF, c >> shift & 0xFFFF) for shift in (0, 16)]
        return None if None in halves else halves[0] | halves[1] << 16

    check("fma.rn.f16x2 {d}, {a}, {b}, {c};", pair)


def test_conversions() -> None:
    def to_s32(a: int, b: int, c: int) -> int:
        x = ref.value(a, F32)
        if x is None:
            return 0 if a & 0x7FFFFF else (0x80000000 if a >> 31 else 0x7FFFFFFF)
        return max(-(2**31), min(2**31 - 1, int(x)))

    check("cvt.rn.f16.f32 {d}, {a};", ref.convert(F32, F16), (32, 32, 32, 16))
    check("cvt.rn.f16.f32 {d}, {a};", ref.convert(F32, F16), (32, 32, 32, 16), ref.moderate)
    check("cvt.rn.bf16.f32 {d}, {a};", ref.convert(F32, BF16), (32, 32, 32, 16))
    check("cvt.f32.f16 {d}, {a};", ref.convert(F16, F32), (16, 32, 32, 32))
    check("cvt.rzi.s32.f32 {d}, {a};", to_s32)
    check("cvt.rn.f32.s32 {d}, {a};", lambda a, b, c: ref.rounded(Fraction(signed(a)), F32))
    check("cvt.rn.f32.u64 {d}, {a};", lambda a, b, c: ref.rounded(Fraction(a), F32), (64, 32, 32, 32))


@pytest.mark.parametrize("body", ["add.rm.f64 %l1, %l2, %l3;", "cvt.rp.f16.f32 %h1, {a};", "tex.1d {d}, {a};"])
def test_refuses_what_it_does_not_support(body: str) -> None:
    program = simgpu.Program(kernel(body, (32, 32, 32, 32)))
    with pytest.raises(simgpu.PtxError, match=r"k: .* is not supported\n  at PTX line 12: "):
        program.launch("k", 1, 32, [0, 0, 0, 0], simgpu.Device(1 << 20))


def test_parameters_have_addresses() -> None:
    # Entry tid of an array in the second parameter, and one that it does not have.
    text = """.version 8.0
    .target sm_80
    .address_size 64
    .visible .entry k(.param .u64 pa, .param .align 8 .b8 array[16])
    {
      .reg .b32 %r<3>; .reg .b64 %rd<5>;
      mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [pa]; mov.b64 %rd2, array;
      mad.wide.u32 %rd3, %r1, 4, %rd2; ld.param.u32 %r2, [%rd3+4];
      mad.wide.u32 %rd4, %r1, 4, %rd1; st.global.u32 [%rd4], %r2;
      ret;
    }
    """
    assert complaint(text) == ""
    device = simgpu.Device()
    out = device.empty(4, np.uint32)
    array = np.array([5, 6, 7, 8], np.uint32)
    simgpu.Program(text).launch("k", 1, 3, [out, array.tobytes()], device)
    assert out.get()[:3].tolist() == [6, 7, 8]
    with pytest.raises(simgpu.SimError, match="read of 4 bytes at 24 of 24 bytes of parameters"):
        simgpu.Program(text).launch("k", 1, 4, [out, array.tobytes()], device)
