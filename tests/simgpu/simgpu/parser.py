"""PTX text to a Module.

Reads what nvcc writes for kernels, and what inline assembly adds: nested scopes with registers and labels of their own.
Not a validator: ptxas decides whether text is legal PTX. Device functions that were not inlined are skipped, and
calling one is refused when the kernel is decoded.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from .ptx import (
    WIDTH,
    Addr,
    Imm,
    Instruction,
    Kernel,
    Module,
    Operand,
    Pair,
    Param,
    PtxError,
    Reg,
    Special,
    Sym,
    Variable,
    Vec,
    expect,
)

_SPECIAL = re.compile(
    r"%(?:(?:tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyz]"
    r"|laneid|warpid|nwarpid|smid|nsmid|gridid|lanemask_(?:lt|le|eq|ge|gt)|clock|clock64|clock_hi"
    r"|globaltimer|globaltimer_lo|globaltimer_hi|dynamic_smem_size|total_smem_size"
    r"|cluster_ctarank|cluster_nctarank|is_explicit_cluster)$"
)
_INTEGER = re.compile(r"-?\s*(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[Uu]?$")
_FLOAT_BITS = re.compile(r"0[fF]([0-9a-fA-F]{8})$")
_DOUBLE_BITS = re.compile(r"0[dD]([0-9a-fA-F]{16})$")
_DECIMAL = re.compile(r"-?\d*\.\d+([eE][-+]?\d+)?$|-?\d+\.\d*$")
_SYMBOL = re.compile(r"([A-Za-z_$%][\w$%.]*)\s*(?:\+\s*(\d+))?$")
_OFFSET = re.compile(r"(.+?)\s*\+\s*(-?\w+)$")

_LINE_DIRECTIVE = re.compile(r"\.(loc|file)\b([^\n]*)\n")
_DIRECTIVE = re.compile(
    r"\.(version|target|address_size|maxntid|minnctapersm|maxnreg|reqntid|explicitcluster|reqnctapercluster)\b([^\n{]*)"
)
_SECTION = re.compile(r"\.section[^}]*\}")
_PROTOTYPE = re.compile(r"\.extern\s+\.func\b[^;]*;")
_FUNCTION = re.compile(
    r"(?:\.(?:visible|weak)\s+)*\.(entry|func)\s*(?:\([^)]*\))?\s*([\w$.]+)\s*(?:\((.*?)\))?", re.DOTALL
)
_LABEL = re.compile(r"([A-Za-z_$][\w$]*)\s*:(?!:)")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s*(?:\.\w+\s+)*(?:\.align\s+\d+\s+)?)?([\w$.]+)\s*(?:\[(\d+)\])?",
    re.DOTALL,
)
_VARIABLE = re.compile(r"((?:\.(?:visible|extern|weak|common)\s+)*)\.(shared|global|const|local)\b(.*)$", re.DOTALL)
_VARIABLE_TYPE = re.compile(r"\.(b8|u8|s8|b16|u16|s16|f16|b32|u32|s32|f32|b64|u64|s64|f64|b128)\b")
_VARIABLE_NAME = re.compile(r"\s*([\w$.]+)\s*((?:\[[^\]]*\]\s*)*)(?:=\s*(.*))?$", re.DOTALL)
_REGISTERS = re.compile(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*)$", re.DOTALL)
_GUARD = re.compile(r"@(!?)\s*([\w%$]+)\s+(.*)$", re.DOTALL)
_OPCODE = re.compile(r"([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_BRACKET = re.compile(r"[;{}\[\]()]")
_BLANK = re.compile(r"\s*")


def parse(text: str) -> Module:
    return _Parser(text).parse()


def _without_comments(text: str) -> str:
    """Block comments become their line ends, so that line numbers stay right."""
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match.group(0).count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def _split(text: str) -> list[str]:
    """The parts between commas that are not inside brackets."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _integer(text: str) -> int:
    digits = text.strip().rstrip("Uu")
    sign = -1 if digits.startswith("-") else 1
    digits = digits.removeprefix("-").strip()
    if digits[:2].lower() == "0x":
        return sign * int(digits, 16)
    if digits[:2].lower() == "0b":
        return sign * int(digits, 2)
    return sign * int(digits, 8 if len(digits) > 1 and digits.startswith("0") else 10)


