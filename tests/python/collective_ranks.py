"""What ranks of torch.distributed do in test_collective.py: python collective_ranks.py JOB RANK SIZE STORE."""

from __future__ import annotations

import datetime
import importlib.util
import inspect
import os
import signal
import sys
import time

import narrowgauge as ng
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def tensor(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def collectives(rank: int, size: int) -> None:
    comm = ng.Communicator.from_torch()
    assert (comm.rank, comm.size) == (rank, size)
    inputs = [tensor(peer, 6, 1000) for peer in range(size)]
    wire = "int8:g64:bf16"
    for dtype, tolerance in ((torch.float32, 0.03), (torch.bfloat16, 0.06)):
        mine = inputs[rank].to(dtype)
        options = {"chunk_bytes": 1000, "exact_below": 0}
        gathered = comm.all_gather(mine, wire, **options)
        assert gathered.dtype == dtype
        torch.testing.assert_close(gathered.float(), torch.cat(inputs), rtol=0, atol=tolerance)
        part = comm.reduce_scatter(mine, wire, op="mean", **options)
        mean = sum(inputs) / size
        torch.testing.assert_close(part.float(), mean.chunk(size)[rank], rtol=0, atol=tolerance)
        everything = comm.all_reduce(mine, wire, op="mean", **options)
        torch.testing.assert_close(everything.float(), mean, rtol=0, atol=tolerance)
        copies = [torch.empty_like(everything) for _ in range(size)]
        dist.all_gather(copies, everything)
        assert all(torch.equal(copy, everything) for copy in copies)
    # The bits are those of ranks within a process.
    again = comm.all_reduce(inputs[rank], wire, op="mean", chunks=1, exact_below=0)
    torch.testing.assert_close(again, comm.all_reduce(inputs[rank], wire, op="mean", **options), rtol=0, atol=0)
    assert comm.all_gather(torch.empty(0)).shape == (0,)
    pieces = [index + 1 for index in range(size)]
    received = torch.empty(size * pieces[rank])
    comm.all_to_all(torch.full((sum(pieces),), float(rank)), pieces, received, [pieces[rank]] * size)
    assert received.tolist() == [float(peer) for peer in range(size) for _ in range(pieces[rank])]
    try:
        comm.all_reduce(torch.zeros(10 + rank))
    except ng.TransportError as error:
        assert f"of {10 + rank} float32" in str(error), error
    else:
        raise AssertionError("a mismatch was not seen")


def nodes(rank: int, size: int) -> None:
    comm = ng.Communicator.from_torch(node_size=2)
    assert comm.node_size == 2
    inputs = [tensor(peer, 4, 500) for peer in range(size)]
    options = {"wire": "int8:g64:bf16", "inside": "int8:g64:bf16", "exact_below": 0}
    part = comm.reduce_scatter(inputs[rank], op="mean", **options)
    torch.testing.assert_close(part, (sum(inputs) / size).chunk(size)[rank], rtol=0, atol=0.03)
    everything = comm.all_reduce(inputs[rank], **options)
    torch.testing.assert_close(everything, sum(inputs), rtol=0, atol=0.2)
    gathered = comm.all_gather(inputs[rank], **options)
    torch.testing.assert_close(gathered, torch.cat(inputs), rtol=0, atol=0.03)


def ddp(rank: int, size: int) -> None:
    losses = {}
    for name in ("exact", "int8:g64:bf16", "int4:g64:bf16"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 1))
        replica = DistributedDataParallel(model)
        if name != "exact":
            state, hook = ng.ddp.hook(name, error_feedback=name.startswith("int4"), exact_below=0)
            replica.register_comm_hook(state, hook)
        optimizer = torch.optim.SGD(replica.parameters(), lr=0.05)
        x = tensor(rank, 64, 20)
        y = x.sum(1, keepdim=True)
        for step in range(100):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(replica(x), y)
            loss.backward()
            optimizer.step()
            if step == 30:  # while it still falls
                losses[name] = loss.item()
        for parameter in model.parameters():
            copies = [torch.empty_like(parameter) for _ in range(size)]
            dist.all_gather(copies, parameter.detach())
            assert all(torch.equal(copy, parameter) for copy in copies)
    exact, *narrow = losses.values()
    assert all(abs(each - exact) < 0.05 * exact for each in narrow), losses
    saved = state.state_dict()
    assert saved["calls"] == 100 and any(error.any() for error in saved["errors"].values())
    state.load_state_dict({"calls": 3, "errors": {}})
    assert state.calls == 3 and not state.errors


