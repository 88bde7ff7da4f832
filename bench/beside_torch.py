"""Whether narrowgauge and torch in one process cost each other time: both run on torch's OpenMP threads.

    python bench/beside_torch.py [--shape 4096x4096] [--rows 1 16] [--rounds 60]

A product of each is timed alone (after another of its own), with the other's just done, when the OpenMP threads still
spin, and after a sleep that outlasts their spinning; interleaved, pinned, weights from memory. The table gives p10 and
median, and "x alone", median over median: what is lost is what that is above 1. Sleeping threads have to be woken, by
torch as by narrowgauge, so that its row says what that costs torch too.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import narrowgauge as ng
import protocol
import torch

SLEEP = 0.03  # seconds; libgomp's threads spin for some milliseconds
BEFORE = ["alone", "just after the other", "after a sleep"]


def measure(calls: dict[str, Callable[[int], object]], rounds: int) -> dict[tuple[str, str], protocol.Timing]:
    """By the name of a call and what was before it."""
    others = dict(zip(calls, reversed(calls), strict=True))
    times: dict[tuple[str, str], list[float]] = {(name, before): [] for name in calls for before in BEFORE}
    number = 0
    for _ in range(rounds):
        for name, before in random.sample(list(times), len(times)):
            number += 1
            calls[others[name] if before == BEFORE[1] else name](number)
            if before == BEFORE[2]:
                time.sleep(SLEEP)
            start = time.perf_counter_ns()
            calls[name](number + 1)
            times[name, before].append((time.perf_counter_ns() - start) * 1e-6)
    return {
        key: protocol.Timing(protocol.percentile(values, 0.1), statistics.median(values))
        for key, values in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="N x K of the weights")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="M, the rows of x")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", help="write all figures here")
    args = parser.parse_args()
    protocol.run_pinned()
    torch.set_num_threads(protocol.usable_cores())
    ng._native.adopt_openmp()
    protocol.print_machine()

    n, k = map(int, args.shape.split("x"))
    w = torch.randn(n, k) * 0.02
    narrow = [ng.quantize(w, "fp6").pack() for _ in range(16)]
    wide = [w.bfloat16() for _ in range(8)]
    results, lines = [], []
    with torch.inference_mode():
        for m in args.rows:
            x = torch.randn(m, k, dtype=torch.bfloat16)
            calls: dict[str, Callable[[int], object]] = {
                "fp6": lambda number, x=x: ng.linear(x, narrow[number % len(narrow)]),
                "torch bf16": lambda number, x=x: torch.nn.functional.linear(x, wide[number % len(wide)]),
            }
            timings = measure(calls, args.rounds)
            for (name, before), timing in timings.items():
                alone = timings[name, BEFORE[0]].median
                lost = timing.median / alone
                results.append({"kernel": name, "m": m, "before": before, **timing._asdict(), "x_alone": lost})
                lines.append([name, str(m), before, f"{timing.p10:.3f} / {timing.median:.3f}", f"{lost:.2f}"])
    protocol.print_table(f"beside torch, {args.shape}", ["kernel", "M", "when", "ms p10 / median", "x alone"], lines)
    if args.json:
        protocol.write_json(args.json, results)


if __name__ == "__main__":
    main()
