"""A rank of bench/collectives.py: runs every case in turns with the others; rank 0 prints what was measured as JSON.

collectives_rank.py ELEMENTS DTYPE ROUNDS     # with torch.distributed's environment
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import narrowgauge as ng
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

COLUMNS = 1024  # of the matrix that PowerSGD sees
POWER_SGD_RANK = 4
FORMATS = {"int8": "int8:g64:bf16", "int4": "int4:g64:bf16"}
Case = Callable[[], torch.Tensor]


def ddp_bucket(n: int, dtype: torch.dtype) -> dist.GradBucket:  # type: ignore[name-defined]
    """The bucket that DDP hands to the hook of a model with one matrix of n elements."""
    kept = []

    def keep(state, bucket):  # type: ignore[no-untyped-def] # DDP compares annotations, and with types, not text
        kept.append(bucket)
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model = DistributedDataParallel(torch.nn.Linear(COLUMNS, n // COLUMNS, bias=False, dtype=dtype))
    model.register_comm_hook(None, keep)
    model(torch.zeros(1, COLUMNS, dtype=dtype)).sum().backward()
    return kept[0]


def cases_of(n: int, dtype: torch.dtype) -> dict[tuple[str, str], tuple[Case, torch.Tensor, int]]:
    """By collective and contender: the call, its exact result, and the bytes that this rank has to send."""
    comm, rank, size = ng.Communicator.from_torch(), dist.get_rank(), dist.get_world_size()
    inputs = [torch.randn(n, generator=torch.Generator().manual_seed(peer)).to(dtype) for peer in range(size)]
    mine, part = inputs[rank], n // size
    shard = mine[:part].contiguous()
    gathered = torch.cat([each[:part] for each in inputs])
    total = sum(each.float() for each in inputs)
    assert isinstance(total, torch.Tensor)
    my_sum = total[rank * part : (rank + 1) * part]
    whole, piece = torch.empty_like(mine), torch.empty_like(shard)
    exchanged = torch.empty_like(mine)

    def plain_gather() -> torch.Tensor:
        dist.all_gather_single(whole, shard)
        return whole

    def plain_scatter() -> torch.Tensor:
        dist.reduce_scatter_single(piece, mine)
        return piece

    def exchange_and_add() -> torch.Tensor:
        dist.all_to_all_single(exchanged, mine)
        return exchanged.view(size, part).float().sum(0).to(dtype)

    def plain_reduce() -> torch.Tensor:
        result = mine.clone()
        dist.all_reduce(result)
        return result

    bucket = ddp_bucket(n, dtype)
    sgd = powerSGD_hook.PowerSGDState(None, POWER_SGD_RANK, start_powerSGD_iter=2, use_error_feedback=False)

    def hooked(hook: Callable[[], torch.futures.Future[torch.Tensor]]) -> torch.Tensor:
        bucket.buffer().copy_(mine)
        result = hook().wait()
        return result[0] if isinstance(result, list) else result

    def bf16_hook() -> torch.Tensor:
        return hooked(lambda: default_hooks.bf16_compress_hook(None, bucket))

    def power_sgd_hook() -> torch.Tensor:
        return hooked(lambda: powerSGD_hook.powerSGD_hook(sgd, bucket))

    sent = part * mine.element_size() * (size - 1)
    cases = {
        ("all_gather", "torch"): (plain_gather, gathered, sent),
        ("reduce_scatter", "torch"): (plain_scatter, my_sum, sent),
        ("reduce_scatter", "all-to-all and sum"): (exchange_and_add, my_sum, sent),
        ("all_reduce", "torch"): (plain_reduce, total, 2 * sent),
        ("all_reduce", "DDP's bf16 hook"): (bf16_hook, total / size, 2 * sent * 2 // mine.element_size()),
    }
    if dtype == torch.float32:  # in bfloat16 torch makes factors orthogonal for seconds
        for _ in range(2):
            power_sgd_hook()  # its first calls are exact
        factors = POWER_SGD_RANK * (n // COLUMNS + COLUMNS)
        cases["all_reduce", "DDP's PowerSGD hook"] = (power_sgd_hook, total / size, 2 * sent * factors // n)
    for name, format in FORMATS.items():
        bits = ng.Format(format).bits_per_weight(part)
        narrow = int(part * bits / 8) * (size - 1)

        def gather(format: str = format) -> torch.Tensor:
            return comm.all_gather(shard, format, out=whole)  # type: ignore[no-any-return]

        def scatter(format: str = format) -> torch.Tensor:
            return comm.reduce_scatter(mine, format, out=piece)  # type: ignore[no-any-return]

        def reduce(format: str = format) -> torch.Tensor:
            return comm.all_reduce(mine, format, out=whole)  # type: ignore[no-any-return]

        cases["all_gather", name] = (gather, gathered, narrow)
        cases["reduce_scatter", name] = (scatter, my_sum, narrow)
        cases["all_reduce", name] = (reduce, total, 2 * narrow)
    return cases


def sent_bytes() -> int:
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(counter.read_text()) if counter.exists() else 0


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def longest(value: float) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def main() -> None:
    n, dtype, rounds = int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    ng.set_threads(1)
    dist.init_process_group("gloo")
    cases = cases_of(n, dtype)
    order = list(cases)
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in order}
    bytes_sent, cpu, errors = {}, {}, {}
    shuffle = random.Random(0)
    for number in range(-1, rounds):
        shuffle.shuffle(order)
        for name in order:
            call, exact, _ = cases[name]
            dist.barrier()
            before, used, start = sent_bytes(), cpu_seconds(), time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - start
            bytes_sent[name], cpu[name] = sent_bytes() - before, cpu_seconds() - used
            errors[name] = float((result.float() - exact.float()).norm() / exact.float().norm())
            elapsed = longest(elapsed)
            if number >= 0:
                seconds[name].append(elapsed)
    if dist.get_rank() == 0:
        print(json.dumps([
            {"collective": name[0], "contender": name[1], "seconds": statistics.median(seconds[name]),
             "least": min(seconds[name]), "most": max(seconds[name]), "bytes": bytes_sent[name],
             "formula": cases[name][2], "error": errors[name], "cpu": cpu[name]}
            for name in sorted(cases)
        ]))  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
