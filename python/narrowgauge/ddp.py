"""Narrow gradients for torch's DistributedDataParallel.

>>> ddp = torch.nn.parallel.DistributedDataParallel(model)
>>> ddp.register_comm_hook(*ng.ddp.hook("int8:g64:bf16"))
"""

# DDP compares a hook's annotations with types, so they are not left as text here.
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from narrowgauge.collective import Communicator, WireLike, as_wire


class State:
    """What a hook has: the ranks, how gradients travel, and the number of calls, which seeds stochastic rounding."""

    def __init__(self, communicator: Communicator, wire: WireLike, inside: WireLike) -> None:
        self.communicator = communicator
        self.wire = as_wire(wire)
        self.inside = as_wire(inside)
        self.calls = 0


def hook(
    wire: WireLike, *, inside: WireLike = None, node_size: int = 0, group: Any = None
) -> tuple[State, Callable[[State, Any], torch.futures.Future[torch.Tensor]]]:
    """The arguments of register_comm_hook: a bucket's gradients become the mean of all ranks', the same bits on all.

    wire, inside, node_size and group as in Communicator; the group is the one that the model was wrapped with. A
    collective call.
    """
    return State(Communicator.from_torch(group, node_size), wire, inside), _reduce


def _reduce(state: State, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    gradients = bucket.buffer()
    state.communicator.all_reduce(
        gradients, state.wire, op="mean", out=gradients, inside=state.inside, seed=state.calls
    )
    state.calls += 1
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(gradients)
    return future
