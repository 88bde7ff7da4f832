"""Asynchronous copies between global and shared memory: cp.async and cp.async.bulk.

A copy is done when it is waited for, as late as the rules allow. Until then its target holds poison, and touching it
is a hazard: a missing or too short wait shows in the result and by name. Tensor maps (TMA) are not supported.
"""

from __future__ import annotations

import numpy as np

from .. import access
from ..machine import Machine
from ..memory import ALLOCATED, INITIALISED, POISON, READ_ONLY, SHARED_WINDOW
from ..pending import BulkCopy, Copy
from ..ptx import Imm, Instruction, Reg, expect
from ..steps import Lanes, Operation, Reader
from . import mbarrier


def _cp(m: Machine, ins: Instruction) -> Operation:
    if ins.mods[0] != "async":
        raise m.unsupported(ins)
    if "bulk" in ins.mods:
        return _bulk(m, ins)
    if "commit_group" in ins.mods:
        return lambda i: _commit(m, i)
    if "wait_group" in ins.mods:
        groups = expect(ins.args[0], Imm).value
        return lambda i: _wait(m, i, groups)
    if "wait_all" in ins.mods:
        return lambda i: _wait(m, i, None)
    if "mbarrier" in ins.mods:
        return _arrive_when_done(m, ins)
    return _copy(m, ins)


def _commit(m: Machine, i: Lanes) -> None:
    m.pending.commits[i] += 1


def _arrive_when_done(m: Machine, ins: Instruction) -> Operation:
    address = m.address(ins.args[0])
    counted = "noinc" not in ins.mods

    def execute(i: Lanes) -> None:
        _wait(m, i, None)
        lanes, addresses = m.spread(i, address(i))
        if counted:
            for lane, at in zip(lanes, addresses, strict=True):
                mbarrier.find(m, ins, lane, at).pending += 1
        mbarrier.arrive(m, ins, lanes, addresses)

    return execute


def _copy(m: Machine, ins: Instruction) -> Operation:
    target, source = m.address(ins.args[0]), m.address(ins.args[1])
    size = expect(ins.args[2], Imm).value
    read_count = _source_count(m, ins, size)

    def execute(i: Lanes) -> None:
        m.now += 1
        lanes, targets = m.spread(i, target(i))
        _, sources = m.spread(i, source(i))
        counts = np.broadcast_to(read_count(i), lanes.shape)
        if (counts > size).any():
            k = np.argmax(counts > size)
            m.fail(ins, f"cp.async of {size} bytes has a source size of {counts[k]} bytes", lanes[k])
        target_offsets = access.check_shared(m, ins, lanes, targets, size, "cp.async write")
        source_offsets = _check_sources(m, ins, lanes, sources, counts, size)
        m.counters.shared_access(ins, "cp.async", lanes, targets, size, m.lane_count)
        if m.shared.check:
            m.shared.note_copy_started(lanes, target_offsets, size, ins)
        m.shared.bytes[target_offsets[:, None] + np.arange(size)] = POISON
        groups = m.pending.commits[lanes]
        m.pending.copies.append(
            Copy(ins, size, lanes.copy(), target_offsets, source_offsets, counts.copy(), groups.copy())
        )

    return execute


def _source_count(m: Machine, ins: Instruction, size: int) -> Reader:
    """How many bytes a lane reads: all, a count that it gives, or none where its predicate ignores the source."""
    hint = any("cache_hint" in mod for mod in ins.mods)
    extra = ins.args[3:-1] if hint else ins.args[3:]
    if not extra:
        everything = np.array([size])
        return lambda i: everything
    if isinstance(extra[0], Reg) and m.kernel.registers[extra[0].name] == 1:
        ignore = m.read(extra[0], "pred")
        return lambda i: np.where(ignore(i), 0, size)
    count = m.read(extra[0], "u32")
    return lambda i: count(i).astype(np.int64)


def _check_sources(
    m: Machine, ins: Instruction, lanes: np.ndarray, sources: np.ndarray, counts: np.ndarray, size: int
) -> np.ndarray:
    """The offsets in device memory; 0 for lanes that read nothing, whose address may be anything."""
    offsets = np.where(counts > 0, m.device.offsets(sources), 0)
    reads = counts > 0
    if not reads.any():
        return offsets
    # The address must be aligned for the whole copy even where only a part of it is read.
    misaligned = reads & ((sources & (size - 1)) != 0)
    if misaligned.any():
        k = np.argmax(misaligned)
        m.fail(ins, f"misaligned cp.async read at {sources[k]:#x}, which is no multiple of {size}", lanes[k])
    ends = offsets + np.maximum(counts, 1) - 1
    outside = reads & ((offsets < 0) | (ends >= m.device.bytes.size))
    access.refuse_unmapped(m, ins, lanes, sources, outside, size, "cp.async read")
    flags = m.device.flags[offsets] & m.device.flags[ends]
    access.refuse_unmapped(m, ins, lanes, sources, reads & ((flags & ALLOCATED) == 0), size, "cp.async read")
    unwritten = reads & ((flags & INITIALISED) == 0)
    if unwritten.any():
        k = np.argmax(unwritten)
        m.hazard("uninitialised global read", ins, lanes[k], int(sources[k]))
    m.counters.global_access(ins, "cp.async", lanes[reads], offsets[reads], size)
    return offsets


