"""Which part of a distributed tensor this rank holds: a DTensor's placements as a box, that of FSDP2 among them.

A box is (begin, end) per axis of the global tensor. What is no box (Partial sums, interleaved shards) is refused.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, NoReturn

from narrowgauge._arrays import Array
from narrowgauge.checkpoint.values import Place, show

Box = tuple[tuple[int, int], ...]


class Part(NamedTuple):
    """A rank's part of a tensor: on every rank the same `axes`, whether or not they are cut there."""

    array: Array
    box: Box | None  # None: all of it
    axes: frozenset[int]  # those that are sharded


def dtensor_type() -> type | None:
    """DTensor, where it is loaded: there are none elsewhere."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def part_of(tensor: Any, place: Place) -> Part:
    """The part of a DTensor that is here. TypeError, with the place, if it is no box."""
    shape = tuple(tensor.shape)
    # Not to_local(), which may give another tensor than the one whose version counts the optimizer's changes.
    local = tensor._local_tensor
    if hasattr(local, "wait"):  # the result of a collective under way
        local = local.wait()
    placements = tensor.placements
    for placement in placements:
        if placement.is_partial():
            _refuse(place, placements, "is a partial sum; redistribute it first")
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    axes = frozenset(placement.dim % len(shape) for placement in placements if not placement.is_replicate())
    if coordinate is None:
        _refuse(place, placements, "is on a mesh that this rank is not in")
    box = []
    for axis, length in enumerate(shape):
        begin, end = 0, length
        for dim in _order(placements, mesh, axis, place):
            # As torch.chunk cuts: all of the same length but the last ones.
            chunk = -(-(end - begin) // mesh.size(dim))
            cut = begin + chunk * coordinate[dim]
            begin, end = min(cut, end), min(cut + chunk, end)
        box.append((begin, end))
    expected = tuple(end - begin for begin, end in box)
    if tuple(local.shape) != expected:
        _refuse(place, placements, f"has a local part {list(local.shape)}, expected {list(expected)}")
    whole = all(bounds == (0, length) for bounds, length in zip(box, shape, strict=True))
    return Part(local, None if whole else tuple(box), axes)


def _order(placements: Any, mesh: Any, axis: int, place: Place) -> list[int]:
    """The dimensions of the mesh that cut an axis, outermost first.

    A strided shard is cut after those to its right (FSDP over tensor parallelism); it is a box if it is cut after all.
    """
    order: list[int] = []
    inner = 1  # parts that the dimensions to the right make
    for dim in reversed(range(len(placements))):
        placement = placements[dim]
        if placement.is_replicate() or placement.dim != axis:
            continue
        strides = getattr(placement, "split_factor", 1)
        if strides == 1:
            order.insert(0, dim)
        elif strides == inner:
            order.append(dim)
        else:
            _refuse(place, placements, f"is interleaved along axis {axis}; redistribute it first")
        inner *= mesh.size(dim)
    return order


def _refuse(place: Place, placements: Any, problem: str) -> NoReturn:
    raise TypeError(f"{show(place)}: a DTensor placed as {tuple(placements)} {problem}")
