"""What checkpoints cost a training loop that saves one at every iteration, over the length of an iteration.

A GPT trains for real; the length is tuned by the tokens of an iteration. A block is a few iterations with one way of
saving: a save is running when it starts, so that it is timed as in a loop without end, and its last save is waited for
outside. Blocks of all ways, and of none, alternate in random order, and each is compared with the block without
checkpoints of its own round. A second set of blocks without checkpoints shows what the measurement can resolve.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import disk
import torch
import usage
from checkpoint_contenders import ADOPTED, SNAPSHOT, Contender, Payload

NOTHING = "no checkpoint"
AGAIN = "no checkpoint, again"
LENGTH = 32  # tokens of a sequence
ITERATIONS = 2  # of a block
TOGETHER = 8  # sequences of a micro-batch; gradients of several are summed


class Trainer:
    def __init__(self, payload: Payload) -> None:
        self.payload = payload
        self.data = torch.randint(payload.model.vocabulary, (4096, LENGTH))

    def iterate(self, sequences: int) -> None:
        for first in range(0, sequences, TOGETHER):
            last = min(first + TOGETHER, sequences)
            (self.payload.model(self.data[first:last]) * ((last - first) / sequences)).backward()
        self.payload.optimizer.step()
        self.payload.optimizer.zero_grad()

    def block(self, contender: Contender | None, sequences: int, iterations: int) -> float:
        """Seconds of an iteration."""
        if contender is not None:
            save(contender, 0)
        start = time.perf_counter()
        for step in range(1, iterations + 1):
            self.iterate(sequences)
            if contender is not None:
                save(contender, step)
        elapsed = time.perf_counter() - start
        if contender is not None:
            contender.wait()
            contender.clear()
        return elapsed / iterations

    def sequences_for(self, seconds: float) -> int:
        """How many make an iteration of that length, nearly: it is measured again afterwards."""
        sequences = TOGETHER
        for _ in range(6):
            taken = statistics.median(self.block(None, sequences, 1) for _ in range(3))
            if abs(taken / seconds - 1) < 0.1:
                break
            change = min(max(seconds / taken, 0.25), 4)
            sequences = min(max(round(sequences * change), 1), len(self.data))
        return sequences


def save(contender: Contender, step: int) -> None:
    contender.save(step)
    if not contender.background:
        contender.wait()


def alone(contender: Contender, rounds: int) -> dict[str, float]:
    """Medians of saves while nothing else computes."""
    samples = []
    for step in range(rounds + 1):
        disk.settle(contender.directory)
        cpu, start = usage.cpu_seconds(), time.perf_counter()
        contender.save(step)
        returned = time.perf_counter() - start
        contender.wait()
        samples.append((returned, time.perf_counter() - start, usage.cpu_seconds() - cpu))
        contender.clear()
    blocking, durable, cpu = (statistics.median(values) for values in zip(*samples[1:], strict=True))
    return {"blocking": blocking, "durable": durable, "cpu": cpu}


def bound(name: str, costs: dict[str, float], step_seconds: float) -> float | None:
    """The share of an iteration that this way of saving may add: its processor time, and what it copies first."""
    if name not in (SNAPSHOT, ADOPTED):
        return None
    share = 1.3 * costs["cpu"] / (len(os.sched_getaffinity(0)) * step_seconds)
    return share + (costs["blocking"] / step_seconds if name == SNAPSHOT else 0)


def measure(
    payload: Payload,
    contenders: dict[str, Contender],
    lengths: list[float],
    rounds: int,
    tick: Callable[[str], None],
) -> dict[str, Any]:
    """`lengths` of an iteration in write times: of a save alone, by the fastest contender."""
    trainer = Trainer(payload)
    costs = {}
    for name, contender in contenders.items():
        tick(f"{name}, alone")
        costs[name] = alone(contender, 5)
    write_seconds = min(cost["durable"] for cost in costs.values())
    tick("length of an iteration")
    sequences = {length: trainer.sequences_for(length * write_seconds) for length in lengths}
    cases: dict[str, Contender | None] = {NOTHING: None, AGAIN: None, **contenders}
    times: dict[float, list[dict[str, float]]] = {length: [] for length in lengths}
    for number in range(rounds):
        for length in lengths:
            order = list(cases)
            random.shuffle(order)
            seconds = {}
            for name in order:
                tick(f"round {number + 1}, iterations of {length:g} write times: {name}")
                seconds[name] = trainer.block(cases[name], sequences[length], ITERATIONS)
            times[length].append(seconds)

    points = []
    for length in lengths:
        base = statistics.median(seconds[NOTHING] for seconds in times[length])
        for name in cases:
            if name == NOTHING:
                continue
            slowdowns = sorted(seconds[name] / seconds[NOTHING] - 1 for seconds in times[length])
            points.append(
                {
                    "contender": name,
                    "length": length,
                    "step_seconds": base,
                    "write_times": base / write_seconds,
                    "slowdown": statistics.median(slowdowns),
                    "lowest": slowdowns[0],
                    "highest": slowdowns[-1],
                    "bound": bound(name, costs[name], base) if name in costs else None,
                }
            )
    return {"bytes": payload.nbytes, "write_seconds": write_seconds, "alone": costs, "points": points}


def plot(results: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(point["contender"] for point in results["points"]):
        points = [point for point in results["points"] if point["contender"] == name]
        steps = [point["write_times"] for point in points]
        dashes = ":" if name == AGAIN else "-" if name.startswith("narrowgauge") else "--"
        (line,) = axis.plot(steps, [100 * p["slowdown"] for p in points], marker="o", linestyle=dashes, label=name)
        low, high = ([100 * point[end] for point in points] for end in ("lowest", "highest"))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.1)
        if points[0]["bound"] is not None:
            bounds = [100 * point["bound"] for point in points]
            axis.plot(steps, bounds, color=line.get_color(), linewidth=1, linestyle="-.", label=f"bound of {name}")
    axis.axhline(0, color="gray", linewidth=0.5)
    axis.set(xscale="log", xlabel="length of an iteration, in write times", ylabel="slowdown, %", ylim=(-5, None))
    axis.set_xticks([1, 2, 3, 6, 10], ["1", "2", "3", "6", "10"])
    axis.set_title(f"A checkpoint of {results['bytes'] / 1e9:.2f} GB at every iteration of training")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
