"""On a machine with an NVIDIA GPU: the tests of GPUs, then linear beside cuBLAS and whatever narrow kernels are there.

    python bench/gpu.py                                   # 4096 x 4096; some minutes
    python bench/gpu.py --shape 8192x28672 --rows 1 16 64 --png gpu.png --json gpu.json

`pytest -m cuda` comes first: times of wrong results mean nothing, so a failure ends it with exit code 1. Then every
kernel's result is compared with float64 on the host, and all are timed in turn, in random order (protocol.py): a time
is that of --repeat calls that follow each other on the default stream and rotate over at least --gigabytes of weights,
divided by their number. "limit" is the time in which a copy on the GPU, in the same rounds, moves the kernel's bytes,
over the kernel's; "x fp16" is torch's F.linear in fp16, which calls cuBLAS, over it, median over median.

Peers are torch's int4 and int8 weight-only ops and, where they are installed, torchao, bitsandbytes and vLLM's Marlin;
one that is absent or fails is named with its reason. They need torch with CUDA; without it only narrowgauge is timed,
on ng.Tensors. Without a GPU this says so and ends with 0. So far it has run on the simulated GPU alone, whose clock
says nothing, and none of the peers has.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import narrowgauge as ng
import numpy as np
import protocol

ROOT = Path(__file__).parents[1]
FORMATS = ["fp6", "fp5", "fp4", "int8", "int4", "mxfp6"]
GROUP = 128  # of the peers


class Case(NamedTuple):
    """A kernel over rotating copies of its weights."""

    name: str
    nbytes: int  # of one copy
    calls: list[Callable[[Any], Any]]  # x [m, k] to y [m, n], one for each copy
    x: str  # type of x
    tolerance: float | None  # of ||y - x @ w.T|| over ||x @ w.T||, w before it was quantized; None: linear.hpp's bound


class Arrays:
    """Weights on the host, x on the GPU, and y back: torch's tensors where torch has CUDA, else ng.Tensors."""

    def __init__(self) -> None:
        try:
            import torch
        except ImportError:
            self.torch, self.why = None, "torch is not installed"
            return
        self.torch = torch if torch.cuda.is_available() else None
        self.why = "" if self.torch else "torch has no CUDA device"

    def host(self, w: np.ndarray) -> Any:
        """As an array of the library whose arrays on the GPU are used."""
        return self.torch.from_numpy(w) if self.torch else w

    def put(self, x: np.ndarray, dtype: str) -> Any:
        if self.torch:
            return self.torch.from_numpy(x).to("cuda", getattr(self.torch, dtype))
        return ng.Tensor.from_dlpack(x.astype(dtype)).to("cuda")

    def get(self, y: Any) -> np.ndarray:
        if self.torch:
            return np.asarray(y.double().cpu())
        return np.from_dlpack(y.to("cpu")).astype(np.float64)


def copies(nbytes: int, gigabytes: float) -> int:
    """At least two, so that a cache holds no weight by chance alone."""
    return max(2, int(gigabytes * 1e9 / nbytes) + 1)


# --- kernels ---------------------------------------------------------------------------------------------------------


def narrow_case(w: Any, format: str, gigabytes: float) -> tuple[Case, np.ndarray]:
    """And its weights as it has them."""
    q = ng.quantize(w, format)
    weights = [q.__copy__().pack("cuda") for _ in range(copies(q.nbytes, gigabytes))]
    calls = [lambda x, one=one: ng.linear(x, one) for one in weights]
    return Case(format, q.nbytes, calls, "float16", None), np.asarray(q.dequantize("float32"), np.float64)


def fp16_case(torch: Any, w: Any, gigabytes: float) -> Case:
    nbytes = 2 * w.numel()
    weights = [w.half() for _ in range(copies(nbytes, gigabytes))]
    calls = [lambda x, one=one: torch.nn.functional.linear(x, one) for one in weights]
    return Case("torch fp16", nbytes, calls, "float16", 1e-2)


def torch_int8(torch: Any, w: Any, gigabytes: float) -> Case:
    scale = w.abs().amax(1) / 127
    codes = (w / scale[:, None]).round().to(torch.int8)
    weights = [codes.clone() for _ in range(copies(w.numel(), gigabytes))]
    bf16 = scale.bfloat16()
    calls = [lambda x, one=one: torch.ops.aten._weight_int8pack_mm(x, one, bf16) for one in weights]
    return Case("torch int8", w.numel() + 2 * len(w), calls, "bfloat16", 0.03)


