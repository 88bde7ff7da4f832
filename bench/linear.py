"""Weight-only linear layers beside torch, and beside the time that memory needs to deliver the same bytes.

    python bench/linear.py                        # 4096 x 4096, three tables; about ten minutes
    python bench/linear.py --shape 11008x4096 --formats fp6 int8 --rows 1 4 16 --png linear.png

The protocol, for each of
  DRAM      weights rotated over at least --gigabytes, threads pinned
  cache     two copies of the weights in turn, threads pinned
  unpinned  as DRAM, threads where the system puts them, as users run
every matmul is timed by itself, all kernels interleaved in random order (protocol.py), p10 and median reported. The
limit is a streaming read of the same packed bytes on the same threads in the same rounds; "limit" is its p10 over the
kernel's. "x bf16" is torch's bf16 F.linear over the kernel, median over median. x is bf16; fp32 for torch fp32, torch
int8 dynamic and the libraries of --peers. "fp6 int8" is fp6 with activations="int8"; "noise" is what rounding them does
to y, for normally distributed x, in dB below it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import narrowgauge as ng
import protocol
import torch
from linear_peers import PEERS, Case, all_cores, copies, torch_ops

FORMATS = ["fp6", "int8", "fp8", "fp5", "fp4", "int4", "mxfp6"]
TABLES = ["DRAM", "cache", "unpinned"]


def narrow_cases(w: torch.Tensor, name: str, activations: list[str], gigabytes: float) -> dict[str, Case]:
    """A format with each of the activations that it takes, over the same copies."""
    canonical = ng.quantize(w, name)
    weights = [canonical.__copy__().pack() for _ in range(copies(canonical.nbytes, gigabytes))]
    cases = {}
    for i, each in enumerate(activations):
        try:
            ng._native.check_activations(each, canonical.format)
        except ValueError:
            continue
        call = functools.partial(_linear, activations=each)
        title = name if each == "exact" else f"{name} {each}"
        cases[title] = Case(weights, call, canonical.nbytes, first=i / (len(activations) + 1))
    return cases


def _linear(x: torch.Tensor, q: ng.QTensor, activations: str) -> object:
    return ng.linear(x, q, activations=activations)


def peers_of(w: torch.Tensor, names: list[str], gigabytes: float) -> dict[str, Case]:
    cases = torch_ops(w, gigabytes)
    for name in names:
        try:
            with all_cores():
                cases |= PEERS[name](w, gigabytes)
        except ImportError as missing:
            print(f"{name} is absent: {missing}")
    return cases


def limit_case(case: Case) -> Callable[[int], object]:
    blocks = [q.packed for q in case.weights]
    first = len(blocks) - 1 - case.first
    return lambda number: ng._native.stream_read(blocks[(number + first) % len(blocks)])


def noise_db(case: Case, w: torch.Tensor) -> float:
    """How far y is from the product of exact activations and the same weights: their energy over the error's, in dB."""
    x = torch.randn(64, w.shape[1], generator=torch.Generator().manual_seed(1))
    exact = ng.linear(x, case.weights[0]).double()
    error = torch.as_tensor(case.call(x, case.weights[0])).double() - exact
    return float(10 * torch.log10(exact.square().sum() / error.square().sum()))


