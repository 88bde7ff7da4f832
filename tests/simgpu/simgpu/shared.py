"""Shared memory of a batch of blocks, with a happens-before check of every access.

For each granule (the smallest access that the kernel makes) it remembers the last write, its lane, and the last read
and atomic operation of each warp, as times of the simulator's step counter. Atomics race with plain accesses only.
ordered[block, w, v] is the time up to which everything that warp v did happens before what warp w does next; barriers
and mbarriers raise it. An access that is later than that is a race, whatever the order in which the simulator happened
to run the warps. Column `warps` of that table is the asynchronous proxy: bulk copies. Bounds, alignment and bank
conflicts are checked and counted elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .memory import POISON
from .ptx import Instruction

PENDING = 1 << 62  # a time that nothing is ordered after: the access has not happened yet

_ASYNC_LANE = -1
_OTHERS = 1 << 30  # beside a lane: others of its warp have done the same since the warp was last synchronised

# (kind, instruction, lane, address in the block, the other access's lane)
Report = Callable[[str, Instruction, int, int, int | None], None]
HeldReads = tuple[np.ndarray, np.ndarray]


class SharedMemory:
    def __init__(self, blocks: int, warps: int, size: int, granule: int, report: Report, check: bool) -> None:
        self.size = size
        # The gap after each block catches what runs over its end before any other block's memory is touched.
        self.stride = (size + 15) // 16 * 16 + 16
        self.bytes = np.full(blocks * self.stride, POISON, np.uint8)
        self.views = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.warps = warps
        self.lanes_per_block = warps * 32
        self.check = check
        self.report = report
        self.shift = granule.bit_length() - 1
        if not check:
            return
        count = self.bytes.size >> self.shift
        self.granules = count
        self.written_at = np.full(count, -1, np.int64)
        self.written_by = np.full(count, -1, np.int32)
        self.read_at = np.full(count, -1, np.int64)
        self.read_by = np.full(count, -1, np.int32)
        self.read_at_by_warp = np.full((warps + 1) * count, -1, np.int64)
        self.ordered = np.full((blocks, warps + 1, warps + 1), -1, np.int64)
        self.block_synced_at = np.full(blocks, -1, np.int64)  # the last barrier of all warps
        self.warp_synced_at = np.full(blocks * (warps + 1), -1, np.int64)  # the last __syncwarp or barrier
        # Of atomics, as of reads; made when there is one.
        self.atomic_at: np.ndarray | None = None
        self.atomic_by = self.read_by[:0]
        self.atomic_at_by_warp = self.read_at_by_warp[:0]

    def note_read(self, lanes: np.ndarray, offsets: np.ndarray, size: int, now: int, ins: Instruction) -> None:
        granules, lanes = self._granules(lanes, offsets, size)
        written_at = self.written_at[granules]
        block = lanes // self.lanes_per_block
        recent = written_at > self.block_synced_at[block]
        if recent.any():
            self._check_writes(
                granules[recent], lanes[recent], written_at[recent], block[recent], ins, "read after write"
            )
        self._check_unwritten(granules, lanes, written_at, ins, "read")
        if self.atomic_at is not None:
            self._check_earlier(
                "read after atomic", granules, lanes, block, ins, self.atomic_at_by_warp, self.atomic_by
            )
        self._note(granules, lanes, block, now, self.read_at, self.read_by, self.read_at_by_warp)

    def note_write(self, lanes: np.ndarray, offsets: np.ndarray, size: int, now: int, ins: Instruction) -> bool:
        """True if two lanes write the same granule in this instruction."""
        granules, lanes = self._check_before_write(lanes, offsets, size, ins)
        self.written_at[granules] = now
        self.written_by[granules] = lanes
        last = self.written_by[granules]
        between_warps = self._warp(last) != self._warp(lanes)
        if between_warps.any():
            k = np.argmax(between_warps)
            what = "write after write: no barrier between warps"
            self.report(what, ins, lanes[k], self._address(granules[k]), last[k])
        return bool((last != lanes).any())

    def note_atomic(self, lanes: np.ndarray, offsets: np.ndarray, size: int, now: int, ins: Instruction) -> None:
        if self.atomic_at is None:
            self.atomic_at, self.atomic_by = np.full_like(self.read_at, -1), np.full_like(self.read_by, -1)
            self.atomic_at_by_warp = np.full_like(self.read_at_by_warp, -1)
        granules, lanes = self._check_plain(lanes, offsets, size, ins, "atomic after write", "atomic after read")
        if "exch" not in ins.mods:
            self._check_unwritten(granules, lanes, self.written_at[granules], ins, "atomic")
        block = lanes // self.lanes_per_block
        self._note(granules, lanes, block, now, self.atomic_at, self.atomic_by, self.atomic_at_by_warp)

    def note_copy_started(self, lanes: np.ndarray, offsets: np.ndarray, size: int, ins: Instruction) -> None:
        granules, lanes = self._check_before_write(lanes, offsets, size, ins)
        self.written_at[granules] = PENDING
        self.written_by[granules] = lanes

    def note_copy_done(self, lanes: np.ndarray, offsets: np.ndarray, size: int, now: int) -> None:
        granules, lanes = self._granules(lanes, offsets, size)
        self.written_at[granules] = now
        self.written_by[granules] = lanes

    def note_bulk_copy_done(self, offsets: np.ndarray, now: int) -> None:
        """16 bytes at each offset were written by the asynchronous proxy, not by a warp."""
        granules, _ = self._granules(offsets, offsets, 16)
        self.written_at[granules] = now
        self.written_by[granules] = _ASYNC_LANE

    def hold_reads(self, lanes: np.ndarray, offsets: np.ndarray, size: int) -> HeldReads:
        """Reads of an asynchronous operation: any write before release_reads is a hazard."""
        granules, lanes = self._granules(lanes, offsets, size)
        by_warp = self._warp(lanes) * self.granules + granules
        self.read_at[granules] = PENDING
        self.read_at_by_warp[by_warp] = PENDING
        return granules, by_warp

    def release_reads(self, held: HeldReads, now: int) -> None:
        granules, by_warp = held
        self.read_at[granules] = now
        self.read_at_by_warp[by_warp] = now

    def block_barrier(self, block: int, warps: np.ndarray, now: int, everyone: bool) -> None:
        """`warps` have met; `everyone` says that these are all that still run."""
        if not self.check:
            return
        self.ordered[block][np.ix_(warps, warps)] = now
        if everyone:
            self.ordered[block, : self.warps, : self.warps] = now
            self.block_synced_at[block] = now
        self.warp_synced_at[block * (self.warps + 1) + warps] = now

    def warp_barrier(self, warps: np.ndarray, now: int) -> None:
        """pre: warps counts through all blocks: block * self.warps + warp."""
        if self.check:
            self.warp_synced_at[warps // self.warps * (self.warps + 1) + warps % self.warps] = now

    def clock(self, block: int, warp: int, now: int) -> np.ndarray:
        """What is ordered before the next step of a warp: what it releases when it arrives at an mbarrier."""
        clock: np.ndarray = self.ordered[block, warp].copy()
        clock[warp] = now
        return clock

    def acquire(self, block: int, warp: int, clock: np.ndarray) -> None:
        self.ordered[block, warp] = np.maximum(self.ordered[block, warp], clock)

    def _granules(self, lanes: np.ndarray, offsets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        granules = offsets >> self.shift
        count = size >> self.shift
        if count > 1:
            granules = (granules[:, None] + np.arange(count)).ravel()
            lanes = np.repeat(lanes, count)
        return granules, lanes

    def _warp(self, lanes: np.ndarray) -> np.ndarray:
        return (lanes & ~_OTHERS) % self.lanes_per_block >> 5

    def _address(self, granule: int) -> int:
        return int(granule << self.shift) % self.stride

    def _check_writes(
        self,
        granules: np.ndarray,
        lanes: np.ndarray,
        written_at: np.ndarray,
        block: np.ndarray,
        ins: Instruction,
        what: str,
    ) -> None:
        """The accesses of `lanes` against the last write of each granule."""
        writer = self.written_by[granules]
        warp = self._warp(lanes)
        writer_warp = np.where(writer < 0, self.warps, self._warp(writer))
        pending = written_at == PENDING
        between_warps = ~pending & (warp != writer_warp) & (written_at > self.ordered[block, warp, writer_warp])
        synced_at = self.warp_synced_at[block * (self.warps + 1) + warp]
        within_warp = ~pending & (warp == writer_warp) & (lanes != writer) & (written_at > synced_at)
        for bad, why in (
            (pending, "asynchronous copy still in flight"),
            (between_warps, "no barrier between warps"),
            (within_warp, "no __syncwarp between lanes of a warp"),
        ):
            if bad.any():
                k = np.argmax(bad)
                self.report(f"{what}: {why}", ins, lanes[k], self._address(granules[k]), writer[k])

    def _note(
        self,
        granules: np.ndarray,
        lanes: np.ndarray,
        block: np.ndarray,
        now: int,
        at: np.ndarray,
        by: np.ndarray,
        at_by_warp: np.ndarray,
    ) -> None:
        warp = self._warp(lanes)
        before = by[granules]
        recent = at_by_warp[warp * self.granules + granules] > self.warp_synced_at[block * (self.warps + 1) + warp]
        others = recent & (before != lanes) & (self._warp(before) == warp)
        by[granules] = np.where(others, lanes | _OTHERS, lanes)
        several = (by[granules] & ~_OTHERS) != lanes
        if several.any():
            by[granules[several]] |= _OTHERS
        at[granules] = now
        at_by_warp[warp * self.granules + granules] = now

    def _check_before_write(
        self, lanes: np.ndarray, offsets: np.ndarray, size: int, ins: Instruction
    ) -> tuple[np.ndarray, np.ndarray]:
        granules, lanes = self._check_plain(lanes, offsets, size, ins, "write after write", "write after read")
        if self.atomic_at is not None:
            block = lanes // self.lanes_per_block
            self._check_earlier(
                "write after atomic", granules, lanes, block, ins, self.atomic_at_by_warp, self.atomic_by
            )
        return granules, lanes

    def _check_plain(
        self, lanes: np.ndarray, offsets: np.ndarray, size: int, ins: Instruction, after_write: str, after_read: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """What changes memory against the plain writes and reads before it."""
        granules, lanes = self._granules(lanes, offsets, size)
        block = lanes // self.lanes_per_block
        synced_at = self.block_synced_at[block]
        written_at = self.written_at[granules]
        recent = written_at > synced_at
        if recent.any():
            self._check_writes(granules[recent], lanes[recent], written_at[recent], block[recent], ins, after_write)
        recent = self.read_at[granules] > synced_at
        if recent.any():
            self._check_earlier(
                after_read, granules[recent], lanes[recent], block[recent], ins, self.read_at_by_warp, self.read_by
            )
        return granules, lanes

    def _check_unwritten(
        self, granules: np.ndarray, lanes: np.ndarray, written_at: np.ndarray, ins: Instruction, what: str
    ) -> None:
        unwritten = written_at < 0
        if self.atomic_at is not None:
            unwritten &= self.atomic_at[granules] < 0
        if unwritten.any():
            k = np.argmax(unwritten)
            self.report(f"uninitialised shared {what}", ins, lanes[k], self._address(granules[k]), None)

    def _check_earlier(
        self,
        what: str,
        granules: np.ndarray,
        lanes: np.ndarray,
        block: np.ndarray,
        ins: Instruction,
        at_by_warp: np.ndarray,
        by: np.ndarray,
    ) -> None:
        """The accesses of `lanes` against the last ones of each warp, and of the lane that came last in their own."""
        warp = self._warp(lanes)
        for other in range(self.warps):
            at = at_by_warp[other * self.granules + granules]
            held = at == PENDING
            bad = ((warp != other) | held) & (at > self.ordered[block, warp, other])
            if bad.any():
                k = np.argmax(bad)
                why = "asynchronous operation still reads" if held[k] else "no barrier between warps"
                base = int(block[k]) * self.lanes_per_block
                self.report(f"{what}: {why}", ins, lanes[k], self._address(granules[k]), base + other * 32)
        last, at = by[granules], at_by_warp[warp * self.granules + granules]
        synced_at = self.warp_synced_at[block * (self.warps + 1) + warp]
        bad = (last >= 0) & (self._warp(last) == warp) & (last != lanes) & (at > synced_at) & (at != PENDING)
        if bad.any():
            k = np.argmax(bad)
            why = "no __syncwarp between lanes of a warp"
            self.report(f"{what}: {why}", ins, lanes[k], self._address(granules[k]), last[k] & ~_OTHERS)
