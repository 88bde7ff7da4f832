"""What kernels of narrow weights do, counted on the simulated GPU (tests/simgpu): ours, and FP6-LLM's and Marlin's.

    pip download --no-deps --no-binary :all: deepspeed==0.14.5 auto-gptq==0.7.1     # with BUILD_CUDA_EXT=0
    tar xzf deepspeed-0.14.5.tar.gz && tar xzf auto_gptq-0.7.1.tar.gz
    python bench/gpu_counts.py --fp6-llm deepspeed-0.14.5 --marlin auto_gptq-0.7.1  # FP6_LLM and MARLIN of gpu_model.py

Ours are run as the installed library has them. One block is run with three numbers of columns. What it does is a
constant and so much for each stage of 64 columns; that this is exact, and not a fit, is checked. The kernels of others
are read from where they were unpacked: DeepSpeed has a copy of FP6-LLM's, AutoGPTQ of Marlin's. Instructions are those
of PTX, of which ptxas may make fewer; copies from register to register, which it gives the same register, are left out.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests" / "simgpu"), str(ROOT / "tests" / "simgpu" / "tests")]

import fpx  # noqa: E402
import narrowgauge as ng  # noqa: E402
import numpy as np  # noqa: E402
import simgpu  # noqa: E402
from narrowgauge import _native  # noqa: E402


class Counts(NamedTuple):
    """Of a block."""

    instructions: float  # of warps
    wavefronts: float  # of shared memory
    mma: float  # m16n8k16
    l2_bytes: float

    def plus(self, other: Counts, times: float = 1) -> Counts:
        return Counts(*(a + times * b for a, b in zip(self, other, strict=True)))


class Linear(NamedTuple):
    """A block's counts: `fixed`, and `stage` for each 64 columns."""

    fixed: Counts
    stage: Counts

    def at(self, stages: float) -> Counts:
        return self.fixed.plus(self.stage, stages)


_COPY = re.compile(r"mov\.\w+ %(r|rd|rs|f)\d+, %(r|rd|rs|f)\d+")


def _instructions(launch: simgpu.Launch) -> float:
    """Of warps, copies from register to register left out."""
    threads = launch.counters.threads
    return sum(int(threads[i]) for i, each in enumerate(launch.kernel.code) if not _COPY.fullmatch(each.text)) / 32


def counts_of(launches: Sequence[simgpu.Launch]) -> Counts:
    totals = [launch.totals for launch in launches]
    return Counts(
        sum(map(_instructions, launches)),
        sum(kind["wavefronts"] for each in totals for kind in each["shared"].values()),
        sum(each["mma"] for each in totals),
        sum(kind["bytes"] for each in totals for kind in each["global"].values()),
    )


def per_stage(run: Callable[[int], Counts], columns: int) -> Linear:
    """From runs with `columns`, twice and three times as many. ValueError if the counts do not lie on a line."""
    one, two, three = (run(times * columns) for times in (1, 2, 3))
    step = two.plus(one, -1)
    if three.plus(two, -1) != step:
        raise ValueError(f"the counts {one}, {two}, {three} are not a constant and so much for {columns} columns")
    return Linear(one.plus(step, -1), Counts(*(count * 64 / columns for count in step)))


@functools.cache
def shipped(kernel: str) -> simgpu.Program:
    """A kernel by itself, as PTX from the library that is installed. ValueError if it was built without kernels."""
    text = Path(ng._native.__file__).read_bytes()
    start = text.find(f".visible .entry {kernel}(".encode())
    if start < 0:
        raise ValueError(f"{ng._native.__file__} has no kernel {kernel}: it was built without nvcc")
    module = text.rindex(b".version", 0, start)
    head = text[module : text.index(b".visible .entry", module)]  # what all kernels of the image share
    body = text[start : text.index(b"\n}", start) + 2]
    # Lines of the source lead nowhere without the other kernels.
    return simgpu.Program(re.sub(r"^\s*\.loc.*$", "", (head + body).decode(), flags=re.M))


