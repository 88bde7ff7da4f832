"""Which rank writes what. Every rank describes its state; from all descriptions each computes the same plan.

Replicas share the bytes: what the same ranks hold is laid end to end and cut evenly among them, so that at most one
tensor is cut between two writers. A whole tensor is cut where its bytes are a multiple of 4096, a shard between the
rows of its first axis. Tensors of up to 64 KiB are not cut and all come from the first of their holders: the buffers
in which replicas tend to differ a little (BatchNorm's statistics) are then those of one rank, as if it saved alone.

Ranks must agree on everything that is not a shard or marked PerRank; where they do not is an error with the place,
and nothing is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from narrowgauge.checkpoint import values
from narrowgauge.checkpoint.shards import Box
from narrowgauge.checkpoint.state import Encoded
from narrowgauge.checkpoint.tensors import FILE_BYTES
from narrowgauge.checkpoint.values import ROOT, Attribute, Node, Place, show

CUT_BYTES = 4096
UNCUT_BYTES = 65536


class Tensor(NamedTuple):
    """A tensor of the checkpoint, whoever writes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Region(NamedTuple):
    """What a rank writes of a tensor: elements [start, stop), row-major, of the part that it holds."""

    tensor: int  # of the plan
    stored: int  # of the rank's own Encoded.tensors
    start: int
    stop: int
    box: Box | None  # where that is in the whole tensor; None: at [start, stop) of it, row-major


class Plan(NamedTuple):
    document: str  # JSON: the state's tree, and what PerRank marks on each rank; decode and restore take it
    tensors: list[Tensor]  # without regions if they are empty
    regions: list[list[Region]]  # per rank


def describe(encoded: Encoded) -> bytes:
    """What other ranks must know of this one's state."""
    tensors = [(each.name, each.dtype, each.shape, each.box) for each in encoded.tensors]
    # As texts in the text, which most ranks need not look into.
    parts = [values.dump(encoded.tree), values.dump(encoded.own), json.dumps(tensors[: encoded.common])]
    return json.dumps([*parts, tensors[encoded.common :]], separators=(",", ":")).encode()


def plan_alone(encoded: Encoded) -> Plan:
    """The plan of one rank that writes all: plan([describe(encoded)]), without the texts."""
    if any(each.box is not None for each in encoded.tensors):
        return plan([describe(encoded)])  # a part of a tensor: whether the rest is somewhere
    tensors = [Tensor(each.name, each.dtype, each.shape) for each in encoded.tensors]
    counts = [math.prod(each.shape) for each in tensors]
    regions = [Region(at, at, 0, count, None) for at, count in enumerate(counts) if count]
    return Plan(_document(values.dump(encoded.tree), [values.dump(encoded.own)]), tensors, [regions])


def _document(tree: str, own: Sequence[str]) -> str:
    return f'["state",{tree},{",".join(own)}]'


