"""What DeepSpeed's zero_quantized_gradients calls, for any dtype, shape and number of ranks.

>>> ng.deepspeed.install()     # before deepspeed.initialize; its qgZ now goes through narrowgauge

DeepSpeed's own takes fp16 matrices on GPUs; other gradients it hands on unquantised, and the mean of matrices is
node_size times too large (0.19.8). Here every gradient takes one path, in its own dtype, and the result is the mean
over all ranks. DeepSpeed is imported by install() only.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from narrowgauge._native import EXACT_BELOW, Wire
from narrowgauge.collective import Communicator, WireLike

INSIDE = Wire("int8:g64:bf16")
BETWEEN = Wire("int4:g64:bf16", hadamard=True)

_PLACES = ("deepspeed.runtime.comm.coalesced_collectives", "deepspeed.runtime.zero.stage3")
_NAME = "all_to_all_quant_reduce"
_communicators: dict[tuple[Any, int], Communicator] = {}


@torch.no_grad()
def all_to_all_quant_reduce(
    tensors: Sequence[torch.Tensor],
    groups: Mapping[str, Any],
    *,
    wire: WireLike = BETWEEN,
    inside: WireLike = INSIDE,
    exact_below: int = EXACT_BELOW,
) -> list[torch.Tensor]:
    """Of each tensor, the mean over all ranks of this rank's part: flat, in the tensor's dtype.

    The first two arguments and the result are those of DeepSpeed's function: the part of a tensor is as many elements
    as ceil(numel / ranks), the last ones fewer, or none. groups: its process groups by name, of which "local_<node>"
    that has this rank says how many ranks a node has; {}: no nodes. wire, inside, exact_below: as in Communicator.
    Tensors of one dtype travel together. A collective call on torch.distributed's default group; the tensors are not
    written.
    """
    communicator = _communicator(_node_size(groups))
    size, rank = communicator.size, communicator.rank
    parts: list[torch.Tensor | None] = [None] * len(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chosen = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
        widths = [-(-tensors[index].numel() // size) for index in chosen]
        laid_out = torch.zeros(size, sum(widths), dtype=dtype)
        for index, columns in zip(chosen, torch.split(laid_out, widths, 1), strict=True):
            values = tensors[index].flatten()
            for row, start in zip(columns, range(0, values.numel(), columns.shape[1] or 1), strict=False):
                row[: values.numel() - start] = values[start : start + len(row)]
        reduced = communicator.reduce_scatter(laid_out, wire, op="mean", inside=inside, exact_below=exact_below)
        for index, part in zip(chosen, torch.split(reduced.view(-1), widths), strict=True):
            parts[index] = part[: max(0, tensors[index].numel() - rank * len(part))]
    return [part for part in parts if part is not None]


def install(wire: WireLike = BETWEEN, inside: WireLike = INSIDE, exact_below: int = EXACT_BELOW) -> None:
    """Replaces DeepSpeed's function in the modules that call it. ImportError without deepspeed; AttributeError if its
    version has none of that name.
    """
    import importlib

    def replacement(tensors: list[torch.Tensor], groups: dict[str, Any]) -> list[torch.Tensor]:
        return all_to_all_quant_reduce(tensors, groups, wire=wire, inside=inside, exact_below=exact_below)

    for place in _PLACES:
        module = sys.modules.get(place) or importlib.import_module(place)
        if not hasattr(module, _NAME):
            raise AttributeError(f"{place} has no {_NAME}, expected the one of DeepSpeed 0.19")
    for place in _PLACES:
        setattr(sys.modules[place], _NAME, replacement)


def _node_size(groups: Mapping[str, Any]) -> int:
    if not groups:
        return 0
    for name, group in groups.items():
        if name.startswith("local_") and dist.get_rank(group) >= 0:
            return dist.get_world_size(group)
    raise ValueError(f"groups are {sorted(groups)}, expected one named local_<node> that has this rank")


def _communicator(node_size: int) -> Communicator:
    key = (dist.group.WORLD, node_size)
    if key not in _communicators:
        _communicators[key] = Communicator.from_torch(None, node_size)
    return _communicators[key]
