"""wgmma: the asynchronous matrix multiplication of four warps (sm_90a), m64 with K-major 16-bit operands into f32.

The result is computed at once, but until wgmma.wait_group the accumulators read as NaN, using them is a hazard, and the
tiles in shared memory count as still being read. wgmma.fence orders nothing here, so a missing one is not found.
Rounding is as in mma.py. Descriptors and swizzles are those of the PTX ISA's matrix descriptor; MN-major tiles are
refused.
"""

from __future__ import annotations

import re

import numpy as np

from .. import fragments, numerics
from ..machine import Machine
from ..pending import Accumulator, Multiplication, WgmmaGroup
from ..ptx import Imm, Instruction, Vec, expect, registers_of
from ..shared import HeldReads
from ..steps import Lanes, Operation, Step, WarpSync
from .common import fragment
from .mma import gather

_NOT_READY = np.uint32(0x7FC00000)  # NaN

# Swizzle mode of a descriptor -> bytes of a row, and which bits of the row number are folded into the address.
_SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}


def tile_offsets(descriptor: int, rows: int, row_bytes: int) -> np.ndarray:
    """Bytes in shared memory of each 16-bit element of a K-major tile: (rows, row_bytes / 2)."""
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = (descriptor >> 62) & 3
    row = np.arange(rows)[:, None]
    byte = np.arange(0, row_bytes, 2)[None, :]
    if mode == 0:
        return start + (row // 8) * stride + (byte // 16) * leading + (row % 8) * 16 + byte % 16
    pitch, mask = _SWIZZLES[mode]
    linear = start + (row // 8) * stride + (row % 8) * pitch + byte
    return linear ^ (((linear >> 7) & mask) << 4)


def _wgmma(m: Machine, ins: Instruction) -> Step:
    op = ins.mods[0]
    if op == "fence":
        return lambda i: None
    if op == "commit_group":
        return lambda i: _commit(m)
    if op == "wait_group":
        left = expect(ins.args[0], Imm).value
        return lambda i: _wait(m, left)
    return _multiply(m, ins)


def _open_group(m: Machine) -> WgmmaGroup:
    groups = m.pending.wgmma
    if not groups or groups[-1].committed:
        groups.append(WgmmaGroup())
    return groups[-1]


def _commit(m: Machine) -> None:
    _open_group(m).committed = True


def _wait(m: Machine, left: int) -> None:
    m.now += 1
    groups = m.pending.wgmma
    while sum(group.committed for group in groups) > left:
        for multiplication in groups.pop(0).multiplications:
            multiplication.finish()


def _multiply(m: Machine, ins: Instruction) -> WarpSync:
    shape = re.search(r"\.m64n(\d+)k16\.", ins.op)
    types = [mod for mod in ins.mods if mod in fragments.BITS or mod == "f32"]
    if shape is None or len(types) != 3 or types[0] != "f32" or types[1] not in ("f16", "bf16"):
        raise m.unsupported(ins)
    n, k = int(shape.group(1)), 16
    names = list(registers_of(ins.args[:1]))
    a_operand, b_operand, rest = ins.args[1], ins.args[2], ins.args[3:]
    read_scale = m.read(rest[0], "pred") if rest else None
    literals = [arg.value for arg in rest[1:] if isinstance(arg, Imm)]
    a_sign, b_sign = literals[:2] if len(literals) >= 2 else (1, 1)
    if any(literals[2:]):
        raise m.unsupported(ins, "an MN-major operand")
    a_fragment = fragment(m, a_operand) if isinstance(a_operand, Vec) else None
    a_descriptor = m.read(a_operand, "u64") if a_fragment is None else None
    b_descriptor = m.read(b_operand, "u64")
    a_index = fragments.index_a(k, 2, 4)
    rows, columns = fragments.coordinates_wgmma_d(len(names))

    def execute(i: Lanes, takes_part: np.ndarray) -> None:
        m.now += 1
        lanes = m.lanes[i]
        if len(lanes) % 128 or (lanes[::128] % m.lanes_per_block % 128).any():
            m.fail(ins, "wgmma needs all four warps of an aligned warpgroup", lanes[0])
        first_lanes = lanes[::128]
        held: list[HeldReads] = []

        def tiles(descriptors: np.ndarray, tile_rows: int) -> np.ndarray:
            per_group = np.broadcast_to(descriptors, lanes.shape)[::128]
            return np.stack(
                [
                    _read_tile(m, ins, lane, int(descriptor), tile_rows, 2 * k, types[1], held)
                    for lane, descriptor in zip(first_lanes, per_group, strict=True)
                ]
            )

        if a_descriptor is not None:
            a = tiles(a_descriptor(i), 64)
        elif a_fragment is not None:
            a = fragments.decode(gather(a_fragment, i), types[1])[:, a_index].reshape(-1, 64, k)
        b = tiles(b_descriptor(i), n)
        product = np.matmul(a * a_sign, b.transpose(0, 2, 1) * b_sign).reshape(-1, 4, 16, n)
        before = np.stack([_accumulator_value(m, name, i) for name in names], -1).view(np.float32).astype(np.float64)
        before = before.reshape(-1, 4, 32, len(names))
        if read_scale:
            scale = np.broadcast_to(read_scale(i), lanes.shape)[::128]
            before = np.where(scale[:, None, None, None], before, 0)
        after = (product[:, :, rows, columns] + before).astype(np.float32).view(np.uint32).reshape(-1, len(names))
        _keep(m, ins, names, lanes, after, held)
        m.counters.multiplied(len(lanes) // 32, 16 * n * k)

    return WarpSync(execute, aligned=True)


def _read_tile(
    m: Machine,
    ins: Instruction,
    lane: int,
    descriptor: int,
    rows: int,
    row_bytes: int,
    type_name: str,
    held: list[HeldReads],
) -> np.ndarray:
    """The values of a tile; what is read of shared memory is added to `held`."""
    offsets = tile_offsets(descriptor, rows, row_bytes)
    if offsets.max() + 2 > m.layout.shared_bytes:
        m.fail(
            ins,
            f"the wgmma descriptor {descriptor:#x} reaches byte {offsets.max() + 1} of shared memory "
            f"(the block has {m.layout.shared_bytes} bytes)",
            lane,
        )
    base = m.place_of(lane)[0] * m.shared.stride
    if m.shared.check:
        pieces = (np.unique(offsets >> 4) << 4) + base
        readers = np.full(len(pieces), lane)
        m.shared.note_read(readers, pieces, 16, m.now, ins)
        held.append(m.shared.hold_reads(readers, pieces, 16))
    codes = np.ascontiguousarray(m.shared.views[2][(offsets + base) // 2])
    values = codes.view(np.float16) if type_name == "f16" else numerics.bf16_to_f32(codes)
    return values.astype(np.float64)


def _accumulator_value(m: Machine, name: str, i: Lanes) -> np.ndarray:
    """The register, or what an unfinished multiplication will leave in it: accumulation needs no wait."""
    unfinished = m.pending.accumulators.get(name)
    register = m.registers[name][i]
    return register if unfinished is None else np.where(unfinished.in_flight[i] > 0, unfinished.values[i], register)


def _keep(
    m: Machine, ins: Instruction, names: list[str], lanes: np.ndarray, values: np.ndarray, held: list[HeldReads]
) -> None:
    """Holds the result back until every multiplication into these registers has been waited for."""
    accumulators = m.pending.accumulators
    for column, name in enumerate(names):
        if name not in accumulators:
            accumulators[name] = Accumulator(np.zeros(m.lane_count, np.uint32), np.zeros(m.lane_count, np.int64))
        accumulators[name].values[lanes] = values[:, column]
        accumulators[name].in_flight[lanes] += 1
        m.registers[name][lanes] = _NOT_READY
    lanes = lanes.copy()

    def finish() -> None:
        for reads in held:
            m.shared.release_reads(reads, m.now)
        for name in names:
            accumulator = accumulators[name]
            accumulator.in_flight[lanes] -= 1
            ready = lanes[accumulator.in_flight[lanes] == 0]
            m.registers[name][ready] = accumulator.values[ready]

    _open_group(m).multiplications.append(Multiplication(ins, int(lanes[0]), finish))


def watch_accumulators(m: Machine, ins: Instruction, operation: Operation) -> Operation:
    """The operation of another instruction, which is a hazard for the lanes whose accumulators it meets in flight."""
    names = [name for name in registers_of(ins.args) if name in m.kernel.accumulators]
    if not names:
        return operation

    def execute(i: Lanes) -> None:
        for name in names:
            accumulator = m.pending.accumulators.get(name)
            if accumulator is not None and accumulator.in_flight[i].any():
                lane = int(m.lanes[i][np.argmax(accumulator.in_flight[i] > 0)])
                m.hazard("accumulator of wgmma is used before wgmma.wait_group", ins, lane)
        operation(i)

    return execute


INSTRUCTIONS = {"wgmma": _wgmma}
