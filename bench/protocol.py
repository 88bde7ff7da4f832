"""How every benchmark here measures: interleaved rounds, p10 and median, ratios within one run, the machine named.

Timings on a shared machine swing within seconds, so a case is never timed alone: each round runs every case once, in
random order, and only ratios between cases of the same run are compared.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import narrowgauge as ng


class Timing(NamedTuple):
    """Milliseconds."""

    p10: float
    median: float


def interleave(cases: Mapping[str, Callable[[int], object]], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Calls each case with the round's number, once a round, in random order; times each call by itself."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    for number in range(-warmup, rounds):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter_ns()
            cases[name](number + warmup)
            elapsed = (time.perf_counter_ns() - start) * 1e-6
            if number >= 0:
                times[name].append(elapsed)
    return {name: Timing(percentile(values, 0.1), statistics.median(values)) for name, values in times.items()}


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def run_pinned() -> None:
    """Starts this script again with one OpenMP thread pinned to each core, unless it already is.

    Unpinned, two threads can land on one core for a scheduler quantum, which says nothing about a kernel.
    """
    if "GOMP_CPU_AFFINITY" in os.environ:
        return
    cores = sorted(os.sched_getaffinity(0))
    os.environ["GOMP_CPU_AFFINITY"] = " ".join(map(str, cores))
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    os.execv(sys.executable, [sys.executable, *sys.argv])


def usable_cores() -> int:
    """As it was before OpenMP pinned this thread to one of them."""
    return int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    facts: dict[str, Any] = {
        "cpu": ng._native.cpu_name(),
        "cores": os.cpu_count(),
        "isa": ng._native.isa(),
        "threads": ng.threads(),
        "executor": ng._native.executor_name(),
        "pinned": os.environ.get("GOMP_CPU_AFFINITY", "no"),
        "load": [round(load, 2) for load in os.getloadavg()],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "narrowgauge": ng.__version__,
    }
    if "torch" in sys.modules:
        facts["torch"] = sys.modules["torch"].__version__
    return facts


def print_machine() -> None:
    print("machine:", ", ".join(f"{key} {value}" for key, value in machine().items()))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, so that it can be pasted."""
    print(f"\n### {title}\n")
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
    for line in [columns, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def write_json(path: str, results: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"machine": machine(), "results": results}, file, indent=1)
