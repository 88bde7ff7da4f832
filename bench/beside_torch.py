"""Whether narrowgauge and torch in one process cost each other time: both run on torch's OpenMP threads.

    python bench/beside_torch.py [--shape 4096x4096] [--rows 1 16] [--rounds 60]

A product of each is timed after another of its own, with the other's just done, when the OpenMP threads still spin, and
after a sleep that outlasts their spinning; interleaved, pinned, weights from memory. "x alone" is the median over that
of the same without the other: after one of its own for the first two, and for fp6 after a sleep, a product after the
same sleep in a process without torch, on threads of narrowgauge's own, which have to be woken too. For torch after a
sleep it is over torch after its own. What is lost is what is above 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import narrowgauge as ng
import numpy as np

SLEEP = 0.03  # seconds; libgomp's threads spin for some milliseconds
AFTER_ITSELF, AFTER_OTHER, AFTER_SLEEP = "after one of its own", "just after the other", "after a sleep"
COPIES = 16


def product_ms(call: Callable[[int], object], number: int) -> float:
    start = time.perf_counter_ns()
    call(number)
    return (time.perf_counter_ns() - start) * 1e-6


def without_torch(n: int, k: int) -> None:
    """The other process: for every line of stdin, [rows, whether to sleep], the milliseconds of a product."""
    generator = np.random.default_rng(0)
    w = generator.standard_normal((n, k), dtype=np.float32) * 0.02
    narrow = [ng.quantize(w, "fp6").pack() for _ in range(COPIES)]
    number = 0
    for line in sys.stdin:
        m, sleep = json.loads(line)
        x = generator.standard_normal((m, k), dtype=np.float32)
        ng.linear(x, narrow[number % COPIES])
        if sleep:
            time.sleep(SLEEP)
        print(product_ms(lambda number, x=x: ng.linear(x, narrow[number % COPIES]), number + 1), flush=True)
        number += 2


class Without:
    """That process."""

    def __init__(self, shape: str) -> None:
        cores = os.environ["GOMP_CPU_AFFINITY"].split()  # by protocol.run_pinned
        command = [sys.executable, __file__, "--shape", shape, "--without-torch", *cores]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, m: int, sleep: bool) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        time.sleep(SLEEP)  # this process's threads stop spinning
        self.process.stdin.write(json.dumps([m, sleep]) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def measure(
    calls: dict[str, Callable[[int], object]], alone: Callable[[bool], float], rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds by the name of a call and what was before it."""
    others = dict(zip(calls, reversed(calls), strict=True))
    cases = [(name, before) for name in calls for before in (AFTER_ITSELF, AFTER_OTHER, AFTER_SLEEP)]
    cases += [("fp6 without torch", before) for before in (AFTER_ITSELF, AFTER_SLEEP)]
    times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    number = 0
    for _ in range(rounds):
        for name, before in random.sample(cases, len(cases)):
            number += 2
            if name not in calls:
                times[name, before].append(alone(before == AFTER_SLEEP))
                continue
            calls[others[name] if before == AFTER_OTHER else name](number)
            if before == AFTER_SLEEP:
                time.sleep(SLEEP)
            times[name, before].append(product_ms(calls[name], number + 1))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="N x K of the weights")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="M, the rows of x")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("--without-torch", type=int, nargs="+", metavar="CORE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    n, k = map(int, args.shape.split("x"))
    if args.without_torch:
        os.sched_setaffinity(0, args.without_torch)  # not the parent's one core
        without_torch(n, k)
        return

    import protocol
    import torch

    protocol.run_pinned()
    torch.set_num_threads(protocol.usable_cores())
    ng._native.adopt_openmp()
    protocol.print_machine()
    without = Without(args.shape)

    w = torch.randn(n, k) * 0.02
    narrow = [ng.quantize(w, "fp6").pack() for _ in range(COPIES)]
    wide = [w.bfloat16() for _ in range(COPIES // 2)]
    results: list[dict[str, Any]] = []
    lines = []
    with torch.inference_mode():
        for m in args.rows:
            x = torch.randn(m, k)
            half = x.bfloat16()
            calls: dict[str, Callable[[int], object]] = {
                "fp6": lambda number, x=x: ng.linear(x, narrow[number % len(narrow)]),
                "torch bf16": lambda number, x=half: torch.nn.functional.linear(x, wide[number % len(wide)]),
            }
            times = measure(calls, lambda sleep, m=m: without(m, sleep), args.rounds)
            medians = {key: statistics.median(values) for key, values in times.items()}
            for (name, before), values in times.items():
                alone = medians[name, AFTER_ITSELF]
                if name == "fp6" and before == AFTER_SLEEP:
                    alone = medians["fp6 without torch", AFTER_SLEEP]
                timing = protocol.Timing(protocol.percentile(values, 0.1), medians[name, before])
                lost = timing.median / alone
                results.append({"kernel": name, "m": m, "before": before, **timing._asdict(), "x_alone": lost})
                lines.append([name, str(m), before, f"{timing.p10:.3f} / {timing.median:.3f}", f"{lost:.2f}"])
    protocol.print_table(f"beside torch, {args.shape}", ["kernel", "M", "when", "ms p10 / median", "x alone"], lines)
    if args.json:
        protocol.write_json(args.json, results)


if __name__ == "__main__":
    main()