def ours(format: str, tile: int) -> Linear:
    """Of the kernel for fp16 activations with `tile` rows of x."""
    plan = _native.cuda_linear_plan(tile, ng.Format(format), 64, 64, "float16", 1)
    element, group, scale = format.split(":")
    kind = (0, "row") if group == "row" else (int(group[1:]), scale)
    program, rng = shipped(plan["kernel"]), np.random.default_rng(0)

    def run(k: int) -> Counts:
        matrix = fpx.random_matrix(rng, element, *kind, plan["weight_rows"], k)
        x = rng.standard_normal((tile, k)).astype(np.float16)
        return counts_of(fpx.run(program, plan["kernel"], matrix, x, tile, race=False).launches)

    return per_stage(run, 1024)


# --- others ----------------------------------------------------------------------------------------------------------


def fp6_llm(folder: Path, tile: int) -> Linear:
    """FP6-LLM's kernel for `tile` rows of x and 256 of fp6_e3m2 weights, in a source tree of DeepSpeed."""
    headers = folder / "deepspeed/inference/v2/kernels/core_ops/cuda_linear"
    kernel = f"QUANT_GEMM_Kernel<TilingConfig<4, 1, {tile // 8}>, half>"
    arguments = "const uint4*, const uint4*, const half*, const half*, half*, size_t, size_t, size_t, int"
    source = (
        f'#include <cstdio>\n#include "include/kernel_matmul.cuh"\ntemplate __global__ void {kernel}({arguments});\n'
    )
    program = simgpu.compile_text(source, "sm_80", ["-O3", f"-I{headers}"])
    rows = 256

    def run(k: int) -> Counts:
        device = simgpu.Device()
        low, high = (device.array(np.zeros(rows * k * bits // 8, np.uint8)) for bits in (2, 4))
        scales, x = device.array(np.ones(rows, np.float16)), device.array(np.ones((tile, k), np.float16))
        y = device.empty((tile, rows), np.float16)
        sizes = [np.int64(rows), np.int64(tile), np.int64(k), np.int32(1)]
        arguments = [low, high, scales, x, y, *sizes]
        return counts_of([program.launch("QUANT_GEMM", 1, 128, arguments, device, shared=100 << 10, race=False)])

    return per_stage(run, 512)


def marlin(folder: Path, tile: int) -> Linear:
    """Marlin's kernel for `tile` rows of x and groups of 128, in a source tree of AutoGPTQ."""
    text = (folder / "autogptq_extension/marlin/marlin_cuda_kernel.cu").read_text()
    text = text[: text.index("const int THREADS")]  # what follows launches it by the runtime
    for line in ("#ifndef MARLIN_CUDA_KERNEL_CUH", '#include "marlin_cuda_kernel.cuh"'):
        text = text.replace(line, "")
    columns, depth = (8, 8) if tile == 16 else (16, 4)
    arguments = "const int4*, const int4*, int4*, const int4*, int, int, int, int*"
    text += f"\ntemplate __global__ void Marlin<256, {tile // 16}, {columns}, {depth}, 4, 8>({arguments});\n"
    program = simgpu.compile_text(text, "sm_80", ["-O3", "--expt-relaxed-constexpr"])
    rows = 16 * columns

    def run(k: int) -> Counts:
        device = simgpu.Device()
        x, codes = device.array(np.ones((tile, k), np.float16)), device.array(np.zeros(rows * k // 2, np.uint8))
        scales, y = device.array(np.ones((k // 128, rows), np.float16)), device.empty((tile, rows), np.float16)
        locks = device.array(np.zeros(64, np.int32))
        arguments = [x, codes, y, scales, np.int32(tile), np.int32(rows), np.int32(k), locks]
        return counts_of([program.launch("Marlin", 1, 256, arguments, device, shared=96 << 10, race=False)])

    return per_stage(run, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fp6-llm", type=Path, required=True, help="DeepSpeed's sources")
    parser.add_argument("--marlin", type=Path, required=True, help="AutoGPTQ's sources")
    args = parser.parse_args()
    for name, count, folder, tiles in (
        ("FP6_LLM", fp6_llm, args.fp6_llm, (8, 16, 32, 64)),
        ("MARLIN", marlin, args.marlin, (16, 32, 64)),
    ):
        print(name)
        for tile in tiles:
            linear = count(folder, tile)
            print(f"    {tile}: Linear(Counts{tuple(linear.fixed)}, Counts{tuple(linear.stage)}),", flush=True)


if __name__ == "__main__":
    main()
