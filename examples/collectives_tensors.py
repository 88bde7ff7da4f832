"""Narrow collectives of plain tensors. The four ranks are threads here: Communicator.from_torch() makes them of a
process group, Communicator.from_mpi(comm) of a communicator of mpi4py.
"""

from concurrent.futures import ThreadPoolExecutor

import narrowgauge as ng
import torch

gradients = torch.randn(4, 1 << 18)  # 1 MiB a rank: smaller tensors travel as they are
weights = torch.randn(4, 16, 256)


def work(comm: ng.Communicator) -> None:
    mean = comm.all_reduce(gradients[comm.rank], "int8:g64:bf16", op="mean")  # the same bits on all ranks
    error = (mean - gradients.mean(0)).norm() / gradients.mean(0).norm()

    pending = comm.reduce_scatter(gradients, "int4:g64:bf16", async_op=True)  # this rank's row of the sum
    q = comm.all_gather_qtensor(weights[comm.rank], "int8:g64:bf16")  # stays narrow: a QTensor [64, 256]
    y = ng.linear(torch.randn(2, 256), q.pack())
    part = pending.wait()

    print(f"{comm}: error {error:.4f}, part {list(part.shape)}, y {list(y.shape)}")
    assert error < 0.02


with ThreadPoolExecutor(4) as pool:
    list(pool.map(work, ng.Communicator.in_process(4)))
