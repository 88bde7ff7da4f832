"""Flat shards for loops that divide a training state between ranks (ZeRO), and collectives with gradients.

>>> shards = ng.shards.FlatShards(comm, model.parameters())
>>> mine = shards.own(model.parameters())      # what this rank's optimizer has: float32, flat
>>> mine.grad = shards.reduce_scatter([p.grad for p in model.parameters()], "int8:g64:bf16")
>>> optimizer.step()
>>> shards.all_gather(mine, "int8:g64:bf16", out=[p.data for p in model.parameters()])

That is ZeRO-2: gradients and optimizer state are divided. One FlatShards for each layer, gathered before it is used, is
ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from narrowgauge._native import EXACT_BELOW
from narrowgauge.collective import Communicator, WireLike

_BLOCK = 64  # parts are so many elements: the groups of most Formats, and the blocks of Hadamard


class FlatShards:
    """Tensors of given shapes, one behind the other, cut into an equal part for every rank.

    part: elements of a rank, a multiple of 64; numel: elements of all tensors, without the zeros that fill the last
    parts. Used by the thread that uses the Communicator.
    """

    def __init__(self, communicator: Communicator, tensors: Iterable[torch.Tensor]) -> None:
        self.communicator = communicator
        self.shapes = [tensor.shape for tensor in tensors]
        self.numel = sum(shape.numel() for shape in self.shapes)
        blocks = -(-self.numel // (communicator.size * _BLOCK))
        self.part = blocks * _BLOCK

    @torch.no_grad()
    def flatten(self, tensors: Iterable[torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The tensors one behind the other and zeros, [size * part], in `dtype`."""
        tensors = list(tensors)
        self._check(tensors, "tensors")
        flat = torch.zeros(self.communicator.size * self.part, dtype=dtype)
        for piece, tensor in zip(self._pieces(flat), tensors, strict=True):
            piece.copy_(tensor)
        return flat

    def own(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """This rank's part of the tensors, float32, of its own memory. Nothing is sent."""
        start = self.communicator.rank * self.part
        return self.flatten(tensors)[start : start + self.part].clone()

    def reduce_scatter(
        self,
        gradients: Iterable[torch.Tensor],
        wire: WireLike = None,
        *,
        op: str = "mean",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> torch.Tensor:
        """This rank's part of the mean (or "sum") of all ranks' gradients, [part], in `dtype`.

        options: inside, error (float32, [size * part]), seed, exact_below, async_op, .. of Communicator.reduce_scatter.
        """
        result: torch.Tensor = self.communicator.reduce_scatter(self.flatten(gradients, dtype), wire, op=op, **options)
        return result

    def all_gather(
        self, part: torch.Tensor, wire: WireLike = None, *, out: Iterable[torch.Tensor], **options: Any
    ) -> None:
        """Writes all ranks' parts into the tensors `out`, rounded to their dtypes. options: of Communicator.all_gather,
        without async_op.
        """
        if options.get("async_op"):
            raise ValueError("async_op is True, expected False: tensors are written when all parts have come")
        tensors = list(out)
        self._check(tensors, "out")
        if part.shape != (self.part,):
            raise ValueError(f"part has shape {list(part.shape)}, expected [{self.part}]")
        flat = self.communicator.all_gather(part, wire, **options)
        with torch.no_grad():
            for piece, tensor in zip(self._pieces(flat), tensors, strict=True):
                tensor.copy_(piece)

    def _pieces(self, flat: torch.Tensor) -> list[torch.Tensor]:
        pieces = torch.split(flat[: self.numel], [shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def _check(self, tensors: Sequence[torch.Tensor], name: str) -> None:
        shapes = [tensor.shape for tensor in tensors]
        if shapes != self.shapes:
            seen, expected = ([list(shape) for shape in each] for each in (shapes, self.shapes))
            raise ValueError(f"{name} have shapes {seen}, expected {expected}")


def all_gather(
    shard: torch.Tensor,
    communicator: Communicator,
    wire: WireLike = None,
    *,
    gradients: WireLike = None,
    inside: WireLike = None,
    seed: int = 0,
    exact_below: int = EXACT_BELOW,
) -> torch.Tensor:
    """Communicator.all_gather that gradients pass: the shard's is the sum over the ranks, by reduce_scatter.

    wire: of the values; gradients, inside: wire and inside of the gradients; seed, exact_below: of both.
    """
    result: torch.Tensor = _AllGather.apply(  # type: ignore[no-untyped-call]
        shard, communicator, wire, gradients, inside, {"seed": seed, "exact_below": exact_below}
    )
    return result


def reduce_scatter(
    input: torch.Tensor,
    communicator: Communicator,
    wire: WireLike = None,
    *,
    op: str = "sum",
    gradients: WireLike = None,
    inside: WireLike = None,
    seed: int = 0,
    exact_below: int = EXACT_BELOW,
) -> torch.Tensor:
    """Communicator.reduce_scatter that gradients pass: the input's is all ranks', by all_gather; of a "mean", divided
    by their number.

    wire, inside: of the values; gradients: the wire of the gradients; seed, exact_below: of both.
    """
    result: torch.Tensor = _ReduceScatter.apply(  # type: ignore[no-untyped-call]
        input, communicator, wire, op, gradients, inside, {"seed": seed, "exact_below": exact_below}
    )
    return result


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shard: torch.Tensor,
        communicator: Communicator,
        wire: WireLike,
        gradients: WireLike,
        inside: WireLike,
        both: dict[str, Any],
    ) -> torch.Tensor:
        ctx.communicator, ctx.options = communicator, {"wire": gradients, "inside": inside, **both}
        gathered: torch.Tensor = communicator.all_gather(shard.contiguous(), wire, **both)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        return (ctx.communicator.reduce_scatter(gradient.contiguous(), **ctx.options), None, None, None, None, None)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        communicator: Communicator,
        wire: WireLike,
        op: str,
        gradients: WireLike,
        inside: WireLike,
        both: dict[str, Any],
    ) -> torch.Tensor:
        ctx.communicator, ctx.options = communicator, {"wire": gradients, **both}
        ctx.divisor = communicator.size if op == "mean" else 1
        part: torch.Tensor = communicator.reduce_scatter(input.contiguous(), wire, op=op, inside=inside, **both)
        return part

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        whole = ctx.communicator.all_gather(gradient.contiguous() / ctx.divisor, **ctx.options)
        return (whole, None, None, None, None, None, None)