def torch_int4(torch: Any, w: Any, gigabytes: float) -> Case:
    n, k = w.shape
    groups = w.reshape(n, -1, GROUP)
    step = (groups.abs().amax(-1) / 7).clamp(min=1e-8)
    codes = ((groups / step[..., None]).round().clamp(-8, 7) + 8).to(torch.uint8).reshape(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scales = torch.stack([step.T, torch.zeros_like(step.T)], -1).bfloat16().contiguous()
    weights = [packed.clone() for _ in range(copies(n * k // 2, gigabytes))]
    calls = [lambda x, one=one: torch.ops.aten._weight_int4pack_mm(x, one, GROUP, scales) for one in weights]
    return Case(f"torch int4 g{GROUP}", n * k // 2 + 2 * scales.numel(), calls, "bfloat16", 0.2)


def layers_of(torch: Any, w: Any, gigabytes: float, nbytes: int, make: Callable[[Any], Any]) -> list[Any]:
    """Copies of a layer that `make` makes of a torch.nn.Linear in bf16."""
    made = []
    for _ in range(copies(nbytes, gigabytes)):
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
        layer.weight.data.copy_(w)
        made.append(make(layer))
    return made


def torchao_int4(torch: Any, w: Any, gigabytes: float) -> Case:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    def make(layer: Any) -> Any:
        whole = torch.nn.Sequential(layer)
        quantize_(whole, Int4WeightOnlyConfig(group_size=GROUP))
        return whole

    nbytes = w.numel() // 2 + 4 * w.numel() // GROUP
    return Case(f"torchao int4 g{GROUP}", nbytes, layers_of(torch, w, gigabytes, nbytes, make), "bfloat16", 0.2)


def bitsandbytes_nf4(torch: Any, w: Any, gigabytes: float) -> Case:
    import bitsandbytes

    def make(layer: Any) -> Any:
        n, k = layer.weight.shape
        made = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        made.load_state_dict({"weight": layer.weight.data.cpu()})
        return made.cuda()  # which quantizes

    nbytes = w.numel() // 2 + 4 * w.numel() // 64
    return Case("bitsandbytes nf4", nbytes, layers_of(torch, w, gigabytes, nbytes, make), "bfloat16", 0.2)


def vllm_marlin(torch: Any, w: Any, gigabytes: float) -> Case:
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
    from vllm.scalar_type import scalar_types

    n, k = w.shape
    kind = scalar_types.uint4b8
    _, codes, scales, group_index, order, _ = marlin_quantize(w.half().T.contiguous(), kind, GROUP, False)
    workspace = marlin_utils.marlin_make_workspace_new(w.device)
    none = torch.empty(0, dtype=torch.int, device=w.device)
    weights = [codes.clone() for _ in range(copies(n * k // 2, gigabytes))]

    def call(x: Any, one: Any) -> Any:
        return marlin_utils.apply_gptq_marlin_linear(
            x, one, scales, none, group_index, order, workspace, kind,
            output_size_per_partition=n, input_size_per_partition=k, is_k_full=True,
        )  # fmt: skip

    calls = [lambda x, one=one: call(x, one) for one in weights]
    return Case(f"vLLM Marlin int4 g{GROUP}", n * k // 2 + 2 * scales.numel(), calls, "float16", 0.2)


PEERS = [torch_int8, torch_int4, torchao_int4, bitsandbytes_nf4, vllm_marlin]

# --- correctness -----------------------------------------------------------------------------------------------------


def check(case: Case, arrays: Arrays, x: np.ndarray, w: np.ndarray) -> None:
    """Raises AssertionError if y is not what it should be. w: as the kernel has it, or before it was quantized."""
    exact = np.asarray(arrays.torch.from_numpy(x).bfloat16().double()) if case.x == "bfloat16" else x.astype(np.float64)
    y = arrays.get(case.calls[0](arrays.put(x, case.x)))
    reference = exact @ w.T
    if case.tolerance is None:
        k = x.shape[1]
        bound = 2.0**-24 * (16 + k / 16) * (np.abs(exact) @ np.abs(w).T) + 2.0**-11 * np.abs(reference) + 2.0**-25
        worst, most = float((np.abs(y - reference) / bound).max()), 1.0
    else:
        worst, most = float(np.linalg.norm(y - reference) / np.linalg.norm(reference)), case.tolerance
    if not worst <= most:
        raise AssertionError(f"{case.name}, M={len(x)}: error {worst:.3g}, expected at most {most:g}")


# --- the run ---------------------------------------------------------------------------------------------------------


def run_tests(paths: list[str]) -> bool:
    """Whether all tests of GPUs passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *paths]
    print("$", " ".join(command), flush=True)
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def peer_cases(arrays: Arrays, w: np.ndarray, x: np.ndarray, gigabytes: float) -> Iterator[Case]:
    """Those that are there and right; says of the others why not."""
    if not arrays.torch:
        print(f"no peers: {arrays.why}")
        return
    there = arrays.torch.from_numpy(w).cuda()
    case = fp16_case(arrays.torch, there, gigabytes)
    check(case, arrays, x, w)
    yield case
    for peer in PEERS:
        try:
            case = peer(arrays.torch, there, gigabytes)
            check(case, arrays, x, w)
        except Exception as error:  # of any kind: they are others' and change; ours are not caught
            print(f"left out: {peer.__name__}: {type(error).__name__}: {error}")
        else:
            yield case


def measure(args: argparse.Namespace, arrays: Arrays) -> list[dict[str, Any]]:
    n, k = map(int, args.shape.split("x"))
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((n, k)) * 0.02).astype(np.float32)
    x = {m: rng.standard_normal((m, k)).astype(np.float16).astype(np.float32) for m in args.rows}
    stream = ng.cuda.current_stream()

    cases = list(peer_cases(arrays, w, x[args.rows[0]], args.gigabytes))
    for format in args.formats:
        case, decoded = narrow_case(arrays.host(w), format, args.gigabytes)
        for rows in x.values():
            check(case, arrays, rows, decoded)
        cases.append(case)
    print("every kernel's results are right")

    block = bytes(max(1 << 16, int(args.gigabytes * 0.25e9)))
    source, target = (ng.Tensor.from_dlpack(np.frombuffer(block, np.uint8).copy()).to("cuda") for _ in range(2))

    def repeated(call: Callable[[int], object]) -> Callable[[int], object]:
        def run(number: int) -> None:
            for i in range(args.repeat):
                call(number * args.repeat + i)
            stream.synchronize()

        return run

    def bind(case: Case, x: Any) -> Callable[[int], object]:
        return lambda i: case.calls[i % len(case.calls)](x)

    results = []
    for m in args.rows:
        there = {dtype: arrays.put(x[m], dtype) for dtype in {case.x for case in cases}}
        bound = {case.name: repeated(bind(case, there[case.x])) for case in cases}
        timings = protocol.interleave(bound | {"copy": repeated(lambda _: target.copy_from(source))}, args.rounds)
        gb_per_s = 2 * source.nbytes * args.repeat / timings["copy"].p10 * 1e-6  # read and written
        for case in cases:
            timing = timings[case.name]
            moved = case.nbytes + 2 * m * (n + k)
            results.append({
                "kernel": case.name, "m": m, "n": n, "k": k, "nbytes": case.nbytes,
                "p10_us": 1e3 * timing.p10 / args.repeat, "median_us": 1e3 * timing.median / args.repeat,
                "copy_gb_per_s": gb_per_s,
                "share_of_limit": moved / gb_per_s * 1e-6 / (timing.p10 / args.repeat),
                "x_fp16": timings["torch fp16"].median / timing.median if "torch fp16" in timings else None,
            })  # fmt: skip
    return results


def show(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    lines = []
    for name in dict.fromkeys(result["kernel"] for result in results):
        cells = []
        for each in (result for result in results if result["kernel"] == name):
            ratio = f" {each['x_fp16']:.2f}x" if each["x_fp16"] else ""
            cells.append(f"{each['p10_us']:.1f} / {each['median_us']:.1f} {each['share_of_limit']:.0%}{ratio}")
        lines.append([name, *cells])
    title = f"{args.shape}: us p10 / median, share of the limit, times torch fp16"
    protocol.print_table(title, ["kernel", *(f"M={m}" for m in args.rows)], lines)


def plot(path: str, results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in dict.fromkeys(result["kernel"] for result in results):
        points = [(each["m"], each["median_us"]) for each in results if each["kernel"] == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="rows of x (M)", ylabel="us, median", yscale="log")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="N x K of the weights")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128], help="M, the rows of x")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=50, help="calls of a kernel in a round")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="weights of each kernel, rotated")
    parser.add_argument("--tests", nargs="*", default=["tests/python"], help="files of tests to run first")
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("--png", help="write a chart here")
    args = parser.parse_args()

    reason = ng.cuda.why_unavailable()
    if not reason and not ng.cuda.architectures():
        reason = "narrowgauge was built without nvcc"
    if reason:
        print(f"no GPU to measure: {reason}")
        return 0
    device = ng.cuda.device()
    print(f"GPU: {device.name}, {device.multiprocessors} multiprocessors, CUDA {ng.cuda.driver_version()}")
    protocol.print_machine()
    if args.tests and not run_tests(args.tests):
        print("the tests of GPUs failed: nothing was timed", file=sys.stderr)
        return 1
    results = measure(args, Arrays())
    show(args, results)
    if args.json:
        protocol.write_json(args.json, results)
    if args.png:
        plot(args.png, results)
        print(f"\nchart: {args.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