class _Piece(NamedTuple):
    """A part of a tensor that the same ranks hold."""

    tensor: int
    shape: tuple[int, ...]  # of the part
    box: Box | None
    itemsize: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def axis(self) -> int:
        """The axis between whose rows a box is cut: parts of it are boxes again."""
        return next((axis for axis, length in enumerate(self.shape) if length > 1), 0)

    def cut(self, size: int) -> int:
        """The number of elements nearest to `size` bytes before which the part may be cut."""
        unit = CUT_BYTES // self.itemsize if self.box is None else math.prod(self.shape[self.axis + 1 :])
        return min(round(size / (unit * self.itemsize)) * unit, self.elements)

    def region(self, start: int, stop: int) -> Region:
        box = self.box
        if box is not None and stop - start < self.elements:
            axis, row = self.axis, math.prod(self.shape[self.axis + 1 :])
            begin = box[axis][0]
            box = (*box[:axis], (begin + start // row, begin + stop // row), *box[axis + 1 :])
        return Region(self.tensor, self.tensor, start, stop, box)


def plan(descriptions: Sequence[bytes]) -> Plan:
    """The plan of the ranks that gave these descriptions, in order. ValueError where they do not agree."""
    parts = [json.loads(each) for each in descriptions]
    trees = [part[0] for part in parts]
    for rank, tree in enumerate(trees):
        if tree != trees[0]:
            _disagree(values.parse(trees[0]), values.parse(tree), ROOT, rank)
    # The common tensors as the ranks hold them: replicas of all hold the same.
    views: dict[str, list[int]] = {}
    for rank, part in enumerate(parts):
        views.setdefault(part[2], []).append(rank)
    listed = [(json.loads(text), ranks) for text, ranks in views.items()]

    entries_of_first = listed[0][0]
    tensors = [Tensor(name, dtype, tuple(shape)) for name, dtype, shape, _ in entries_of_first]
    regions: list[list[Region]] = [[] for _ in parts]
    shared: dict[tuple[int, ...], list[_Piece]] = {}
    tiled: set[Any] = set()
    for index, tensor in enumerate(tensors):
        if not math.prod(shape := tensor.shape):
            continue
        whole = tuple((0, length) for length in shape)
        holders: dict[Box, list[int]] = {}
        for entries, ranks in listed:
            *same, box = entries[index]
            if same != entries_of_first[index][:3]:
                raise ValueError(
                    f"tensor '{tensor.name}' is {tensor.dtype} {list(shape)} on rank 0 and {same} on rank {ranks[0]}"
                )
            holders.setdefault(whole if box is None else tuple(map(tuple, box)), []).extend(ranks)
        holders = {box: ranks for box, ranks in holders.items() if all(begin < end for begin, end in box)}
        if whole not in holders or len(holders) > 1:
            how = (shape, tuple(holders))
            if how not in tiled:
                _check_tiling(tensor, list(holders))
                tiled.add(how)
        for box, ranks in holders.items():
            lengths = tuple(end - begin for begin, end in box)
            piece = _Piece(index, lengths, None if box == whole else box, FILE_BYTES[tensor.dtype])
            shared.setdefault(tuple(sorted(ranks)), []).append(piece)
    for holding, pieces in shared.items():
        for rank, region in _share(pieces, holding):
            regions[rank].append(region)
    for rank, part in enumerate(parts):
        for offset, (name, dtype, shape, _) in enumerate(part[3]):
            if count := math.prod(shape):
                regions[rank].append(Region(len(tensors), len(entries_of_first) + offset, 0, count, None))
            tensors.append(Tensor(name, dtype, tuple(shape)))
    document = _document(trees[0], [part[1] for part in parts])
    return Plan(document, tensors, [sorted(each) for each in regions])


def _share(pieces: list[_Piece], holders: tuple[int, ...]) -> Iterator[tuple[int, Region]]:
    """Cuts what `holders` all hold into a share for each: (rank, region)."""
    large = []
    done = left = 0
    for piece in pieces:
        size = piece.elements * piece.itemsize
        if size <= UNCUT_BYTES or len(holders) == 1:
            yield holders[0], piece.region(0, piece.elements)
            done += size
        else:
            large.append(piece)
            left += size
    if not large:
        return
    first = max((done + left) // len(holders) - done, 0)
    # Where each share ends, in bytes of the large pieces end to end.
    ends = [first + (left - first) * number // (len(holders) - 1) for number in range(len(holders))]
    writer = position = 0
    for piece in large:
        start, size = 0, piece.elements * piece.itemsize
        while writer < len(holders) - 1 and ends[writer] < position + size:
            stop = max(piece.cut(ends[writer] - position), start)
            if stop > start:
                yield holders[writer], piece.region(start, stop)
            start, writer = stop, writer + 1
        if start < piece.elements:
            yield holders[writer], piece.region(start, piece.elements)
        position += size


def _check_tiling(tensor: Tensor, boxes: list[Box]) -> None:
    """Whether boxes cover a tensor, each element once: they must be all cells of a grid."""
    cells = 1
    for axis, length in enumerate(tensor.shape):
        ranges = sorted({box[axis] for box in boxes})
        ends = [0, *(end for _, end in ranges)]
        if [begin for begin, _ in ranges] != ends[:-1] or ends[-1] != length:
            cells = -1
            break
        cells *= len(ranges)
    if cells != len(boxes):
        shown = ", ".join(str([list(bounds) for bounds in box]) for box in sorted(boxes)[:4])
        raise ValueError(
            f"tensor '{tensor.name}' {list(tensor.shape)} is not covered once by the parts that the ranks hold: "
            f"{len(boxes)} parts, {shown}{', ...' if len(boxes) > 4 else ''}"
        )


# --- disagreement -----------------------------------------------------------------------------------------------


def _disagree(a: Node, b: Node, place: Place, rank: int) -> NoReturn:
    """Finds the first difference of the trees of rank 0 and `rank`."""
    tag = a[0] if type(a) is list else ""
    if tag and type(b) is list and tag == b[0] and len(a) == len(b):
        if tag in ("list", "tuple"):
            for index, (x, y) in enumerate(zip(a[1:], b[1:], strict=True)):
                if not _same(x, y):
                    _disagree(x, y, (place, index), rank)
        if tag in ("dict", "Counter", "OrderedDict"):
            start = 2 if tag == "OrderedDict" else 1
            if start == 2 and not _same(a[1], b[1]):
                _disagree(a[1], b[1], (place, Attribute("_metadata")), rank)
            for at in range(start, len(a), 2):
                if not _same(a[at], b[at]):
                    _differ(place, f"has the key {values.word(a[at])}", f"the key {values.word(b[at])}", rank)
                if not _same(a[at + 1], b[at + 1]):
                    _disagree(a[at + 1], b[at + 1], (place, values.decode_value(a[at], place)), rank)
    _differ(place, f"is {values.word(a)}", values.word(b), rank)


def _same(a: Node, b: Node) -> bool:
    # Not a == b: 1, 1.0 and True are three values.
    return values.dump(a) == values.dump(b)


def _differ(place: Place, here: str, there: str, rank: int) -> NoReturn:
    raise ValueError(
        f"{show(place)} {here} on rank 0 and {there} on rank {rank}: what differs between ranks must be wrapped in "
        "narrowgauge.PerRank"
    )