class _Scopes:
    """Names of registers and labels. Inline assembly declares its own inside { }; those get a suffix."""

    def __init__(self) -> None:
        self.stack: list[tuple[dict[str, str], int]] = [({}, 0)]
        self.count = 0

    def push(self) -> None:
        self.count += 1
        self.stack.append(({}, self.count))

    def pop(self) -> None:
        self.stack.pop()

    def declare(self, name: str) -> str:
        names, number = self.stack[-1]
        names[name] = name if number == 0 else f"{name}@{number}"
        return names[name]

    def find(self, name: str) -> str | None:
        return next((names[name] for names, _ in reversed(self.stack) if name in names), None)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = _without_comments(text)
        self.module = Module(text)
        self.at = 0
        self.line = 1
        self.kernel: Kernel | None = None
        self.scopes = _Scopes()
        self.depth = 0  # open braces of the kernel
        self.source: tuple[tuple[int, int], ...] = ()
        self.inlined_at: dict[tuple[str, ...], tuple[str, ...]] = {}  # file, line and column of a call's caller

    def parse(self) -> Module:
        self._advance(self._must(_BLANK.match(self.text, self.at)).end())
        while self.at < len(self.text):
            self._item()
            self._advance(self._must(_BLANK.match(self.text, self.at)).end())
        return self.module

    def _advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    @property
    def _open(self) -> Kernel:
        if self.kernel is None:
            raise self._error("a statement outside a function")
        return self.kernel

    def _error(self, message: str) -> PtxError:
        where = f"{self.kernel.name}: " if self.kernel else ""
        return PtxError(f"{where}{message}\n  at PTX line {self.line}")

    def _must(self, match: re.Match[str] | None) -> re.Match[str]:
        if match is None:
            raise self._error("a statement is not understood")
        return match

    def _item(self) -> None:
        if match := _LINE_DIRECTIVE.match(self.text, self.at):
            self._line_directive(match)
        elif match := _DIRECTIVE.match(self.text, self.at):
            self._directive(match)
        elif match := _SECTION.match(self.text, self.at) or _PROTOTYPE.match(self.text, self.at):
            pass
        elif self.kernel is None and (match := _FUNCTION.match(self.text, self.at)):
            self._function(match)
        elif self.kernel is not None and (match := _LABEL.match(self.text, self.at)):
            self.kernel.labels[self.scopes.declare("L:" + match.group(1))] = len(self.kernel.code)
        if match:
            self._advance(match.end())
        elif self.text[self.at] in "{};":
            self._brace(self.text[self.at])
            self._advance(self.at + 1)
        else:
            end = self._end_of_statement()
            self._statement(self.text[self.at : end].strip())
            self._advance(end + 1)

    def _end_of_statement(self) -> int:
        depth = 0
        for match in _BRACKET.finditer(self.text, self.at):
            if match.group() in "{[(":
                depth += 1
            elif match.group() in "}])":
                depth -= 1
            elif depth == 0:
                return match.start()
        raise self._error(f"a statement has no end: {self.text[self.at : self.at + 80]!r}")

    def _line_directive(self, match: re.Match[str]) -> None:
        words = match.group(2).split()
        if match.group(1) == "loc":
            self.source = tuple(self._inlining(words))
        else:
            self.module.files[int(words[0])] = match.group(2).split('"')[1]

    def _inlining(self, words: list[str]) -> Iterator[tuple[int, int]]:
        """The place that a .loc names, and the calls that it was inlined at, innermost first."""
        first = tuple(words[:3])
        self.inlined_at.pop(first, None)
        if "inlined_at" in words:
            at = words.index("inlined_at") + 1
            self.inlined_at[first] = tuple(words[at : at + 3])
        seen: list[tuple[str, ...]] = []
        place: tuple[str, ...] | None = first
        while place is not None and place not in seen:
            seen.append(place)
            yield int(place[0]), int(place[1])
            place = self.inlined_at.get(place)

    def _directive(self, match: re.Match[str]) -> None:
        name, value = match.group(1), match.group(2).strip()
        if name == "version":
            self.module.version = value
        elif name == "target":
            self.module.target = value
        elif self.kernel is not None:
            self.kernel.directives[name] = value

    def _function(self, match: re.Match[str]) -> None:
        params, offset = [], 0
        for text in _split(match.group(3) or ""):
            align, type_name, name, count = self._must(_PARAM.match(text)).groups()
            width = WIDTH[type_name] // 8
            alignment = int(align or width)
            offset = (offset + alignment - 1) // alignment * alignment
            params.append(Param(name, alignment, width * int(count or 1), type_name, offset))
            offset += params[-1].size
        self.kernel = Kernel(match.group(2), params, is_entry=match.group(1) == "entry", lines=(self.line, self.line))
        self.scopes = _Scopes()
        self.depth = 0

    def _brace(self, char: str) -> None:
        if char == ";":
            if self.depth == 0:  # the end of a declaration without a body
                self.kernel = None
            return
        if self.kernel is None:
            raise self._error(f"{char!r} outside a function")
        if char == "{":
            if self.depth:
                self.scopes.push()
            self.depth += 1
            return
        self.depth -= 1
        if self.depth:
            self._resolve_scope()
            self.scopes.pop()
            return
        self._resolve_kernel()
        self.kernel.lines = (self.kernel.lines[0], self.line)
        if self.kernel.is_entry:
            self.module.kernels[self.kernel.name] = self.kernel
        self.kernel = None

    def _resolve_scope(self) -> None:
        names, _ = self.scopes.stack[-1]
        for ins in self._open.code:
            if ins.base == "bra" and ins.target < 0:
                label = names.get("L:" + expect(ins.args[0], Sym).name)
                if label is not None:
                    ins.target = self._open.labels[label]

    def _resolve_kernel(self) -> None:
        for ins in self._open.code:
            if ins.base == "bra" and ins.target < 0:
                label = "L:" + expect(ins.args[0], Sym).name
                if label not in self._open.labels:
                    raise PtxError(f"{self._open.name}: unknown label {label[2:]}\n  at PTX line {ins.line}")
                ins.target = self._open.labels[label]

    def _statement(self, text: str) -> None:
        if not text.startswith("."):
            self._instruction(text)
        elif match := _REGISTERS.match(text):
            self._registers(*match.groups())
        elif match := _VARIABLE.match(text):
            variables = self.kernel.variables if self.kernel else self.module.variables
            variables.append(self._variable(*match.groups()))
        elif not text.startswith((".pragma", ".param", ".branchtargets")):
            raise self._error(f"directive not supported: {text[:80]}")

    def _registers(self, type_name: str, names: str) -> None:
        for name in _split(names):
            counted = re.match(r"(.+)<(\d+)>$", name)
            every = [f"{counted.group(1)}{k}" for k in range(int(counted.group(2)))] if counted else [name]
            for one in every:
                self._open.registers[self.scopes.declare(one)] = WIDTH[type_name]

    def _variable(self, qualifiers: str, space: str, text: str) -> Variable:
        align = re.search(r"\.align\s+(\d+)", text)
        type_name = self._must(_VARIABLE_TYPE.search(text))
        width = WIDTH[type_name.group(1)] // 8
        name, dims, initial = self._must(_VARIABLE_NAME.match(text[type_name.end() :])).groups()
        count, dynamic = 1, "extern" in qualifiers
        for dim in re.findall(r"\[([^\]]*)\]", dims):
            if dim.strip():
                count *= _integer(dim)
            else:
                count, dynamic = 0, True
        data = None if initial is None else self._initial(name, initial, width).ljust(count * width, b"\0")
        return Variable(name, space, int(align.group(1)) if align else width, count * width, data, dynamic)

    def _initial(self, name: str, text: str, width: int) -> bytes:
        data = b""
        for value in filter(None, (part.strip() for part in re.sub(r"[{}]", "", text).split(","))):
            if match := _FLOAT_BITS.match(value):
                data += struct.pack("<I", int(match.group(1), 16))
            elif match := _DOUBLE_BITS.match(value):
                data += struct.pack("<Q", int(match.group(1), 16))
            elif _INTEGER.match(value):
                data += (_integer(value) & ((1 << (8 * width)) - 1)).to_bytes(width, "little")
            else:
                raise self._error(f"the initial value {value!r} of {name} is not supported")
        return data

    def _instruction(self, text: str) -> None:
        guard = None
        if match := _GUARD.match(text):
            name = self.scopes.find(match.group(2))
            if name is None:
                raise self._error(f"unknown guard {match.group(2)}")
            guard = Reg(name, match.group(1) == "!")
            text = match.group(3).strip()
        op, rest = self._must(_OPCODE.match(text)).groups()
        base, *mods = op.split(".")
        rest = " ".join(rest.split())
        if base in ("bra", "call"):
            args: list[Operand] = [Sym(rest)]
        else:
            args = [self._operand(part) for part in _split(rest)]
        prefix = f"@{'!' if guard.negated else ''}{guard.name} " if guard else ""
        text = f"{prefix}{op} {rest}".rstrip()
        self._open.code.append(Instruction(op, base, mods, args, guard, self.line, self.source, text))

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vec(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if "|" in text and not text.startswith("0"):
            first, second = text.split("|")
            return Pair(self._operand(first.strip()), self._operand(second.strip()))
        if text.startswith("!"):
            return Reg(expect(self._operand(text[1:]), Reg).name, True)
        if text == "_":
            return Reg("_")
        if _SPECIAL.match(text):
            return Special(text[1:])
        name = self.scopes.find(text)
        return Reg(name) if name is not None else self._constant(text)

    def _address(self, text: str) -> Addr:
        parts = _split(text)
        if len(parts) > 1:  # a tensor map and its coordinates: parsed, refused when decoded
            return Addr(Vec(tuple(self._operand(part) for part in parts)))
        match = _OFFSET.match(text)
        if match:
            return Addr(self._operand(match.group(1).strip()), _integer(match.group(2)))
        return Addr(self._operand(text))

    def _constant(self, text: str) -> Operand:
        if match := _FLOAT_BITS.match(text):
            return Imm(int(match.group(1), 16), "f32")
        if match := _DOUBLE_BITS.match(text):
            return Imm(int(match.group(1), 16), "f64")
        if _INTEGER.match(text):
            return Imm(_integer(text))
        if _DECIMAL.match(text):
            return Imm(int.from_bytes(struct.pack("<d", float(text)), "little"), "f64")
        if text == "WARP_SZ":
            return Imm(32)
        if text in ("true", "false"):
            return Imm(int(text == "true"))
        if match := _SYMBOL.match(text):
            return Sym(match.group(1), int(match.group(2) or 0))
        raise self._error(f"operand not understood: {text!r}")
