"""What a launch did, counted in the units of NVIDIA's profiler where there is one.

Counts only: no times and no model of caches. Sectors are the distinct 32-byte pieces of global memory that a warp's
request touches; wavefronts are the passes that shared memory needs for a request, `ideal` of them without bank
conflicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .ptx import Instruction, Kernel


@dataclass
class GlobalCount:
    ins: Instruction
    requests: int = 0
    sectors: int = 0
    bytes: int = 0
    lines: int = 0  # of 128 bytes

    @property
    def sector_use(self) -> float:
        """Bytes asked for over bytes moved: 1 is fully coalesced, more is a broadcast."""
        return self.bytes / (32 * self.sectors) if self.sectors else 0


@dataclass
class SharedCount:
    ins: Instruction
    requests: int = 0
    wavefronts: int = 0
    ideal: int = 0
    bytes: int = 0

    @property
    def conflicts(self) -> int:
        return self.wavefronts - self.ideal


class Counters:
    def __init__(self, instructions: int, count_memory: bool) -> None:
        self.count_memory = count_memory
        self.warps = np.zeros(instructions + 1, np.int64)  # executions of each instruction
        self.threads = np.zeros(instructions + 1, np.int64)
        self.divergent = np.zeros(instructions + 1, np.int64)
        self.global_accesses: dict[tuple[int, str], GlobalCount] = {}  # by PTX line and kind
        self.shared_accesses: dict[tuple[int, str], SharedCount] = {}
        self.mma = 0
        self.macs = 0
        self.ldmatrix = 0
        self.barriers = 0
        self.atomic_rounds = 0
        self.bulk_bytes = 0

    def executed(self, start: int, stop: int, warps: int, threads: int) -> None:
        self.warps[start:stop] += warps
        self.threads[start:stop] += threads

    def multiplied(self, warps: int, macs: int) -> None:
        self.mma += warps
        self.macs += warps * macs

    def global_access(self, ins: Instruction, kind: str, lanes: np.ndarray, offsets: np.ndarray, size: int) -> None:
        if not self.count_memory:
            return
        warps = lanes >> 5
        sectors = np.sort((warps << 40) | (offsets >> 5))
        lines = sectors >> 2
        count = self.global_accesses.setdefault((ins.line, kind), GlobalCount(ins))
        count.requests += _runs(warps)
        count.sectors += _runs(sectors)
        count.lines += _runs(lines)
        count.bytes += len(lanes) * size

    def shared_access(
        self, ins: Instruction, kind: str, lanes: np.ndarray, addresses: np.ndarray, size: int, lane_count: int
    ) -> None:
        """One pass serves a warp, or half or a quarter of it for accesses of 8 or 16 bytes; see _words."""
        if not self.count_memory:
            return
        words = _words(kind, lanes, addresses, size, lane_count)
        passes = len(words)
        # Sorted by bank and word, so that each distinct word counts once for its bank: broadcasts are free.
        words = np.sort(np.where(words < 0, -1, (words & 31) << 40 | words), axis=1)
        distinct = np.ones(words.shape, bool)
        np.not_equal(words[:, 1:], words[:, :-1], out=distinct[:, 1:])
        distinct &= words >= 0
        rows, columns = np.nonzero(distinct)
        banks = words[rows, columns] >> 40
        per_bank = np.bincount(rows * 32 + banks, minlength=passes * 32).reshape(passes, 32)
        count = self.shared_accesses.setdefault((ins.line, kind), SharedCount(ins))
        count.requests += _runs(lanes >> 5)
        count.wavefronts += int(per_bank.max(1).sum())
        count.ideal += passes
        count.bytes += len(lanes) * size

    def totals(self) -> dict[str, Any]:
        global_kinds: dict[str, dict[str, int]] = {}
        for (_, kind), access in self.global_accesses.items():
            total = global_kinds.setdefault(kind, dict.fromkeys(("requests", "sectors", "bytes", "lines"), 0))
            for name in total:
                total[name] += getattr(access, name)
        shared_kinds: dict[str, dict[str, int]] = {}
        for (_, kind), seen in self.shared_accesses.items():
            names = ("requests", "wavefronts", "ideal", "conflicts", "bytes")
            total = shared_kinds.setdefault(kind, dict.fromkeys(names, 0))
            for name in total:
                total[name] += getattr(seen, name)
        return {
            "warp_instructions": int(self.warps.sum()),
            "thread_instructions": int(self.threads.sum()),
            "divergent_branches": int(self.divergent.sum()),
            "barriers": self.barriers,
            "mma": self.mma,
            "macs": self.macs,
            "ldmatrix": self.ldmatrix,
            "atomic_rounds": self.atomic_rounds,
            "bulk_bytes": self.bulk_bytes,
            "global": {
                kind: {**total, "sector_use": round(total["bytes"] / (32 * total["sectors"]), 3)}
                for kind, total in global_kinds.items()
            },
            "shared": shared_kinds,
        }

    def opcodes(self, kernel: Kernel) -> dict[str, int]:
        """Executions by warps of each opcode, most first."""
        counts: dict[str, int] = {}
        for pc, ins in enumerate(kernel.code):
            if self.warps[pc]:
                counts[ins.op] = counts.get(ins.op, 0) + int(self.warps[pc])
        return dict(sorted(counts.items(), key=lambda entry: -entry[1]))

    def hot_conflicts(self, limit: int = 5) -> list[tuple[int, int, str, int, str]]:
        """The worst bank conflicts: (conflicts, PTX line, kind, requests, instruction)."""
        rows = [
            (seen.conflicts, line, kind, seen.requests, seen.ins.text)
            for (line, kind), seen in self.shared_accesses.items()
            if seen.conflicts
        ]
        return sorted(rows, key=lambda row: -row[0])[:limit]

    def uncoalesced(self, limit: int = 5) -> list[tuple[float, int, str, int, str]]:
        """The worst use of sectors: (sector use, PTX line, kind, sectors, instruction)."""
        rows = [
            (round(seen.sector_use, 3), line, kind, seen.sectors, seen.ins.text)
            for (line, kind), seen in self.global_accesses.items()
            if seen.sector_use < 0.99
        ]
        return sorted(rows)[:limit]


def _runs(values: np.ndarray) -> int:
    """How many stretches of equal values there are."""
    return 1 + int(np.count_nonzero(values[1:] != values[:-1]))


def _words(kind: str, lanes: np.ndarray, addresses: np.ndarray, size: int, lane_count: int) -> np.ndarray:
    """The 4-byte words that each pass asks for: (passes, lanes of a pass * words of a lane), -1 where there is none."""
    per_pass = {8: 16, 16: 8}.get(size, 32)
    whole_warps = len(lanes) % 32 == 0 or kind in ("ldmatrix", "stmatrix")
    if len(lanes) % per_pass == 0 and whole_warps and _consecutive(lanes, per_pass):
        words = (addresses >> 2).reshape(-1, per_pass)
    else:
        by_lane = np.full(lane_count, -1, np.int64)
        by_lane[lanes] = addresses >> 2
        every = by_lane.reshape(-1, per_pass)
        words = every[(every >= 0).any(1)]
    count = max(1, size // 4)
    if count == 1:
        return words
    return np.where(words[:, :, None] >= 0, words[:, :, None] + np.arange(count), -1).reshape(len(words), -1)


def _consecutive(lanes: np.ndarray, per_pass: int) -> bool:
    rows = lanes.reshape(-1, per_pass)
    return bool((rows[:, 0] % per_pass == 0).all() and (rows[:, -1] - rows[:, 0] == per_pass - 1).all())