def measure(args: argparse.Namespace, table: str) -> list[dict[str, Any]]:
    n, k = map(int, args.shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=generator) * 0.02
    gigabytes = 0.0 if table == "cache" else args.gigabytes
    peers = peers_of(w, args.peers, gigabytes)
    narrow: dict[str, Case] = {}
    for name in args.formats:
        narrow |= narrow_cases(w, name, args.activations, gigabytes)
    noise = {name: noise_db(case, w) for name, case in narrow.items() if case.call.keywords["activations"] != "exact"}
    limits = {f"read {name}": limit_case(case) for name, case in narrow.items()}

    results = []
    with torch.inference_mode():
        for m in args.rows:
            x = {dtype: torch.randn(m, k, generator=generator).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
            bound = {name: case.bind(x[case.dtype]) for name, case in (peers | narrow).items()}
            timings = protocol.interleave(bound | limits, args.rounds)
            base = timings["torch bf16"]
            for name, case in (peers | narrow).items():
                timing = timings[name]
                result = {
                    "table": table, "kernel": name, "m": m, "n": n, "k": k, "p10_ms": timing.p10,
                    "median_ms": timing.median, "gb_per_s": case.nbytes / timing.p10 * 1e-6,
                    "x_bf16": base.median / timing.median,
                }  # fmt: skip
                if name in narrow:
                    result["share_of_limit"] = timings[f"read {name}"].p10 / timing.p10
                    result["limit_gb_per_s"] = case.nbytes / timings[f"read {name}"].p10 * 1e-6
                if name in noise:
                    result["noise_db"] = noise[name]
                results.append(result)
    return results


def show(args: argparse.Namespace, table: str, results: list[dict[str, Any]]) -> None:
    columns = ["kernel", *(f"M={m} ms p10 / median" for m in args.rows), "limit M=1", "x bf16, by M", "noise dB"]
    lines = []
    for name in dict.fromkeys(result["kernel"] for result in results):
        mine = {result["m"]: result for result in results if result["kernel"] == name}
        first = mine[args.rows[0]]
        limit = (
            f"{first['share_of_limit']:.0%} of {first['limit_gb_per_s']:.1f} GB/s" if "share_of_limit" in first else ""
        )
        lines.append(
            [name]
            + [f"{mine[m]['p10_ms']:.3f} / {mine[m]['median_ms']:.3f}" for m in args.rows]
            + [limit, "  ".join(f"{mine[m]['x_bf16']:.2f}" for m in args.rows)]
            + [f"{first['noise_db']:.1f}" if "noise_db" in first else ""]
        )
    protocol.print_table(f"{table}, {args.shape}", columns, lines)


def plot(path: str, results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = list(dict.fromkeys(result["table"] for result in results))
    # Above, how much faster than torch bf16; below, bytes of weights a second under what memory delivers.
    figure, axes = pyplot.subplots(2, len(tables), figsize=(6 * len(tables), 9), squeeze=False, sharey="row")
    for column, table in enumerate(tables):
        mine = [result for result in results if result["table"] == table]
        for axis, what, label in ((axes[0], "x_bf16", "times torch bf16"), (axes[1], "gb_per_s", "GB/s of weights")):
            for name in dict.fromkeys(result["kernel"] for result in mine):
                points = [(result["m"], result[what]) for result in mine if result["kernel"] == name]
                narrow = any("limit_gb_per_s" in result for result in mine if result["kernel"] == name)
                axis[column].plot(*zip(*points, strict=True), marker="o", ls="-" if narrow else "--", label=name)
            axis[column].set(title=table, xlabel="rows of x (M)", ylabel=label)
            axis[column].set_xscale("log", base=2)
            axis[column].grid(alpha=0.3)
        limit = max(result.get("limit_gb_per_s", 0.0) for result in mine)
        axes[1][column].axhline(limit, color="black", label="read limit")
    axes[1][0].legend(fontsize=6, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def run_table(args: argparse.Namespace, table: str, results_path: str) -> None:
    """In a process of its own, since pinning and the allocator's state cannot be undone."""
    environment = dict(os.environ)
    environment.pop("GOMP_CPU_AFFINITY", None)
    command = [sys.executable, __file__, "--table", table, "--json", results_path, "--shape", args.shape]
    command += ["--rounds", str(args.rounds), "--gigabytes", str(args.gigabytes), "--rows", *map(str, args.rows)]
    command += ["--activations", *args.activations, "--peers", *args.peers]
    subprocess.run([*command, "--formats", *args.formats], check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="N x K of the weights")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64], help="M, the rows of x")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--activations", nargs="+", default=["exact", "int16", "int8"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="besides torch")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--gigabytes", type=float, default=0.6, help="weights of each kernel, rotated")
    parser.add_argument("--table", choices=TABLES, help="only this one, in this process")
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("--png", help="write a chart here")
    args = parser.parse_args()

    if args.table is not None:
        if args.table != "unpinned":
            protocol.run_pinned()
        torch.set_num_threads(protocol.usable_cores())
        ng._native.adopt_openmp()
        protocol.print_machine()
        results = measure(args, args.table)
        show(args, args.table, results)
    else:
        results = []
        with tempfile.TemporaryDirectory() as folder:
            for table in TABLES:
                path = os.path.join(folder, "results.json")
                run_table(args, table, path)
                with open(path, encoding="utf-8") as file:
                    results += json.load(file)["results"]
    if args.json:
        protocol.write_json(args.json, results)
    if args.png:
        plot(args.png, results)
        print(f"\nchart: {args.png}")


if __name__ == "__main__":
    main()
