"""`narrowgauge bench --explain`: which kernel a product gets, how the work is cut and why, and how long it should take.
A plan for a GPU needs none.

The plan is the one that linear follows (linear_plan.hpp). On the CPU the time is the larger of two: that of reading the
bytes, and that of the arithmetic at the rate of a small product of the same kind, in the cache; both measured just
now. On a GPU it is a bound from the machine's figures: instructions are not in it (bench/gpu_model.py counts those).
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import typer

import narrowgauge as ng
from narrowgauge import _native
from narrowgauge.cli.output import human_bytes
from narrowgauge.cli.roofline import GPUS, Gpu, Work, estimate

Facts = list[tuple[str, str, str]]  # what, how much, why

_SAMPLE = (512, 1024)  # rows and columns of weights that a cache holds
_SAMPLE_RUNS = 20


def explain(
    n: int, k: int, m: int, format: str, device: str, x: str, activations: str = "exact"
) -> tuple[dict[str, Any], Facts]:
    """The plan for x [m, k], of type `x`, and weights [n, k] as values for --json and as facts to show.

    device: "cpu", "cuda", "cuda:i", or the name of a GPU in roofline.GPUS. typer.BadParameter if it is none of them.
    activations: as for narrowgauge.linear, on the CPU.
    """
    parsed = ng.Format(format)
    traffic = traffic_of(parsed, n, k, m, x)
    on_cpu = device == "cpu"
    how = _cpu(m, parsed, n, k, traffic, activations, x) if on_cpu else _gpu(m, parsed, n, k, traffic, device, x)
    at_least = "" if on_cpu else "at least "
    shown = "-" if how.seconds is None else f"{at_least}{1e6 * how.seconds:.1f} us"
    facts = [*how.facts, ("bytes", human_bytes(int(traffic)), "weights, x and y, each once"), ("time", shown, how.why)]
    values = {"format": str(parsed), "device": device, **how.plan, "bytes": traffic, "seconds": how.seconds}
    return values, facts


class _How(NamedTuple):
    plan: dict[str, Any]
    facts: Facts
    seconds: float | None  # None: not known
    why: str  # so many, or none


def traffic_of(format: ng.Format, n: int, k: int, m: int, x: str) -> float:
    """Bytes of weights, x and y, each once. What the packed layout pads is left out."""
    return n * k * format.bits_per_weight(k) / 8 + m * (n + k) * (4 if x == "float32" else 2)


def work_of(plan: dict[str, Any], traffic: float) -> Work:
    """What the kernels of a plan do, instructions left out. traffic: bytes of weights, x and y."""
    stages = plan["block_stages"] * plan["teams"]
    return Work(
        plan["blocks"],
        plan["resident"],
        traffic,
        stages * plan["stage_bytes"],
        (plan["stages"] - 1) * plan["teams"] * plan["stage_bytes"],
        stages * 4 * (plan["weight_rows"] // 16) * (plan["x_rows"] // 8),
        workspace_bytes=plan["workspace_bytes"],
    )


def _cpu(m: int, format: ng.Format, n: int, k: int, traffic: float, activations: str, x: str) -> _How:
    from narrowgauge.cli.doctor import read_bandwidth

    plan = _native.cpu_linear_plan(m, format, n, k, activations, x)
    threads = _native.threads()
    if activations == "exact" and plan["isa"] == "amx":
        sums = ("arithmetic", "products of bf16 in fp32", "activations stay as they are")
    elif activations == "exact":
        sums = ("arithmetic", "fma in fp32", "activations stay as they are")
    else:
        sums = ("arithmetic", f"{activations} by int8 in int32", f"{format.element} is an integer times a power of two")
    if plan["direct"] and (activations != "exact" or plan["isa"] == "amx"):
        way = ("kernel", "direct", "M rows fit in a tile: weights are decoded beside the arithmetic")
        tile = ("x", f"a tile of {plan['x_rows']} rows", "all of them")
    elif plan["direct"]:
        tiles = [plan["x_rows"], plan["second_x_rows"]] if plan["second_x_rows"] else [plan["x_rows"]]
        way = ("kernel", "direct", "M rows fit in two tiles: weights are decoded beside the arithmetic")
        tile = ("x", f"tiles of {' + '.join(map(str, tiles))} rows", "the smallest tiles that hold them")
    else:
        way = ("kernel", "panels", "M rows do not fit in tiles: weights are decoded into the cache once a pass")
        tile = ("x", f"{plan['pass_rows']} rows a pass, in tiles of {plan['x_rows']}", "what the scratch holds")
    facts = [
        ("instruction set", plan["isa"], "narrowgauge doctor says why"),
        sums,
        way,
        tile,
        ("passes", str(plan["passes"]), "over the weights in memory"),
        (
            "tasks",
            f"at most {plan['tasks']}, of {plan['task_rows']} rows of weights or more",
            f"worth a hand-over; {threads} threads",
        ),
    ]
    bandwidth = read_bandwidth()
    if bandwidth is None:
        return _How(plan, facts, None, "memory could not be measured: it takes numpy or torch")
    # Further passes over the weights read them again.
    reading = (traffic + (plan["passes"] - 1) * n * k * format.bits_per_weight(k) / 8) / bandwidth / 1e9
    rate = _rate(min(m, plan["pass_rows"]), format, activations, x)
    arithmetic = m * n * k / rate
    if reading > arithmetic:
        why = f"reading the bytes at {bandwidth:.1f} GB/s, measured just now"
    else:
        why = f"arithmetic at {rate / 1e9:.1f} G products/s, measured just now"
    return _How(plan, facts, max(reading, arithmetic), why)


def _rate(m: int, format: ng.Format, activations: str, x: str) -> float:
    """Products a second of m rows of x, at most _SAMPLE[0], and weights that are in the cache, threads and all."""
    w, rows, y = _sample(m, x)
    q = ng.quantize(w, format).pack()
    best = float("inf")
    for _ in range(_SAMPLE_RUNS):
        start = time.perf_counter()
        _native.linear(rows, q._matrix, None, y, activations)  # type: ignore[arg-type]
        best = min(best, time.perf_counter() - start)
    return m * _SAMPLE[0] * _SAMPLE[1] / best


def _sample(m: int, x: str) -> tuple[Any, Any, Any]:
    """Weights, m of their rows in the type x, and room for y."""
    try:
        import numpy
    except ImportError:
        import torch

        w = torch.randn(_SAMPLE)
        return w, w[:m].to(getattr(torch, x)), torch.empty(m, _SAMPLE[0])
    floats = numpy.random.default_rng(0).standard_normal(_SAMPLE, dtype=numpy.float32)
    rows: Any = floats[:m]
    if x == "bfloat16":  # which numpy has not
        rows = ng.Tensor.from_dlpack((rows.view(numpy.uint32) >> 16).astype(numpy.uint16)).view(x)
    else:
        rows = rows.astype(x)
    return floats, rows, numpy.empty((m, _SAMPLE[0]), numpy.float32)


def _gpu(m: int, format: ng.Format, n: int, k: int, traffic: float, device: str, x: str) -> _How:
    gpu, multiprocessors, name = _find(device)
    plan = _native.cuda_linear_plan(m, format, n, k, x, multiprocessors)
    waves = plan["blocks"] / (multiprocessors * plan["resident"])
    most = -(-plan["blocks"] // multiprocessors)
    split = plan["splits"] > 1
    facts = [
        ("GPU", name, f"{multiprocessors} multiprocessors"),
        (
            "kernel",
            plan["kernel"],
            f"{format.element}, {x}, the smallest tile that has M rows, or the largest",
        ),
        (
            "tile",
            f"{plan['x_rows']} rows of x, {plan['weight_rows']} of weights",
            f"{plan['threads'] // 32} warps, {plan['teams']} teams with columns of their own",
        ),
        (
            "splits",
            str(plan["splits"]),
            f"ranges of columns; without them {plan['blocks'] // plan['splits']} blocks",
        ),
        (
            "blocks",
            str(plan["blocks"]),
            f"at most {most} a multiprocessor, {plan['resident']} at a time: {waves:.2f} waves",
        ),
        ("stages", f"{plan['block_stages']} a team", f"of 64 columns, {plan['stages'] - 1} of them on their way"),
        ("shared memory", human_bytes(plan["shared_bytes"]), "of a block"),
        ("workspace", human_bytes(plan["workspace_bytes"]), "sums of the ranges" if split else "no ranges to add"),
    ]
    if gpu is None:
        return _How(plan, facts, None, f"the bandwidth of {name} is not known; that of {', '.join(GPUS)} is")
    bound = estimate(gpu, work_of(plan, traffic))
    return _How(plan, facts, bound.seconds, f"{bound.limit}, by a model; nothing was measured")


def _find(device: str) -> tuple[Gpu | None, int, str]:
    if device in GPUS:
        gpu = GPUS[device]
        return gpu, gpu.multiprocessors, gpu.name
    if device.partition(":")[0] != "cuda":
        raise typer.BadParameter(f"'{device}' is no device; there are cpu, cuda, cuda:1, ... and {', '.join(GPUS)}")
    _, _, index = _native.device_name(device).partition(":")
    found = ng.cuda.device(int(index))
    known = {gpu.name: gpu for gpu in GPUS.values()}
    return known.get(found.name.removeprefix("NVIDIA ")), found.multiprocessors, found.name
