"""What a checkpoint costs: time until durable, time that training waits, processor time, memory, page cache.

    python bench/checkpoint.py --dir /data --png checkpoint.png        # about 2 GB of state; some twenty minutes
    python bench/checkpoint.py --dir /data --part blocking --quick     # 0.3 GB and few rounds, to see that it works

  durable   until the checkpoint survives a power cut, beside the best that fio writes (direct, new files, fsync)
  cpu       CPU seconds per GB with checksums, extra memory, page cache left behind; of the same saves
  blocking  until save() returns, beside a memcpy of the same bytes into memory that was touched before
  loop      training with a checkpoint at every iteration, over the length of an iteration (checkpoint_loop.py)
  load      from the page cache and from the disk; every tensor is then touched, since some loaders only map the file

Every round runs all contenders in random order on a quiet disk: old files are gone and dirty pages written before the
clock starts. Ratios are taken within a round; tables give their median [least..most]. A GB is 10^9 bytes. The peers'
fsync of files and directories is counted; DCP syncs for itself, but neither its metadata's last buffer nor the
directory, so its rows promise less. CPU seconds are those of the process: the kernel writes dirty pages of buffered
writers in threads of its own. Extra memory is the growth of the resident set over a first save.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import checkpoint_loop
import disk
import narrowgauge as ng
import protocol
import rich.progress
import torch
from checkpoint_contenders import ADOPTED, CONTENDERS, DEFERRED, SNAPSHOT, Contender, Payload, flatten
from checkpoint_loop import AGAIN
from checkpoint_rounds import Bench, Sample, ratio, show_bars

PARTS = ["durable", "cpu", "blocking", "loop", "load"]
NARROWGAUGE = [SNAPSHOT, DEFERRED, ADOPTED]
LOOP = [ADOPTED, SNAPSHOT, "DCP async_save", "torch.save"]
FIO = "fio"
MIB = 1 << 20


def measure_saves(bench: Bench, parts: list[str], memory: str) -> None:
    cases = bench.savers(list(CONTENDERS))
    without_fio = "not asked for" if "durable" not in parts else disk.fio_absent()
    if without_fio is None:
        folder = bench.directory / FIO
        try:
            sweep = disk.sweep_fio(folder, min(bench.payload().nbytes, 10**9), memory, bench.args.quick, bench.tick)
            cases[FIO] = fio_case(bench, folder, sweep.best)
            bench.results["fio"] = {
                "best": str(sweep.best),
                "GB/s": {str(config): rate for config, rate in sweep.rates.items()},
                "refused": sweep.refused,
            }
        except disk.FioRefused as error:
            without_fio = str(error)
    samples = bench.interleave(cases, "saves")
    bench.results["saves"] = {name: [sample._asdict() for sample in of] for name, of in samples.items()}
    bench.results["extra memory"] = bench.memory
    if "durable" in parts:
        show_durable(bench, samples, without_fio)
    show_cost(bench, samples)


def fio_case(bench: Bench, folder: Path, config: disk.FioConfig) -> Callable[[int], Sample]:
    def case(number: int) -> Sample:
        disk.empty(folder)
        disk.settle(folder)
        seconds, cpu = disk.run_fio(folder, config, bench.payload().nbytes)
        cached = disk.cached_bytes(folder)
        disk.empty(folder)
        return Sample(seconds, seconds, cpu, cached)

    return case


def show_durable(bench: Bench, samples: dict[str, list[Sample]], without_fio: str | None) -> None:
    durable = {name: [sample.durable for sample in of] for name, of in samples.items()}
    references = [name for name in (FIO, *NARROWGAUGE) if name in samples]
    rows = []
    for name, seconds in durable.items():
        row = [name, f"{statistics.median(s.returned for s in samples[name]):.3f}"]
        row += [f"{statistics.median(seconds):.2f} [{min(seconds):.2f}..{max(seconds):.2f}]"]
        row += [f"{bench.gigabytes / statistics.median(seconds):.2f}"]
        rows.append(row + [str(ratio(durable[reference], seconds)) for reference in references])
    columns = ["way", "returns, s", "durable, s", "GB/s", *(f"rate, x {name}" for name in references)]
    protocol.print_table(f"Durable save of {bench.gigabytes:.2f} GB, {bench.args.rounds} rounds", columns, rows)
    if without_fio is None:
        print(f"\nfio: {bench.results['fio']['best']}; best of {len(bench.results['fio']['GB/s'])} configurations")
    else:
        print(f"\nwithout fio: {without_fio}")

    for name in bench.chosen(NARROWGAUGE):
        for peer, least in ((FIO, 0.95), ("torch.save", 2.0), ("DCP save", 2.0), ("safetensors", 1.2)):
            claim, bound = f"{name}: rate of durable saves beside {peer}", f">= {least}x"
            if peer in durable:
                beside = ratio(durable[peer], durable[name])
                bench.bar(claim, bound, beside.median, str(beside), beside.median >= least)
            else:
                bench.unmeasured(claim, bound, without_fio if peer == FIO and without_fio else "not among contenders")


def show_cost(bench: Bench, samples: dict[str, list[Sample]]) -> None:
    cost = {name: [sample.cpu / bench.gigabytes for sample in of] for name, of in samples.items()}
    cached = {name: statistics.median(sample.cached for sample in of) for name, of in samples.items()}
    rows = [
        [
            name,
            f"{statistics.median(seconds):.3f} [{min(seconds):.3f}..{max(seconds):.3f}]",
            f"{bench.memory[name] / MIB:.0f}" if name in bench.memory else "",
            f"{cached[name] / MIB:.1f}",
        ]
        for name, seconds in cost.items()
    ]
    columns = ["way", "CPU s/GB", "extra memory, MiB", "page cache left, MiB"]
    protocol.print_table(f"What a save of {bench.gigabytes:.2f} GB costs", columns, rows)
    for name, most in ((ADOPTED, 0.15), (DEFERRED, 0.3), (SNAPSHOT, 0.3)):
        if name not in cost:
            continue
        median, memory = statistics.median(cost[name]), bench.memory[name] / MIB
        bench.bar(f"{name}: CPU s/GB with checksums", f"<= {most}", median, f"{median:.3f}", median <= most)
        left = cached[name] / MIB
        bench.bar(f"{name}: page cache left behind", "<= 1 MiB", left, f"{left:.1f} MiB", left <= 1)
        if name != SNAPSHOT:
            bench.bar(f"{name}: extra memory", "<= 64 MiB", memory, f"{memory:.0f} MiB", memory <= 64)


class Memcpy:
    """Copies the state into one block of touched memory, a share of the bytes for each thread."""

    def __init__(self, payload: Payload, threads: int) -> None:
        self.target = torch.ones(payload.nbytes, dtype=torch.uint8)
        self.pool = ThreadPoolExecutor(threads)
        self.shares: list[list[tuple[int, int, int]]] = [[]]  # target, source, bytes
        share = -(-payload.nbytes // threads)
        at, room = self.target.data_ptr(), share
        for tensor in payload.tensors().values():
            source, left = tensor.data_ptr(), tensor.nbytes
            while left > 0:
                if room == 0:
                    self.shares.append([])
                    room = share
                piece = min(left, room)
                self.shares[-1].append((at, source, piece))
                at, source, left, room = at + piece, source + piece, left - piece, room - piece

    @staticmethod
    def copy(share: list[tuple[int, int, int]]) -> None:
        for target, source, nbytes in share:
            ctypes.memmove(target, source, nbytes)

    def __call__(self, number: int) -> Sample:
        gc.collect()
        start = time.perf_counter()
        list(self.pool.map(self.copy, self.shares))
        elapsed = time.perf_counter() - start
        return Sample(elapsed, elapsed, 0, 0)


def measure_blocking(bench: Bench) -> None:
    threads = ng.threads()
    copies = {f"memcpy, {n} thread{'s' if n > 1 else ''}": Memcpy(bench.payload(), n) for n in sorted({1, threads})}
    cases = copies | bench.savers([*NARROWGAUGE, "DCP async_save"])
    samples = bench.interleave(cases, "blocking")
    bench.results["blocking"] = {name: [sample.returned for sample in of] for name, of in samples.items()}
    blocking: dict[str, list[float]] = bench.results["blocking"]
    rows = []
    for name, seconds in blocking.items():
        row = [name, f"{1e3 * statistics.median(seconds):.1f} [{1e3 * min(seconds):.1f}..{1e3 * max(seconds):.1f}]"]
        rows.append(row + [str(ratio(seconds, blocking[copy])) for copy in copies])
    columns = ["way", "ms", *(f"x {name}" for name in copies)]
    protocol.print_table(f"Time until save() returns, {bench.gigabytes:.2f} GB", columns, rows)

    for name in bench.chosen([DEFERRED, ADOPTED]):
        median = 1e3 * statistics.median(blocking[name])
        bench.bar(f"{name}: blocks", "< 5 ms", median, f"{median:.2f} ms", median < 5)
    for name in bench.chosen([SNAPSHOT]):
        copy = list(copies)[-1]
        beside = ratio(blocking[name], blocking[copy])
        bench.bar(f"{name}: blocks, beside {copy}", "<= 1.15x", beside.median, str(beside), beside.median <= 1.15)


def measure_loop(bench: Bench) -> None:
    args = bench.args
    names = bench.chosen(LOOP)
    payload = Payload(min(args.size, 0.3))
    folder = bench.directory / "loop"
    contenders = {name: CONTENDERS[name](payload, folder / str(i)) for i, name in enumerate(names)}
    for contender in contenders.values():
        contender.state = payload.state()  # adoption has moved the tensors
    lengths = [1.0, 6.0] if args.quick else [1.0, 2.0, 3.0, 6.0, 10.0]
    results = checkpoint_loop.measure(payload, contenders, lengths, args.rounds, bench.tick)
    for contender in contenders.values():
        contender.close()
    bench.results["loop"] = results
    noise = {point["length"]: point["slowdown"] for point in results["points"] if point["contender"] == AGAIN}
    rows = []
    for point in results["points"]:
        name, slowdown, most = point["contender"], point["slowdown"], point["bound"]
        spread = f"{100 * slowdown:.1f} [{100 * point['lowest']:.1f}..{100 * point['highest']:.1f}]"
        text = f"{slowdown:.1%} (without checkpoints, again: {noise[point['length']]:.1%})"
        step = f"{point['write_times']:.1f} ({point['step_seconds']:.2f} s)"
        rows.append([step, name, spread, "" if most is None else f"{100 * most:.1f}"])
        if most is not None and point["length"] >= 2:
            claim = f"{name}: slowdown, iteration of {point['length']:g} write times"
            bench.bar(claim, f"<= {most:.1%}", slowdown, text, slowdown <= most)
        if name == ADOPTED and point["length"] == 6:
            bench.bar(f"{name}: slowdown at six write times", "< 3 %", slowdown, text, slowdown < 0.03)
    columns = ["iteration, write times", "way", "slowdown, %", "bound, %"]
    title = f"Training with a checkpoint of {results['bytes'] / 1e9:.2f} GB at every iteration"
    protocol.print_table(f"{title}, {args.rounds} rounds", columns, rows)
    print("\nA shorter iteration than the write waits for the disk: the bound is a claim from two write times on.")
    costs = ", ".join(
        f"{name} {cost['durable']:.2f} s ({cost['blocking']:.3f} s blocking, {cost['cpu']:.2f} s CPU)"
        for name, cost in results["alone"].items()
    )
    print(f"A save alone: {costs}. A write time is the shortest.")


def measure_load(bench: Bench) -> None:
    names = bench.chosen([SNAPSHOT, "torch.save", "safetensors", "DCP save"])
    expected = bench.payload().tensors()
    loaders: dict[str, tuple[Contender, Callable[[], Any]]] = {}
    for name in names:
        contender = bench.contender(name)
        contender.save(1)
        contender.wait()
        loaders[name.replace(SNAPSHOT, "narrowgauge")] = (contender, lambda c=contender: c.load(1))
        if name == SNAPSHOT:
            unverified = lambda c=contender: ng.load_checkpoint(c.directory, step=1, verify="off")  # noqa: E731
            loaders["narrowgauge, verify off"] = (contender, unverified)
    for name, (_, load) in loaders.items():
        bench.tick(f"{name}: first load")
        loaded = flatten(load())
        wrong = [key for key, tensor in expected.items() if key not in loaded or not torch.equal(loaded[key], tensor)]
        if wrong:
            raise RuntimeError(f"{name}: {len(wrong)} of {len(expected)} tensors differ, the first is {wrong[0]}")
        del loaded

    def case(prepare: Callable[[Path], None], contender: Contender, load: Callable[[], Any]) -> Callable[[int], Sample]:
        def timed(number: int) -> Sample:
            prepare(contender.directory)
            gc.collect()
            start = time.perf_counter()
            state = load()
            for tensor in flatten(state).values():
                tensor.reshape(-1).view(torch.uint8)[::4096].sum()
            elapsed = time.perf_counter() - start
            return Sample(elapsed, elapsed, 0, 0)

        return timed

    temperatures = {"page cache": disk.read_all, "disk": disk.evict}
    rows, results = [], {}
    for temperature, prepare in temperatures.items():
        cases = {name: case(prepare, *loader) for name, loader in loaders.items()}
        samples = bench.interleave(cases, f"loads from the {temperature}")
        seconds = {name: [sample.durable for sample in of] for name, of in samples.items()}
        results[temperature] = seconds
        first = seconds[next(iter(seconds))]
        for name, times in seconds.items():
            spread = f"{statistics.median(times):.2f} [{min(times):.2f}..{max(times):.2f}]"
            rate = bench.gigabytes / statistics.median(times)
            rows.append([temperature, name, spread, f"{rate:.2f}", str(ratio(first, times))])
    bench.results["load"] = results
    columns = ["from", "loader", "s", "GB/s", f"rate, x {next(iter(loaders))}"]
    protocol.print_table(f"Loading {bench.gigabytes:.2f} GB", columns, rows)


def measure(args: argparse.Namespace, directory: Path, tick: Callable[[str], None]) -> Bench:
    bench = Bench(args, directory, tick)
    try:
        if "durable" in args.part or "cpu" in args.part:
            with disk.fio_memory() as memory:
                measure_saves(bench, args.part, memory)
        if "blocking" in args.part:
            measure_blocking(bench)
        if "load" in args.part:
            measure_load(bench)
    finally:
        bench.close()
    if "loop" in args.part:
        measure_loop(bench)
    return bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(), help="where to write: a disk, not a tmpfs (default: here)")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--size", type=float, metavar="GB", help="of the state (default: 1.94, quick 0.3)")
    parser.add_argument("--rounds", type=int, help="default: 9, quick 3")
    parser.add_argument("--quick", action="store_true", help="a small state, few rounds, a short sweep of fio")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--png", metavar="FILE", help="write the training loop's curve here")
    args = parser.parse_args()
    args.size = args.size or (0.3 if args.quick else 1.94)
    args.rounds = args.rounds or (3 if args.quick else 9)
    warnings.filterwarnings("ignore", module="torch.distributed")  # no process group: that is meant

    with tempfile.TemporaryDirectory(prefix="narrowgauge-", dir=args.dir) as name:
        directory = Path(name)
        refused = disk.refusal(directory, int(4e9 * args.size))
        if refused:
            parser.error(f"{refused}; choose another place with --dir")
        columns = rich.progress.SpinnerColumn(), rich.progress.TextColumn("{task.description}")
        with rich.progress.Progress(*columns, rich.progress.TimeElapsedColumn(), transient=True) as progress:
            task = progress.add_task("")
            bench = measure(args, directory, lambda text: progress.update(task, description=text))
        facts = disk.facts(directory)
    show_bars(bench.bars)
    print()
    protocol.print_machine()
    print("disk:", ", ".join(f"{key} {value}" for key, value in facts.items()))
    if args.json:
        bars = [bar._asdict() for bar in bench.bars]
        protocol.write_json(args.json, {"disk": facts, "size": args.size, "bars": bars, **bench.results})
    if args.png and "loop" in bench.results:
        checkpoint_loop.plot(bench.results["loop"], args.png)
        print(f"\nchart: {args.png}")


if __name__ == "__main__":
    main()
