"""Training under FSDP2 with narrow weights and gradients on the wire: does the loss suffer, and what is a step's time?

    python bench/train.py --json train.json --png train.png      # both parts; less than 90 minutes on 2 idle cores
    python bench/train.py --part loss --seeds 0,1,2 --steps 300 --json train.json
    python bench/train.py --part step --rates 200mbit,1gbit --rounds 20 --json train.json      # root: netlab.py

A GPT of 5.7 million parameters learns the text of Python's own documentation (pydoc_data.topics) byte by byte, with
AdamW, clipping and batches of 4 x 2 x 64 tokens, on 4 ranks over gloo. Contenders:

    fp32     torch's own collectives
    bf16     the same with weights and gradients cast to bf16 for the wire
    int8     weights and gradients int8:g64:bf16
    zero++   int8 weights, int4 gradients, large groups, no Hadamard: ZeRO++'s formats, with the mean taken rightly
    ours     int8:g64:bf16 weights and, within nodes, gradients; int4:g64:bf16 gradients with Hadamard between nodes

loss: 2 nodes of 2 ranks, links not shaped. The last 50 losses and a held-out one, as differences from fp32's of the
same seed, beside how far fp32's own seeds are apart.
step: as many hosts as there are links, a step of each contender in turns. zero++ and ours keep for the backward pass
what the forward pass gathered (hpZ), so that they take more memory. Bytes are those of the network device.

With --json, what is measured is written there as it comes; what is there already is not measured again (loss) or is
added to (step).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import protocol
import rich.progress
from netlab import Lab, end, exit_on_signals, wait_for_all, why_not

CONTENDERS = ["fp32", "bf16", "int8", "zero++", "ours"]
RANK = [sys.executable, str(Path(__file__).with_name("train_rank.py"))]
RANKS = 4  # of the loss part
LAST = 50  # losses that are averaged


@contextmanager
def ranks_here(command: list[str]) -> Iterator[Iterable[dict[str, Any]]]:
    """Rank 0's lines of ranks on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def start(rank: int, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(command, env={**os.environ, **environment, "RANK": str(rank)}, text=True, **options)

    with lines_of(RANKS, start) as lines:
        yield lines


@contextmanager
def ranks_on(lab: Lab, command: list[str]) -> Iterator[Iterable[dict[str, Any]]]:
    with lines_of(lab.ranks, lambda rank, **options: lab.start(rank, command, **options)) as lines:
        yield lines


@contextmanager
def lines_of(count: int, start: Any) -> Iterator[Iterable[dict[str, Any]]]:
    with ExitStack() as stack:
        processes = []
        for rank in range(count):
            processes.append(start(rank, stdout=subprocess.PIPE if rank == 0 else None))
            stack.callback(end, processes[-1])
        yield map(json.loads, processes[0].stdout)
        if code := wait_for_all(processes):
            raise RuntimeError(f"a rank ended with {code}, expected 0")


def measure_losses(results: dict[str, Any], args: argparse.Namespace, progress: rich.progress.Progress) -> None:
    """Seed by seed, so that whatever there is when it is stopped can be compared."""
    runs = results.setdefault("loss", [])
    runs[:] = [run for run in runs if "held out" in run]
    done = {(run["contender"], run["seed"], len(run["losses"])) for run in runs}
    jobs = [(name, seed) for seed in args.seeds for name in args.contenders if (name, seed, args.steps) not in done]
    task = progress.add_task("loss", total=len(jobs) * args.steps)
    if not jobs:
        return
    with ranks_here([*RANK, "loss", json.dumps(jobs), str(args.steps)]) as lines:
        for line in lines:
            if "step" in line:
                if line["step"] == 0:
                    runs.append({"contender": line["contender"], "seed": line["seed"], "losses": []})
                runs[-1]["losses"].append(line["loss"])
                where = f"loss: {line['contender']}, seed {line['seed']}, {line['loss']:.3f}"
                progress.update(task, advance=1, description=where)
            else:
                runs[-1].update(line)
            if "step" not in line or line["step"] % 25 == 0:
                save(results, args.json)


def measure_steps(results: dict[str, Any], args: argparse.Namespace, progress: rich.progress.Progress) -> None:
    rows = results.setdefault("step", [])
    task = progress.add_task("step", total=len(args.rates) * args.rounds)
    for rate in args.rates:
        command = [*RANK, "step", json.dumps(args.contenders), str(args.rounds), str(args.ranks)]
        with Lab(args.hosts, None if rate == "none" else rate, args.ranks) as lab, ranks_on(lab, command) as lines:
            for line in lines:
                rows.append({"hosts": args.hosts, "ranks": args.ranks, "rate": rate, "contenders": line})
                progress.update(task, advance=1, description=f"step: {rate}")
                save(results, args.json)


def save(results: dict[str, Any], path: str | None) -> None:
    if path:
        protocol.write_json(f"{path}.new", results)
        os.replace(f"{path}.new", path)


def tail(run: dict[str, Any]) -> float:
    return statistics.fmean(run["losses"][-LAST:])


