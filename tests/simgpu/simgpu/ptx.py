"""A PTX module as Python objects: operands, instructions, variables, kernels.

Only what a functional simulator needs. Debug sections, linkage and tuning directives are not kept. parser.py makes
these objects from text; nothing here executes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

# Bits of each fundamental type.
WIDTH = {
    "pred": 1,
    **dict.fromkeys(("b8", "u8", "s8"), 8),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 64),
    "b128": 128,
}

_SPACES = ("global", "shared", "local", "const", "param")


class PtxError(Exception):
    """PTX that is malformed, or that the simulator does not support. Raised before a kernel runs."""


@dataclass(frozen=True)
class Reg:
    """A register; `_` is the sink that discards what is written."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    """A literal. Floating-point literals keep their bit pattern in `value`."""

    value: int
    float_type: str = ""  # "", "f32" or "f64"


@dataclass(frozen=True)
class Sym:
    """The address of a variable, or the name of a label."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Special:
    """A read-only register of the hardware, such as %tid.x, without its percent sign."""

    name: str


@dataclass(frozen=True)
class Vec:
    """{a, b, ...}"""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Addr:
    """[base + offset]"""

    base: Operand
    offset: int = 0


@dataclass(frozen=True)
class Pair:
    """%p|%q"""

    first: Operand
    second: Operand


Operand = Reg | Imm | Sym | Special | Vec | Addr | Pair
_Kind = TypeVar("_Kind", Reg, Imm, Sym, Vec, Addr, Pair)


@dataclass
class Instruction:
    op: str  # with all modifiers: ld.global.v4.u32
    base: str  # ld
    mods: list[str]  # global v4 u32
    args: list[Operand]
    guard: Reg | None
    line: int  # in the PTX text
    source: tuple[tuple[int, int], ...] = ()  # number of the CUDA file and line, then where that was inlined
    text: str = ""
    target: int = -1  # of a branch: index into Kernel.code


@dataclass
class Variable:
    name: str
    space: str
    align: int
    size: int
    initial: bytes | None = None
    dynamic: bool = False  # its size is given at launch


@dataclass
class Param:
    name: str
    align: int
    size: int
    type: str
    offset: int


@dataclass
class Kernel:
    name: str
    params: list[Param]
    is_entry: bool = True
    registers: dict[str, int] = field(default_factory=dict)  # name -> bits
    variables: list[Variable] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    directives: dict[str, str] = field(default_factory=dict)
    lines: tuple[int, int] = (0, 0)  # of the text, the first and the last

    @cached_property
    def accumulators(self) -> frozenset[str]:
        """The registers that wgmma writes to."""
        multiplications = (ins.args[:1] for ins in self.code if ins.op.startswith("wgmma.mma_async"))
        return frozenset(name for target in multiplications for name in registers_of(target))


@dataclass
class Module:
    text: str
    version: str = ""
    target: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    files: dict[int, str] = field(default_factory=dict)  # number -> path of a CUDA source


def expect(operand: Operand, kind: type[_Kind]) -> _Kind:
    """The operand; ValueError if it is not of that kind."""
    if not isinstance(operand, kind):
        raise ValueError(f"{operand} is no {kind.__name__}")
    return operand


def data_type(ins: Instruction) -> str:
    """The type that an instruction works on: the last one it names."""
    return next((mod for mod in reversed(ins.mods) if mod in WIDTH), "b32")


def bits_type(ins: Instruction) -> str:
    """The untyped bits as wide as data_type(ins)."""
    name = data_type(ins)
    return "pred" if name == "pred" else f"b{WIDTH[name]}"


def types(ins: Instruction) -> list[str]:
    return [mod for mod in ins.mods if mod in WIDTH]


def choice(ins: Instruction, options: Iterable[str]) -> str:
    """The first modifier that is one of `options`; StopIteration if there is none."""
    return next(mod for mod in ins.mods if mod in options)


def state_space(ins: Instruction) -> str:
    """The memory that an instruction names, or "generic"."""
    return next((space for mod in ins.mods if (space := mod.split("::")[0]) in _SPACES), "generic")


def items(operand: Operand) -> tuple[Operand, ...]:
    """The elements of a vector; a scalar is a vector of one."""
    return operand.items if isinstance(operand, Vec) else (operand,)


def symbols(operands: Iterable[Operand]) -> Iterator[str]:
    """The names of all variables that operands refer to."""
    return (operand.name for operand in _leaves(operands) if isinstance(operand, Sym))


def registers_of(operands: Iterable[Operand]) -> Iterator[str]:
    """The names of all registers that operands refer to."""
    return (operand.name for operand in _leaves(operands) if isinstance(operand, Reg))


def _leaves(operands: Iterable[Operand]) -> Iterator[Operand]:
    for operand in operands:
        if isinstance(operand, Addr):
            yield from _leaves([operand.base])
        elif isinstance(operand, Vec):
            yield from _leaves(operand.items)
        elif isinstance(operand, Pair):
            yield from _leaves([operand.first, operand.second])
        else:
            yield operand
