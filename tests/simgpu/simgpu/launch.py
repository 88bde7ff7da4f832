"""One launch of a kernel: what it was given, and what was seen while it ran.

Machines read the first half and report into the second. Faults that make going on pointless raise SimError; what looks
wrong but can be run on is a Hazard, kept once for each kind and PTX line.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .counters import Counters
from .layout import Layout
from .memory import Buffer, Device
from .ptx import Instruction, Kernel, Module
from .writers import Writers

Dim = tuple[int, int, int]
Argument = Buffer | bytes | bytearray | np.generic | int | float


class SimError(Exception):
    """What a running kernel did that hardware would answer with an error, a hang or garbage."""


@dataclass
class Hazard:
    kind: str
    ins: Instruction
    where: str
    thread: str
    other: str  # the thread of the other access, if there is one
    address: int | None
    count: int = 1

    def __str__(self) -> str:
        address = "" if self.address is None else f" at address {int(self.address):#x}"
        other = f", the other access by {self.other}" if self.other else ""
        return f"{self.kind}{address} by {self.thread}{other} ({self.count} times)\n  at {self.where}: {self.ins.text}"


class Launch:
    def __init__(
        self,
        module: Module,
        kernel: Kernel,
        device: Device,
        globals_at: Mapping[str, int],
        grid: Dim,
        block: Dim,
        args: Sequence[Argument],
        *,
        shared: int,
        race: bool,
        count_memory: bool,
        max_steps: int,
        cross_block: bool,
    ) -> None:
        self.kernel = kernel
        self.device = device
        self.grid = grid
        self.block = block
        self.dynamic_shared = shared
        self.race = race
        self.max_steps = max_steps
        self.layout = Layout.of(module, kernel, globals_at, shared)
        self.params = _pack(kernel, args)
        self.files = module.files
        self.hazards: list[Hazard] = []
        self.turns = 0  # of the scheduler, at most in a batch
        self.counters = Counters(len(kernel.code), count_memory)
        self._hazards_by_place: dict[tuple[str, int], Hazard] = {}
        self.writers = Writers(device.top, self.layout.store_granule) if cross_block and self.blocks > 1 else None

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.block[0] * self.block[1] * self.block[2]

    def param_offset(self, name: str) -> int | None:
        """None for a name that is no parameter of the kernel: the result of a call."""
        return next((param.offset for param in self.kernel.params if param.name == name), None)

    def thread_name(self, block: int, thread: int) -> str:
        return f"{self.block_name(block)} thread {_coordinates(thread, self.block)}"

    def block_name(self, block: int) -> str:
        return f"block {_coordinates(block, self.grid)}"

    def place(self, ins: Instruction) -> str:
        lines = ", inlined at ".join(f"{self.files.get(file, '?')}:{line}" for file, line in ins.source)
        return f"PTX line {ins.line}" + (f" ({lines})" if lines else "")

    def hazard(self, kind: str, ins: Instruction, thread: str, other: str = "", address: int | None = None) -> None:
        key = (kind, ins.line)
        seen = self._hazards_by_place.get(key)
        if seen is not None:
            seen.count += 1
            return
        hazard = Hazard(kind, ins, self.place(ins), thread, other, address)
        self._hazards_by_place[key] = hazard
        self.hazards.append(hazard)

    @property
    def totals(self) -> dict[str, Any]:
        return self.counters.totals()

    def opcodes(self) -> dict[str, int]:
        return self.counters.opcodes(self.kernel)

    def unexecuted(self) -> list[tuple[int, str]]:
        """(PTX line, instruction) that no thread reached: what this launch says nothing about."""
        return [(ins.line, ins.text) for pc, ins in enumerate(self.kernel.code) if not self.counters.warps[pc]]

    def clean(self) -> Launch:
        """Raises if there was any hazard; returns the launch."""
        if self.hazards:
            lines = "\n".join(map(str, self.hazards))
            raise SimError(f"{self.kernel.name}: {len(self.hazards)} hazards\n{lines}")
        return self


def _coordinates(index: int, dims: Dim) -> str:
    return f"({index % dims[0]},{index // dims[0] % dims[1]},{index // dims[0] // dims[1]})"


def _pack(kernel: Kernel, args: Sequence[Argument]) -> bytes:
    """The parameters as the kernel's parameter space holds them."""
    if len(args) != len(kernel.params):
        raise TypeError(f"{kernel.name} takes {len(kernel.params)} arguments, {len(args)} given")
    packed = bytearray(max((param.offset + param.size for param in kernel.params), default=0))
    for param, arg in zip(kernel.params, args, strict=True):
        data = _encode(arg, param.type, param.size)
        if len(data) != param.size:
            raise TypeError(f"{kernel.name}: parameter {param.name} has {param.size} bytes, {len(data)} given")
        packed[param.offset : param.offset + param.size] = data
    return bytes(packed)


def _encode(arg: Argument, type_name: str, size: int) -> bytes:
    if isinstance(arg, Buffer):
        return struct.pack("<Q", arg.ptr)
    if isinstance(arg, bytes | bytearray):
        return bytes(arg)
    if isinstance(arg, np.generic):
        return arg.tobytes()
    if type_name in ("f32", "f64"):
        return struct.pack("<f" if type_name == "f32" else "<d", arg)
    return (int(arg) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
