"""Narrow gradients under DistributedDataParallel: two ranks over gloo, started here."""

import tempfile

import narrowgauge as ng
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def train(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.manual_seed(rank)  # DDP starts all ranks with the parameters of rank 0
    model = DistributedDataParallel(torch.nn.Linear(64, 1))
    model.register_comm_hook(*ng.ddp.hook("int4:g64:bf16", error_feedback=True, exact_below=0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(50):
        x = torch.randn(32, 64)
        loss = (model(x) - x.mean(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()  # gradients travel as 4.25 bits an element; all ranks get the same bits
        optimizer.step()
    print(f"rank {rank}: loss {loss.item():.6f}")
    assert loss < 1e-3
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (2, folder), nprocs=2)
