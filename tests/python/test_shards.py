"""ng.shards: flat shards for ZeRO-style loops, and collectives with gradients, over ranks that are threads."""

from __future__ import annotations

from typing import Any

import narrowgauge as ng
import pytest
from thread_ranks import results_of

torch = pytest.importorskip("torch")

INT8 = "int8:g64:bf16"


def values(seed: int, *shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [(3, 50), (7,), (), (2, 3, 4), (0,)]


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_cut_comes_back(size: int) -> None:
    tensors = [values(i, *shape) for i, shape in enumerate(SHAPES)]

    def body(comm: ng.Communicator) -> Any:
        shards = ng.shards.FlatShards(comm, tensors)
        assert shards.numel == 182 and shards.part == (192 if size == 1 else 64)
        part = shards.own(tensors)
        out = [torch.empty_like(tensor) for tensor in tensors]
        shards.all_gather(part, out=out)
        assert all(torch.equal(a, b) for a, b in zip(out, tensors, strict=True))
        halves = [tensor.bfloat16() for tensor in out]
        shards.all_gather(part, INT8, out=halves, exact_below=0)
        for half, tensor in zip(halves, tensors, strict=True):
            torch.testing.assert_close(half.float(), tensor, rtol=0, atol=0.03)
        gradients = [tensor * (comm.rank + 1) for tensor in tensors]
        mean = shards.reduce_scatter(gradients)
        torch.testing.assert_close(mean, part * (size + 1) / 2)
        total = shards.reduce_scatter(gradients, op="sum", async_op=True).wait()
        torch.testing.assert_close(total, part * size * (size + 1) / 2)

    results_of(size, body)


def test_zero_2_trains_as_one_process_does() -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3))

    models = [model() for _ in range(4)]  # torch's generator is one for all threads
    inputs = [values(rank, 16, 20) for rank in range(3)]
    target = values(99, 20, 3)
    single = models[3]
    optimizer = torch.optim.AdamW(single.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        x = torch.cat(inputs)
        torch.nn.functional.mse_loss(single(x), x @ target).backward()
        optimizer.step()

    def body(comm: ng.Communicator, wire: Any) -> Any:
        replica = models[comm.rank]
        parameters = list(replica.parameters())
        shards = ng.shards.FlatShards(comm, parameters)
        mine = torch.nn.Parameter(shards.own(parameters))
        optimizer = torch.optim.AdamW([mine], lr=1e-2)
        for _ in range(10):
            replica.zero_grad()
            x = inputs[comm.rank]
            torch.nn.functional.mse_loss(replica(x), x @ target).backward()
            mine.grad = shards.reduce_scatter([each.grad for each in parameters], wire, exact_below=0)
            optimizer.step()
            shards.all_gather(mine, wire, out=parameters, exact_below=0)
        return [each.detach() for each in parameters]

    exact = results_of(3, lambda comm: body(comm, None))
    for replica in exact:
        for a, b in zip(replica, single.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    models[:3] = [model() for _ in range(3)]
    first, *others = results_of(3, lambda comm: body(comm, INT8))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for a, b in zip(first, single.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.1)


def test_gradients_pass() -> None:
    shards = [values(rank, 4, 8) for rank in range(2)]
    weights = values(9, 8, 8)

    def body(comm: ng.Communicator) -> Any:
        shard = shards[comm.rank].clone().requires_grad_()
        whole = ng.shards.all_gather(shard, comm)
        part = ng.shards.reduce_scatter((whole * weights * (comm.rank + 1)).square(), comm, op="mean")
        part.sum().backward()
        return part.detach(), shard.grad

    whole = torch.cat(shards).requires_grad_()
    expected = sum((whole * weights * (rank + 1)).square() for rank in range(2)) / 2
    expected.sum().backward()
    for rank, (part, gradient) in enumerate(results_of(2, body)):
        torch.testing.assert_close(part, expected.detach().chunk(2)[rank])
        torch.testing.assert_close(gradient, whole.grad.chunk(2)[rank])


def test_narrow_gradients_pass() -> None:
    def body(comm: ng.Communicator) -> Any:
        shard = values(comm.rank, 4, 64).requires_grad_()
        ng.shards.all_gather(shard, comm, INT8, gradients=INT8, exact_below=0).square().sum().backward()
        return shard.detach(), shard.grad

    for shard, gradient in results_of(2, body):
        torch.testing.assert_close(gradient, 4 * shard, rtol=0, atol=0.15)
        assert not torch.equal(gradient, 4 * shard)


def test_wrong_shapes_are_named() -> None:
    comm = ng.Communicator.in_process(1)[0]
    shards = ng.shards.FlatShards(comm, [torch.empty(3, 2)])
    with pytest.raises(ValueError, match=r"tensors have shapes \[\[2, 3\]\], expected \[\[3, 2\]\]"):
        shards.own([torch.empty(2, 3)])
    with pytest.raises(ValueError, match="async_op is True, expected False"):
        shards.all_gather(torch.empty(64), out=[torch.empty(3, 2)], async_op=True)
    with pytest.raises(ValueError, match=r"part has shape \[3\], expected \[64\]"):
        shards.all_gather(torch.empty(3), out=[torch.empty(3, 2)])
