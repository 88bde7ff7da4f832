"""What asynchronous instructions have started and not finished: copies, mbarriers, wgmma.

State of a batch of blocks, in plain records. The rules by which it changes are those of the instructions
(instructions/async_copy.py, mbarrier.py, wgmma.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .ptx import Instruction


@dataclass
class Copy:
    """One execution of cp.async; arrays have an element for each lane."""

    ins: Instruction
    size: int  # bytes written by a lane
    lanes: np.ndarray
    targets: np.ndarray  # offsets in shared memory
    sources: np.ndarray  # offsets in global memory
    counts: np.ndarray  # bytes read by a lane; the rest of `size` is zero
    groups: np.ndarray  # commit group of the lane

    def only(self, which: np.ndarray) -> Copy:
        arrays = (self.lanes, self.targets, self.sources, self.counts, self.groups)
        return Copy(self.ins, self.size, *(array[which] for array in arrays))


@dataclass
class MBarrier:
    count: int  # arrivals of a phase
    pending: int  # arrivals that this phase still waits for
    owner: int  # the warp that initialised it
    born: int  # when
    clock: np.ndarray  # what the arrivals of this phase have released, by warp
    released: np.ndarray  # the same of the last complete phase
    bytes: int = 0  # expected of bulk copies and not yet complete
    phase: int = 0

    def finish_phase(self) -> None:
        """The next phase begins if nothing more is waited for."""
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            self.released = self.clock.copy()


@dataclass
class BulkCopy:
    """A bulk copy from global to shared memory; it completes when its mbarrier is asked about it."""

    ins: Instruction
    lane: int
    barrier: MBarrier
    target: int
    source: int
    size: int


@dataclass
class Multiplication:
    ins: Instruction
    lane: int
    finish: Callable[[], None]


@dataclass
class WgmmaGroup:
    """What is started between two wgmma.commit_group."""

    multiplications: list[Multiplication] = field(default_factory=list)
    committed: bool = False


@dataclass
class Accumulator:
    """What a register will hold once no multiplication into it is in flight."""

    values: np.ndarray
    in_flight: np.ndarray  # how many, for each lane


class Pending:
    def __init__(self, lanes: int) -> None:
        self.copies: list[Copy] = []
        self.commits = np.zeros(lanes, np.int64)  # cp.async.commit_group executed by each lane
        self.mbarriers: dict[tuple[int, int], MBarrier] = {}  # by block and address
        self.bulk_copies: list[BulkCopy] = []
        self.wgmma: list[WgmmaGroup] = []
        self.accumulators: dict[str, Accumulator] = {}

    def unfinished(self) -> Iterator[tuple[Instruction, int]]:
        """Operations in flight, one of each kind at least, with a lane that started it."""
        if self.copies:
            yield self.copies[0].ins, int(self.copies[0].lanes[0])
        if self.bulk_copies:
            yield self.bulk_copies[0].ins, self.bulk_copies[0].lane
        for group in self.wgmma:
            for multiplication in group.multiplications[:1]:
                yield multiplication.ins, multiplication.lane