def fsdp(rank: int, size: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    target = tensor(99, 20, 4)
    losses, norms = {}, {}
    for name, options in {
        "torch": None,
        "narrow": {"weights": "int8:g64:bf16", "gradients": "int8:g64:bf16"},
        "nodes": {"gradients": ("int8:g64:bf16", ng.Wire("int4:g64:bf16", hadamard=True)), "node_size": 2},
    }.items():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            *[torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 20)) for _ in range(2)],
            torch.nn.Linear(20, 4),
        )
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        if options is not None:
            ng.fsdp.apply(model, **options, exact_below=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        generator = torch.Generator().manual_seed(rank)
        for step in range(40):
            # Gradients of two steps are added up: as reduced shards at first, later whole, before they travel.
            model.set_requires_gradient_sync(step < 20 or step % 2 == 1)
            x = torch.randn(64, 20, generator=generator)
            loss = torch.nn.functional.cross_entropy(model(x).float(), (x @ target).argmax(1))
            loss.backward()
            if step % 2:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).full_tensor()
                norms.setdefault(name, norm.item())
                clipped = torch.nn.utils.get_total_norm([each.grad for each in model.parameters()]).full_tensor()
                torch.testing.assert_close(clipped, norm.clamp(max=0.5), rtol=1e-3, atol=0)
                optimizer.step()
                optimizer.zero_grad()
        dist.all_reduce(loss)
        losses[name] = loss.item() / size
    for name in ("narrow", "nodes"):
        # Rounding errors are nearly orthogonal to gradients: the norm grows by half of their square, int4's 0.006.
        assert abs(norms[name] - norms["torch"]) < 0.02 * norms["torch"], norms
        assert abs(losses[name] - losses["torch"]) < 0.1 * losses["torch"], losses
    try:
        ng.fsdp.apply(torch.nn.Linear(2, 2), weights="int8:g64:bf16")
    except ValueError as error:
        assert "no FSDPModule" in str(error)
    else:
        raise AssertionError("a model without FSDP was taken")


def secondary(rank: int, size: int) -> None:
    """Weights of two nodes, of which the second gather of a step does not leave the node: the same losses."""
    from torch.distributed.fsdp import fully_shard

    losses: dict[bool, list[float]] = {}
    for keep in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(3)])
        for layer in model:
            fully_shard(layer)
        kept = ng.fsdp.apply(model, weights="int8:g64:bf16", node_size=2, exact_below=0, secondary=keep)
        assert (kept is not None) == keep
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = tensor(rank, 32, 64)
        losses[keep] = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), x.flip(1))
            if kept is not None:
                assert all(shard.is_filled for shard in kept._shards)
            loss.backward()
            optimizer.step()
            losses[keep].append(loss.item())
            if kept is not None:
                assert not any(shard.is_filled for shard in kept._shards)
                # Half of each layer's 64 x 64 + 64, in int8 with scales for 64, and padding.
                assert 3 * 2080 * 1.03 <= kept.nbytes < 3 * 2080 * 1.1, kept.nbytes
    assert losses[True] == losses[False], losses
    try:
        ng.fsdp.apply(model, weights="int8:g64:bf16", secondary=True)
    except ValueError as error:
        assert "node_size=0; expected both" in str(error)
    else:
        raise AssertionError("secondary shards without nodes were taken")


