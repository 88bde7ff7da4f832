"""Layers whose weights are sharded over ranks, gathered for each product and freed: as they travelled, or made wide.

    python bench/gathered_linear.py                       # 4 hosts on links of 1 Gbit/s (netlab.py); root
    python bench/gathered_linear.py --rate none --rows 1 64 --layers 8 --size 2048

The loop of FSDP's forward pass: a rank has 1/4 of each square weight in float32, gathers all of it, multiplies its own
rows with it, and drops it. Three ways: torch gathers float32 and multiplies; the weight travels in a Format and is
dequantised to float32 for torch; or all_gather_qtensor gives a QTensor, which is packed and multiplied by ng.linear as
it came. Times are of the slowest rank, from a barrier on, medians of interleaved rounds, with one thread for each rank;
bytes are those of the network device, headers included; "held" is the largest weight that a rank had at once.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import protocol
from collectives_rank import longest, sent_bytes
from netlab import Lab, exit_on_signals, why_not

WAYS = ["torch, float32", "dequantised", "as it travelled"]


def rank_main(args: argparse.Namespace) -> None:
    import narrowgauge as ng
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    ng.set_threads(1)
    dist.init_process_group("gloo")
    comm, rank = ng.Communicator.from_torch(), dist.get_rank()
    n, part = args.size, args.size // dist.get_world_size()
    weights = [torch.randn(n, n, generator=torch.Generator().manual_seed(i)) / n**0.5 for i in range(args.layers)]
    shards = [weight[rank * part : (rank + 1) * part].clone() for weight in weights]
    results: list[dict[str, Any]] = []

    for rows in args.rows:
        x = torch.randn(rows, n, generator=torch.Generator().manual_seed(100 + rank))
        exact = x.double()
        for weight in weights:
            exact = exact @ weight.double().T
        held = dict.fromkeys(WAYS, 0)

        def plain(shard: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, int]:
            whole = torch.empty(n, n)
            dist.all_gather_single(whole, shard)
            return torch.nn.functional.linear(y, whole), whole.nbytes

        def dequantised(shard: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, int]:
            whole = comm.all_gather(shard, args.wire, exact_below=0)
            return torch.nn.functional.linear(y, whole), whole.nbytes

        def travelled(shard: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, int]:
            q = comm.all_gather_qtensor(shard, args.wire).pack("cpu")
            return ng.linear(y, q), q.nbytes

        calls: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, int]]]
        calls = dict(zip(WAYS, (plain, dequantised, travelled), strict=True))
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        sent, errors = {}, {}
        order, shuffle = list(WAYS), random.Random(0)
        for number in range(-1, args.rounds):
            shuffle.shuffle(order)
            for way in order:
                dist.barrier()
                before, start, y = sent_bytes(), time.perf_counter(), x
                for shard in shards:
                    y, nbytes = calls[way](shard, y)
                    held[way] = max(held[way], nbytes)
                elapsed = time.perf_counter() - start
                sent[way] = sent_bytes() - before
                errors[way] = float((y.double() - exact).norm() / exact.norm())
                elapsed = longest(elapsed)
                if number >= 0:
                    seconds[way].append(elapsed)
        results += [
            {"rows": rows, "way": way, "seconds": statistics.median(seconds[way]), "least": min(seconds[way]),
             "sent": sent[way], "held": held[way], "error": errors[way]}
            for way in WAYS
        ]  # fmt: skip
    if rank == 0:
        print(json.dumps(results))
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="1gbit", help='such as 200mbit; "none": not shaped')
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of a weight")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64], help="of activations, on each rank")
    parser.add_argument("--wire", default="int8:g64:bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank_main(args)
        return 0
    if reason := why_not():
        print(f"bench/gathered_linear.py measures on links of its own: {reason}", file=sys.stderr)
        return 2
    exit_on_signals()
    command = [sys.executable, str(Path(__file__)), "--rank", *sys.argv[1:]]
    with Lab(args.hosts, None if args.rate == "none" else args.rate) as lab:
        first = lab.start(0, command, stdout=subprocess.PIPE)
        others = [lab.start(host, command) for host in range(1, args.hosts)]
        output, _ = first.communicate()
        codes = [first.returncode, *(other.wait() for other in others)]
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}, expected 0")
    results = json.loads(output.splitlines()[-1])
    table = []
    for row in results:
        peer = next(other for other in results if other["rows"] == row["rows"] and other["way"] == "dequantised")
        table.append([
            str(row["rows"]), row["way"], f"{1e3 * row['seconds']:.0f} [{1e3 * row['least']:.0f}]",
            f"{peer['seconds'] / row['seconds']:.2f}", f"{row['sent'] / 1e6:.1f}", f"{row['held'] / 1e6:.2f}",
            f"{row['error']:.4f}",
        ])  # fmt: skip
    protocol.print_table(
        f"{args.layers} layers of {args.size} x {args.size} on {args.hosts} hosts, {args.rate}, {args.wire}",
        ["rows", "weights", "ms, median [least]", "speed over dequantised", "MB sent", "MB held", "relative error"],
        table,
    )
    protocol.print_machine()
    if args.json:
        protocol.write_json(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
