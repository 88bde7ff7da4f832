"""Collectives for an hour: random ones between processes over gloo, beside float64, with kills and mismatches.

    python tests/soak/collectives.py --minutes 60 --seed 0

A round is a process group of 2 to 6 ranks that draws collectives, shapes, dtypes, formats and nodes from one seed. In
some calls a rank comes with another shape, which all must be told of, and go on. In every other round one rank is
killed: the others must say so within the timeout and leave. A rank's memory may not grow after its first third.
Prints the seed of a round that fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import narrowgauge as ng
import rich.progress
import torch
import torch.distributed as dist

TIMEOUT = 20  # seconds, of the process group
GROWTH = 96 << 20  # bytes: a pool of each communicator keeps the memory of its largest call; 23 to 46 MiB were seen
# Relative error of one rounding of normally distributed values, times three.
WIRES = {"int8:g64:bf16": 0.02, "int4:g64:bf16": 0.35, "fp8_e4m3:g128:fp16": 0.08, "uint6:g32:fp16": 0.06, None: 1e-6}
DTYPES = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-10}


def values(seed: int, numel: int, dtype: str, scale: float) -> torch.Tensor:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(getattr(torch, dtype))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Rank:
    def __init__(self, seed: int, rank: int, size: int) -> None:
        self.seed, self.rank, self.size = seed, rank, size
        self.draw = random.Random(seed)
        nodes = [n for n in range(2, size) if size % n == 0]
        self.communicators = [ng.Communicator.from_torch(node_size=n) for n in (0, *nodes)]
        self.counts: Counter[str] = Counter()
        self.worst = 0.0

    def call(self, number: int) -> None:
        """The same on all ranks, but for the values."""
        comm = self.draw.choice(self.communicators)
        collective = self.draw.choice(["all_gather", "reduce_scatter", "all_reduce", "all_to_all"])
        numel = self.draw.choice([self.draw.randrange(70), self.draw.randrange(5000), self.draw.randrange(100_000)])
        dtype, name = self.draw.choice(list(DTYPES)), self.draw.choice(list(WIRES))
        scale = 10 ** self.draw.uniform(-2, 2)
        rotated, stochastic = self.draw.random() < 0.3, self.draw.random() < 0.3
        wire = ng.Wire(name, hadamard=rotated, stochastic=stochastic) if name else ng.Wire()
        chunk_bytes, exact_below = self.draw.choice([1000, 1 << 18]), self.draw.choice([0, 1 << 16])
        mean, asynchronous = self.draw.random() < 0.5, self.draw.random() < 0.3
        options: dict[str, Any] = {"seed": number, "async_op": asynchronous}
        options |= {"chunk_bytes": chunk_bytes, "exact_below": exact_below}
        if self.draw.random() < 0.02:
            self.mismatch(comm, 100_000 + 2 * number)
            return
        seeds = [self.seed * 1_000_003 + number * 31 + rank for rank in range(self.size)]
        count = numel * self.size if collective in ("reduce_scatter", "all_to_all") else numel
        inputs = [values(seed, count, dtype, scale) for seed in seeds]
        poisoned = self.draw.randrange(count) if count and self.draw.random() < 0.05 else None
        if poisoned is not None:
            inputs[0][poisoned] = self.draw.choice([float("nan"), float("inf"), -float("inf")])
        mine, exact = inputs[self.rank], [each.double() for each in inputs]
        if collective == "all_gather":
            result = comm.all_gather(mine, wire, **options)
            expected, magnitude = torch.cat(exact), torch.cat(exact)
        elif collective == "all_to_all":
            result = comm.all_to_all(
                mine, [numel] * self.size, torch.empty_like(mine), [numel] * self.size, wire,
                seed=number, async_op=asynchronous,
            )  # fmt: skip
            expected = magnitude = torch.cat([each.view(self.size, numel)[self.rank] for each in exact])
        else:
            method = getattr(comm, collective)
            op = "mean" if mean else "sum"
            result = method(mine, wire, op=op, inside=wire, **options)
            expected = sum(exact) / (self.size if mean else 1)  # type: ignore[assignment]
            magnitude = sum(each.abs() for each in exact) / (self.size if mean else 1)  # type: ignore[assignment]
            if collective == "reduce_scatter":
                part = slice(self.rank * numel, (self.rank + 1) * numel)
                expected, magnitude = expected[part], magnitude[part]
        if asynchronous:
            result = result.wait()
        self.check(result.double(), expected, magnitude, WIRES[name], DTYPES[dtype], stochastic, f"{number}: {wire}")
        self.counts[collective] += 1
        self.counts["poisoned"] += poisoned is not None

    def check(
        self,
        result: torch.Tensor,
        expected: torch.Tensor,
        magnitude: torch.Tensor,
        rounding: float,
        dtype: float,
        stochastic: bool,
        what: str,
    ) -> None:
        """Up to three roundings, and that of the result."""
        lost = ~expected.isfinite()
        assert not result[lost].isfinite().any(), f"{what}: a value that is not finite arrived finite"
        kept = result.isfinite() & ~lost
        missing = len(result) - int(kept.sum())
        assert missing <= (0 if not lost.any() else 128), f"{what}: {missing} values are not finite"
        allowed = (3 * rounding * (2 if stochastic else 1) + 2 * dtype) * float(magnitude[kept].norm()) + 1e-30
        ratio = float((result - expected)[kept].norm()) / allowed
        self.worst = max(self.worst, ratio)
        assert ratio <= 1, f"{what}: the error is {ratio} of what is allowed"

    def mismatch(self, comm: ng.Communicator, numel: int) -> None:
        """Of shapes that no rank has called with, since others are not compared again."""
        try:
            comm.all_reduce(torch.ones(numel + self.rank % 2), "int8:g64:bf16", exact_below=0)
        except ng.TransportError as error:
            assert f"of {numel} float32" in str(error) and f"of {numel + 1} float32" in str(error), error
            self.counts["mismatches"] += 1
        else:
            raise AssertionError("a mismatch was not seen")


def run_rank(seed: int, rank: int, size: int, seconds: float, store: str) -> None:
    torch.set_num_threads(1)
    ng.set_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    worker = Rank(seed, rank, size)
    start, number, early, seen = time.monotonic(), 0, 0, ""
    try:
        while True:
            # All stop after the same call.
            elapsed = torch.tensor(time.monotonic() - start)
            if number % 50 == 0:
                dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
                if elapsed > seconds:
                    break
                if elapsed < seconds / 3:
                    early = resident()
            worker.call(number)
            number += 1
    except (ng.TransportError, TimeoutError, RuntimeError) as error:
        seen = str(error)
    growth = resident() - early
    result = {"calls": number, "worst": worker.worst, "growth": growth, "seen": seen, **worker.counts}
    print(json.dumps(result), flush=True)
    dist.destroy_process_group()


def run_round(seed: int, seconds: float, kills: bool) -> Counter[str]:
    draw = random.Random(seed)
    size = draw.randrange(2, 7)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--seed", str(seed), "--seconds", str(seconds), "--store", f"{folder}/s"]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank), "--size", str(size)], stdout=subprocess.PIPE, text=True)
            for rank in range(size)
        ]
        victim = draw.randrange(size) if kills else None
        try:
            if victim is not None:
                time.sleep(seconds * 0.9)
                ranks[victim].send_signal(signal.SIGKILL)
            outputs = [rank.communicate(timeout=seconds + 2 * TIMEOUT + 120)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    total: Counter[str] = Counter()
    for index, (rank, output) in enumerate(zip(ranks, outputs, strict=True)):
        if index == victim:
            continue
        assert rank.returncode == 0, f"seed {seed}, {size} ranks: rank {index} ended with {rank.returncode}"
        result = json.loads(output.splitlines()[-1])
        seen = result.pop("seen")
        assert bool(seen) == kills, f"seed {seed}: rank {index} said {seen!r}, kills: {kills}"
        growth, worst = result.pop("growth"), result.pop("worst")
        assert growth < GROWTH, f"seed {seed}: rank {index} grew by {growth} bytes"
        total["worst growth, KiB"] = max(total["worst growth, KiB"], growth >> 10)
        total["worst error, % of the bound"] = max(total["worst error, % of the bound"], round(100 * worst))
        if index == next(i for i in range(size) if i != victim):
            total.update(result)
    total["kills"] += kills
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="of a round (default: a twelfth of all, 20 at least)")
    for name in ("--rank", "--size", "--store"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    seconds = args.seconds or max(20, args.minutes * 5)
    if args.store:
        run_rank(args.seed, int(args.rank), int(args.size), seconds, args.store)
        return
    total: Counter[str] = Counter()
    until, number = time.monotonic() + 60 * args.minutes, 0
    columns = rich.progress.SpinnerColumn(), rich.progress.TextColumn("{task.description}")
    with rich.progress.Progress(*columns, rich.progress.TimeElapsedColumn(), transient=True) as progress:
        task = progress.add_task("")
        while time.monotonic() < until:
            progress.update(task, description=f"round {number}, seed {args.seed + number}: {total['calls']} calls")
            found = run_round(args.seed + number, seconds, kills=number % 2 == 1)
            worst = {name: max(total[name], found[name]) for name in found if name.startswith("worst")}
            total.update(found)
            total.update({name: worst[name] - total[name] for name in worst})
            number += 1
    print(f"{number} rounds:", ", ".join(f"{name} {count}" for name, count in sorted(total.items())))


if __name__ == "__main__":
    main()
