"""Narrow weights and gradients on the wire of torch's FSDP2.

>>> for block in model.layers: fully_shard(block)
>>> fully_shard(model)
>>> ng.fsdp.apply(model, weights="int8:g64:bf16", gradients="int8:g64:bf16")

Parameters, optimizer and sums stay as they are. With nodes, gradients are added up within them first (qgZ of ZeRO++).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from narrowgauge._native import EXACT_BELOW, Wire
from narrowgauge.collective import Communicator, SecondaryShard, WireLike, as_wire
from narrowgauge.memory import HostPool

try:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
except ImportError as error:
    raise ImportError(
        f"torch {torch.__version__} has no custom collectives for FSDP2 where narrowgauge looks for them: "
        "torch.distributed.fsdp._fully_shard._fsdp_api of torch 2.13"
    ) from error


class _Ranks:
    """A Communicator for each process group that FSDP calls with, made when it first does."""

    def __init__(self, node_size: int) -> None:
        self._node_size = node_size
        self._communicators: dict[dist.ProcessGroup, Communicator] = {}

    def of(self, group: dist.ProcessGroup) -> Communicator:
        if group not in self._communicators:
            self._communicators[group] = Communicator.from_torch(group, self._node_size)
        return self._communicators[group]


class _Comm:
    def __init__(self, ranks: _Ranks, wire: Wire, inside: Wire, exact_below: int) -> None:
        self._ranks, self._wire, self._inside, self._exact_below = ranks, wire, inside, exact_below
        self._calls = 0  # seeds stochastic rounding

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def _seed(self) -> int:
        self._calls += 1
        return self._calls


class _AllGather(_Comm, AllGather):
    secondary: SecondaryShard | None = None
    owner: Secondary | None = None  # which lives as long as the modules that use it

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        self._ranks.of(group).all_gather(
            input_tensor,
            self._wire,
            out=output_tensor,
            inside=self._inside,
            secondary=self.secondary,
            seed=self._seed(),
            exact_below=self._exact_below,
        )


class _ReduceScatter(_Comm, ReduceScatter):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"FSDP reduces gradients by {op}; expected SUM or AVG, so no set_gradient_divide_factor()")
        self._ranks.of(group).reduce_scatter(
            input_tensor,
            self._wire,
            op="mean" if op == dist.ReduceOp.AVG else "sum",
            out=output_tensor,
            inside=self._inside,
            seed=self._seed(),
            exact_below=self._exact_below,
        )


class Secondary:
    """The secondary shards of a model's modules (hpZ): between two steps of an optimizer, any optimizer, weights are
    gathered from all nodes once, and then from this one.
    """

    def __init__(self) -> None:
        self._shards: list[SecondaryShard] = []
        self_of = weakref.ref(self)

        def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            secondary = self_of()
            if secondary is not None:
                secondary.invalidate()

        weakref.finalize(self, register_optimizer_step_post_hook(stepped).remove)

    def add(self, pool: HostPool) -> SecondaryShard:
        self._shards.append(SecondaryShard(pool))
        return self._shards[-1]

    @property
    def nbytes(self) -> int:
        """Bytes held by this rank."""
        return sum(shard.nbytes for shard in self._shards)

    def invalidate(self) -> None:
        """After weights were changed by anything but an optimizer's step: load_state_dict, or a copy. On all ranks."""
        for shard in self._shards:
            shard.invalidate()


def apply(
    model: torch.nn.Module,
    *,
    weights: WireLike = None,
    gradients: WireLike | tuple[WireLike, WireLike] = None,
    node_size: int = 0,
    secondary: HostPool | bool = False,
    exact_below: int = EXACT_BELOW,
) -> Secondary | None:
    """Makes every FSDPModule of `model` gather weights and reduce gradients in narrow formats.

    weights, gradients: a Wire, a Format or its name; None leaves torch's own collective. gradients may be two: within a
    node and between nodes. node_size: ranks of a node, 0 for no nodes. exact_below: as in Communicator, of the
    parameters that a module gathers and of the gradients that it reduces.

    secondary: with nodes and `weights`, keep secondary shards, in memory of this pool or, for True, of one of their own
    (hpZ): the backward pass then gathers weights within the node. They are what apply returns; else None.

    Call it after fully_shard, on all ranks. Weights that are gathered have been rounded, on every rank alike; the
    shards that the optimizer updates are as they were. Parameters of one group must have one dtype
    (MixedPrecisionPolicy sees to it). Collectives run in the caller's thread. ValueError if there is no FSDPModule in
    the model, or for secondary shards without nodes or weights.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no FSDPModule; expected fully_shard to have been called")
    if secondary is not False and (weights is None or node_size == 0):
        raise ValueError(f"secondary shards with weights={weights} and node_size={node_size}; expected both")
    pool = HostPool() if secondary is True else secondary
    owner = Secondary() if isinstance(pool, HostPool) else None
    ranks = _Ranks(node_size)
    inside, between = gradients if isinstance(gradients, tuple) else (gradients, gradients)
    for module in modules:
        if weights is not None:
            gather = _AllGather(ranks, as_wire(weights), as_wire(None), exact_below)
            if owner is not None and isinstance(pool, HostPool):
                gather.owner, gather.secondary = owner, owner.add(pool)
            module.set_custom_all_gather(gather)
        if gradients is not None:
            module.set_custom_reduce_scatter(_ReduceScatter(ranks, as_wire(between), as_wire(inside), exact_below))
    return owner
