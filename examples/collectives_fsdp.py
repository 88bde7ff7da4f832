"""Narrow weights and gradients under FSDP2: two ranks over gloo, started here."""

import tempfile

import narrowgauge as ng
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard


def train(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 1))
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    # Weights are gathered in 8.25 bits an element, gradients reduced in 4.25; parameters and optimizer stay fp32.
    # (Layers below 1 MiB would travel as they are.)
    narrow = ng.Wire("int4:g64:bf16", hadamard=True)
    ng.fsdp.apply(model, weights="int8:g64:bf16", gradients=narrow, exact_below=0)
    torch.manual_seed(rank + 1)  # every rank has data of its own
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        x = torch.randn(64, 64)
        loss = (model(x) - x[:, :1]).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"rank {rank}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.5 * losses[0]
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (2, folder), nprocs=2)
