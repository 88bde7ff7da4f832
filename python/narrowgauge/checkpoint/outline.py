"""What a state holds beside its tensors, for people: places and values, without reading a tensor."""

from __future__ import annotations

from collections.abc import Iterator

from narrowgauge.checkpoint.decode import MAPPINGS, SEQUENCES, Reader, Source
from narrowgauge.checkpoint.values import ROOT, Attribute, Node, Place, decode_value, show, tag_of

_TENSORS = ("torch", "numpy", "Tensor", "QTensor")


def outline(document: str, source: Source) -> Iterator[tuple[str, str]]:
    """(place, value) of every value that is no tensor, such as ("state['step']", "100"). FileCorrupt as decode."""
    reader = Reader(document, source, None, 0)

    def walk(node: Node, place: Place) -> Iterator[tuple[str, str]]:
        tag = tag_of(node, place)
        if tag in MAPPINGS:
            for key, child in reader.pairs(node, place):
                yield from walk(child, (place, key))
        elif tag in SEQUENCES:
            for index, child in enumerate(node[1:]):
                yield from walk(child, (place, index))
        elif tag == "PerRank":
            for child in [reader.own_node(node, place)]:
                yield from walk(child, (place, Attribute("value")))
        elif not tag.startswith(_TENSORS):
            text = repr(decode_value(node, place))
            yield show(place), text if len(text) <= 100 else f"{text[:100]}..."

    yield from walk(reader.tree, ROOT)
