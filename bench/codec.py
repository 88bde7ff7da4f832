"""How fast matrices are quantized and dequantized, beside memcpy.

    python bench/codec.py                          # 256 MB of fp32 weights; about a minute
    python bench/codec.py --formats fp6 int4 --isa avx2 --png codec.png

A rate counts the bytes read and the bytes written, as does memcpy's: of the same fp32 matrix, with libc's memcpy, one
share for each thread of the executor. All cases and memcpy are interleaved (protocol.py); "of memcpy" is the ratio of
the two rates, median over median. Weights lie in memory, beyond any cache that this process can count on.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import narrowgauge as ng
import protocol
import torch

FORMATS = ["int8", "fp8", "fp6", "int4", "fp5", "fp4", "nf4", "uint4:g64:fp16", "mxfp8", "mxfp6", "mxfp4", "nvfp4"]
FORMATS += ["int8:g64:bf16", "int4:g64:bf16"]  # what collectives send
DIRECTIONS = ["quantize fp32", "quantize bf16", "dequantize fp32", "dequantize bf16"]


class Memcpy:
    """Copies one tensor to another with as many threads as the executor has, each on a core of its own if pinned."""

    def __init__(self, source: torch.Tensor) -> None:
        self.source, self.target = source, torch.zeros_like(source)
        self.threads = ng.threads()
        cores = [int(core) for core in os.environ.get("GOMP_CPU_AFFINITY", "").split()]
        self.pool = ThreadPoolExecutor(self.threads)
        self.cores = cores if len(cores) >= self.threads else []

    def share(self, index: int) -> None:
        if self.cores:
            os.sched_setaffinity(0, {self.cores[index]})  # of this thread
        size = self.source.nbytes // self.threads
        ctypes.memmove(self.target.data_ptr() + index * size, self.source.data_ptr() + index * size, size)

    def __call__(self, number: int) -> None:
        list(self.pool.map(self.share, range(self.threads)))


def quantize_case(w: torch.Tensor, q: ng.QTensor) -> Callable[[int], object]:
    arrays = q._borrow(q.canonical())
    options = ("absmax", "error", False, 0, False, False)
    return lambda number: ng._native.quantize(w, q.format, q.rows, q.cols, *arrays, *options)


def dequantize_case(q: ng.QTensor, out: torch.Tensor) -> Callable[[int], object]:
    arrays = q._borrow(q.canonical())
    return lambda number: ng._native.dequantize(q.format, q.rows, q.cols, *arrays, out)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows, cols = map(int, args.shape.split("x"))
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.02
    narrow = w.bfloat16()
    out = {torch.float32: torch.zeros_like(w), torch.bfloat16: torch.zeros_like(narrow)}
    cases: dict[str, Callable[[int], object]] = {"memcpy": Memcpy(w)}
    traffic = {"memcpy": 2 * w.nbytes}
    for name in args.formats:
        q = ng.quantize(w, name)
        for direction, case, dense in (
            ("quantize fp32", quantize_case(w, q), w),
            ("quantize bf16", quantize_case(narrow, q), narrow),
            ("dequantize fp32", dequantize_case(q, out[torch.float32]), w),
            ("dequantize bf16", dequantize_case(q, out[torch.bfloat16]), narrow),
        ):
            cases[f"{name} {direction}"] = case
            traffic[f"{name} {direction}"] = q.nbytes + dense.nbytes
    times = protocol.interleave(cases, args.rounds)

    def rate(case: str) -> protocol.Timing:
        return protocol.Timing(*(traffic[case] / milliseconds * 1e-6 for milliseconds in times[case]))

    copy = rate("memcpy")
    results = []
    for name in args.formats:
        for direction in DIRECTIONS:
            best, median = rate(f"{name} {direction}")
            results.append(
                {
                    "format": name,
                    "direction": direction,
                    "GB/s p10": best,
                    "GB/s median": median,
                    "of memcpy p10": best / copy.p10,
                    "of memcpy median": median / copy.median,
                }
            )
    print(f"\nmemcpy: {copy.median:.1f} GB/s median, {copy.p10:.1f} p10, {ng.threads()} threads")
    return results


def print_results(results: list[dict[str, Any]], shape: str) -> None:
    table = []
    for name in dict.fromkeys(result["format"] for result in results):
        cells = [name]
        for result in results:
            if result["format"] == name:
                cells.append(f"{result['GB/s median']:.1f} ({100 * result['of memcpy median']:.0f} %)")
        table.append(cells)
    protocol.print_table(f"GB/s read and written (of memcpy's), median, {shape}", ["format", *DIRECTIONS], table)


def plot(results: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(result["format"] for result in results))
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for i, direction in enumerate(DIRECTIONS):
        heights = [100 * r["of memcpy median"] for r in results if r["direction"] == direction]
        axes.bar([x + 0.2 * (i - 1.5) for x in range(len(names))], heights, 0.2, label=direction)
    axes.axhline(70, color="gray", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set_ylabel("% of memcpy's traffic rate")
    axes.set_title(f"{ng._native.cpu_name()}, {ng._native.isa()}, {ng.threads()} threads")
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="16384x4096", help="rows x columns")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--isa", choices=ng._native.supported_isas(), default=ng._native.isa())
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--png", metavar="FILE")
    args = parser.parse_args()
    protocol.run_pinned()
    torch.set_num_threads(protocol.usable_cores())
    ng._native.force_isa(args.isa)
    results = measure(args)
    print_results(results, args.shape)
    protocol.print_machine()
    if args.json:
        protocol.write_json(args.json, results)
    if args.png:
        plot(results, args.png)


if __name__ == "__main__":
    main()
