"""Weight-only linear layers beside torch, and beside the time that memory needs to deliver the same bytes.

    python bench/linear.py                        # 4096 x 4096, three tables; about four minutes
    python bench/linear.py --shape 11008x4096 --formats fp6 int8 --rows 1 4 16 --png linear.png

The protocol, for each of
  DRAM      weights rotated over at least --gigabytes, threads pinned
  cache     two copies of the weights in turn, threads pinned
  unpinned  as DRAM, threads where the system puts them, as users run
every matmul is timed by itself, all kernels interleaved in random order (protocol.py), p10 and median reported. The
limit is a streaming read of the same packed bytes on the same threads in the same rounds; "limit" is its p10 over the
kernel's. "x bf16" is torch's bf16 F.linear over the kernel, median over median. Activations are bf16 (fp32 for fp32).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import narrowgauge as ng
import protocol
import torch

FORMATS = ["fp6", "int8", "fp8", "fp5", "fp4", "int4", "mxfp6"]
TABLES = ["DRAM", "cache", "unpinned"]


class Case:
    """A kernel over rotating copies of its weights."""

    def __init__(self, weights: list[Any], call: Callable[[torch.Tensor, Any], torch.Tensor], nbytes: int) -> None:
        self.weights, self.call, self.nbytes = weights, call, nbytes

    def bind(self, x: torch.Tensor) -> Callable[[int], object]:
        weights, call = self.weights, self.call
        return lambda number: call(x, weights[number % len(weights)])


def copies(nbytes: int, gigabytes: float) -> int:
    """At least two, so that a cache holds no weight by chance alone."""
    return max(2, int(gigabytes * 1e9 / nbytes) + 1)


def narrow_case(w: torch.Tensor, name: str, gigabytes: float) -> Case:
    canonical = ng.quantize(w, name)
    weights = [canonical.__copy__().pack() for _ in range(copies(canonical.nbytes, gigabytes))]
    return Case(weights, ng.linear, canonical.nbytes)


def torch_cases(w: torch.Tensor, gigabytes: float) -> dict[str, Case]:
    n, k = w.shape
    cases = {}
    for name, dtype in (("torch bf16", torch.bfloat16), ("torch fp32", torch.float32)):
        nbytes = n * k * dtype.itemsize
        weights = [w.to(dtype, copy=True) for _ in range(copies(nbytes, gigabytes))]
        cases[name] = Case(weights, torch.nn.functional.linear, nbytes)

    scale = (w.abs().amax(1) / 127).to(torch.bfloat16)
    codes = (w / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)
    int8 = [(codes.clone(), scale) for _ in range(copies(n * k, gigabytes))]
    cases["torch int8pack"] = Case(int8, lambda x, q: torch.ops.aten._weight_int8pack_mm(x, *q), n * k + 2 * n)

    group = 128
    if k % group == 0 and n % 32 == 0:
        lows = w.reshape(n, -1, group)
        step = (lows.abs().amax(-1) / 7).clamp(min=1e-8)
        quarters = ((lows / step[..., None]).round().clamp(-8, 7) + 8).to(torch.int32).reshape(n, k)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quarters, 1)
        pairs = torch.stack([step.T, torch.zeros_like(step.T)], -1).to(torch.bfloat16).contiguous()
        int4 = [(packed.clone(), group, pairs) for _ in range(copies(n * k // 2, gigabytes))]
        cases["torch int4pack g128"] = Case(
            int4, lambda x, q: torch.ops.aten._weight_int4pack_mm_for_cpu(x, *q), n * k // 2 + 2 * pairs.numel()
        )
    return cases


def limit_case(case: Case) -> Callable[[int], object]:
    blocks = [q.packed for q in case.weights]
    return lambda number: ng._native.stream_read(blocks[number % len(blocks)])


def measure(args: argparse.Namespace, table: str) -> list[dict[str, Any]]:
    n, k = map(int, args.shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=generator) * 0.02
    gigabytes = 0.0 if table == "cache" else args.gigabytes
    peers = torch_cases(w, gigabytes)
    narrow = {name: narrow_case(w, name, gigabytes) for name in args.formats}
    limits = {f"read {name}": limit_case(case) for name, case in narrow.items()}

    results = []
    with torch.inference_mode():
        for m in args.rows:
            x = {dtype: torch.randn(m, k, generator=generator).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
            bound = {
                name: case.bind(x[torch.float32 if name == "torch fp32" else torch.bfloat16])
                for name, case in (peers | narrow).items()
            }
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
                results.append(result)
    return results


def show(args: argparse.Namespace, table: str, results: list[dict[str, Any]]) -> None:
    columns = ["kernel", *(f"M={m} ms p10 / median" for m in args.rows), "limit M=1", "x bf16, by M"]
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
        )
    protocol.print_table(f"{table}, {args.shape}, bf16 activations", columns, lines)


def plot(path: str, results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = list(dict.fromkeys(result["table"] for result in results))
    figure, axes = pyplot.subplots(1, len(tables), figsize=(6 * len(tables), 5), squeeze=False, sharey=True)
    for axis, table in zip(axes[0], tables, strict=True):
        for name in dict.fromkeys(result["kernel"] for result in results):
            points = [(r["m"], r["x_bf16"]) for r in results if r["kernel"] == name and r["table"] == table]
            axis.plot(*zip(*points, strict=True), marker="o", ls="--" if name.startswith("torch") else "-", label=name)
        axis.set(title=table, xscale="log", xlabel="rows of x (M)", ylabel="times torch bf16")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def run_table(args: argparse.Namespace, table: str, results_path: str) -> None:
    """In a process of its own, since pinning and the allocator's state cannot be undone."""
    environment = dict(os.environ)
    environment.pop("GOMP_CPU_AFFINITY", None)
    command = [sys.executable, __file__, "--table", table, "--json", results_path, "--shape", args.shape]
    command += ["--rounds", str(args.rounds), "--gigabytes", str(args.gigabytes), "--rows", *map(str, args.rows)]
    subprocess.run([*command, "--formats", *args.formats], check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="N x K of the weights")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64], help="M, the rows of x")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
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
        if args.json:
            protocol.write_json(args.json, results)
        return

    import json

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
