"""Narrow weights and gradients on the wire of torch's FSDP2.

>>> for block in model.layers: fully_shard(block)
>>> fully_shard(model)
>>> ng.fsdp.apply(model, weights="int8:g64:bf16", gradients="int8:g64:bf16")

Parameters, optimizer and sums stay as they are. With nodes, gradients are added up within them first (qgZ of ZeRO++).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from narrowgauge._native import Wire
from narrowgauge.collective import Communicator, WireLike, as_wire

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
    def __init__(self, ranks: _Ranks, wire: Wire, inside: Wire) -> None:
        self._ranks, self._wire, self._inside = ranks, wire, inside
        self._calls = 0  # seeds stochastic rounding

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def _seed(self) -> int:
        self._calls += 1
        return self._calls


class _AllGather(_Comm, AllGather):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        self._ranks.of(group).all_gather(
            input_tensor, self._wire, out=output_tensor, inside=self._inside, seed=self._seed()
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
        )


def apply(
    model: torch.nn.Module,
    *,
    weights: WireLike = None,
    gradients: WireLike | tuple[WireLike, WireLike] = None,
    node_size: int = 0,
) -> None:
    """Makes every FSDPModule of `model` gather weights and reduce gradients in narrow formats.

    weights, gradients: a Wire, a Format or its name; None leaves torch's own collective. gradients may be two: within a
    node and between nodes. node_size: ranks of a node, 0 for no nodes.

    Call it after fully_shard, on all ranks. Weights that are gathered have been rounded, on every rank alike; the
    shards that the optimizer updates are as they were. Parameters of one group must have one dtype
    (MixedPrecisionPolicy sees to it). Collectives run in the caller's thread. ValueError if there is no FSDPModule in
    the model.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no FSDPModule; expected fully_shard to have been called")
    ranks = _Ranks(node_size)
    inside, between = gradients if isinstance(gradients, tuple) else (gradients, gradients)
    for module in modules:
        if weights is not None:
            module.set_custom_all_gather(_AllGather(ranks, as_wire(weights), as_wire(None)))
        if gradients is not None:
            module.set_custom_reduce_scatter(_ReduceScatter(ranks, as_wire(between), as_wire(inside)))
