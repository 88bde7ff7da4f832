"""A training state made anew from its document and the tensors of the files. (restore.py fills one that is there.)

The document is walked first, and all of it checked against what the files hold; then all tensors are read in one
batch; then what needs their values is made (narrow matrices). The document is treated as hostile: what encode() would
not have written is FileCorrupt.

Patterns pick parts of a state by name, which is the path joined by dots, or its last parts: "model", "weight",
"optimizer.state.*.exp_avg". What is picked brings everything in it. Of what is not, dict entries are left out, and
items of lists and tuples are None.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from narrowgauge import _arrays, _native
from narrowgauge._arrays import Array
from narrowgauge._native import Format
from narrowgauge._patterns import matches
from narrowgauge.checkpoint import tensors, values
from narrowgauge.checkpoint.shards import Box
from narrowgauge.checkpoint.state import NARROWED, PerRank
from narrowgauge.checkpoint.tensors import (
    FILE_BYTES,
    OWN_AXES,
    OWN_DTYPES,
    OWN_TAG,
    TORCH_FORMS,
    TORCH_TAGS,
    Form,
    Library,
    dense_strides,
    span_of,
)
from narrowgauge.checkpoint.values import ROOT, Attribute, Node, Place, corrupt, decode_lengths, decode_value, show
from narrowgauge.qtensor import FILE_DTYPES, Canonical, QTensor, canonical_parts

LEFT_OUT: Any = object()

MAPPINGS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple}


class Request(NamedTuple):
    """A part of a file's tensor to be read: the bytes of `box` (None: all), row-major, into `array`, u8 [n]."""

    name: str
    box: Box | None
    array: Array


class Source(Protocol):
    """The tensors of a checkpoint's files."""

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype, as safetensors names it, and shape. KeyError if there is none of that name."""

    def read(self, requests: list[Request]) -> None: ...

    def map(self, name: str) -> memoryview | None:
        """The bytes of a tensor where they are in its file; None if they are not in one piece."""


def decode(
    document: str,
    source: Source,
    *,
    patterns: Iterable[str] | None = None,
    lazy: bool = False,
    library: str | None = None,
    rank: int = 0,
) -> Any:
    """The state that was encoded, or what `patterns` pick of it. Sharded tensors come whole, as torch tensors.

    lazy: tensors are views of the files where the source can map them. library: "numpy" gives numpy arrays for torch
    tensors, tuples for torch.Size and strings for torch's dtypes and devices, without torch.
    """
    if library not in (None, "numpy"):
        raise ValueError(f"library is {library!r}, expected None or 'numpy'")
    reader = Reader(document, source, patterns, rank, lazy, library)
    state = reader.value(reader.tree, ROOT, "", reader.patterns is None)
    if state is LEFT_OUT:
        raise ValueError(f"no part of the checkpoint's state matches {reader.patterns}")
    reader.finish()
    return state


class TensorNode(NamedTuple):
    """A tensor's node, found sound."""

    tag: str
    library: Any  # a Library, by its own type
    form: Form
    shape: tuple[int, ...]
    where: Node


class MatrixNode(NamedTuple):
    """A narrow matrix of the files, found sound."""

    format: Format
    shape: tuple[int, ...]
    names: list[str | None]  # of its canonical arrays, None for an absent one


