"""A training state filled in place from its document and the tensors of the files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

from narrowgauge import _native
from narrowgauge._arrays import Array, is_torch
from narrowgauge.checkpoint import tensors, values
from narrowgauge.checkpoint.decode import LEFT_OUT, MAPPINGS, SEQUENCES, Reader, Request, Source, TensorNode
from narrowgauge.checkpoint.shards import Box, dtensor_type, part_of
from narrowgauge.checkpoint.state import PerRank
from narrowgauge.checkpoint.tensors import OWN_TAG, TORCH_TAGS, dense_strides
from narrowgauge.checkpoint.values import ROOT, Attribute, Node, Place, decode_value, show
from narrowgauge.qtensor import QTensor


def restore(document: str, source: Source, into: Any, *, patterns: Iterable[str] | None = None, rank: int = 0) -> Any:
    """Fills `into` with the state that was encoded, or with what `patterns` pick of it, and returns it.

    Tensors are filled where they are, DTensors (FSDP2's) with the part that is here, by whatever placements. Values are
    replaced in the dicts and lists that hold them; a tuple that holds one is made anew. Both states must have the same
    containers, keys and lengths, save where neither holds a tensor: a list of losses may have grown.

    ValueError with the place, the checkpoint's value and the state's, before anything is changed, if they differ. An
    error of reading comes later: some tensors are then filled, others not.
    """
    restorer = _Restorer(document, source, patterns, rank)
    if restorer.patterns is not None and not restorer.picks(restorer.tree, ""):
        raise ValueError(f"no part of the checkpoint's state matches {restorer.patterns}")
    state = restorer.into(restorer.tree, into, ROOT, "", restorer.patterns is None)
    restorer.check_targets()
    restorer.finish()
    return state


class _Restorer(Reader):
    def __init__(self, document: str, source: Source, patterns: Iterable[str] | None, rank: int) -> None:
        super().__init__(document, source, patterns, rank)
        # The dense memory that is filled: (begin, end, of what tensor in the files, where in the state).
        self.targets: list[tuple[int, int, str, Place]] = []
        self.filled: set[Any] = set()

    def picks(self, node: Node, name: str, place: Place = ROOT) -> bool:
        """Whether patterns pick a node or a part of it."""
        if self.chosen(name):
            return True
        tag = values.tag_of(node, place)
        prefix = f"{name}." if name else ""
        if tag in MAPPINGS:
            return any(self.picks(child, f"{prefix}{key}", (place, key)) for key, child in self.pairs(node, place))
        if tag in SEQUENCES:
            return any(self.picks(child, f"{prefix}{at}", (place, at)) for at, child in enumerate(node[1:]))
        if tag == "PerRank" and (own := self.own_node(node, place)) is not LEFT_OUT:
            self.inside_own = True
            picked = self.picks(own, name, (place, Attribute("value")))
            self.inside_own = False
            return picked
        return False

    def into(self, node: Node, target: Any, place: Place, name: str, chosen: bool) -> Any:
        """What belongs in the place of `target`: itself wherever it can be filled."""
        chosen = chosen or self.chosen(name)
        if not chosen and not self.picks(node, name, place):
            return target
        tag = values.tag_of(node, place)
        if tag in MAPPINGS:
            return self.into_mapping(node, target, place, name, chosen)
        if tag in SEQUENCES:
            return self.into_sequence(node, target, place, name, chosen)
        if tag == "PerRank":
            return self.into_own(node, target, place, name, chosen)
        if tag == "QTensor":
            return self.into_matrix(node, target, place)
        if tag == OWN_TAG:
            return self.into_own_tensor(node, target, place)
        if _is_tensor_node(node):
            return self.into_tensor(node, target, place)
        if type(target) in _CONTAINERS or _holds_tensors(target):
            _mismatch(place, values.word(node), _kind(target))
        return decode_value(node, place)

    def into_mapping(self, node: Node, target: Any, place: Place, name: str, chosen: bool) -> Any:
        if type(target) is not MAPPINGS[node[0]]:
            _mismatch(place, f"a {node[0]}", _kind(target))
        prefix = f"{name}." if name else ""
        children = {
            key: child
            for key, child in self.pairs(node, place)
            if chosen or self.picks(child, f"{prefix}{key}", (place, key))
        }
        if missing := [key for key in children if key not in target]:
            if self.replaceable(node, target, chosen):
                return self.replace_mapping(node, target, place)
            _mismatch(place, f"the key {_some(missing)}", "none of that name")
        if chosen and (more := [key for key in target if key not in children]):
            if self.replaceable(node, target, chosen):
                return self.replace_mapping(node, target, place)
            _mismatch(place, "none of that name", f"the key {_some(more)}")
        for key, child in children.items():
            item = self.into(child, target[key], (place, key), f"{prefix}{key}", chosen)
            if item is not target[key]:
                self.after.append(partial(target.__setitem__, key, item))
        if node[0] == "OrderedDict" and chosen and node[1] is not None:
            inside = (place, Attribute("_metadata"))
            self.after.append(partial(setattr, target, "_metadata", self.value(node[1], inside, name, True)))
        return target

    def replaceable(self, node: Node, target: Any, chosen: bool) -> bool:
        return chosen and not _node_holds_tensors(node) and not _holds_tensors(target)

    def replace_mapping(self, node: Node, target: Any, place: Place) -> Any:
        new = self.value(node, place, "", True)

        def replace() -> None:
            target.clear()
            dict.update(target, new)

        self.after.append(replace)
        return target

    def into_sequence(self, node: Node, target: Any, place: Place, name: str, chosen: bool) -> Any:
        if type(target) is not SEQUENCES[node[0]]:
            _mismatch(place, f"a {node[0]}", _kind(target))
        if len(target) != len(node) - 1:
            if not self.replaceable(node, target, chosen):
                _mismatch(place, f"{len(node) - 1} items", f"{len(target)}")
            new = self.value(node, place, name, True)
            if type(target) is tuple:
                return new
            self.after.append(partial(target.__setitem__, slice(None), new))
            return target
        prefix = f"{name}." if name else ""
        items = [
            self.into(child, target[at], (place, at), f"{prefix}{at}", chosen) for at, child in enumerate(node[1:])
        ]
        if all(new is old for new, old in zip(items, target, strict=True)):
            return target
        if type(target) is tuple:
            return tuple(items)
        self.after.append(partial(target.__setitem__, slice(None), items))
        return target

    def into_own(self, node: Node, target: Any, place: Place, name: str, chosen: bool) -> Any:
        if type(target) is not PerRank:
            _mismatch(place, "a PerRank", _kind(target))
        own = self.own_node(node, place)
        if own is LEFT_OUT:
            return target
        self.inside_own = True
        value = self.into(own, target.value, (place, Attribute("value")), name, chosen)
        self.inside_own = False
        if value is not target.value:
            self.after.append(partial(setattr, target, "value", value))
        return target

    # --- tensors ---

    def into_tensor(self, node: Node, target: Any, place: Place) -> Any:
        parsed = self.parse_tensor(node, place)
        library, form, shape = parsed.library, parsed.form, parsed.shape
        has = f"a {library.name} tensor of {node[1]} {list(shape)}"
        if library.name == "torch":
            if not is_torch(target):
                _mismatch(place, has, _kind(target))
            if target.device.type not in ("cpu", "cuda") or target.layout is not library.torch.strided:
                raise ValueError(
                    f"{show(place)} is {target.layout} on {target.device}, expected strided on cpu or cuda"
                )
        elif type(target) is not library.numpy.ndarray:
            _mismatch(place, has, _kind(target))
        elif not target.flags.writeable:
            raise ValueError(f"{show(place)} is a read-only array")
        if library.form(target.dtype) != form or tuple(target.shape) != shape:
            _mismatch(place, has, f"one of {str(target.dtype).removeprefix('torch.')} {list(target.shape)}")
        local, box = target, None
        kind = dtensor_type()
        if kind is not None and isinstance(target, kind):
            local, box, _ = part_of(target, place)
        if math.prod(tuple(local.shape)):
            self.fill(parsed, local, box, place)
        return target

    def into_own_tensor(self, node: Node, target: Any, place: Place) -> Any:
        dtype, shape, where = self.parse_own_tensor(node, place)
        has = f"a Tensor of {dtype} {list(shape)}"
        if type(target) is not _native.Tensor:
            _mismatch(place, has, _kind(target))
        if (target.dtype, target.shape) != (dtype, shape):
            _mismatch(place, has, f"one of {target.dtype} {list(target.shape)}")
        if target.read_only or not target.is_contiguous():
            raise ValueError(f"{show(place)} is a read-only Tensor or not dense, expected one that can be filled")
        if target.nbytes and target.device == "cpu":
            begin = target.data_ptr()
            self.targets.append((begin, begin + target.nbytes, where, place))
            self.requests.append(Request(where, None, target))
        elif target.nbytes:
            staging = _native.empty(list(shape), dtype, "cpu")
            self.requests.append(Request(where, None, staging))
            self.after.append(partial(target.copy_from, staging))
        return target

    def fill(self, node: TensorNode, local: Array, box: Box | None, place: Place) -> None:
        """Fills `local` with a box of a tensor."""
        library, form, where = node.library, node.form, node.where
        if type(where) is str and local.nbytes > (span := library.span(local)).end - span.begin:
            raise ValueError(f"{show(place)} overlaps itself in the state, but not in the checkpoint")
        direct = library.is_dense(local) and library.is_plain(local) and not (is_torch(local) and local.is_cuda)
        if direct:
            begin, end = library.span(local)
            self.targets.append(
                (begin, end, where if type(where) is str else where[-1 if where[0] == "narrow" else 1], place)
            )
            how = (begin, end, values.dump(where))
            if how in self.filled:
                return
            self.filled.add(how)
        if type(where) is str:
            size = math.prod(tuple(local.shape)) * form.itemsize
            memory = library.flat(local) if direct else library.allocate(size)
            if box is not None:
                box = (*box, *((0, length) for length in form.tail))
            self.requests.append(Request(where, box, memory))
            if direct:
                self.after.append(partial(library.changed, local))
                return
            array = library.view(memory, form, tuple(local.shape), 0, dense_strides(tuple(local.shape), form.itemsize))
            self.after.append(partial(library.copy, local, array))
        elif where[0] == "view":
            array = self.array(node, place)
            if box is not None:
                array = array[tuple(slice(*bounds) for bounds in box)]
            self.after.append(partial(library.copy, local, array))
        else:
            matrix = self.parse_matrix(where[1], list(node.shape), where[2:], place)
            # Whole rows are read, and then cut.
            rows = box[0] if box is not None and len(box) > 1 else None
            q = self.read_matrix(matrix, library, rows)

            def narrow() -> None:
                array = library.dequantize(q, form)
                if box is not None:
                    cut = [slice(*bounds) for bounds in box]
                    array = array[(slice(None), *cut[1:]) if rows is not None else tuple(cut)]
                library.copy(local, array)

            self.after.append(narrow)

    def into_matrix(self, node: Node, target: Any, place: Place) -> Any:
        _, _, matrix = self.parse_qtensor(node, place)
        has = f"a QTensor of {matrix.format} {list(matrix.shape)}"
        if type(target) is not QTensor:
            _mismatch(place, has, _kind(target))
        if target.format != matrix.format or target.shape != matrix.shape:
            _mismatch(place, has, f"one of {target.format} {list(target.shape)}")
        codes = target.packed if target.is_packed else target.codes
        q = self.read_matrix(matrix, tensors.library("torch" if is_torch(codes) else "numpy"))
        self.after.append(partial(target.assign, q))
        return target

    def check_targets(self) -> None:
        """Refuses memory that would be filled with two different tensors."""
        self.targets.sort(key=lambda target: target[:2])
        for (_, end, what, place), (begin, _, other, at) in zip(self.targets, self.targets[1:], strict=False):
            if begin < end and what != other:
                raise ValueError(
                    f"{show(place)} and {show(at)} share memory in the state, but are two tensors in the checkpoint, "
                    f"'{what}' and '{other}'"
                )


# Of a state, where values and tensors are told apart by what is in them.
_CONTAINERS = (*MAPPINGS.values(), *SEQUENCES.values(), PerRank)


def _is_tensor_node(node: Node) -> bool:
    tag = values.tag_of(node, ROOT)
    return tag in TORCH_TAGS or tag == OWN_TAG or (tag == "numpy" and len(node) == 4)


def _node_holds_tensors(node: Node) -> bool:
    if _is_tensor_node(node):
        return True
    tag = node[0] if type(node) is list else ""
    children = node[1:] if tag in MAPPINGS or tag in SEQUENCES else ()
    return tag in ("QTensor", "PerRank") or any(map(_node_holds_tensors, children))


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    kind = type(value)
    if kind not in _CONTAINERS:
        return is_torch(value) or kind is QTensor or hasattr(kind, "__dlpack__")
    if kind is PerRank or depth > values.MAX_DEPTH:
        return True
    return any(_holds_tensors(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value))


def _mismatch(place: Place, stored: str, here: str) -> NoReturn:
    raise ValueError(f"{show(place)}: the checkpoint has {stored}, the state to be filled has {here}")


def _kind(value: Any) -> str:
    kind = type(value)
    if kind in _CONTAINERS and kind is not PerRank:
        return f"a {kind.__name__} of {len(value)}"
    if is_torch(value) or kind is QTensor or hasattr(value, "dtype"):
        dtype = getattr(value, "dtype", None) or value.format
        return f"a {kind.__name__} of {str(dtype).removeprefix('torch.')} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _some(keys: Sequence[Any]) -> str:
    text = ", ".join(repr(key)[:80] for key in keys[:4])
    return text if len(keys) <= 4 else f"{text}, ... ({len(keys)} keys)"
