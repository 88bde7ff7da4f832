"""Which block of a launch has written each piece of global memory.

Blocks are ordered by nothing but atomics, so two of them that store to one byte race, whichever comes last. The table
spans the device's memory, but only the pages of it that a kernel writes to take memory.
"""

from __future__ import annotations

import mmap

import numpy as np

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's value: Python names it from 3.13 on


class Writers:
    def __init__(self, memory: int, granule: int) -> None:
        """For `memory` bytes, written in aligned pieces of no less than `granule`."""
        self.shift = granule.bit_length() - 1
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        table = mmap.mmap(-1, 4 * ((memory >> self.shift) + 1), flags=flags)
        self.last = np.frombuffer(table, np.int32)  # block + 1; 0: none

    def note(self, blocks: np.ndarray, offsets: np.ndarray, size: int) -> tuple[int, int] | None:
        """Stores of `size` bytes by blocks. (which of them, the other block) for one that another block has written."""
        pieces = offsets >> self.shift
        count = size >> self.shift
        if count > 1:
            pieces = (pieces[:, None] + np.arange(count)).ravel()
            blocks = np.repeat(blocks, count)
        writer = blocks.astype(np.int32) + 1
        before = self.last[pieces]
        self.last[pieces] = writer
        after = self.last[pieces]  # not `writer` where two blocks write in this very instruction
        other = np.where(after != writer, after, before)
        bad = (other != 0) & (other != writer)
        if not bad.any():
            return None
        k = int(np.argmax(bad))
        return k // count, int(other[k]) - 1
