"""What an allocation costs: HostPool beside glibc's malloc, mimalloc, jemalloc and torch's CPU allocator.

    cmake --preset release && cmake --build --preset release --target narrowgauge_pool_replay
    python bench/pool.py --png pool.png            # three rounds; 19 minutes on two busy cores

Each case is a trace that bench/pool/replay.cpp replays natively in a process of its own, so that no Python is timed and
nobody inherits another's heap: peers come in by LD_PRELOAD, torch's by calling c10::alloc_cpu. Processes run in random
order, round after round. Peers are asked for what torch asks malloc for (64-byte alignment); "aligned" rows ask for the
4096 bytes that direct I/O needs and HostPool always gives.

- training step: the allocations of a real step of a 13 M parameter transformer (tests/python/training_trace.py),
  beside its parameters and optimizer state, which stay. Target: touched, HostPool as fast as the best peer or faster.
- churn: random sizes of one range, 100 blocks live (20 of the largest).
- 2 threads: the same churn in two threads at once.

"plain" is the calls alone; "touched" writes one byte of every page of every new block, as any use of it would. "cold"
is the first iteration of a process, with what grows the heap. "peak / live" is the largest resident set over the bytes
that were live at the worst moment.

Peers run with their defaults, under which they give memory back to the system and fault it in again; HostPool keeps it
until it is trimmed. That is most of the difference where blocks are large, and settings of the peers could narrow it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import protocol
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "python"))
import training_trace  # noqa: E402

REPLAY = ROOT / "build" / "release" / "bench" / "narrowgauge_pool_replay"
OURS = "HostPool"
FIELDS = ("plain", "touched", "cold", "peak / live")


class Allocator(NamedTuple):
    name: str
    mode: str
    preload: str


class Workload(NamedTuple):
    name: str
    trace: training_trace.Trace
    threads: int


def allocators() -> list[Allocator]:
    c10 = Path(torch.__file__).parent / "lib" / "libc10.so"
    found = [Allocator(OURS, "pool", ""), Allocator("glibc", "malloc", ""), Allocator("glibc aligned", "aligned", "")]
    for name in ("mimalloc", "jemalloc"):
        if (library := ctypes.util.find_library(name)) is None:
            print(f"{name} is not installed (Debian: lib{name}2 or lib{name}2.0) and left out", file=sys.stderr)
            continue
        found += [Allocator(name, "malloc", library), Allocator(f"{name} aligned", "aligned", library)]
    return [*found, Allocator("torch", f"torch:{c10}", "")]


def churn(low: int, high: int, live: int = 100, count: int = 2000) -> training_trace.Trace:
    """Sizes even on a log scale; a block dies at random."""
    rng = random.Random(low)
    events, alive = [], []
    for slot in range(count):
        events.append(training_trace.Event(slot, int(low * (high / low) ** rng.random()), 0))
        alive.append(slot)
        if len(alive) > live:
            events.append(training_trace.Event(alive.pop(rng.randrange(len(alive))), 0, 0))
    events += [training_trace.Event(slot, 0, 0) for slot in alive]
    return training_trace.Trace([], events)


def workloads() -> list[Workload]:
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        step = training_trace.record(layers=4, width=512, heads=8, batch=8, length=256)
    return [
        Workload("training step", step, 1),
        Workload("churn 64 B to 4 KiB", churn(64, 4 << 10), 1),
        Workload("churn 4 to 64 KiB", churn(4 << 10, 64 << 10), 1),
        Workload("churn 64 KiB to 1 MiB", churn(64 << 10, 1 << 20), 1),
        Workload("churn 1 to 16 MiB", churn(1 << 20, 16 << 20, live=20, count=300), 1),
        Workload("churn 4 to 64 KiB, 2 threads", churn(4 << 10, 64 << 10), 2),
        Workload("one block of 1 GiB", churn(1 << 30, 1 << 30, live=0, count=1), 1),
    ]


def write_trace(trace: training_trace.Trace, path: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.writelines(f"keep {size}\n" for size in trace.kept)
        file.writelines(f"+ {slot} {size}\n" if size else f"- {slot} {age}\n" for slot, size, age in trace.events)


def replay(program: Path, path: str, allocator: Allocator, threads: int, iterations: int, touch: str) -> dict[str, Any]:
    environment = {**os.environ, "LD_PRELOAD": allocator.preload}
    command = [str(program), path, allocator.mode, str(iterations), str(threads), touch]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{allocator.name}: {result.stderr}")
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def measure(program: Path, rounds: int) -> list[dict[str, Any]]:
    results = []
    peers = allocators()
    with tempfile.TemporaryDirectory() as folder:
        for workload in workloads():
            path = os.path.join(folder, "trace")
            write_trace(workload.trace, path)
            seen: dict[str, dict[str, list[float]]] = {peer.name: {field: [] for field in FIELDS} for peer in peers}
            for _ in range(rounds):
                random.shuffle(peers)
                for peer in peers:
                    plain = replay(program, path, peer, workload.threads, 200, "plain")
                    touched = replay(program, path, peer, workload.threads, 6, "touch")
                    into, pairs = seen[peer.name], plain["pairs"]
                    into["plain"].append(plain["steady_ns"] / pairs)
                    into["touched"].append(touched["steady_ns"] / pairs)
                    into["cold"].append(touched["cold_ns"] / 1e6)
                    into["peak / live"].append(touched["resident"] / touched["peak_live"])
            # A round's numbers are neighbours in time: ratios are taken within it.
            for name, fields in seen.items():
                ratios = {
                    f"{field} ratio": statistics.median(
                        mine / theirs for mine, theirs in zip(seen[OURS][field], fields[field], strict=True)
                    )
                    for field in FIELDS[:3]
                }
                medians = {field: statistics.median(values) for field, values in fields.items()}
                results.append({"workload": workload.name, "allocator": name, **medians, **ratios})
            print(f"{workload.name}: done", file=sys.stderr)
    return results


def print_results(results: list[dict[str, Any]]) -> None:
    columns = ["allocator", "plain, ns", "touched, ns", "cold, ms", "peak / live"]
    for workload in dict.fromkeys(result["workload"] for result in results):
        rows = []
        of = sorted((r for r in results if r["workload"] == workload), key=lambda r: r["touched"])
        for r in of:
            cells = [r["allocator"]]
            for field, digits in (("plain", 0), ("touched", 0), ("cold", 2)):
                ratio = "" if r["allocator"] == OURS else f" ({1 / r[f'{field} ratio']:.2f}x)"
                cells.append(f"{r[field]:.{digits}f}{ratio}")
            # The worst moments of several threads need not coincide.
            rows.append([*cells, "-" if "threads" in workload else f"{r['peak / live']:.2f}"])
        title = "an allocation and its free; in brackets: how much longer than HostPool, median of ratios"
        protocol.print_table(f"{workload}: {title}", columns, rows)
        peers = [r for r in of if r["allocator"] != OURS]
        for field in FIELDS[:3]:
            best = max(peers, key=lambda r: r[f"{field} ratio"])
            ratio = best[f"{field} ratio"]
            verdict = f"1/{1 / ratio:.2f}" if ratio <= 1 else f"{ratio:.2f}x"
            print(f"{field}: HostPool takes {verdict} of the time of the best peer, {best['allocator']}")


def plot(results: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(result["workload"] for result in results))
    labels = [name for name in dict.fromkeys(r["allocator"] for r in results) if "aligned" not in name]
    labels.sort(key=lambda name: name != OURS)
    figure, rows = pyplot.subplots(2, 1, figsize=(10, 7), layout="constrained", sharex=True)
    for axes, field in zip(rows, ("plain", "touched"), strict=True):
        for i, label in enumerate(labels):
            heights = [next(r[field] for r in results if (r["workload"], r["allocator"]) == (n, label)) for n in names]
            width = 0.8 / len(labels)
            axes.bar([x + width * (i - (len(labels) - 1) / 2) for x in range(len(names))], heights, width, label=label)
        axes.set_yscale("log")
        axes.set_ylabel(f"ns per pair, {field}")
    rows[0].legend()
    rows[1].set_xticks(range(len(names)), names, rotation=15)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replay", type=Path, default=REPLAY, help="the native half")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--png", metavar="FILE")
    args = parser.parse_args()
    if not args.replay.exists():
        parser.error(f"{args.replay} is not built; see the first line of --help")
    results = measure(args.replay, args.rounds)
    print_results(results)
    protocol.print_machine()
    if args.json:
        protocol.write_json(args.json, results)
    if args.png:
        plot(results, args.png)


if __name__ == "__main__":
    main()