def _wait(m: Machine, i: Lanes, groups: int | None) -> None:
    """Finishes the copies of these lanes but for those of their last `groups` commit groups; all if None."""
    pending = m.pending
    if not pending.copies:
        return
    m.now += 1
    waits = m.mask(m.lanes[i])
    left = []
    for copy in pending.copies:
        done = waits[copy.lanes]
        if groups is not None:
            done &= copy.groups < pending.commits[copy.lanes] - groups
        if done.any():
            _finish(m, copy.only(done))
        if not done.all():
            left.append(copy.only(~done))
    pending.copies = left


def _finish(m: Machine, copy: Copy) -> None:
    # Whole words where possible: a quarter of the elements to move.
    unit = 4 if copy.size >= 4 and (copy.counts % 4 == 0).all() else 1
    steps = np.arange(copy.size // unit)
    inside = (steps * unit)[None, :] < copy.counts[:, None]
    sources = np.where(inside, (copy.sources // unit)[:, None] + steps, 0)
    values = np.where(inside, m.device.views[unit][sources], 0)
    m.shared.views[unit][(copy.targets // unit)[:, None] + steps] = values
    if m.shared.check:
        m.shared.note_copy_done(copy.lanes, copy.targets, copy.size, m.now)


def _bulk(m: Machine, ins: Instruction) -> Operation:
    if "commit_group" in ins.mods or "wait_group" in ins.mods:
        return lambda i: None  # copies to global memory are done at once
    if "tensor" in ins.mods or "reduce" in ins.mods or "prefetch" in ins.mods:
        raise m.unsupported(ins)
    target, source, size = m.address(ins.args[0]), m.address(ins.args[1]), m.read(ins.args[2], "u32")
    to_shared = next(mod for mod in ins.mods if mod.startswith(("shared", "global"))).startswith("shared")
    barrier = m.address(ins.args[3]) if to_shared else None

    def execute(i: Lanes) -> None:
        m.now += 1
        lanes, targets = m.spread(i, target(i))
        _, sources = m.spread(i, source(i))
        _, sizes = m.spread(i, size(i))
        barriers = m.spread(i, barrier(i))[1] if barrier else None
        for k, lane in enumerate(lanes):
            at = None if barriers is None else int(barriers[k])
            _bulk_of_lane(m, ins, lane, int(targets[k]), int(sources[k]), int(sizes[k]), at)

    return execute


def _bulk_of_lane(
    m: Machine, ins: Instruction, lane: int, target: int, source: int, size: int, barrier: int | None
) -> None:
    if size % 16 or target % 16 or source % 16:
        m.fail(
            ins,
            f"cp.async.bulk needs addresses and a size that are multiples of 16, not {size} bytes "
            f"from {source:#x} to {target:#x}",
            lane,
        )
    far, near = (source, target) if barrier is not None else (target, source)
    offset = _check_bulk_global(m, ins, lane, far, size, writes=barrier is None)
    end = offset + size
    near -= SHARED_WINDOW if near >= SHARED_WINDOW else 0
    if near < 0 or near + size > m.layout.shared_bytes:
        m.fail(
            ins,
            f"out-of-bounds cp.async.bulk of {size} bytes at {near:#x} of shared memory "
            f"(the block has {m.layout.shared_bytes} bytes)",
            lane,
        )
    near += m.place_of(lane)[0] * m.shared.stride
    m.counters.bulk_bytes += size
    pieces = near + 16 * np.arange(size // 16)
    owner = np.full(len(pieces), lane)
    if barrier is not None:
        if m.shared.check:
            m.shared.note_copy_started(owner, pieces, 16, ins)
        m.shared.bytes[near : near + size] = POISON
        m.pending.bulk_copies.append(BulkCopy(ins, int(lane), mbarrier.find(m, ins, lane, barrier), near, offset, size))
        return
    if m.shared.check:
        m.shared.note_read(owner, pieces, 16, m.now, ins)
    m.device.bytes[offset:end] = m.shared.bytes[near : near + size]
    m.device.flags[offset:end] |= INITIALISED
    access.note_global_write(m, ins, owner, offset + 16 * np.arange(size // 16), 16)


def _check_bulk_global(m: Machine, ins: Instruction, lane: int, address: int, size: int, writes: bool) -> int:
    """The offset in device memory."""
    what = "cp.async.bulk write" if writes else "cp.async.bulk read"
    addresses, lanes = np.array([address]), np.array([lane])
    offset = int(m.device.offsets(addresses)[0])
    flags = m.device.flags[offset : offset + size] if offset >= 0 else m.device.flags[:0]
    unmapped = len(flags) < size or not (flags & ALLOCATED).all()
    access.refuse_unmapped(m, ins, lanes, addresses, np.array([unmapped]), size, what)
    if writes and (flags & READ_ONLY).any():
        m.fail(ins, f"{what} of {size} bytes to read-only memory at {address:#x}", lane)
    if not writes and not (flags & INITIALISED).all():
        m.hazard("uninitialised global read", ins, lane, address)
    return offset


INSTRUCTIONS = {"cp": _cp}
