"""Linear on GPUs without one: what the kernels do, counted, and the time that a model gives them.

    python bench/gpu_model.py                          # all tables; a few minutes
    python bench/gpu_model.py --png gpu_model.png --json gpu_model.json

Ours are fp16 activations with fp6 (groups of 128), FP6-LLM's format (fp6_e3m2 with scales of rows) and int4 (groups of
128), beside the published FP6-LLM and Marlin, on layers of Llama-2-70B, OPT-30B, OPT-66B and Phi-3-mini. How work is
cut is asked of the library (cuda_linear_plan), what a block does is counted by the simulated GPU (gpu_counts.py).
Times are a model (narrowgauge/cli/roofline.py), not measurements: it has to give the ratios that others published
within 25 % from their own counts first, and for as many rows of x as those ratios are about. All else are counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import narrowgauge as ng
import protocol
from gpu_counts import Counts, Linear, ours
from narrowgauge import _native
from narrowgauge.cli.explain import traffic_of, work_of
from narrowgauge.cli.roofline import GPUS, Estimate, Gpu, Work, dense, estimate

ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
FEW = 16  # rows of x up to which the goals are
LAYERS = {  # N, K
    "Llama-2-70B": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "OPT-30B": [(21504, 7168), (7168, 7168), (28672, 7168), (7168, 28672)],
    "OPT-66B": [(27648, 9216), (9216, 9216), (36864, 9216), (9216, 36864)],
    "Phi-3-mini": [(9216, 3072), (3072, 3072), (16384, 3072), (3072, 8192)],
}
FORMATS = {"fp6": "fp6_e2m3:g128:fp16", "fp6 rows": "fp6_e3m2:row:fp16", "int4": "int4:g128:fp16"}
TILES = [8, 16, 32, 64, 128]  # rows of x, as in fpx_args.hpp

# --- peers: printed by gpu_counts.py ---------------------------------------------------------------------------------

FP6_LLM = {
    8: Linear(Counts(2052.0, 172, 0, 4608), Counts(3916.0, 232.0, 64.0, 13312.0)),
    16: Linear(Counts(2396.0, 308, 0, 8704), Counts(3980.0, 272.0, 128.0, 14336.0)),
    32: Linear(Counts(3148.0, 580, 0, 16896), Counts(4164.0, 352.0, 256.0, 16384.0)),
    64: Linear(Counts(4596.0, 1124, 0, 33280), Counts(4548.0, 512.0, 512.0, 20480.0)),
}
MARLIN = {
    16: Linear(Counts(2312.0, 544, 0, 4096), Counts(757.25, 145.0, 64.0, 6272.0)),
    32: Linear(Counts(3224.0, 896, 0, 16384), Counts(1678.5, 354.0, 256.0, 12544.0)),
    64: Linear(Counts(4928.0, 1728, 0, 32768), Counts(2152.5, 514.0, 512.0, 16640.0)),
}
FP6_LLM_RESIDENT = {8: 5, 16: 4, 32: 3, 64: 2}  # 96, 120, 155 and 214 registers in 128 threads


def fp6_llm(gpu: Gpu, m: int, n: int, k: int) -> Estimate:
    """Split into as many ranges of columns, of the 18 that its table goes up to, as is best."""
    tile = min((each for each in FP6_LLM if m <= each), default=64)
    tiles = -(-m // tile)
    stages = -(-k // 64)
    traffic = n * k * 6 / 8 + 2 * n + 2 * m * (n + k)

    def split(count: int) -> Estimate:
        block = FP6_LLM[tile].at(stages / count)
        copied = 256 * 64 * 6 / 8 + tile * 64 * 2  # a stage, of which one is on its way
        workspace = 4 * m * n * count if count > 1 else 0
        work = Work(-(-n // 256) * tiles * count, FP6_LLM_RESIDENT[tile], traffic, block.l2_bytes, copied, block.mma,
                    block.instructions, block.wavefronts, workspace)  # fmt: skip
        return estimate(gpu, work)

    return min((split(count) for count in range(1, 19)), key=lambda found: found.seconds)


def marlin(gpu: Gpu, m: int, n: int, k: int) -> Estimate:
    """One block a multiprocessor, among which tiles are dealt out; three stages are on their way."""
    tile = min((each for each in MARLIN if m <= each), default=64)
    rows, depth = (128, 128) if tile == 16 else (256, 64)
    tiles = -(-n // rows) * -(-k // depth) * -(-m // tile)
    block = MARLIN[tile].at(-(-tiles // gpu.multiprocessors) * depth / 64)
    traffic = n * k * (4 + 16 / 128) / 8 + 2 * m * (n + k)
    copied = 3 * (rows * depth // 2 + tile * depth * 2)
    return estimate(gpu, Work(gpu.multiprocessors, 1, traffic, block.l2_bytes, copied, block.mma,
                              block.instructions, block.wavefronts))  # fmt: skip


# --- does the model give what was published? -------------------------------------------------------------------------


class Published(NamedTuple):
    """A ratio that others measured on silicon. up_to: rows of x that it is about."""

    what: str
    source: str
    ratio: float
    up_to: int
    model: float

    @property
    def reproduced(self) -> bool:
        return abs(self.model / self.ratio - 1) <= 0.25


def published() -> list[Published]:
    a100, a10, ada = GPUS["a100"], GPUS["a10"], GPUS["4070tis"]
    readme = "README of usyd-fsalab/fp6_llm"
    ratios = [
        dense(a100, m, n, k) / fp6_llm(a100, m, n, k).seconds
        for name in ("Llama-2-70B", "OPT-30B", "OPT-66B")
        for n, k in LAYERS[name]
        for m in (8, 16, 32)
    ]
    found = [
        Published("FP6-LLM over cuBLAS, A100, M = 8 to 32, mean", readme, 2.1, 32, statistics.mean(ratios)),
        Published("the same, largest", readme, 2.6, 32, max(ratios)),
    ]
    for n, k, ratio in ((8192, 8192, 2.26), (10240, 8192, 2.29), (57344, 8192, 2.60), (8192, 28672, 2.39)):
        model = dense(ada, 1, n, k) / fp6_llm(ada, 1, n, k).seconds
        found.append(
            Published(f"FP6-LLM over cuBLAS, RTX 4070 Ti Super, M = 1, {n} x {k}", "torchao #1147", ratio, 1, model)
        )
    n, k = 256 * 72, 4 * 256 * 72  # "can be ideally partitioned"
    for m in (1, 16, 32):
        model = dense(a10, m, n, k) / marlin(a10, m, n, k).seconds
        found.append(Published(f"Marlin over fp16, A10, M = {m}", "README of IST-DASLab/marlin", 3.87, m, model))
    return found


def trusted_rows(checks: list[Published]) -> int:
    """The most rows of x for which times may be told: 0 if one of the ratios is not reproduced."""
    return max(check.up_to for check in checks) if all(check.reproduced for check in checks) else 0


# --- ours ------------------------------------------------------------------------------------------------------------


class Ours(NamedTuple):
    plan: dict[str, Any]
    block: Counts
    traffic: float

    def instructions_per_weight(self, n: int, k: int) -> float:
        """Of threads, for all rows of x."""
        return 32 * self.block.instructions * self.plan["blocks"] / (n * k)


def of_ours(counts: dict[int, Linear], gpu: Gpu, format: str, m: int, n: int, k: int) -> Ours:
    plan = _native.cuda_linear_plan(m, ng.Format(format), n, k, "float16", gpu.multiprocessors)
    block = counts[plan["x_rows"]].at(plan["block_stages"] * plan["teams"])
    return Ours(plan, block, traffic_of(ng.Format(format), n, k, m, "float16"))


def time_of_ours(gpu: Gpu, found: Ours) -> Estimate:
    block, work = found.block, work_of(found.plan, found.traffic)
    return estimate(gpu, work._replace(instructions=block.instructions, wavefronts=block.wavefronts))


def measure() -> dict[str, dict[int, Linear]]:
    return {name: {tile: ours(format, tile) for tile in TILES} for name, format in FORMATS.items()}


# --- tables ----------------------------------------------------------------------------------------------------------


def loop_instructions(kernels: dict[int, Linear], weight_rows: Callable[[int], int], m: int) -> float:
    """PTX instructions of threads for a weight and all m rows of x, in the loop over columns."""
    tile = min((each for each in kernels if m <= each), default=max(kernels))
    return 32 * kernels[tile].stage.instructions * -(-m // tile) / (weight_rows(tile) * 64)


def instruction_table(counts: dict[str, dict[int, Linear]]) -> dict[str, list[float]]:
    mine = {8: 64, 16: 64, 32: 128, 64: 256, 128: 128}  # rows of weights of a block
    table = {name: [loop_instructions(kernels, mine.__getitem__, m) for m in ROWS] for name, kernels in counts.items()}
    table["FP6-LLM"] = [loop_instructions(FP6_LLM, lambda tile: 256, m) for m in ROWS]
    table["Marlin"] = [loop_instructions(MARLIN, lambda tile: 128 if tile == 16 else 256, m) for m in ROWS]
    return table


def goals(table: dict[str, list[float]], times: list[dict[str, Any]]) -> list[list[str]]:
    few = range(len([m for m in ROWS if m <= FEW]))
    worst = max(table["fp6"][i] / table["FP6-LLM"][i] for i in few)
    price = max(table["fp6"][i] / table["fp6 rows"][i] - 1 for i in range(len(ROWS)))
    lines = [
        ["fewer instructions a weight than FP6-LLM, M <= 16", f"at most {worst:.2f} of its", met(worst < 1)],
        ["group scales for at most 5 % more instructions, all M", f"{price:.1%}", met(price <= 0.05)],
    ]
    for gpu in dict.fromkeys(each["gpu"] for each in times):
        shares = [
            each["share"] for each in times if each["gpu"] == gpu and each["format"] == "fp6" and each["m"] <= FEW
        ]
        lines.append([
            f"fp6 at >= 90 % of the traffic-limited time, M <= 16, {gpu}",
            f"{min(shares):.0%} to {max(shares):.0%}, in {sum(s >= 0.9 for s in shares)} of {len(shares)}",
            met(min(shares) >= 0.9),
        ])  # fmt: skip
    return lines


def met(yes: bool) -> str:
    return "met" if yes else "not met"


def times_of(counts: dict[str, dict[int, Linear]], rows: list[int]) -> list[dict[str, Any]]:
    """For each GPU, format, layer and M: the model's time, its share of the traffic-limited one, ratios to peers."""
    found = []
    for key in ("a100", "h100"):
        gpu = GPUS[key]
        for name, format in FORMATS.items():
            for model, shapes in LAYERS.items():
                for n, k in shapes:
                    for m in rows:
                        mine = of_ours(counts[name], gpu, format, m, n, k)
                        time = time_of_ours(gpu, mine)
                        peer = (marlin if name == "int4" else fp6_llm)(gpu, m, n, k)
                        found.append({
                            "gpu": gpu.name, "format": name, "model": model, "n": n, "k": k, "m": m,
                            "us": 1e6 * time.seconds, "limit": time.limit,
                            "share": mine.traffic / gpu.dram / time.seconds,
                            "over_peer": peer.seconds / time.seconds, "over_dense": dense(gpu, m, n, k) / time.seconds,
                        })  # fmt: skip
    return found


