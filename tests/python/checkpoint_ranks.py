"""One rank of test_checkpoint_plan.py: states with DTensors and FSDP2, taken apart, planned together, and restored into
other placements. Run with RANK, WORLD_SIZE and STORE (a file for the rendezvous) in the environment."""

import copy
import os
from typing import Any

import narrowgauge as ng
import torch
import torch.distributed as dist
from checkpoint_memory import Files, to_bytes
from narrowgauge.checkpoint.decode import decode
from narrowgauge.checkpoint.plan import describe, plan
from narrowgauge.checkpoint.restore import restore
from narrowgauge.checkpoint.state import PerRank, encode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def save(state: Any, **options: Any) -> tuple[str, Files]:
    """Plans with the other ranks; every rank then has the files of all."""
    encoded = encode(state, rank=RANK, **options)
    for stored in encoded.tensors:
        stored.array, stored.sources = to_bytes(stored.array).copy(), ()
    everyone: list[Any] = [None] * WORLD
    dist.all_gather_object(everyone, (describe(encoded), encoded))
    planned = plan([description for description, _ in everyone])
    ranks = [each for _, each in everyone]
    for each in ranks:
        for stored in each.tensors:
            stored.array = stored.array.view(f"u{stored.array.shape[-1]}")[..., 0]
    return planned.document, Files().write(planned, ranks)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(condition: object, *what: object) -> None:
    if not condition:
        raise AssertionError(f"rank {RANK}: {what}")


def placements_on(mesh: Any) -> list[Any]:
    cuts = [Replicate(), Shard(0), Shard(1)]
    return [(a,) for a in cuts] if mesh.ndim == 1 else [(a, b) for a in cuts for b in cuts]


def check_placements() -> None:
    meshes = [init_device_mesh("cpu", (WORLD,))]
    if WORLD == 4:
        meshes.append(init_device_mesh("cpu", (2, 2)))
    for mesh in meshes:
        torch.manual_seed(0)
        shapes = [(300, 130), (1, 5), (3, 7, 2), (0, 4), (2, 2)]
        whole = {
            str(shape): torch.randn(shape).to(torch.complex128 if shape == (2, 2) else torch.float32)
            for shape in shapes
        }
        for number, placements in enumerate(placements_on(mesh)):
            state = {name: distribute_tensor(tensor, mesh, placements) for name, tensor in whole.items()}
            state["tied"] = state["(300, 130)"]
            state["detached"] = state["(1, 5)"].detach()
            document, files = save(state)
            check(set(files.tensors) == set(whole), files.tensors)
            back = decode(document, files)
            check(all(torch.equal(back[name], tensor) for name, tensor in whole.items()), placements)
            # Into every other placement, and into plain tensors.
            other = placements_on(mesh)[(number + 1) % len(placements_on(mesh))]
            target = {name: distribute_tensor(torch.zeros_like(back[name]), mesh, other) for name in whole}
            target["tied"], target["detached"] = target["(300, 130)"], target["(1, 5)"].detach()
            files.bytes_read = 0
            restore(document, files, target)
            local = sum(target[name].to_local().nbytes for name in whole)
            check(files.bytes_read == local, files.bytes_read, local)
            for name, tensor in whole.items():
                check(torch.equal(full(target[name]), tensor), name, placements, other)
            plain = {name: torch.zeros_like(tensor) for name, tensor in back.items()}
            restore(document, files, plain)
            check(torch.equal(plain["tied"], whole["(300, 130)"]))


def check_refusals() -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    partial = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    for state, message in (
        ({"w": partial}, "state['w']: a DTensor placed as"),
        ({"w": PerRank(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))}, "inside a PerRank"),
    ):
        try:
            encode(state)
        except (TypeError, ValueError) as error:
            check(message in str(error), error)
        else:
            check(False, "no error", message)


def check_strided() -> None:
    """FSDP over tensor parallelism along one axis: a box; interleaved: refused."""
    if WORLD != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(40.0).view(10, 4)
    row, column = mesh.get_coordinate()
    local = whole.chunk(2)[column].chunk(2)[row].clone()
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    tensor = DTensor.from_local(local, mesh, placements, shape=whole.shape, stride=whole.stride(), run_check=False)
    document, files = save({"w": tensor})
    check(torch.equal(decode(document, files)["w"], whole))
    tensor.to_local().zero_()
    restore(document, files, {"w": tensor})
    check(torch.equal(tensor.to_local(), whole.chunk(2)[column].chunk(2)[row]))
    odd = DTensor.from_local(
        local, mesh, [_StridedShard(0, split_factor=3), Shard(0)], shape=whole.shape, stride=(4, 1)
    )
    try:
        encode({"w": odd})
    except TypeError as error:
        check("interleaved along axis 0" in str(error), error)
    else:
        check(False, "no error")


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 8))
        self.head = torch.nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(x)))


def train(seed: int, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        model(torch.arange(11)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def check_fsdp() -> None:
    model, optimizer = train(0, 2)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": PerRank([RANK, torch.rand(2)])}
    document, files = save(state)
    names = list(files.tensors)
    check("model.embed.weight" in names and "model.head.weight" not in names, names)
    back = decode(document, files, rank=RANK)
    check(back["model"]["embed.weight"] is back["model"]["head.weight"] and back["rng"].value[0] == RANK)
    for name, tensor in state["model"].items():
        check(torch.equal(full(tensor), back["model"][name]), name)
    other, other_optimizer = train(1, 1)
    target = {
        "model": other.state_dict(),
        "optimizer": other_optimizer.state_dict(),
        "rng": PerRank([0, torch.rand(2)]),
    }
    restore(document, files, target, rank=RANK)
    other_optimizer.load_state_dict(target["optimizer"])
    for one, same in ((model, optimizer), (other, other_optimizer)):
        one(torch.arange(11)).square().mean().backward()
        same.step()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        check(torch.equal(full(ours), full(theirs)), name)
    # Narrow where whole rows are on a rank: the same tree on all, and into whole tensors again.
    torch.manual_seed(7)
    mesh = init_device_mesh("cpu", (WORLD,))
    whole = {"a": torch.randn(9, 64), "b": torch.randn(64), "c": torch.randn(3, 5, 64), "d": torch.randn(4, 32)}
    state = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}
    state["d"] = distribute_tensor(whole["d"], mesh, [Shard(1)])
    document, files = save(state, formats={"*": "fp6"})
    check({"a.codes", "b", "c.scales", "d"} < set(files.tensors), list(files.tensors))
    lossy = {name: ng.quantize(whole[name], "fp6").dequantize() for name in "ac"} | {name: whole[name] for name in "bd"}
    back = decode(document, files)
    check(all(torch.equal(back[name], lossy[name]) for name in whole), "narrow")
    for placement in (Shard(0), Shard(1), Replicate()):
        target = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
        target |= {name: distribute_tensor(target[name], mesh, [placement]) for name in "acd"}
        restore(document, files, target)
        check(all(torch.equal(full(target[name]), lossy[name]) for name in whole), "narrow", placement)
    exact = save(copy.deepcopy(state), formats={"*": "nvfp4"})[1]
    check("a" in exact.tensors, "a global scale needs the whole tensor")


if __name__ == "__main__":
    store = dist.FileStore(os.environ["STORE"], WORLD)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=WORLD)
    check_placements()
    check_refusals()
    check_strided()
    check_fsdp()
    dist.destroy_process_group()
