"""One rank of test_checkpoint_ranks.py. Run with RANK, WORLD_SIZE, STORE (a file for the rendezvous) and JOB (what to
do) in the environment, and the directory of the checkpoints as argument."""

import copy
import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import narrowgauge as ng
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(96, 1000), torch.nn.ReLU(), torch.nn.Linear(1000, 61))


def trained(sharded: bool, seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The same on all ranks, whatever their number."""
    net = model(seed)
    if sharded:
        fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    torch.manual_seed(1)
    net(torch.randn(4, 96)).square().mean().backward()
    optimizer.step()
    return net, optimizer


def state_of(net: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(100 * step + RANK).get_state()
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "rng": ng.PerRank(rng)}


def full(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: full(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(full(each) for each in value)
    return value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, ng.PerRank):
        return isinstance(b, ng.PerRank) and same(a.value, b.value)
    return bool(a == b)


def check(condition: object, *what: object) -> None:
    if not condition:
        raise AssertionError(f"rank {RANK}: {what}")


def save_and_load(directory: Path) -> None:
    """Replicated and sharded states, snapshot and deferred; each loads into the other layout."""
    plain, plain_optimizer = trained(sharded=False)
    net, optimizer = trained(sharded=True)
    with ng.Checkpointer(directory, keep=10) as ck:
        try:
            ng.Checkpointer(directory / "." if RANK == 0 else directory)
            check(False, "a second Checkpointer was made")
        except ng.CheckpointError as error:
            check("another Checkpointer" in str(error), error)
        ck.save(1, state_of(plain, plain_optimizer, 1))
        ck.wait()
        total = sum(tensor.nbytes for tensor in plain.state_dict().values()) * 3
        check(abs(ck.last.bytes - total / WORLD) < 0.25 * total / WORLD + 20_000, ck.last, total)
        ck.save(2, state_of(net, optimizer, 2))
        ck.attach(optimizer)
        ck.save(3, state_of(net, optimizer, 3), mode="deferred")
        ck.adopt(net, optimizer)
        ck.save(4, state_of(net, optimizer, 4), mode="deferred")
        ck.wait()
        expected = full(state_of(net, optimizer, 0))

        # What differs between ranks is an error everywhere, and nothing is saved.
        for bad, words in [({"loss": RANK}, "PerRank"), ({"x": object()} if RANK == 1 else {"x": 1}, "'x'")]:
            try:
                ck.save(9, bad)
                check(False, "it was saved", bad)
            except (ValueError, TypeError, ng.CheckpointError) as error:
                check(words in str(error), error)
        try:
            ck.save(4, {"a": 1})
            check(False, "step 4 was saved twice")
        except ng.CheckpointError as error:
            check("exists" in str(error), error)

        # A change on one rank stops all.
        parameter = next(net.parameters()).to_local()
        gate_open = RANK != 1
        ck.save(9, state_of(net, optimizer, 9), mode="deferred")
        if not gate_open:
            with torch.no_grad():
                parameter.add_(0)
        try:
            ck.wait()
        except ng.CheckpointError as error:
            check("was changed" in str(error), error)
        check(set(ng.checkpoint.steps(directory)) - {9} == {1, 2, 3, 4}, ng.checkpoint.steps(directory))
    dist.barrier()

    for step in (2, 3, 4):
        loaded = ng.load_checkpoint(directory, step)
        check(same(loaded, {**expected, "step": step, "rng": state_of(net, optimizer, step)["rng"]}), step)
    # Sharded into replicated, and replicated into shards: of the rank's own part only, and in place.
    for step in (1, 2):
        fresh, fresh_optimizer = trained(sharded=True, seed=7)
        into = state_of(fresh, fresh_optimizer, 0)
        wanted = copy.deepcopy(ng.load_checkpoint(directory, step))
        reports: list[Any] = []
        ng.load_checkpoint(directory, step, into=into, verify="off", report=reports.append)
        local = sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors(into))
        check(reports[0].bytes_read == local, reports, local)
        check(same(full(into), wanted), step)
        check(same(full(fresh.state_dict()), wanted["model"]), "the module's own tensors are filled")
    mesh = init_device_mesh("cpu", (WORLD,))
    for placement in (Shard(0), Shard(1), Replicate()):
        weight = distribute_tensor(torch.zeros(1000, 96), mesh, [placement])
        into_one = {"model": OrderedDict({"0.weight": weight})}
        ng.load_checkpoint(directory, 2, into=into_one, map="model.0.weight")
        check(torch.equal(weight.full_tensor(), expected["model"]["0.weight"]), placement)


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, ng.PerRank):
        return tensors(value.value)
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in tensors(each)]
    return [tensor for each in value for tensor in tensors(each)] if isinstance(value, (list, tuple)) else []


def load(directory: Path) -> None:
    """What another number of ranks has saved."""
    net, optimizer = trained(sharded=True, seed=7)
    into = state_of(net, optimizer, 0)
    del into["rng"]
    into["rng"] = ng.PerRank(torch.zeros(1))
    loaded = ng.load_checkpoint(directory, 2, map=["model", "optimizer", "step"])
    ng.load_checkpoint(directory, 2, into=into, map=["model", "optimizer", "step"])
    check(same(full(into["model"]), loaded["model"]) and into["step"] == 2)
    check(same(full(into["optimizer"]), loaded["optimizer"]))


def die(directory: Path) -> None:
    """Saves until a rank dies; the others must say so, in time."""
    net, optimizer = trained(sharded=False)
    ck = ng.Checkpointer(directory, keep=2, timeout=5)
    try:
        for step in range(10**6):
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.fill_(step)
            ck.save(step, state_of(net, optimizer, step))
            ck.wait()
            print(step, flush=True)
    except ng.CheckpointError as error:
        print("error:", str(error).splitlines()[0], flush=True)
        os._exit(0)


if __name__ == "__main__":
    store = dist.FileStore(os.environ["STORE"], WORLD)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=WORLD)
    {"save_and_load": save_and_load, "load": load, "die": die}[os.environ["JOB"]](Path(sys.argv[1]))
    dist.destroy_process_group()
