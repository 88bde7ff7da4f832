"""Runs a batch of blocks to its end: which lanes execute which instruction next.

Lanes at the same program counter form a group and advance together. The group with the lowest program counter goes
first, which brings diverged lanes together again where their paths meet; when one of them spins, they take turns. Lanes
that wait for others, at a barrier or for the rest of their warp, are parked; if nothing else can run, that is a
deadlock. This is one schedule of many: races are found by clocks (shared.py), not by luck.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .instructions import decode
from .launch import SimError
from .machine import Machine
from .ptx import Imm
from .steps import ALL, Barrier, Branch, Exit, Lanes, Step, WarpSync

_SPIN_LIMIT = 64  # backward branches before another group gets a turn
_FULL_WARP = 0xFFFFFFFF


@dataclass
class _Arrivals:
    """At one barrier of one block, since it last completed."""

    arrived: np.ndarray
    waiting: dict[int, np.ndarray] = field(default_factory=dict)  # by program counter
    threads: int | None = None


def _no_operation(i: Lanes) -> None:
    raise AssertionError("the scheduler itself acts on this step")


class Scheduler:
    def __init__(self, machine: Machine) -> None:
        self.m = machine
        self.code = machine.kernel.code
        self.end = len(self.code)
        self.steps = [decode(machine, ins) for ins in self.code]
        self.operations = [step if callable(step) else _no_operation for step in self.steps]
        # From each instruction, the next one that is not a plain operation.
        self.next_control = [self.end] * (self.end + 1)
        for pc in range(self.end - 1, -1, -1):
            self.next_control[pc] = self.next_control[pc + 1] if callable(self.steps[pc]) else pc
        self.runnable: dict[int, np.ndarray] = {}  # program counter -> lanes
        self.queued_at: dict[int, int] = {}
        self.parked: dict[int, np.ndarray] = {}  # waiting for the rest of their warp
        self.barriers: dict[tuple[int, int], _Arrivals] = {}  # by block and number
        self.turn = 0

    def run(self) -> None:
        self._enqueue(0, self.m.alive.copy())
        spins = 0
        with np.errstate(all="ignore"):
            while self.runnable or self.parked or self.barriers:
                if not self.runnable:
                    raise self._deadlock()
                self.turn += 1
                if len(self.runnable) > 1 and spins > _SPIN_LIMIT:
                    pc = min(self.runnable, key=self.queued_at.__getitem__)
                    spins = 0
                else:
                    pc = min(self.runnable)
                if self._run_group(pc, self.runnable.pop(pc)):
                    spins += 1
                    if self.turn > self.m.launch.max_steps:
                        raise self._endless()
        for ins, lane in self.m.pending.unfinished():
            self.m.hazard("asynchronous operation was never waited for", ins, lane)

    def _enqueue(self, pc: int, mask: np.ndarray) -> None:
        if pc in self.runnable:
            self.runnable[pc] = self.runnable[pc] | mask
        else:
            self.runnable[pc] = mask
            self.queued_at[pc] = self.turn

    def _lanes(self, mask: np.ndarray) -> Lanes:
        return ALL if mask.all() else np.nonzero(mask)[0]

    def _guard(self, pc: int, i: Lanes) -> np.ndarray | None:
        """For each of the lanes whether the instruction's predicate holds; None if it has none."""
        guard = self.code[pc].guard
        if guard is None:
            return None
        holds = self.m.registers[guard.name][i]
        return ~holds if guard.negated else holds

    def _run_group(self, pc: int, mask: np.ndarray) -> bool:
        """Advances lanes until they meet others, wait, diverge or end. True if they went backward."""
        m, steps = self.m, self.steps
        i = self._lanes(mask)
        lanes = m.lane_count if i is ALL else len(m.lanes[i])
        warps = m.lane_count >> 5 if i is ALL else len(np.unique(m.lanes[i] >> 5))
        meet = min((other for other in self.runnable if other > pc), default=self.end + 1)
        while True:
            stop = min(self.next_control[pc], meet)
            for operation in self.operations[pc:stop]:
                operation(i)
            m.counters.executed(pc, stop, warps, lanes)
            pc = stop
            if pc == meet:
                self._enqueue(pc, mask)
                return False
            if pc == self.end:
                self._exit(mask)
                return False
            m.counters.executed(pc, pc + 1, warps, lanes)
            step = steps[pc]
            if isinstance(step, Branch):
                following = self._branch(pc, step.target, i, mask)
                if following is None:
                    return step.target <= pc
                if following <= pc or following > meet:
                    self._enqueue(following, mask)
                    return following <= pc
                pc = following
            elif isinstance(step, WarpSync):
                if not self._meet_warp(pc, step, i, mask):
                    return False
                pc += 1
            elif isinstance(step, Exit):
                self._exit_guarded(pc, i, mask)
                return False
            elif isinstance(step, Barrier):
                self._arrive(pc, step, i, mask)
                return False
            if pc == meet:
                self._enqueue(pc, mask)
                return False

    def _branch(self, pc: int, target: int, i: Lanes, mask: np.ndarray) -> int | None:
        """Where all lanes go on; None if they diverge, in which case both parts are queued."""
        holds = self._guard(pc, i)
        if holds is None or holds.all():
            return target
        if not holds.any():
            return pc + 1
        taken = self.m.mask(self.m.lanes[i][holds])
        other = mask & ~taken
        split = taken.reshape(-1, 32).any(1) & other.reshape(-1, 32).any(1)
        self.m.counters.divergent[pc] += int(split.sum())
        self._enqueue(target, taken)
        self._enqueue(pc + 1, other)
        return None

    def _exit_guarded(self, pc: int, i: Lanes, mask: np.ndarray) -> None:
        leaving = self._guarded(pc, i, mask)
        staying = mask & ~leaving
        if staying.any():
            self._enqueue(pc + 1, staying)
        if leaving.any():
            self._exit(leaving)

    def _guarded(self, pc: int, i: Lanes, mask: np.ndarray) -> np.ndarray:
        """Those of the lanes whose predicate holds; `mask` itself if that is all of them."""
        holds = self._guard(pc, i)
        if holds is None or holds.all():
            return mask
        return self.m.mask(self.m.lanes[i][holds])

    def _exit(self, mask: np.ndarray) -> None:
        """Lanes that have ended no longer count: others may have waited for them."""
        self.m.alive &= ~mask
        for key in list(self.barriers):
            self._complete(key)
        for pc in list(self.parked):
            self._enqueue(pc, self.parked.pop(pc))

    def _meet_warp(self, pc: int, step: WarpSync, i: Lanes, group: np.ndarray) -> bool:
        """True if all lanes of the group have executed it and go on together; else they have been queued or parked."""
        mask = self._guarded(pc, i, group)
        if not mask.any():
            self._enqueue(pc + 1, group)
            return False
        if i is ALL and mask is group and self._needs_full_warps(pc, step):
            step.execute(i, mask)
            return True
        if mask is not group:
            self._enqueue(pc + 1, group & ~mask)
        before = self.parked.pop(pc, None)
        here = mask if before is None else mask | before
        here_by_warp = here.reshape(-1, 32)
        complete = here_by_warp.any(1) & ~(self._needed(pc, step, here) & ~here_by_warp).any(1)
        go = (here_by_warp & complete[:, None]).ravel()
        wait = here & ~go
        if wait.any():
            self.parked[pc] = wait
        if not go.any():
            return False
        step.execute(self._lanes(go), go)
        if mask is group and before is None and not wait.any():
            return True
        self._enqueue(pc + 1, go)
        return False

    def _needs_full_warps(self, pc: int, step: WarpSync) -> bool:
        """True only if that is known without looking at each lane."""
        if step.members is None:
            return True
        return isinstance(self.code[pc].args[-1], Imm) and int(step.members(ALL)[0]) == _FULL_WARP

    def _needed(self, pc: int, step: WarpSync, here: np.ndarray) -> np.ndarray:
        """(warps, 32): the lanes that must be here before any goes on."""
        m, ins = self.m, self.code[pc]
        by_warp, alive = here.reshape(-1, 32), self.m.alive.reshape(-1, 32)
        any_here: np.ndarray = np.logical_or.reduce(by_warp, axis=1)
        if step.aligned:
            partly_gone = np.logical_and(any_here, np.logical_not(alive.all(1)))
            if partly_gone.any():
                lane = int(np.argmax((by_warp & partly_gone[:, None]).ravel()))
                m.fail(ins, "an .aligned instruction is executed after a lane of the warp has ended", lane)
            return np.broadcast_to(any_here[:, None], by_warp.shape)
        if step.members is None:
            return by_warp
        masks = np.zeros(m.lane_count, np.uint32)
        lanes = np.nonzero(here)[0]
        masks[lanes] = step.members(lanes)
        members = masks.reshape(-1, 32)[np.arange(len(by_warp)), by_warp.argmax(1)]
        named = ((members[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)).astype(bool)
        needed: np.ndarray = named & alive & any_here[:, None]
        outside = (by_warp & ~needed).ravel()
        if outside.any():
            lane = int(np.argmax(outside))
            m.fail(
                ins,
                "a lane executes a .sync instruction without being in its membermask "
                f"({int(members[lane >> 5]):#010x}, lane {lane & 31})",
                lane,
            )
        return needed

    def _arrive(self, pc: int, step: Barrier, i: Lanes, group: np.ndarray) -> None:
        m = self.m
        mask = self._guarded(pc, i, group)
        if mask is not group:
            self._enqueue(pc + 1, group & ~mask)
        if not mask.any():
            return
        if step.arrive_only:
            self._enqueue(pc + 1, mask)
        lanes = np.nonzero(mask)[0]
        numbers = m.spread(lanes, step.number(lanes))[1]
        threads = m.spread(lanes, step.threads(lanes))[1] if step.threads else None
        blocks = m.block_of[lanes]
        for key in np.unique(blocks << 32 | numbers).tolist():
            block, number = key >> 32, key & 0xFFFFFFFF
            chosen = (blocks == block) & (numbers == number)
            arriving = m.mask(lanes[chosen])
            arrivals = self.barriers.setdefault((block, number), _Arrivals(np.zeros(m.lane_count, bool)))
            arrivals.arrived |= arriving
            if threads is not None:
                arrivals.threads = int(threads[chosen][0])
            if not step.arrive_only:
                waiting = arrivals.waiting.get(pc)
                arrivals.waiting[pc] = arriving if waiting is None else waiting | arriving
            self._complete((block, number))

    def _complete(self, key: tuple[int, int]) -> None:
        """Lets the lanes at a barrier go on, if all that it waits for have arrived."""
        m, arrivals = self.m, self.barriers[key]
        block = key[0]
        of_block = slice(block * m.lanes_per_block, (block + 1) * m.lanes_per_block)
        arrived, alive = arrivals.arrived[of_block], m.alive[of_block]
        missing = alive & ~arrived
        warps = arrived.reshape(-1, 32).any(1)
        if arrivals.threads is None:
            done = not missing.any()
        else:
            whole_warps = not missing.reshape(-1, 32)[warps].any()
            done = whole_warps and int(warps.sum()) * 32 >= arrivals.threads
        if not done:
            return
        m.now += 1
        m.shared.block_barrier(block, np.nonzero(warps)[0], m.now, everyone=not missing.any())
        m.counters.barriers += 1
        if len(arrivals.waiting) > 1:
            first, last = min(arrivals.waiting), max(arrivals.waiting)
            other, lane = (int(np.argmax(arrivals.waiting[pc])) for pc in (first, last))
            m.hazard("one barrier is reached at different instructions", self.code[last], lane, other=other)
        for pc, mask in arrivals.waiting.items():
            self._reduce(self.steps[pc], mask)
            self._enqueue(pc + 1, mask)
        del self.barriers[key]

    def _reduce(self, step: Step, mask: np.ndarray) -> None:
        if not isinstance(step, Barrier) or step.reduction is None:
            return
        reduction = step.reduction
        lanes = np.nonzero(mask)[0]
        values = self.m.spread(lanes, reduction.source(lanes))[1]
        if reduction.op == "popc":
            reduction.write(lanes, np.array([values.sum()], np.uint32))
        else:
            reduction.write(lanes, np.array([values.all() if reduction.op == "and" else values.any()]))

    def _deadlock(self) -> SimError:
        lines = [
            f"{int(mask.sum())} lanes, {self.m.thread_name(int(np.argmax(mask)))} among them, wait for the rest of "
            f"their warp at {self._place(pc)}"
            for pc, mask in self.parked.items()
        ]
        for (block, number), arrivals in self.barriers.items():
            lines += [
                f"{int(mask.sum())} lanes, {self.m.thread_name(int(np.argmax(mask)))} among them, wait at barrier "
                f"{number} at {self._place(pc)}"
                for pc, mask in arrivals.waiting.items()
            ]
            expected = "every thread" if arrivals.threads is None else f"{arrivals.threads} threads"
            lines.append(
                f"barrier {number} of block {self.m.blocks[block]} has been reached by {int(arrivals.arrived.sum())} "
                f"lanes; it expects {expected}"
            )
        return SimError(f"{self.m.kernel.name}: deadlock\n  " + "\n  ".join(lines[:12]))

    def _endless(self) -> SimError:
        places = "\n  ".join(
            f"{int(mask.sum())} lanes, {self.m.thread_name(int(np.argmax(mask)))} among them, at {self._place(pc)}"
            for pc, mask in self.runnable.items()
        )
        return SimError(f"{self.m.kernel.name}: no end after {self.turn} turns of the scheduler\n  {places}")

    def _place(self, pc: int) -> str:
        return f"{self.m.launch.place(self.code[pc])}: {self.code[pc].text}"