class Reader:
    def __init__(
        self,
        document: str,
        source: Source,
        patterns: Iterable[str] | None,
        rank: int,
        lazy: bool = False,
        library: str | None = None,
    ) -> None:
        parsed = values.parse(document)
        if type(parsed) is not list or len(parsed) < 3 or parsed[0] != "state":
            corrupt(ROOT, "it is no document of a state")
        self.tree, owns = parsed[1], parsed[2:]
        if not all(type(own) is list and len(own) == len(owns[0]) for own in owns):
            corrupt(ROOT, "ranks differ in what they have for themselves")
        self.own: list[Node] | None = owns[rank] if rank < len(owns) else None
        self.rank, self.ranks, self.slots = rank, len(owns), len(owns[0])
        self.inside_own = False
        self.source = source
        self.patterns = None if patterns is None else list(patterns)
        self.lazy, self.library = lazy, library
        self.memory: dict[tuple[str, str], Array] = {}
        self.made: dict[str, Any] = {}
        self.requests: list[Request] = []
        self.after: list[Callable[[], object]] = []

    def finish(self) -> None:
        self.source.read(self.requests)
        for step in self.after:
            step()

    # --- the tree ---

    def chosen(self, name: str) -> bool:
        return any(matches(pattern, name) for pattern in self.patterns or ())

    def value(self, node: Node, place: Place, name: str, chosen: bool) -> Any:
        chosen = chosen or self.chosen(name)
        tag = values.tag_of(node, place)
        if tag in MAPPINGS:
            return self.mapping(node, place, name, chosen)
        if tag in SEQUENCES:
            return self.sequence(node, place, name, chosen)
        if tag == "PerRank":
            return self.per_rank(node, place, name, chosen)
        if not chosen:
            return LEFT_OUT
        if tag == "QTensor":
            return self.matrix(node, place)
        if tag == OWN_TAG:
            return self.own_tensor(node, place)
        if tag in TORCH_TAGS or (tag == "numpy" and len(node) == 4):
            return self.tensor(node, place)
        if self.library == "numpy" and tag in ("torch.Size", "torch.dtype", "torch.device"):
            return tuple(node[1:]) if tag == "torch.Size" else values.argument(node, place)
        return decode_value(node, place)

    def pairs(self, node: Node, place: Place) -> Iterator[tuple[Any, Node]]:
        """The keys and the nodes of a mapping."""
        start = 2 if node[0] == "OrderedDict" else 1
        if len(node) < start or (len(node) - start) % 2:
            corrupt(place, f"'{node[0]}' has a key without a value")
        seen = set()
        for at in range(start, len(node), 2):
            key = decode_value(node[at], place)
            values.check_hashable(key, place)
            if key in seen:
                corrupt(place, f"the key {str(key)[:80]!r} occurs twice")
            seen.add(key)
            yield key, node[at + 1]

    def mapping(self, node: Node, place: Place, name: str, chosen: bool) -> Any:
        out = MAPPINGS[node[0]]()
        prefix = f"{name}." if name else ""
        for key, child in self.pairs(node, place):
            item = self.value(child, (place, key), f"{prefix}{key}", chosen)
            if item is not LEFT_OUT:
                out[key] = item
        if not out and not chosen:
            return LEFT_OUT
        if node[0] == "OrderedDict" and node[1] is not None and chosen:
            out._metadata = self.value(node[1], (place, Attribute("_metadata")), f"{name}._metadata", True)
        return out

    def sequence(self, node: Node, place: Place, name: str, chosen: bool) -> Any:
        prefix = f"{name}." if name else ""
        out = [self.value(child, (place, at), f"{prefix}{at}", chosen) for at, child in enumerate(node[1:])]
        if not chosen and all(item is LEFT_OUT for item in out):
            return LEFT_OUT
        return SEQUENCES[node[0]](None if item is LEFT_OUT else item for item in out)

    def own_node(self, node: Node, place: Place) -> Node:
        """What PerRank marks on this rank; LEFT_OUT if the checkpoint has no such rank."""
        if len(node) != 2 or type(node[1]) is not int or not 0 <= node[1] < self.slots or self.inside_own:
            corrupt(place, "'PerRank' takes the number of what a rank has for itself")
        return LEFT_OUT if self.own is None else self.own[node[1]]

    def per_rank(self, node: Node, place: Place, name: str, chosen: bool) -> Any:
        own = self.own_node(node, place)
        if own is LEFT_OUT:
            if not chosen:
                return LEFT_OUT
            raise ValueError(
                f"{show(place)} is PerRank, of {self.ranks} ranks, and this is rank {self.rank}: restore the state in "
                "place, where the value there stays, or leave it out"
            )
        self.inside_own = True
        value = self.value(own, (place, Attribute("value")), name, chosen)
        self.inside_own = False
        return value if value is LEFT_OUT else PerRank(value)

    # --- tensors ---

    def info(self, name: object, place: Place) -> tuple[str, tuple[int, ...]]:
        if type(name) is not str:
            corrupt(place, "a tensor's name is a string")
        try:
            dtype, shape = self.source.info(name)
        except KeyError:
            corrupt(place, f"the files hold no tensor '{name[:200]}'")
        if dtype not in FILE_BYTES:
            corrupt(place, f"'{name[:200]}' is of dtype {dtype}, which is no dtype of a state")
        return dtype, tuple(shape)

    def parse_tensor(self, node: Node, place: Place) -> TensorNode:
        """Checks a tensor's node against itself and the files."""
        if len(node) != 4:
            corrupt(place, f"'{node[0]}' takes a dtype, a shape and a place in the files")
        tag, dtype, lengths, where = node
        shape = decode_lengths(lengths, place)
        form = None
        if type(dtype) is str:
            form = TORCH_FORMS.get(dtype) if tag != "numpy" else tensors.library("numpy").form_named(dtype)
        if form is None:
            corrupt(place, f"no dtype {str(dtype)[:80]!r} here")
        if TORCH_TAGS.get(tag, (False, False))[1] and not dtype.startswith(("float", "bfloat", "complex")):
            corrupt(place, f"a tensor of {dtype} has no gradient")
        if len(shape) > 64 or math.prod(max(length, 1) for length in shape) * form.itemsize >= 2**62:
            corrupt(place, "a shape beyond any memory")
        library: Any = tensors.library("numpy" if tag == "numpy" else self.library or "torch")
        if tag != "numpy":
            form = library.form_of_torch(form)
            if form is None:
                raise TypeError(f"{show(place)}: no numpy dtype holds torch.{dtype}")
        if type(where) is list:
            if len(where) < 2:
                corrupt(place, "a tensor is nowhere in the files")
            if where[0] == "view":
                self.check_view(where, form, shape, library, place)
            elif where[0] == "narrow":
                if form.name not in NARROWED or not shape:
                    corrupt(place, f"a tensor of {dtype} {list(shape)} is never narrow")
                self.parse_matrix(where[1], list(shape), where[2:], place)
            else:
                corrupt(place, "a tensor is nowhere in the files")
        elif (found := self.info(where, place)) != (form.file, (*shape, *form.tail)):
            expected = f"{form.file} {[*shape, *form.tail]}"
            corrupt(place, f"'{where[:200]}' is {found[0]} {list(found[1])} in the files, expected {expected}")
        return TensorNode(tag, library, form, shape, where)

    def check_view(self, where: Node, form: Form, shape: tuple[int, ...], library: Library, place: Place) -> None:
        _, name, *steps = where
        dtype, lengths = self.info(name, place)
        size = math.prod(lengths) * FILE_BYTES[dtype]
        if len(steps) != 1 + len(shape) or not all(type(step) is int and abs(step) < 2**62 for step in steps):
            corrupt(place, "a view takes an offset and a stride for each axis")
        span = span_of(steps[0], shape, tuple(steps[1:]), form.itemsize)
        if 0 in shape or span.begin < 0 or span.end > size:
            corrupt(place, f"a view of bytes [{span.begin}, {span.end}) of '{name[:200]}', which has {size}")
        if library.name == "torch" and (steps[0] < 0 or any(step < 0 or step % form.itemsize for step in steps)):
            corrupt(place, "a view with steps that torch does not have")

    def parse_matrix(self, format: Node, lengths: Node, names: Node, place: Place) -> MatrixNode:
        """Checks a matrix in a Format against the files."""
        shape = decode_lengths(lengths, place)
        if type(format) is not str or not shape or type(names) is not list:
            corrupt(place, "a narrow matrix takes a format, a shape and the names of its arrays")
        rows, cols = math.prod(shape[:-1]), shape[-1]
        try:
            parsed = Format(format)
            _native.canonical_bytes(parsed, rows, cols)
        except (ValueError, TypeError, OverflowError) as error:
            corrupt(place, str(error))
        parts = canonical_parts(parsed, rows, cols)
        given = iter(names)
        found = [None if part is None else next(given, None) for part in parts]
        if len(names) != sum(part is not None for part in parts):
            corrupt(place, f"a matrix in {parsed} has {len(names)} arrays")
        for part, name in zip(parts, found, strict=True):
            if part is not None and (seen := self.info(name, place)) != (FILE_DTYPES[part[1]], part[2]):
                expected = f"{FILE_DTYPES[part[1]]} {list(part[2])}"
                corrupt(place, f"'{name}' is {seen[0]} {list(seen[1])} in the files, expected {expected}")
        return MatrixNode(parsed, shape, found)

    def whole(self, library: Library, name: str, place: Place) -> Array:
        """The memory of a tensor of the files, which all that is made of it shares."""
        key = (library.name, name)
        if key not in self.memory:
            dtype, shape = self.info(name, place)
            size = math.prod(shape) * FILE_BYTES[dtype]
            mapped = self.source.map(name) if self.lazy else None
            if mapped is not None:
                if mapped.nbytes != size:
                    corrupt(place, f"'{name}' has {mapped.nbytes} bytes, expected {size}")
                self.memory[key] = library.borrow(mapped)
            else:
                self.memory[key] = library.allocate(size)
                if size:
                    self.requests.append(Request(name, None, self.memory[key]))
        return self.memory[key]

    def tensor(self, node: Node, place: Place) -> Array:
        # Equal nodes are one tensor: tied weights.
        key = values.dump(node)
        if key not in self.made:
            parsed = self.parse_tensor(node, place)
            array = self.array(parsed, place)
            parameter, grad = TORCH_TAGS.get(parsed.tag, (False, False))
            if parsed.library.name == "torch" and (parameter or grad):
                array = parsed.library.trained(array, parameter, grad)
            self.made[key] = array
        return self.made[key]

    def parse_own_tensor(self, node: Node, place: Place) -> tuple[str, tuple[int, ...], str]:
        """Dtype, shape and place in the files of an ng.Tensor."""
        if len(node) != 4:
            corrupt(place, f"'{OWN_TAG}' takes a dtype, a shape and a place in the files")
        _, dtype, lengths, where = node
        shape = decode_lengths(lengths, place)
        if type(dtype) is not str or dtype not in OWN_DTYPES or len(shape) > OWN_AXES:
            corrupt(place, f"no Tensor of {str(dtype)[:80]!r} with {len(shape)} axes here")
        if (found := self.info(where, place)) != (TORCH_FORMS[dtype].file, shape):
            corrupt(
                place, f"'{where[:200]}' is {found[0]} {list(found[1])} in the files, expected {dtype} {list(shape)}"
            )
        return dtype, shape, where

    def own_tensor(self, node: Node, place: Place) -> Any:
        key = values.dump(node)
        if key not in self.made:
            dtype, shape, where = self.parse_own_tensor(node, place)
            self.made[key] = tensor = _native.empty(list(shape), dtype, "cpu")
            if tensor.nbytes:
                self.requests.append(Request(where, None, tensor))
        return self.made[key]

    def array(self, node: TensorNode, place: Place) -> Array:
        library, form, shape = node.library, node.form, node.shape
        dense = dense_strides(shape, form.itemsize)
        if type(node.where) is str:
            return library.view(self.whole(library, node.where, place), form, shape, 0, dense)
        if node.where[0] == "view":
            _, name, offset, *strides = node.where
            return library.view(self.whole(library, name, place), form, shape, offset, tuple(strides))
        array = library.view(library.allocate(math.prod(shape) * form.itemsize), form, shape, 0, dense)
        matrix = self.parse_matrix(node.where[1], list(shape), node.where[2:], place)
        q = self.read_matrix(matrix, library)
        self.after.append(lambda: library.copy(array, library.dequantize(q, form)))
        return array

    def read_matrix(self, matrix: MatrixNode, library: Library, rows: tuple[int, int] | None = None) -> QTensor:
        """A QTensor whose arrays are read by finish(); rows: of its first axis, by default all."""
        shape, inner = matrix.shape, math.prod(matrix.shape[1:-1])
        if rows is not None:
            shape = (rows[1] - rows[0], *shape[1:])
        q = QTensor(matrix.format, shape, _arrays.library(library.name))
        canonical = q._new_canonical()
        for field, name, array in zip(Canonical._fields, matrix.names, canonical, strict=True):
            if name is None or not math.prod(array.shape):
                continue
            box = None
            if rows is not None and field != "global_scale":
                box = ((rows[0] * inner, rows[1] * inner), (0, array.shape[1]))
            self.requests.append(Request(name, box, library.flat(array)))
        return QTensor.from_canonical(q.format, q.shape, canonical)

    def parse_qtensor(self, node: Node, place: Place) -> tuple[str, bool, MatrixNode]:
        if len(node) != 6 or node[1] not in ("torch", "numpy") or type(node[2]) is not bool:
            corrupt(place, "'QTensor' takes a library, whether it is packed, and a matrix")
        return node[1], node[2], self.parse_matrix(node[3], node[4], node[5], place)

    def matrix(self, node: Node, place: Place) -> Any:
        key = values.dump(node)
        if key not in self.made:
            kind, packed, matrix = self.parse_qtensor(node, place)
            self.made[key] = q = self.read_matrix(matrix, tensors.library(self.library or kind))
            if packed:
                self.after.append(q.pack)
        return self.made[key]
