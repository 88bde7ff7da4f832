"""The state of a batch of blocks that run together, and access to it by operands.

Every register is an array with one element for each lane of the batch, so that one numpy call executes an instruction
for all of them. read, write and address turn an operand into a function once, when an instruction is decoded; running
it is then a few calls. Blocks are padded to whole warps; the padding lanes are never alive. Which lanes run next is
scheduler.py's matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from .launch import Launch, SimError
from .memory import POISON
from .pending import Pending
from .ptx import WIDTH, Addr, Imm, Instruction, Operand, PtxError, Reg, Special, Sym, expect
from .shared import SharedMemory
from .steps import Lanes, Reader, Writer

DTYPE: dict[str, Any] = {
    "pred": np.bool_,
    **dict.fromkeys(("b8", "u8"), np.uint8),
    "s8": np.int8,
    **dict.fromkeys(("b16", "u16", "bf16"), np.uint16),
    "s16": np.int16,
    "f16": np.float16,
    **dict.fromkeys(("b32", "u32", "f16x2", "bf16x2", "tf32"), np.uint32),
    "s32": np.int32,
    "f32": np.float32,
    **dict.fromkeys(("b64", "u64"), np.uint64),
    "s64": np.int64,
    "f64": np.float64,
}
UNSIGNED: dict[int, Any] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}

# What registers hold before they are written. A value that stands out, since hardware leaves anything there.
_UNWRITTEN = {16: 0xDEAD, 32: 0xDEADBEEF, 64: 0xDEADBEEFDEADBEEF}

_CLOCKS = ("clock", "clock64", "clock_hi", "globaltimer", "globaltimer_lo", "globaltimer_hi")
_MULTIPROCESSORS = 132


class _Registers(dict[str, np.ndarray]):
    """Made when they are first named: large kernels have more registers than a launch touches."""

    def __init__(self, widths: Mapping[str, int], lanes: int) -> None:
        super().__init__()
        self.widths, self.lanes = widths, lanes

    def __missing__(self, name: str) -> np.ndarray:
        width = self.widths[name]
        self[name] = np.full(self.lanes, _UNWRITTEN.get(width, 0), UNSIGNED[width])
        return self[name]


class Machine:
    def __init__(self, launch: Launch, blocks: Sequence[int]) -> None:
        self.launch = launch
        self.kernel = launch.kernel
        self.device = launch.device
        self.counters = launch.counters
        self.layout = launch.layout
        self.warps_per_block = (launch.threads + 31) // 32
        self.lanes_per_block = self.warps_per_block * 32
        self.blocks = np.asarray(blocks, np.int64)  # their numbers in the grid
        self.lane_count = len(blocks) * self.lanes_per_block
        self.lanes = np.arange(self.lane_count)
        self.lane_in_warp = (self.lanes & 31).astype(np.uint32)
        self.block_of = self.lanes // self.lanes_per_block  # counted in this batch
        self.alive = self.lanes % self.lanes_per_block < launch.threads
        self.now = 1  # the step counter that orders accesses to shared memory
        self.registers = _Registers(self.kernel.registers, self.lane_count)
        self.carry = np.zeros(self.lane_count, np.uint64)
        self.local = np.full(max(16, self.lane_count * self.layout.local_bytes), POISON, np.uint8)
        self.local_views = {size: self.local.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.shared = SharedMemory(
            len(blocks),
            self.warps_per_block,
            self.layout.shared_bytes,
            self.layout.granule,
            self.hazard,
            launch.race and self.layout.shared_bytes > 0,
        )
        self.pending = Pending(self.lane_count)

    def place_of(self, lane: int) -> tuple[int, int]:
        """The block in this batch and the warp in its block."""
        return int(lane) // self.lanes_per_block, int(lane) % self.lanes_per_block >> 5

    def thread_name(self, lane: int) -> str:
        block, thread = divmod(int(lane), self.lanes_per_block)
        return self.launch.thread_name(int(self.blocks[block]), thread)

    def fail(self, ins: Instruction, message: str, lane: int) -> NoReturn:
        raise SimError(
            f"{self.kernel.name}: {message} by {self.thread_name(lane)}\n  at {self.launch.place(ins)}: {ins.text}"
        )

    def unsupported(self, ins: Instruction, what: str = "this instruction") -> PtxError:
        return PtxError(f"{self.kernel.name}: {what} is not supported\n  at {self.launch.place(ins)}: {ins.text}")

    def hazard(
        self, kind: str, ins: Instruction, lane: int, address: int | None = None, other: int | None = None
    ) -> None:
        """`other` is the lane of the access that this one collides with, negative for an asynchronous copy."""
        other_name = "" if other is None else "an asynchronous copy" if other < 0 else self.thread_name(other)
        self.launch.hazard(kind, ins, self.thread_name(lane), other_name, address)

    def spread(self, i: Lanes, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the lanes, and a value for each of them."""
        lanes = self.lanes[i]
        return lanes, values if values.shape == lanes.shape else np.broadcast_to(values, lanes.shape)

    def mask(self, lanes: np.ndarray) -> np.ndarray:
        mask = np.zeros(self.lane_count, bool)
        mask[lanes] = True
        return mask

    def read(self, operand: Operand, type_name: str) -> Reader:
        dtype = DTYPE[type_name]
        if isinstance(operand, Reg):
            return self._read_register(operand, type_name)
        if isinstance(operand, Special):
            if operand.name in _CLOCKS:
                return lambda i: np.full(1, self.now, dtype)
            values: np.ndarray = self._special(operand.name).astype(UNSIGNED[WIDTH[type_name]]).view(dtype)
            return values.__getitem__
        value = self.constant(operand, type_name).view(dtype)
        return lambda i: value

    def _read_register(self, operand: Reg, type_name: str) -> Reader:
        dtype = DTYPE[type_name]
        if operand.name == "_":
            return lambda i: np.zeros(1, dtype)
        register, width = self.registers[operand.name], WIDTH[type_name]
        have = self.kernel.registers[operand.name]
        if width == have:
            values = register.view(dtype)
            return (lambda i: ~values[i]) if operand.negated else values.__getitem__
        if have == 1:
            raise PtxError(f"{self.kernel.name}: the predicate {operand.name} is used as {type_name}")
        unsigned = UNSIGNED[width]
        return lambda i: register[i].astype(unsigned).view(dtype)

    def write(self, operand: Operand, type_name: str) -> Writer:
        if not isinstance(operand, Reg):
            raise PtxError(f"{self.kernel.name}: a register is expected where {operand} is written")
        if operand.name == "_":
            return lambda i, values: None
        register, width = self.registers[operand.name], WIDTH[type_name]
        have = self.kernel.registers[operand.name]
        if width == have:
            same: np.ndarray = register.view(DTYPE[type_name])
            return same.__setitem__
        if have < width:
            narrow = UNSIGNED[have]
            return lambda i, values: register.__setitem__(i, values.astype(narrow))
        # A register may be wider than the type: signed values are extended by their sign, all others by zeros.
        signed = type_name.startswith("s")
        wide = register.view(SIGNED[have]) if signed else register
        raw = np.dtype(SIGNED[width] if signed else UNSIGNED[width])

        def extend(i: Lanes, values: np.ndarray) -> None:
            wide[i] = values.view(raw) if values.dtype.itemsize == raw.itemsize else values.astype(raw)

        return extend

    def constant(self, operand: Operand, type_name: str) -> np.ndarray:
        """The bits of a literal or of the address of a variable, as one element."""
        width = WIDTH[type_name]
        mask = (1 << width) - 1
        if isinstance(operand, Sym):
            return np.array([self.symbol_address(operand) & mask], UNSIGNED[width])
        if not isinstance(operand, Imm):
            raise PtxError(f"{self.kernel.name}: a constant is expected where {operand} stands")
        if type_name == "pred":
            return np.array([bool(operand.value)])
        if operand.float_type == "f64" and type_name == "f32":
            return np.array([operand.value], np.uint64).view(np.float64).astype(np.float32).view(np.uint32)
        if not operand.float_type and type_name in ("f32", "f64"):
            return np.array([operand.value], DTYPE[type_name]).view(UNSIGNED[width])
        return np.array([operand.value & mask], UNSIGNED[width])

    def symbol_address(self, symbol: Sym) -> int:
        """Of a parameter: where it is among them, for ld.param."""
        parameter = self.launch.param_offset(symbol.name)
        if parameter is not None:
            return parameter + symbol.offset
        if symbol.name not in self.layout.addresses:
            raise PtxError(f"{self.kernel.name}: unknown variable {symbol.name}")
        return self.layout.addresses[symbol.name] + symbol.offset

    def address(self, operand: Operand) -> Reader:
        """Addresses as int64, from a register, a variable or a literal, with an offset."""
        base, offset = (operand.base, operand.offset) if isinstance(operand, Addr) else (operand, 0)
        if isinstance(base, Reg):
            register = self.registers[base.name]
            if self.kernel.registers[base.name] == 64:
                values = register.view(np.int64)
                return (lambda i: values[i] + offset) if offset else values.__getitem__
            return lambda i: register[i].astype(np.int64) + offset
        value = self.symbol_address(base) if isinstance(base, Sym) else expect(base, Imm).value
        constant = np.array([value + offset], np.int64)
        return lambda i: constant

    def _special(self, name: str) -> np.ndarray:
        launch = self.launch
        thread = self.lanes % self.lanes_per_block
        block = self.blocks[self.block_of]
        lane = thread & 31
        below = (1 << lane) - 1
        values: dict[str, np.ndarray | int] = {
            "laneid": lane,
            "warpid": thread >> 5,
            "nwarpid": self.warps_per_block,
            "smid": block % _MULTIPROCESSORS,
            "nsmid": _MULTIPROCESSORS,
            "gridid": 0,
            "dynamic_smem_size": launch.dynamic_shared,
            "total_smem_size": self.layout.shared_bytes,
            "lanemask_eq": 1 << lane,
            "lanemask_lt": below,
            "lanemask_le": below | 1 << lane,
            "lanemask_gt": 0xFFFFFFFF & ~(below | 1 << lane),
            "lanemask_ge": 0xFFFFFFFF & ~below,
            "cluster_ctarank": 0,
            "cluster_nctarank": 1,
        }
        for prefix, index, dims in (("t", thread, launch.block), ("cta", block, launch.grid)):
            parts = (index % dims[0], index // dims[0] % dims[1], index // dims[0] // dims[1])
            for axis, part, extent in zip("xyz", parts, dims, strict=True):
                values[f"{prefix}id.{axis}"] = part
                values[f"n{prefix}id.{axis}"] = extent
        for axis in "xyz":  # a cluster is one block
            values[f"clusterid.{axis}"] = values[f"ctaid.{axis}"]
            values[f"cluster_ctaid.{axis}"] = 0
            values[f"cluster_nctaid.{axis}"] = 1
        if name not in values:
            raise PtxError(f"{self.kernel.name}: special register %{name} is not supported")
        out: np.ndarray = np.broadcast_to(np.asarray(values[name], np.int64), (self.lane_count,)).copy()
        return out
