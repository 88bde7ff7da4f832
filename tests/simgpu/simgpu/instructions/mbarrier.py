"""mbarrier: barriers in shared memory that count arrivals and bytes of bulk copies.

A phase ends when all arrivals and all expected bytes are in. Bulk copies move their bytes when a wait finds that only
they are missing. Arrivals release what the arriving warp has done, and a successful wait acquires it, which orders
accesses to shared memory between warps.
"""

from __future__ import annotations

import numpy as np

from .. import access
from ..machine import Machine
from ..memory import SHARED_WINDOW
from ..pending import MBarrier
from ..ptx import Instruction, Reg
from ..steps import Lanes, Operation


def find(m: Machine, ins: Instruction, lane: int, address: int) -> MBarrier:
    block, warp = m.place_of(lane)
    inside = int(address) - (SHARED_WINDOW if address >= SHARED_WINDOW else 0)
    barrier = m.pending.mbarriers.get((block, inside))
    if barrier is None:
        m.fail(ins, f"the mbarrier at {inside:#x} was not initialised", lane)
    if m.shared.check and barrier.owner != warp and m.shared.ordered[block, warp, barrier.owner] < barrier.born:
        m.hazard("mbarrier is used by a warp that is not ordered after its initialisation", ins, int(lane), inside)
    return barrier


def arrive(
    m: Machine,
    ins: Instruction,
    lanes: np.ndarray,
    addresses: np.ndarray,
    bytes_expected: np.ndarray | None = None,
    count: int = 1,
) -> None:
    m.now += 1
    for k, (lane, address) in enumerate(zip(lanes, addresses, strict=True)):
        barrier = find(m, ins, lane, address)
        if m.shared.check:
            barrier.clock = np.maximum(barrier.clock, m.shared.clock(*m.place_of(lane), m.now))
        if bytes_expected is not None:
            barrier.bytes += int(bytes_expected[k])
        barrier.pending -= count
        if barrier.pending < 0:
            m.fail(ins, f"more arrivals at the mbarrier than its count of {barrier.count}", lane)
        barrier.finish_phase()


def _finish_bulk_copies(m: Machine, barrier: MBarrier) -> None:
    left = []
    for copy in m.pending.bulk_copies:
        if copy.barrier is not barrier:
            left.append(copy)
            continue
        m.shared.bytes[copy.target : copy.target + copy.size] = m.device.bytes[copy.source : copy.source + copy.size]
        barrier.bytes -= copy.size
        if m.shared.check:
            m.shared.note_bulk_copy_done(copy.target + 16 * np.arange(copy.size // 16), m.now)
            barrier.clock[m.shared.warps] = m.now
    m.pending.bulk_copies = left
    barrier.finish_phase()


def _mbarrier(m: Machine, ins: Instruction) -> Operation:
    op = ins.mods[0]
    if op not in _OPERATIONS:
        raise m.unsupported(ins)
    return _OPERATIONS[op](m, ins)


def _init(m: Machine, ins: Instruction) -> Operation:
    address, count = m.address(ins.args[0]), m.read(ins.args[1], "u32")

    def execute(i: Lanes) -> None:
        m.now += 1
        lanes, addresses = m.spread(i, address(i))
        access.check_shared(m, ins, lanes, addresses, 8, "mbarrier")
        for lane, at, arrivals in zip(lanes, addresses, m.spread(i, count(i))[1], strict=True):
            block, warp = m.place_of(lane)
            nothing = np.full(m.shared.warps + 1, -1, np.int64)
            m.pending.mbarriers[block, int(at)] = MBarrier(
                int(arrivals), int(arrivals), owner=warp, born=m.now, clock=nothing, released=nothing.copy()
            )

    return execute


def _inval(m: Machine, ins: Instruction) -> Operation:
    return lambda i: None


def _arrive(m: Machine, ins: Instruction) -> Operation:
    """mbarrier.arrive[.expect_tx] [state,] address [, count]; the state is the number of the phase."""
    args = list(ins.args)
    write_state = m.write(args.pop(0), "b64") if isinstance(args[0], Reg) else None
    address = m.address(args[0])
    read_count = m.read(args[1], "u32") if len(args) > 1 else None
    expects = "expect_tx" in ins.mods

    def execute(i: Lanes) -> None:
        lanes, addresses = m.spread(i, address(i))
        counts = m.spread(i, read_count(i))[1] if read_count else None
        if write_state:
            phases = [find(m, ins, lane, at).phase for lane, at in zip(lanes, addresses, strict=True)]
            write_state(i, np.array(phases, np.uint64))
        if expects or counts is None:
            arrive(m, ins, lanes, addresses, counts)
        else:
            for k, count in enumerate(counts):
                arrive(m, ins, lanes[k : k + 1], addresses[k : k + 1], count=int(count))

    return execute


def _change_bytes(m: Machine, ins: Instruction) -> Operation:
    address, read = m.address(ins.args[0]), m.read(ins.args[1], "u32")
    sign = 1 if ins.mods[0] == "expect_tx" else -1

    def execute(i: Lanes) -> None:
        lanes, addresses = m.spread(i, address(i))
        for lane, at, change in zip(lanes, addresses, m.spread(i, read(i))[1], strict=True):
            barrier = find(m, ins, lane, at)
            barrier.bytes += sign * int(change)
            barrier.finish_phase()

    return execute


def _wait(m: Machine, ins: Instruction) -> Operation:
    write, address = m.write(ins.args[0], "pred"), m.address(ins.args[1])
    parity = "parity" in ins.mods
    read = m.read(ins.args[2], "u32" if parity else "u64")

    def execute(i: Lanes) -> None:
        m.now += 1
        lanes, addresses = m.spread(i, address(i))
        phases = m.spread(i, read(i))[1]
        done = np.zeros(len(lanes), bool)
        for k, lane in enumerate(lanes):
            barrier = find(m, ins, lane, addresses[k])
            if barrier.bytes != 0 and barrier.pending == 0:
                _finish_bulk_copies(m, barrier)
            phase = int(phases[k])
            done[k] = (barrier.phase & 1) != phase if parity else barrier.phase > phase
            if done[k] and m.shared.check:
                m.shared.acquire(*m.place_of(lane), barrier.released)
        write(i, done)

    return execute


_OPERATIONS = {
    "init": _init,
    "inval": _inval,
    "arrive": _arrive,
    "expect_tx": _change_bytes,
    "complete_tx": _change_bytes,
    "try_wait": _wait,
    "test_wait": _wait,
}

INSTRUCTIONS = {"mbarrier": _mbarrier}
