"""Narrow gradients for torch's DistributedDataParallel.

>>> ddp = torch.nn.parallel.DistributedDataParallel(model)
>>> ddp.register_comm_hook(*ng.ddp.hook("int8:g64:bf16"))
"""

# DDP compares a hook's annotations with types, so they are not left as text here.
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from narrowgauge._native import EXACT_BELOW
from narrowgauge.collective import Communicator, WireLike, as_wire


class State:
    """What a hook has: the ranks, how gradients travel, the number of calls, which seeds stochastic rounding, and with
    error feedback what rounding has left, by bucket.
    """

    def __init__(
        self, communicator: Communicator, wire: WireLike, inside: WireLike, error_feedback: bool, exact_below: int
    ) -> None:
        self.communicator = communicator
        self.exact_below = exact_below
        self.wire = as_wire(wire)
        self.inside = as_wire(inside)
        self.error_feedback = error_feedback
        self.calls = 0
        self.errors: dict[int, torch.Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint of this rank: errors are a rank's own."""
        return {"calls": self.calls, "errors": dict(self.errors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls, self.errors = state["calls"], dict(state["errors"])

    def error(self, bucket: dist.GradBucket) -> torch.Tensor | None:  # type: ignore[name-defined]
        """None without error feedback. DDP cuts its buckets anew after the first step, which starts them again."""
        if not self.error_feedback:
            return None
        index, size = bucket.index(), bucket.buffer().numel()
        if index not in self.errors or self.errors[index].numel() != size:
            self.errors[index] = torch.zeros(size)
        return self.errors[index]


def hook(
    wire: WireLike,
    *,
    inside: WireLike = None,
    node_size: int = 0,
    error_feedback: bool = False,
    exact_below: int = EXACT_BELOW,
    group: Any = None,
) -> tuple[State, Callable[[State, Any], torch.futures.Future[torch.Tensor]]]:
    """The arguments of register_comm_hook: a bucket's gradients become the mean of all ranks', the same bits on all.

    wire, inside, exact_below, node_size and group as in Communicator; it is buckets that exact_below is about, and the
    group is the one that the model was wrapped with. error_feedback: what rounding leaves is added to the next step's
    gradients; the state, the first of the two, has state_dict() for it. A collective call.
    """
    return State(Communicator.from_torch(group, node_size), wire, inside, error_feedback, exact_below), _reduce


def _reduce(state: State, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    gradients = bucket.buffer()
    state.communicator.all_reduce(
        gradients,
        state.wire,
        op="mean",
        out=gradients,
        inside=state.inside,
        error=state.error(bucket),
        seed=state.calls,
        exact_below=state.exact_below,
    )
    state.calls += 1
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(gradients)
    return future
