"""Rounds of saves: each contender once a round, in random order, on a quiet disk, with what a save costs beside time.

Ratios are taken within a round, so that what slows the machine for a while slows both sides; a bar is a claim about
the median of them.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import disk
import protocol
import usage
from checkpoint_contenders import ADOPTED, CONTENDERS, Contender, Payload


class Sample(NamedTuple):
    returned: float
    durable: float
    cpu: float
    cached: int


class Ratio(NamedTuple):
    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.least:.2f}..{self.most:.2f}]"


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Of two lists by round."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


class Bar(NamedTuple):
    """A claim. `measured` is None if it was not measured, and `text` then says why."""

    claim: str
    bound: str
    measured: float | None
    text: str
    holds: bool


class Bench:
    """Owns the directory, the states and the ways of saving, and collects results."""

    def __init__(self, args: argparse.Namespace, directory: Path, tick: Callable[[str], None]) -> None:
        self.args, self.directory, self.tick = args, directory, tick
        self.contenders: dict[str, Contender] = {}
        self.memory: dict[str, int] = {}
        self.payloads: dict[bool, Payload] = {}
        self.results: dict[str, Any] = {}
        self.bars: list[Bar] = []

    def payload(self, adopted: bool = False) -> Payload:
        if adopted not in self.payloads:
            self.tick("making the state")
            self.payloads[adopted] = Payload(self.args.size)
        return self.payloads[adopted]

    @property
    def gigabytes(self) -> float:
        return self.payload().nbytes * 1e-9

    def chosen(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.args.contenders]

    def contender(self, name: str) -> Contender:
        """Made once; its first save, which measures memory, is the warm-up."""
        if name not in self.contenders:
            self.tick(f"{name}: first save")
            folder = self.directory / name.replace(" ", "-").replace(",", "").replace(".", "-")
            contender = self.contenders[name] = CONTENDERS[name](self.payload(name == ADOPTED), folder)
            gc.collect()
            with usage.peak_memory() as peak:
                contender.save(0)
                contender.wait()
            self.memory[name] = peak.nbytes
            contender.clear()
        return self.contenders[name]

    def sample(self, name: str, step: int) -> Sample:
        contender = self.contender(name)
        disk.settle(self.directory)
        gc.collect()
        cpu, start = usage.cpu_seconds(), time.perf_counter()
        contender.save(step)
        returned = time.perf_counter() - start
        contender.wait()
        durable = time.perf_counter() - start
        cpu = usage.cpu_seconds() - cpu
        cached = disk.cached_bytes(contender.directory)
        contender.clear()
        return Sample(returned, durable, cpu, cached)

    def interleave(self, cases: dict[str, Callable[[int], Sample]], what: str) -> dict[str, list[Sample]]:
        samples: dict[str, list[Sample]] = {name: [] for name in cases}
        order = list(cases)
        for number in range(1, self.args.rounds + 1):
            random.shuffle(order)
            for name in order:
                self.tick(f"{what}, round {number} of {self.args.rounds}: {name}")
                samples[name].append(cases[name](number))
        return samples

    def savers(self, names: Sequence[str]) -> dict[str, Callable[[int], Sample]]:
        for name in self.chosen(names):
            self.contender(name)
        return {name: lambda step, name=name: self.sample(name, step) for name in self.chosen(names)}

    def bar(self, claim: str, bound: str, measured: float, text: str, holds: bool) -> None:
        self.bars.append(Bar(claim, bound, measured, text, holds))

    def unmeasured(self, claim: str, bound: str, why: str) -> None:
        self.bars.append(Bar(claim, bound, None, why, False))

    def close(self) -> None:
        for contender in self.contenders.values():
            contender.close()


def show_bars(bars: list[Bar]) -> None:
    if bars:
        verdicts = ["not measured" if bar.measured is None else "pass" if bar.holds else "FAIL" for bar in bars]
        rows = [[v, bar.claim, bar.bound, bar.text] for v, bar in zip(verdicts, bars, strict=True)]
        protocol.print_table("Bars", ["", "claim", "bound", "measured"], rows)
        print("\n" + ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)))