def show_times(times: list[dict[str, Any]], rows: list[int]) -> None:
    by = {(each["gpu"], each["format"], each["n"], each["k"], each["m"]): each for each in times}
    for gpu in dict.fromkeys(each["gpu"] for each in times):
        for name in FORMATS:
            lines = []
            for model, shapes in LAYERS.items():
                for n, k in shapes:
                    found = [by[gpu, name, n, k, m] for m in rows]
                    cells = [
                        f"{e['us']:.1f} {e['share']:.0%} {e['over_peer']:.2f} {e['over_dense']:.2f}" for e in found
                    ]
                    lines.append([f"{model} {n} x {k}", *cells])
            peer = "Marlin" if name == "int4" else "FP6-LLM"
            protocol.print_table(
                f"MODEL, not measured: {gpu}, {FORMATS[name]}: us, share of the traffic-limited time, times {peer}'s "
                "model, times 16 bits without any loss",
                ["layer", *(f"M={m}" for m in rows)],
                lines,
            )


def show_summary(times: list[dict[str, Any]], rows: list[int]) -> None:
    lines = []
    for gpu in dict.fromkeys(each["gpu"] for each in times):
        for name in FORMATS:
            for m in rows:
                found = [each for each in times if (each["gpu"], each["format"], each["m"]) == (gpu, name, m)]
                spreads = [spread([each[key] for each in found]) for key in ("share", "over_peer", "over_dense")]
                lines.append([gpu, name, str(m), *spreads])
    columns = [
        "GPU",
        "format",
        "M",
        "share of the traffic-limited time",
        "times FP6-LLM (int4: Marlin)",
        "times 16 bits",
    ]
    protocol.print_table("MODEL, not measured: median of the layers [least..most]", columns, lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}..{max(values):.2f}]"


