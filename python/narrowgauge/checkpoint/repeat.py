"""A state like the one saved before: what was found out about that one still holds.

A training loop saves the same tensors again and again; their contents change, and a few numbers beside them. To take a
state apart costs microseconds a tensor, to see that it looks as before a fraction of one. Whatever is out of the
ordinary (numpy arrays, QTensors, DTensors, PerRank, tensors that are not dense) makes a state that is taken apart each
time.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from narrowgauge import _native
from narrowgauge.checkpoint.state import Stored
from narrowgauge.checkpoint.values import ROOT, Node, dump, encode_value

_SCALARS = frozenset({int, float, bool, str, type(None)})
_MARK = re.compile(r'"\\u0001\d+"')
_MOVED = 16  # tensors that may lie elsewhere than before, such as the state of random numbers


Look = tuple[bytes, list[bool], list[bool]]


class Leaves(NamedTuple):
    """A state laid flat: what containers it has, and what is in them."""

    structure: list[Any]
    tensors: list[Any]
    scalars: list[Any]


def flatten(state: Any) -> Leaves | None:
    """None for a state with anything but dicts, lists, tuples, torch tensors and plain values."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    leaves = Leaves([], [], [])
    try:
        plain = _flatten((state,), leaves, frozenset((torch.Tensor, torch.nn.Parameter)))
    except RecursionError:  # it contains itself, which encode() says better
        plain = False
    return leaves if plain else None


def _flatten(values: Iterable[Any], leaves: Leaves, tensor: frozenset[type]) -> bool:
    for value in values:
        kind = type(value)
        leaves.structure.append(kind)
        if kind in tensor:
            leaves.tensors.append(value)
        elif kind in _SCALARS:
            leaves.scalars.append(value)
        elif kind is dict or kind is OrderedDict:
            leaves.structure.extend((tuple(value), tuple(map(type, value))))  # 1, 1.0 and True are three keys
            if kind is OrderedDict and not _flatten((vars(value),), leaves, tensor):
                return False
            if not _flatten(value.values(), leaves, tensor):
                return False
        elif kind is list or kind is tuple:
            leaves.structure.append(len(value))
            if not _flatten(value, leaves, tensor):
                return False
        else:
            return False
    return True


def _look(tensors: list[Any]) -> tuple[list[int], Look] | None:
    """Where tensors are, and all else that their nodes and their places in a file follow from."""
    found = _native.tensor_layouts(tensors)
    if found is None:
        return None
    begins, layouts = found
    return begins, (layouts, [tensor.requires_grad for tensor in tensors], [tensor.is_neg() for tensor in tensors])


class Repeat:
    """What was prepared to save a state, to be used again."""

    def __init__(
        self,
        leaves: Leaves,
        texts: list[str],
        parts: _native.CheckpointParts,
        owners: dict[int, int],
        borrowed: list[tuple[str, int]],
        begins: list[int],
        look: Look,
        key: object,
    ) -> None:
        self.parts = parts
        self._structure, self._scalars = leaves.structure, leaves.scalars  # not the tensors, which may die
        self._begins, self._look = begins, look
        self._sizes = [tensor.nbytes for tensor in leaves.tensors]
        self._texts = texts  # of the document, between the scalars
        self._dumped = [_dump(scalar) for scalar in leaves.scalars]
        self._owners = owners  # a tensor: the part that it alone is
        self._borrowed = borrowed  # names and places of tensors that are read in the background
        self._key = key

    @classmethod
    def of(
        cls,
        leaves: Leaves | None,
        state: Any,
        tree: Node,
        stored: Sequence[Stored],
        part_of: dict[int, int],
        parts: _native.CheckpointParts,
        watched: list[tuple[str, Any]],
        key: object,
    ) -> Repeat | None:
        """None if the state is out of the ordinary.

        part_of: an entry of `stored`: its part. watched: names and tensors that are read in the background. key:
        whatever else must be as it was.
        """
        if leaves is None or (look := _look(leaves.tensors)) is None or not all(each.sources for each in stored):
            return None
        if not all(t.is_contiguous() and not t.is_neg() and not t.is_complex() for t in leaves.tensors):
            return None
        texts = _MARK.split(dump(_marked(tree, state, [0])))
        if len(texts) != len(leaves.scalars) + 1:  # a text of the state's own looks like a mark
            return None
        places = {id(tensor): place for place, tensor in enumerate(leaves.tensors)}
        borrowed = [(name, places[id(tensor)]) for name, tensor in watched]
        lent = {place for _, place in borrowed}  # where they are, and nowhere else
        owners = {}
        for index, part in part_of.items():
            sources = stored[index].sources
            if len(sources) == 1 and sources[0].data_ptr() == stored[index].array.data_ptr():
                owners[places[id(sources[0])]] = part
        owners = {place: part for place, part in owners.items() if place not in lent}
        return cls(leaves, texts, parts, owners, borrowed, *look, key)

    def again(self, leaves: Leaves | None, key: object) -> tuple[str, list[tuple[str, Any]]] | None:
        """The document of a state with these leaves, and its watched tensors; `parts` fit it then.

        None if it is not like the one before.
        """
        if leaves is None or key != self._key or leaves.structure != self._structure:
            return None
        if (found := _look(leaves.tensors)) is None or found[1] != self._look:
            return None
        begins = found[0]
        if begins != self._begins and not self._move(begins):
            return None
        for index, scalar in enumerate(leaves.scalars):
            if scalar is not self._scalars[index]:
                self._dumped[index] = _dump(scalar)
        self._scalars = leaves.scalars
        pieces = [self._texts[0]]
        for dumped, text in zip(self._dumped, self._texts[1:], strict=True):
            pieces += (dumped, text)
        return f'["state",{"".join(pieces)},[]]', [(name, leaves.tensors[place]) for name, place in self._borrowed]

    def _move(self, begins: list[int]) -> bool:
        """Takes tensors from where they are now, if each of them is a part of its own and shares no memory."""
        moved = [place for place, begin in enumerate(begins) if begin != self._begins[place]]
        if len(moved) > _MOVED or not all(place in self._owners for place in moved):
            return False
        for place in moved:
            begin, end = begins[place], begins[place] + self._sizes[place]
            for other, (start, size) in enumerate(zip(begins, self._sizes, strict=True)):
                if other != place and start < end and begin < start + size:
                    return False
        for place in moved:
            self.parts.move(self._owners[place], begins[place])
        self._begins = begins
        return True


def _dump(scalar: Any) -> str:
    return dump(encode_value(scalar, ROOT))


def _marked(node: Node, value: Any, count: list[int]) -> Node:
    """The tree with a mark in place of each scalar, in the order of flatten()."""
    kind = type(value)
    if kind in _SCALARS:
        count[0] += 1
        return f"\x01{count[0] - 1}"
    if kind is dict:
        items = [_marked(child, item, count) for child, item in zip(node[2::2], value.values(), strict=True)]
        return [node[0], *(part for pair in zip(node[1::2], items, strict=True) for part in pair)]
    if kind is OrderedDict:
        metadata = vars(value).get("_metadata")
        head = [node[0], node[1] if metadata is None else _marked(node[1], metadata, count)]
        items = [_marked(child, item, count) for child, item in zip(node[3::2], value.values(), strict=True)]
        return [*head, *(part for pair in zip(node[2::2], items, strict=True) for part in pair)]
    if kind is list or kind is tuple:
        return [node[0], *(_marked(child, item, count) for child, item in zip(node[1:], value, strict=True))]
    return node
