"""A training state taken apart: the tensors that a checkpoint stores, and the tree of everything else.

encode() reads nothing but addresses and sizes: no byte of a tensor is copied, save where a file can only hold it in
another form (conjugates, packed or narrowed matrices, some numpy dtypes). What is written is what the tensors hold
when the writer reads them.

Tensors that are one in memory are stored once and come back as one: the same view twice (tied weights) is one tensor,
and views whose byte ranges overlap become views of one storage again. Views that do not overlap come apart, each
stored with its own elements only. Lists and dicts that occur twice come back as two. Layouts are not kept (see
tensors.py), nor hooks, gradients and other attributes of a tensor but requires_grad and being a Parameter.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from narrowgauge._arrays import FLOATS, Array, is_torch
from narrowgauge._native import Format, Tensor
from narrowgauge._patterns import matches
from narrowgauge.checkpoint.shards import Box, Part, dtensor_type, part_of
from narrowgauge.checkpoint.sharing import Held, overlapping
from narrowgauge.checkpoint.tensors import OWN_TAG, TORCH_FORMS, TORCH_TAGS, Form, Library, library
from narrowgauge.checkpoint.values import ROOT, Attribute, Node, Place, check_depth, encode_value, show
from narrowgauge.qtensor import FILE_DTYPES, Canonical, QTensor, canonical_parts, quantize

_RESERVED = re.compile(r"rank\d+\.|__metadata__$")
_NAME_LENGTH = 512


@dataclass
class PerRank:
    """Marks a part of a state that each rank has for itself, such as the state of its random numbers.

    Everything else must be the same on all ranks: tensors there are the replicas of one, of which any rank may write
    a part. Loading gives the PerRank of the same rank. On a rank that the checkpoint does not know it is an error,
    unless the state is restored in place: then the value there stays.
    """

    value: Any


@dataclass(slots=True)
class Stored:
    """A tensor of a file, and the part of it that this rank holds."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]  # of the whole tensor
    box: Box | None  # the part that is here: (begin, end) per axis; None: all of it
    array: Array  # that part, perhaps not dense; uint8 where DLPack has no such dtype, or numpy's uint16
    sources: tuple[Array, ...]  # the state's tensors whose memory `array` is; none where encode made it


@dataclass
class Encoded:
    tree: Node  # the same on every rank
    own: list[Node]  # what PerRank marks on this one, in order
    tensors: list[Stored]  # those of `own` last
    common: int  # how many are not of `own`


def encode(state: Any, formats: Mapping[str, Format | str] | None = None, rank: int = 0) -> Encoded:
    """Takes `state` apart.

    formats: {pattern: Format} for float tensors to be stored narrow, by name or its last parts, first match first.
    They come back in their own dtype. Only float32, float16 and bfloat16 are narrowed, by rows of the last axis, so
    not 0-d tensors, nor those that are sharded along it; nor does a sharded tensor take a format with a global scale.

    TypeError or ValueError, with the place, for what cannot be stored.
    """
    encoder = _Encoder(formats or {})
    tree = encoder.value(state, "", ROOT, 0)
    encoder.settle()
    common = len(encoder.tensors)
    own = encoder.encode_own(rank)
    return Encoded(tree, own, encoder.tensors, common)


_TAGS = {flags: tag for tag, flags in TORCH_TAGS.items()}
# The dtypes that quantize takes, as torch and as numpy name them.
NARROWED = (*FLOATS, "<f4", "<f2")