def plot(path: str, table: dict[str, list[float]], times: list[dict[str, Any]], rows: list[int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5))
    for name, values in table.items():
        axes[0].plot(ROWS, values, marker="o", ls="--" if name in ("FP6-LLM", "Marlin") else "-", label=name)
    axes[0].set(title="counted: PTX instructions a weight", xlabel="rows of x (M)", yscale="log")
    for gpu in dict.fromkeys(each["gpu"] for each in times):
        for name in FORMATS:
            mine = [each for each in times if each["gpu"] == gpu and each["format"] == name]
            shares = [[each["share"] for each in mine if each["m"] == m] for m in rows]
            axes[1].plot(rows, [statistics.median(share) for share in shares], marker="o", label=f"{name}, {gpu}")
    axes[1].set(
        title="model: share of the traffic-limited time, median of layers", xlabel="rows of x (M)", ylim=(0, 1.05)
    )
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("--png", help="write a chart here")
    args = parser.parse_args()

    counts = measure()
    table = instruction_table(counts)
    lines = [[name, *(f"{value:.2f}" for value in values)] for name, values in table.items()]
    title = "counted: PTX instructions a weight in the loop, for all rows of x"
    protocol.print_table(title, ["kernel", *(f"M={m}" for m in ROWS)], lines)

    checks = published()
    lines = [
        [check.what, check.source, f"{check.ratio:.2f}", f"{check.model:.2f}", "yes" if check.reproduced else "NO"]
        for check in checks
    ]
    protocol.print_table("published ratios", ["what", "source", "published", "model", "within 25 %"], lines)
    print("\nNot in the model, whose kernels were not counted: TensorRT-LLM's W8A16 and W4A16, bitsandbytes.")
    rows = [m for m in ROWS if m <= trusted_rows(checks)]
    if rows:
        print(f"No ratio is published here for more than {rows[-1]} rows of x: no times beyond. None is for an H100.")
    else:
        print("A ratio is not reproduced: no times are printed.")

    times = times_of(counts, rows)
    if times:
        shown = [m for m in rows if m not in (2, 4)]
        show_times(times, shown)
        show_summary(times, shown)
    protocol.print_table("goals", ["goal", "found", ""], goals(table, times))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(
                {"instructions": table, "published": [c._asdict() for c in checks], "model": times}, file, indent=1
            )
    if args.png:
        plot(args.png, table, times, rows)
        print(f"\nchart: {args.png}")


if __name__ == "__main__":
    main()