def deepspeed(rank: int, size: int) -> None:
    """The result is that of DeepSpeed's own exact function, where it is installed."""
    groups = {f"local_{node}": dist.new_group([2 * node, 2 * node + 1]) for node in range(size // 2)}
    shapes = [(16, 64), (1001,), (3,), (0,), (5, 7, 9)]
    for dtype, tolerance in ((torch.float32, 0.01), (torch.bfloat16, 0.015), (torch.float16, 0.01)):
        everyone = [[tensor(10 * peer + i, *shape).to(dtype) for i, shape in enumerate(shapes)] for peer in range(size)]
        copies = [each.clone() for each in everyone[rank]]
        narrow = {"wire": "int8:g64:bf16", "inside": "int8:g64:bf16", "exact_below": 0}
        parts = ng.deepspeed.all_to_all_quant_reduce(everyone[rank], groups, **narrow)
        assert all(torch.equal(each, copy) for each, copy in zip(everyone[rank], copies, strict=True))
        for part, every in zip(parts, zip(*everyone, strict=True), strict=True):
            mean = (sum(each.float() for each in every) / size).flatten()
            width = -(-len(mean) // size)
            mine = mean[rank * width : (rank + 1) * width]
            assert part.dtype == dtype and part.shape == mine.shape
            torch.testing.assert_close(part.float(), mine, rtol=0, atol=3 * tolerance)
    try:
        ng.deepspeed.all_to_all_quant_reduce([torch.ones(4)], {"global_0": groups["local_0"]})
    except ValueError as error:
        assert "local_<node>" in str(error)
    else:
        raise AssertionError("groups without nodes were taken")
    if importlib.util.find_spec("deepspeed"):
        from deepspeed import comm
        from deepspeed.runtime.comm import coalesced_collectives
        from deepspeed.runtime.zero import stage3

        comm.init_distributed("gloo")
        theirs, ours = coalesced_collectives.all_to_all_quant_reduce, ng.deepspeed.all_to_all_quant_reduce
        assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters)[:2]
        gradients = [tensor(rank, *shape) for shape in shapes if shape != (0,)]
        ng.deepspeed.install(wire=None, inside=None)
        assert stage3.all_to_all_quant_reduce is coalesced_collectives.all_to_all_quant_reduce is not theirs
        parts = stage3.all_to_all_quant_reduce(gradients, groups)
        exact = coalesced_collectives.reduce_scatter_coalesced([each.clone() for each in gradients])
        torch.testing.assert_close(parts, exact, rtol=1e-6, atol=1e-6)


def dies(rank: int, size: int) -> None:
    """Killed with a collective under way: the others get an error and can leave the group in order."""
    comm = ng.Communicator.from_torch()
    comm.all_reduce(torch.ones(100), "int8:g64:bf16")
    pending = comm.all_reduce(torch.ones(1 << 20), "int8:g64:bf16", async_op=True)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        pending.wait()
    except (ng.TransportError, TimeoutError) as error:
        assert "all_reduce" in str(error) and f"rank {rank}" in str(error), error
    else:
        raise AssertionError("a dead rank was not seen")


def stuck(rank: int, size: int) -> None:
    """A rank that stays away is an error when the group's timeout has passed."""
    comm = ng.Communicator.from_torch(dist.new_group(timeout=datetime.timedelta(seconds=2)))
    comm.all_reduce(torch.ones(100), "int8:g64:bf16")
    if rank != 1:
        start = time.monotonic()
        try:
            comm.all_reduce(torch.ones(100), "int8:g64:bf16")
        except (ng.TransportError, TimeoutError) as error:
            assert "all_reduce" in str(error) and f"rank {rank}" in str(error), error
        else:
            raise AssertionError("a rank that stayed away was not seen")
        assert time.monotonic() - start > 1
    dist.barrier()


if __name__ == "__main__":
    job, rank, size, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60)
    )
    globals()[job](rank, size)
    dist.destroy_process_group()