class _Encoder:
    """One walk over a state, which makes the nodes and the tensors; settle() then finds those that share memory."""

    def __init__(self, formats: Mapping[str, Format | str]) -> None:
        self.formats = [(pattern, Format(format)) for pattern, format in formats.items()]
        self.tensors: list[Stored] = []
        self.names: dict[str, int] = {}  # a name: how many wanted it
        self.prefix = ""
        self.own: list[tuple[str, Place, PerRank]] = []
        self.active: set[int] = set()  # the containers around the walk
        self.seen: dict[Any, Held] = {}  # {memory and how it is seen: what holds it}
        self.held: dict[Library, list[Held]] = {}
        self.matrices: dict[int, Node] = {}
        # Functions, not methods: an encoder in a cycle would keep the state's tensors until the collector runs.
        encoder = type(self)
        self.handlers: dict[type, Callable[[_Encoder, Any, str, Place, int], Node]] = {
            dict: encoder.mapping,
            OrderedDict: encoder.ordered,
            Counter: encoder.mapping,
            list: encoder.sequence,
            tuple: encoder.sequence,
            QTensor: encoder.matrix,
            Tensor: encoder.own_tensor,
            PerRank: encoder.per_rank,
        }
        if sys.modules.get("numpy") is not None:
            self.numpy = library("numpy")
            self.held[self.numpy] = []
            self.handlers[self.numpy.numpy.ndarray] = encoder.numpy_array
        if sys.modules.get("torch") is not None:
            self.torch = library("torch")
            self.held[self.torch] = []
            self.strided, self.parameter = self.torch.torch.strided, self.torch.torch.nn.Parameter
            self.handlers[self.torch.torch.Tensor] = self.handlers[self.parameter] = encoder.torch_tensor
            if (dtensor := dtensor_type()) is not None:
                self.handlers[dtensor] = encoder.dtensor

    # --- containers ---

    def value(self, value: Any, name: str, place: Place, depth: int) -> Node:
        handler = self.handlers.get(type(value))
        return encode_value(value, place, depth) if handler is None else handler(self, value, name, place, depth)

    def enter(self, value: Any, place: Place, depth: int) -> None:
        if id(value) in self.active:
            raise ValueError(f"{show(place)} contains itself")
        check_depth(place, depth)
        self.active.add(id(value))

    def mapping(self, value: dict[Any, Any], name: str, place: Place, depth: int) -> Node:
        node: list[Node] = [type(value).__name__]
        depth += 1
        self.enter(value, place, depth)
        prefix = f"{name}." if name else ""
        for key, item in value.items():
            inside = (place, key)
            node.append(key if type(key) is str and key.isascii() else encode_value(key, inside, depth))
            node.append(self.value(item, f"{prefix}{key}", inside, depth))
        self.active.discard(id(value))
        return node

    def ordered(self, value: OrderedDict[Any, Any], name: str, place: Place, depth: int) -> Node:
        metadata: Node = None
        check_depth(place, depth + 1)
        for attribute, item in vars(value).items():
            if attribute != "_metadata":  # torch's: the versions of the modules of a state_dict
                raise TypeError(
                    f"{show(place)} has an attribute '{attribute}', which cannot be stored; give a dict(...)"
                )
            metadata = self.value(item, f"{name}._metadata", (place, Attribute(attribute)), depth + 1)
        node = self.mapping(value, name, place, depth)
        return [node[0], metadata, *node[1:]]

    def sequence(self, value: Any, name: str, place: Place, depth: int) -> Node:
        node: list[Node] = [type(value).__name__]
        depth += 1
        self.enter(value, place, depth)
        prefix = f"{name}." if name else ""
        for index, item in enumerate(value):
            node.append(self.value(item, f"{prefix}{index}", (place, index), depth))
        self.active.discard(id(value))
        return node

    def per_rank(self, value: PerRank, name: str, place: Place, depth: int) -> Node:
        if self.prefix:
            raise ValueError(f"{show(place)} is a PerRank inside a PerRank")
        self.own.append((name, place, value))
        return ["PerRank", len(self.own) - 1]

    def encode_own(self, rank: int) -> list[Node]:
        self.prefix = f"rank{rank}."
        self.seen, self.matrices = {}, {}  # the common tree must not refer to these tensors
        own = [self.value(each.value, name, (place, Attribute("value")), 0) for name, place, each in self.own]
        self.settle()
        return own

    # --- tensors ---

    def reserve(self, name: str) -> str:
        """A name that no other tensor of any rank's files has."""
        name = name or "state"
        if len(name) > _NAME_LENGTH or not name.isascii():
            name = name[:_NAME_LENGTH].encode("utf-8", "backslashreplace").decode()
        # Names that are not a tensor's own: the parts of a cut one, those of PerRank, safetensors' metadata.
        if "@" in name or (not self.prefix and name.startswith(("rank", "__")) and _RESERVED.match(name)):
            name += "~"
        name = self.prefix + name
        if name not in self.names:
            self.names[name] = 1
            return name
        count = self.names[name] + 1
        while (unique := f"{name}~{count}") in self.names:
            count += 1
        self.names[name], self.names[unique] = count, 1
        return unique

    def torch_tensor(self, value: Any, name: str, place: Place, depth: int) -> Node:
        form = self.torch.forms.get(value.dtype)
        if form is None or not (value.is_cpu or value.is_cuda) or value.layout is not self.strided or value.is_nested:
            self.refuse(value, place)
        grad = value.requires_grad
        array = value.detach() if grad else value
        sources: tuple[Array, ...] = (value,)
        if value.is_neg() or (form.name.startswith("c") and value.is_conj()):
            array, sources = array.resolve_conj().resolve_neg(), ()
        shape = [*value.shape]
        node: Node = [_TAGS[type(value) is self.parameter, grad], form.name, shape, None]
        begin = end = array.data_ptr()
        how: Any = id(value)
        if dense := array.is_contiguous():
            if nbytes := array.nbytes:
                end, how = begin + nbytes, (begin, form.name, *shape)
        elif array.numel():
            begin, end = self.torch.span(array)
            how = (begin, form.name, *shape, array.stride())
        return self.keep(self.torch, array, form, node, how, begin, end, dense, sources, name, place)

    def own_tensor(self, value: Tensor, name: str, place: Place, depth: int) -> Node:
        """Stored as it is, never narrowed; one that is there twice is stored once."""
        form = TORCH_FORMS[value.dtype]
        how = ("Tensor", value.device, value.data_ptr(), form.name, value.shape) if value.nbytes else id(value)
        if (held := self.seen.get(how)) is None:
            stored = Stored(self.reserve(name), form.file, value.shape, None, value, (value,))
            self.tensors.append(stored)
            node = [OWN_TAG, form.name, [*value.shape], stored.name]
            held = self.seen[how] = Held(0, 0, True, len(self.seen), value, form, place, [node], stored)
        return held.nodes[0]

    def numpy_array(self, value: Any, name: str, place: Place, depth: int) -> Node:
        form = self.numpy.form(value.dtype)
        if form is None:
            hint = "give each field" if value.dtype.names else "give an array of numbers, or a list"
            raise TypeError(f"{show(place)}: an array of {value.dtype} cannot be stored in a checkpoint; {hint}")
        node = ["numpy", form.name, [*value.shape], None]
        # Made dense by a copy where its elements are taken apart.
        sources = () if form.tail and not value.flags.c_contiguous else (value,)
        begin, end = self.numpy.span(value) if value.size else (0, 0)
        how: Any = (begin, form.name, value.shape, value.strides, self.numpy.start(value)) if value.size else id(value)
        return self.keep(self.numpy, value, form, node, how, begin, end, value.flags.c_contiguous, sources, name, place)

    def dtensor(self, value: Any, name: str, place: Place, depth: int) -> Node:
        if self.prefix:
            raise ValueError(f"{show(place)} is a DTensor inside a PerRank, but all ranks hold parts of it")
        part = part_of(value, place)
        local = part.array
        form = self.torch.forms.get(local.dtype)
        if form is None or not (local.is_cpu or local.is_cuda) or local.layout is not self.strided:
            self.refuse(local, place)
        tag = _TAGS[isinstance(value, self.parameter), value.requires_grad]
        node = [tag, form.name, [*value.shape], None]
        # Not by address: the parts of other ranks may be empty, and the trees of all must be the same.
        storage = local.untyped_storage()._cdata
        how = (storage, local.storage_offset(), form.name, value.shape, value.placements)
        array = local.detach().resolve_conj().resolve_neg()
        sources = (local,) if array.data_ptr() == local.data_ptr() else ()
        return self.keep(self.torch, array, form, node, how, 0, 0, True, sources, name, place, part)

    def keep(
        self,
        library: Library,
        array: Array,
        form: Form,
        node: Node,
        how: Any,
        begin: int,
        end: int,
        dense: bool,
        sources: tuple[Array, ...],
        name: str,
        place: Place,
        part: Part | None = None,
    ) -> Node:
        """Says in `node` where the data is, which is stored unless it was already seen this way (`how`)."""
        format = None
        if self.formats:
            format = self.format_of(name, node, part)
            how = (how, format)
        if (held := self.seen.get(how)) is not None:
            held.nodes.append(node)
            node[-1] = held.nodes[0][-1]
            if held.stored is not None:
                held.stored.sources += sources
            return node
        stored = None
        if format is not None:
            node[-1] = self.narrow(array, format, node, name, place, part)
        else:
            node[-1] = name = self.reserve(name)
            shape, box = tuple(node[2]) + form.tail, None
            if part is not None and part.box is not None:
                box = (*part.box, *((0, length) for length in form.tail))
            bare = library.stored(array, form) if form.indirect else array
            stored = Stored(name, form.file, shape, box, bare, sources)
            self.tensors.append(stored)
        held = Held(begin, end, dense, len(self.seen), array, form, place, [node], stored)
        self.seen[how] = held
        if begin < end:
            self.held[library].append(held)
        return node

    def refuse(self, value: Any, place: Place) -> NoReturn:
        if value.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{show(place)} is on device {value.device}, expected cpu or cuda")
        kind, hint = f"of {value.dtype}", "give it in another dtype"
        if value.is_quantized:
            hint = "give its int_repr() and its scales"
        elif value.is_nested or value.layout is not self.strided:
            kind, hint = "that is nested", "give its parts"
            if not value.is_nested:
                kind, hint = f"of layout {value.layout}", "give its indices and values, or its to_dense()"
        raise TypeError(f"{show(place)}: a tensor {kind} cannot be stored in a checkpoint; {hint}")

    # --- matrices in a Format ---

    def matrix(self, value: QTensor, name: str, place: Place, depth: int) -> Node:
        if (node := self.matrices.get(id(value))) is None:
            here = value.to("cpu")
            canonical = here.canonical()
            kind = "torch" if is_torch(canonical.codes) else "numpy"
            parts = self.add_matrix(here, canonical, name, new=value.is_packed or here is not value)
            node = ["QTensor", kind, value.is_packed, str(value.format), [*value.shape], parts]
            self.matrices[id(value)] = node
        return node

    def format_of(self, name: str, node: Node, part: Part | None) -> Format | None:
        """The format that a tensor is narrowed to; the same on every rank."""
        _, dtype, shape, _ = node
        if dtype not in NARROWED or not shape:
            return None
        format = next((format for pattern, format in self.formats if matches(pattern, name)), None)
        if format is None or part is None or not part.axes:
            return format
        return format if part.axes == {0} and len(shape) > 1 and not format.has_global_scale else None

    def narrow(self, array: Array, format: Format, node: Node, name: str, place: Place, part: Part | None) -> Node:
        try:
            q = quantize(array, format)
        except ValueError as error:
            raise ValueError(f"{show(place)} cannot be stored as {format}: {error}") from None
        rows = None
        if part is not None and part.axes:
            shape = node[2]
            inner = math.prod(shape[1:-1])
            begin, end = part.box[0] if part.box is not None else (0, shape[0])
            rows = (begin * inner, end * inner, shape[0] * inner)
        return ["narrow", str(format), *self.add_matrix(q, q.canonical(), name, rows)]

    def add_matrix(
        self,
        q: QTensor,
        canonical: Canonical,
        name: str,
        rows: tuple[int, int, int] | None = None,
        new: bool = True,
    ) -> list[str]:
        """Stores the canonical arrays and gives their names. rows: (begin, end, of how many), if not all are here;
        new: the arrays are not the state's."""
        names = []
        for part, array in zip(canonical_parts(q.format, q.rows, q.cols), canonical, strict=True):
            if part is None or array is None:
                continue
            source = library("torch" if is_torch(array) else "numpy")
            names.append(self.reserve(f"{name or 'state'}.{part[0]}"))
            bare = source.stored(array, source.form(array.dtype))
            shape, box = part[2], None
            if rows is not None:
                shape, box = (rows[2], shape[1]), (rows[:2], (0, shape[1]))
            sources = () if new else (array,)
            self.tensors.append(Stored(names[-1], FILE_DTYPES[part[1]], shape, box, bare, sources))
        return names

    # --- shared memory ---

    def settle(self) -> None:
        """Stores once what lies in the same memory."""
        dropped: set[int] = set()
        for source, everything in self.held.items():
            for group in overlapping(everything):
                base = self.join(source, group)
                dropped.update(id(held.stored) for held in group if held.stored is not base)
            everything.clear()
        if dropped:
            self.tensors = [stored for stored in self.tensors if id(stored) not in dropped]

    def join(self, source: Library, group: list[Held]) -> Stored:
        """Makes the tensors of a group views of one that is stored: of one of them if it spans all."""
        first = group[0]
        begin, end = min(held.begin for held in group), max(held.end for held in group)
        for held in group:
            if held.stored is None:
                other = next((show(each.place) for each in group if each is not held), "itself")
                raise ValueError(f"{show(held.place)} shares memory with {other}: it cannot be narrowed alone")
        whole = [held for held in group if held.dense and held.end - held.begin == end - begin]
        if whole:
            base: Stored = whole[0].stored
        elif source.name == "torch" and first.array.is_cuda:
            raise ValueError(
                f"{show(first.place)} and {show(group[-1].place)} share memory on a GPU, and neither is all of it; "
                "give the tensor that they are views of too, or copies"
            )
        else:
            flat = source.view_memory(begin, end, [held.array for held in group])
            form = first.form
            starts = [source.start(held.array) - begin for held in group]
            if any(held.form != form for held in group) or any(n % form.itemsize for n in (*starts, end - begin)):
                form = source.bytes_form
            length = (end - begin) // form.itemsize
            array = source.view(flat, form, (length,), 0, (form.itemsize,))
            name = self.reserve(f"{first.stored.name.removeprefix(self.prefix)}.memory")
            base = Stored(name, form.file, (length, *form.tail), None, source.stored(array, form), ())
            self.tensors.append(base)
        base.sources = tuple(tensor for held in group for tensor in held.stored.sources or (held.array,))
        for held in group:
            if held.stored is base:
                continue
            offset = source.start(held.array) - begin
            if offset % held.form.itemsize and source.name == "torch":
                others = next(each.place for each in group if each is not held)
                raise ValueError(
                    f"{show(held.place)}, of {held.form.name}, begins {offset} bytes into the memory that it shares "
                    f"with {show(others)}: no storage of torch could hold both"
                )
            for node in held.nodes:
                node[-1] = ["view", base.name, offset, *source.strides(held.array)]
        return base
