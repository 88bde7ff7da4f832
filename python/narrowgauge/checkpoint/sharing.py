"""Which tensors of a state lie in the same memory.

Judged by the range of bytes that each one's elements span. Interleaved views (two columns of a matrix) thus count as
one memory, though no element is in both: storing the range once and both as views of it is right all the same.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

from narrowgauge._arrays import Array
from narrowgauge.checkpoint.tensors import Form
from narrowgauge.checkpoint.values import Node, Place


class Held(NamedTuple):
    """Memory that a state holds, seen in one way: an array whose elements span bytes [begin, end)."""

    begin: int
    end: int
    order: int  # of the walk
    array: Array
    form: Form
    place: Place
    nodes: list[Node]  # of all tensors that see it in this way; the last entry of each says where its data is
    stored: Any  # the Stored; None if it is narrowed


def overlapping(everything: list[Held]) -> list[list[Held]]:
    """The groups of more than one, or of one that overlaps itself (an expanded tensor); in the order of the walk."""
    groups: list[list[Held]] = []
    group: list[Held] = []
    end = 0
    for held in sorted(everything, key=attrgetter("begin")):
        if held.begin >= end:
            group = []
        group.append(held)
        end = max(end, held.end)
        if len(group) == 2 or (len(group) == 1 and held.array.nbytes > held.end - held.begin):
            groups.append(group)
    # A group that begins with one that overlaps itself was entered twice.
    unique = {id(each): each for each in groups}.values()
    for each in unique:
        each.sort(key=attrgetter("order"))
    return sorted(unique, key=lambda each: each[0].order)
