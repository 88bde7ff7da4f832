"""Collectives with narrow numbers beside torch.distributed's own over gloo, on links of known rates (netlab.py). Root.

    python bench/collectives.py                        # 4 hosts; 200 Mbit/s, 1 Gbit/s and as fast as the kernel goes
    python bench/collectives.py --rates 200mbit --mebibytes 16 --rounds 9 --png collectives.png --json results.json
    python bench/collectives.py --hosts 2,4 --mebibytes 1,4,16,64,256

Without root, or off Linux, it prints the bytes that ranks plan to send, and exits with 2.

Every round runs every case once in random order; a time is that of the slowest rank, from a barrier on. The ideal is
the time in which the link carries what a rank has to send. Bytes are those of the network device, headers included,
beside the formula: elements x bits x (ranks - 1). The relative error is that of the Euclidean norm. DDP's hooks get the
bucket of a matrix with 1024 columns; PowerSGD has rank 4 and no error feedback.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import narrowgauge as ng
import protocol
from collectives_rank import FORMATS
from netlab import Lab, exit_on_signals, why_not

BITS_PER_SECOND = {"mbit": 1e6, "gbit": 1e9}
COLLECTIVES = ["all_gather", "reduce_scatter", "all_reduce"]


def bits_per_second(rate: str) -> float | None:
    return None if rate == "none" else float(rate[:-4]) * BITS_PER_SECOND[rate[-4:]]


def measure(hosts: int, rate: str, mebibytes: float, dtype: str, rounds: int) -> list[dict[str, Any]]:
    size = 4 if dtype == "float32" else 2
    elements = int(mebibytes * 2**20 / size) // (1024 * hosts) * 1024 * hosts
    command = [sys.executable, str(Path(__file__).with_name("collectives_rank.py"))]
    command += [str(elements), dtype, str(rounds)]
    with Lab(hosts, None if rate == "none" else rate) as lab:
        first = lab.start(0, command, stdout=subprocess.PIPE)
        others = [lab.start(host, command) for host in range(1, hosts)]
        output, _ = first.communicate()
        codes = [first.returncode, *(other.wait() for other in others)]
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}, expected 0")
    return [
        {"hosts": hosts, "rate": rate, "MiB": mebibytes, "dtype": dtype, **row}
        for row in json.loads(output.splitlines()[-1])
    ]


def table(rows: list[dict[str, Any]], rate: str, mebibytes: float, dtype: str) -> None:
    lines = []
    for collective in COLLECTIVES:
        found = {row["contender"]: row for row in rows if row["collective"] == collective}
        for name, row in found.items():
            link = bits_per_second(rate)
            ideal = f"{row['seconds'] / (row['formula'] * 8 / link):.2f}" if link else "-"
            peers = [f"{found['torch']['seconds'] / row['seconds']:.2f}"]
            if "all-to-all and sum" in found:
                peers.append(f"{found['all-to-all and sum']['seconds'] / row['seconds']:.2f}")
            lines.append([
                collective, name, f"{1e3 * row['seconds']:.0f} [{1e3 * row['least']:.0f}..{1e3 * row['most']:.0f}]",
                ideal, " / ".join(peers), f"{row['bytes'] / 1e6:.2f}", f"{row['bytes'] / row['formula']:.3f}",
                f"{row['error']:.4f}", f"{row['cpu']:.3f}",
            ])  # fmt: skip
    hosts = rows[0]["hosts"]
    protocol.print_table(
        f"{hosts} hosts, {rate}, {mebibytes:g} MiB of {dtype}",
        ["collective", "contender", "ms, median", "times ideal", "speed over torch (/ all-to-all and sum)", "MB sent",
         "times formula", "relative error", "CPU s"],
        lines,
    )  # fmt: skip


def account(hosts: int, mebibytes: float, dtype: str) -> None:
    """What ranks would send by their plans, where nothing can be measured."""
    elements = int(mebibytes * 2**20 / (4 if dtype == "float32" else 2)) // hosts * hosts
    lines = []
    for collective, (name, wire) in itertools.product(COLLECTIVES, {"exact": None, **FORMATS}.items()):
        plan = ng.collective.plan(collective, elements, dtype, wire, size=hosts)
        exact = ng.collective.plan(collective, elements, dtype, None, size=hosts)
        fewer = f"{exact.sent_bytes / plan.sent_bytes:.2f}"
        lines.append([collective, name, f"{plan.sent_bytes / 1e6:.2f}", fewer, str(plan.wire), str(plan.chunks)])
    protocol.print_table(
        f"{hosts} hosts, {mebibytes:g} MiB of {dtype}: what a rank plans to send",
        ["collective", "contender", "MB", "fewer than exact", "wire", "chunks"],
        lines,
    )


def plot(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = ("hosts", "rate", "MiB", "dtype")
    groups = list(dict.fromkeys(tuple(row[name] for name in settings) for row in rows))
    figure, axes = pyplot.subplots(1, len(COLLECTIVES), figsize=(5 * len(COLLECTIVES), 4), sharey=True)
    for axis, collective in zip(axes, COLLECTIVES, strict=True):
        for offset, contender in enumerate(("int8", "int4")):
            ratios = []
            for group in groups:
                found = {
                    row["contender"]: row["seconds"]
                    for row in rows
                    if row["collective"] == collective and tuple(row[name] for name in settings) == group
                }
                ratios.append(found["torch"] / found[contender])
            axis.bar([i + 0.4 * offset for i in range(len(groups))], ratios, 0.4, label=contender)
        axis.axhline(1, color="black", linewidth=0.8)
        names = [f"{hosts} hosts\n{rate}\n{mebibytes:g} MiB\n{dtype}" for hosts, rate, mebibytes, dtype in groups]
        axis.set_xticks([i + 0.2 for i in range(len(groups))], names, fontsize=7)
        axis.set_title(collective)
    axes[0].set_ylabel("speed over torch's own (gloo)")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default="4")
    parser.add_argument("--rates", default="200mbit,1gbit,none", help='such as 1gbit; "none": not shaped')
    parser.add_argument("--mebibytes", help="of a whole tensor (default: 16 up to 200mbit, else 64)")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--png", help="where to write a picture")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    if reason := why_not():
        print(f"bench/collectives.py measures on links of its own: {reason}. Bytes as planned:", file=sys.stderr)
        sizes = (args.mebibytes or "16,64").split(",")
        for hosts, mebibytes, dtype in itertools.product(args.hosts.split(","), sizes, args.dtypes.split(",")):
            account(int(hosts), float(mebibytes), dtype)
        return 2
    exit_on_signals()
    rows: list[dict[str, Any]] = []
    for hosts, rate in itertools.product(map(int, args.hosts.split(",")), args.rates.split(",")):
        usual = "16" if (bits_per_second(rate) or 1e12) <= 200e6 else "64"
        for mebibytes, dtype in itertools.product((args.mebibytes or usual).split(","), args.dtypes.split(",")):
            found = measure(hosts, rate, float(mebibytes), dtype, args.rounds)
            table(found, rate, float(mebibytes), dtype)
            rows += found
            if args.json:
                protocol.write_json(args.json, rows)
    protocol.print_machine()
    if args.png:
        plot(rows, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
