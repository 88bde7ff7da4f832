"""`narrowgauge bench`: one linear layer in several formats beside torch's, in a minute.

Each contender has enough copies of its weights that none is found in a cache; contenders take turns, pass by pass,
and every matmul is timed by itself. bench/linear.py of the sources is the full protocol; this is its short form.
With --explain it says what linear would do, and about how long it would take (explain.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import narrowgauge as ng
from narrowgauge import _native
from narrowgauge.cli.output import JsonOption, Output, human_bytes, table
from narrowgauge.importers import require

_FORMATS = ("fp8", "fp6", "fp5", "fp4", "int8", "int4")


class Timing(NamedTuple):
    """One contender. Seconds per matmul; limit is the seconds that reading the same bytes once takes."""

    name: str
    bytes: int
    median: float
    p10: float
    limit: float


class Contender(NamedTuple):
    name: str
    bytes: int  # of one copy of the weights
    call: Callable[[int], object]  # one matmul with copy i
    read: Callable[[int], object]  # a streaming read of copy i
    copies: int


def command(
    n: Annotated[int, typer.Argument(min=1, help="Rows of the weights.")] = 4096,
    k: Annotated[int, typer.Argument(min=1, help="Columns of the weights.")] = 4096,
    m: Annotated[int, typer.Argument(min=1, help="Rows of the activations (tokens).")] = 1,
    format: Annotated[list[str] | None, typer.Option(help="A format; may be given several times.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of x for the narrow layers: float32 or bfloat16; for --explain also float16.")
    ] = "bfloat16",
    activations: Annotated[str, typer.Option(help="exact, or rounded row by row: int16 or int8.")] = "exact",
    rotate: Annotated[int, typer.Option(min=1, help="MB of weights to go through per contender.")] = 256,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure.")] = 10.0,
    png: Annotated[Path | None, typer.Option(help="Write a bar chart here.")] = None,
    explain: Annotated[bool, typer.Option(help="Say which kernel would run, why, and for how long.")] = False,
    device: Annotated[str, typer.Option(help="For --explain: cpu, cuda, cuda:1, a100, h100, a10 or 4070tis.")] = "cpu",
    json: JsonOption = False,
) -> None:
    """Time y = x @ w.T for weights N x K and M tokens, narrow formats beside torch bf16 and fp32."""
    from narrowgauge.cli.generate import parse_dtype

    output = Output(json)
    if explain:
        _explain(output, n, k, m, format or _formats(activations), device, dtype, activations)
        return
    if device != "cpu":
        raise typer.BadParameter(f"'{device}' is for --explain; bench/gpu.py of the sources times GPUs")
    torch = require("torch", "torch")
    if png is not None:
        require("matplotlib", "demo")
    x_dtype = parse_dtype(dtype)
    formats = format or _formats(activations)
    for each in formats:
        _native.check_activations(activations, ng.Format(each))
    torch.manual_seed(0)
    weight = torch.randn(n, k)
    x = torch.randn(m, k)
    with torch.inference_mode(), output.progress() as progress:
        task = progress.add_task("preparing", total=None)
        contenders = [_torch(weight, x, name, rotate) for name in ("float32", "bfloat16")]
        contenders += [_narrow(weight, x.to(x_dtype), name, rotate, activations) for name in formats]
        progress.update(task, description="measuring")
        timings = measure(contenders, seconds)

    best = min(timing.median for timing in timings[:2])
    rows = [
        [
            timing.name,
            human_bytes(timing.bytes),
            f"{1e6 * timing.median:.1f}",
            f"{1e6 * timing.p10:.1f}",
            f"{timing.bytes / timing.median / 1e9:.1f}",
            f"{100 * timing.limit / timing.median:.0f} %",
            f"{best / timing.median:.2f}x",
        ]
        for timing in timings
    ]
    machine = f"{_native.threads()} threads, {_native.isa()}"
    title = f"N={n} K={k} M={m}, {machine}, weights from memory, narrow x {dtype} {activations}"
    columns = ["weights", ">bytes", ">median us", ">p10 us", ">GB/s", ">of the read limit", ">vs better torch"]
    output.result(
        {
            "n": n,
            "k": k,
            "m": m,
            "threads": _native.threads(),
            "isa": _native.isa(),
            "cpu": _native.cpu_name(),
            "x": dtype,
            "activations": activations,
            "rows": [{**timing._asdict(), "speedup": best / timing.median} for timing in timings],
        },
        table(columns, rows, title),
    )
    if png is not None:
        _plot(timings, title, png)
        output.note(f"wrote {png}")


def _formats(activations: str) -> list[str]:
    """Those of _FORMATS that take the activations. ValueError if these are none at all."""
    _native.check_activations(activations, ng.int8)
    return [each for each in _FORMATS if activations == "exact" or each != "fp8"]


def _explain(
    output: Output, n: int, k: int, m: int, formats: Sequence[str], device: str, dtype: str, activations: str
) -> None:
    from narrowgauge.cli.explain import explain

    if dtype not in ("float32", "float16", "bfloat16"):
        raise typer.BadParameter(f"{dtype!r}; expected float32, float16 or bfloat16", param_hint="--dtype")
    if activations != "exact" and device != "cpu":
        raise typer.BadParameter(f"{activations!r} on {device}; expected exact", param_hint="--activations")
    plans = [explain(n, k, m, format, device, dtype, activations) for format in formats]
    title = f"N={n} K={k} M={m}, x {dtype} {activations}"
    output.result(
        {"n": n, "k": k, "m": m, "x": dtype, "activations": activations, "plans": [values for values, _ in plans]},
        *(table([values["format"], "", "why"], facts, title) for values, facts in plans),
    )


def measure(contenders: list[Contender], seconds: float) -> list[Timing]:
    """Passes over all contenders' copies in turn until the time is up; the first pass warms and does not count."""
    times: list[list[float]] = [[] for _ in contenders]
    reads: list[list[float]] = [[] for _ in contenders]
    stop = time.perf_counter() + seconds
    warm = False
    while not warm or time.perf_counter() < stop or not times[0]:
        for contender, taken, read in zip(contenders, times, reads, strict=True):
            for samples, action in ((taken, contender.call), (read, contender.read)):
                for copy in range(contender.copies):
                    begin = time.perf_counter()
                    action(copy)
                    if warm:
                        samples.append(time.perf_counter() - begin)
        warm = True
    result = []
    for contender, taken, read in zip(contenders, times, reads, strict=True):
        taken.sort()
        read.sort()
        p10, median = taken[len(taken) // 10], taken[len(taken) // 2]
        result.append(Timing(contender.name, contender.bytes, median, p10, read[len(read) // 2]))
    return result


def _copies(nbytes: int, rotate: int) -> int:
    return max(2, -(-rotate * 10**6 // max(nbytes, 1)))


def _torch(weight: Any, x: Any, dtype: str, rotate: int) -> Contender:
    import torch

    x, first = x.to(getattr(torch, dtype)), weight.to(getattr(torch, dtype))
    weights = [first.clone() for _ in range(_copies(first.nbytes, rotate))]
    bytes_of = [each.view(torch.uint8) for each in weights]
    return Contender(
        f"torch {dtype}",
        first.nbytes,
        lambda i: torch.nn.functional.linear(x, weights[i]),
        lambda i: _native.stream_read(bytes_of[i]),
        len(weights),
    )


def _narrow(weight: Any, x: Any, format: str, rotate: int, activations: str) -> Contender:
    import copy

    q = ng.quantize(weight, format).pack()
    weights = [q, *(copy.deepcopy(q) for _ in range(_copies(q.nbytes, rotate) - 1))]
    return Contender(
        str(q.format),
        q.nbytes,
        lambda i: ng.linear(x, weights[i], activations=activations),
        lambda i: _native.stream_read(weights[i].packed),
        len(weights),
    )


def _plot(timings: list[Timing], title: str, png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [timing.name for timing in timings]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(names) + 1.5), layout="constrained")
    axes.barh(names, [1e6 * timing.median for timing in timings], label="matmul")
    axes.barh(names, [1e6 * timing.limit for timing in timings], height=0.3, label="reading the same bytes")
    axes.invert_yaxis()
    axes.set_xlabel("us per matmul, median")
    axes.set_title(title, fontsize=9)
    axes.legend()
    figure.savefig(png, dpi=120)
    pyplot.close(figure)