def loss_table(runs: list[dict[str, Any]]) -> None:
    found = {(run["contender"], run["seed"]): run for run in runs if "held out" in run}
    for what, value in (("mean of the last 50 losses", tail), ("held-out loss", lambda run: run["held out"])):
        exact = {seed: value(run) for (name, seed), run in found.items() if name == "fp32"}
        if not exact:
            continue
        lines = []
        for name in CONTENDERS:
            values = {seed: value(run) for (other, seed), run in found.items() if other == name and seed in exact}
            if not values:
                continue
            apart = [values[seed] - exact[seed] for seed in values]
            lines.append([
                name, str(len(values)), f"{statistics.fmean(values.values()):.4f}",
                f"{max(values.values()) - min(values.values()):.4f}",
                f"{statistics.fmean(apart):+.4f}", " ".join(f"{each:+.4f}" for each in apart),
            ])  # fmt: skip
        steps = len(next(iter(found.values()))["losses"])
        protocol.print_table(
            f"{what}, {steps} steps, 2 nodes of 2 ranks",
            ["contender", "seeds", "mean", "spread of seeds", "from fp32 of the same seed, mean", "each"],
            lines,
        )


def step_table(rows: list[dict[str, Any]]) -> None:
    for hosts, ranks, rate in dict.fromkeys((row["hosts"], row["ranks"], row["rate"]) for row in rows):
        rounds = [
            row["contenders"] for row in rows if (row["hosts"], row["ranks"], row["rate"]) == (hosts, ranks, rate)
        ]
        lines = []
        for name in CONTENDERS:
            if any(name not in each for each in rounds):
                continue
            seconds = [each[name]["seconds"] for each in rounds]

            def median_of(what: str, name: str = name) -> float:
                return statistics.median(each[name][what] for each in rounds)  # noqa: B023

            def over(peer: str, what: str, name: str = name) -> str:
                if any(peer not in each for each in rounds):  # noqa: B023
                    return "-"
                return f"{statistics.median(each[peer][what] / each[name][what] for each in rounds):.2f}"  # noqa: B023

            lines.append([
                name, f"{median_of('seconds'):.3f} [{min(seconds):.3f}..{max(seconds):.3f}]",
                over("fp32", "seconds"), over("bf16", "seconds"), f"{median_of('bytes') / 1e6:.2f}",
                over("fp32", "bytes"), over("bf16", "bytes"), f"{median_of('cpu'):.3f}",
            ])  # fmt: skip
        protocol.print_table(
            f"a step, {hosts} hosts of {ranks} ranks, {rate}, {len(rounds)} rounds",
            ["contender", "s, median", "speed over fp32", "over bf16", "MB sent by a host", "fewer than fp32",
             "than bf16", "CPU s of a rank"],
            lines,
        )  # fmt: skip


def plot(results: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name in CONTENDERS:
        runs = [run["losses"] for run in results.get("loss", []) if run["contender"] == name and "held out" in run]
        if not runs:
            continue
        smooth = [[statistics.fmean(run[max(0, i - 9) : i + 1]) for i in range(len(run))] for run in runs]
        columns = list(zip(*smooth, strict=True))
        (line,) = curves.plot([statistics.fmean(column) for column in columns], label=name, linewidth=1)
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        curves.fill_between(range(len(columns)), low, high, color=line.get_color(), alpha=0.12)
    curves.set(xlabel="step", ylabel="loss, mean of 10 steps and of the seeds; band: all seeds")
    if curves.lines:
        curves.legend()
    settings = list(dict.fromkeys((row["hosts"], row["ranks"], row["rate"]) for row in results.get("step", [])))
    for offset, name in enumerate(CONTENDERS):
        heights = []
        for setting in settings:
            heights.append(
                statistics.median(
                    row["contenders"][name]["seconds"]
                    for row in results["step"]
                    if (row["hosts"], row["ranks"], row["rate"]) == setting and name in row["contenders"]
                )
            )
        bars.bar([i + 0.16 * offset for i in range(len(settings))], heights, 0.16, label=name)
    bars.set_xticks([i + 0.32 for i in range(len(settings))], [f"{h} x {r}, {rate}" for h, r, rate in settings])
    bars.set_ylabel("seconds of a step, median")
    if settings:
        bars.legend()
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["loss", "step", "none"], help="default: both; none: what --json has")
    parser.add_argument("--seeds", type=lambda text: [int(each) for each in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of the loss part")
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=CONTENDERS)
    parser.add_argument("--rates", type=lambda text: text.split(","), default=["200mbit", "1gbit"])
    parser.add_argument("--rounds", type=int, default=20, help="steps of each contender in the step part")
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=1, help="of a host, which is a node if there are more than one")
    parser.add_argument("--json", help="where figures are kept, and found")
    parser.add_argument("--png", help="where to write a picture")
    args = parser.parse_args()
    if unknown := set(args.contenders) - set(CONTENDERS):
        parser.error(f"--contenders has {', '.join(sorted(unknown))}, expected some of {', '.join(CONTENDERS)}")
    exit_on_signals()
    results: dict[str, Any] = {}
    if args.json and Path(args.json).exists():
        results = json.loads(Path(args.json).read_text(encoding="utf-8"))["results"]
    columns = [*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn()]
    with rich.progress.Progress(*columns, transient=True) as progress:
        if args.part in (None, "loss"):
            measure_losses(results, args, progress)
        if args.part in (None, "step"):
            if reason := why_not():
                print(f"the step part needs links of its own: {reason}", file=sys.stderr)
                return 2
            measure_steps(results, args, progress)
    loss_table(results.get("loss", []))
    step_table(results.get("step", []))
    print()
    protocol.print_machine()
    if args.png:
        plot(results, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
