"""The values of a state that are not tensors, as nodes of its tree, and back with the same type and value.

A node is None, a bool, an int of at most 2**53, a finite float or a str as JSON has them, or a list whose first entry
is a tag: ["tuple", 1, 2], ["float", "7ff8000000000000"]. Every nesting of the state nests the tree once, so that a
reader with a limit on depth can be sure of it. There is no object, no class name that is looked up, no pickle.

Decoding treats a tree as hostile: what encoding would not have written is FileCorrupt with the place.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from narrowgauge import _arrays
from narrowgauge.checkpoint.tensors import OWN_TAG, TORCH_TAGS, numpy_dtype, numpy_dtype_name
from narrowgauge.errors import FileCorrupt

Node = Any

# Where in a state something is: (the place of what holds it, its key), () for the state itself.
Place = tuple[Any, ...]
ROOT: Place = ()

# Containers in containers. A tree with its document around it and a tensor's node at the bottom stays within the 64
# levels of the strict JSON reader.
MAX_DEPTH = 60

_EXACT = 2**53


class Attribute(str):
    """A key of a Place that is an attribute."""


def show(place: Place) -> str:
    """state['optimizer']['state'][0]"""
    steps = []
    while place:
        place, key = place
        if isinstance(key, Attribute):
            steps.append(f".{key}")
            continue
        text = repr(key)
        steps.append(f"[{text if len(text) <= 80 else text[:80] + '...'}]")
    return "state" + "".join(reversed(steps))


def corrupt(place: Place, problem: str) -> NoReturn:
    raise FileCorrupt(f"the tree of the checkpoint's state is not sound at {show(place)}: {problem}")


def cannot_store(place: Place, value: object, hint: str = "") -> NoReturn:
    kind = type(value)
    if not hint:
        if callable(getattr(kind, "state_dict", None)):
            hint = "give its state_dict()"
        elif isinstance(value, tuple):
            hint = "give a tuple(...) or a dict"
        elif isinstance(value, dict):
            hint = "give a dict(...)"
        elif hasattr(kind, "__array__") or hasattr(kind, "__dlpack__"):
            hint = "give a numpy.asarray(...) or a torch tensor"
        else:
            hint = "give numbers, strings, bytes, dicts, lists, tuples and tensors"
    name = f"<class '{kind.__module__}.{kind.__qualname__}'>"
    raise TypeError(f"{show(place)}: {name} cannot be stored in a checkpoint; {hint}")


def check_depth(place: Place, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"{show(place)} is nested deeper than {MAX_DEPTH} levels")


# --- encoding ---------------------------------------------------------------------------------------------------


def encode_str(value: str) -> Node:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # lone surrogates, which JSON would join or refuse
            return ["str", _base64(value.encode("utf-8", "surrogatepass"))]
    return value


def _encode_int(value: int) -> Node:
    # Hexadecimal: decimals of that length are slow, and limited by Python.
    return value if -_EXACT <= value <= _EXACT else ["int", hex(value)]


def _encode_float(value: float) -> Node:
    return value if math.isfinite(value) else ["float", struct.pack(">d", value).hex()]


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()


def _itself(value: Any) -> Node:
    return value


_ENCODERS: dict[type, Callable[[Any], Node]] = {
    type(None): _itself,
    bool: _itself,
    int: _encode_int,
    float: _encode_float,
    str: encode_str,
    complex: lambda value: ["complex", _encode_float(value.real), _encode_float(value.imag)],
    bytes: lambda value: ["bytes", _base64(value)],
    bytearray: lambda value: ["bytearray", _base64(value)],
}


def encode_value(value: object, place: Place, depth: int = 0) -> Node:
    """The node of anything but lists, dicts and tensors. TypeError or ValueError, with the place, if there is none."""
    encoder = _ENCODERS.get(type(value))
    if encoder is not None:
        return encoder(value)
    kind = type(value)
    if kind is tuple:
        return _encode_items("tuple", value, place, depth)  # type: ignore[arg-type]
    if kind is set or kind is frozenset:
        node = _encode_items(kind.__name__, value, place, depth)  # type: ignore[arg-type]
        # The order of a set is its own affair, and not the same in two processes.
        return [node[0], *sorted(node[1:], key=json.dumps)]
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None:
        if kind is torch.Size:
            return ["torch.Size", *value]  # type: ignore[misc]
        if kind is torch.dtype:
            return ["torch.dtype", str(value).removeprefix("torch.")]
        if kind is torch.device:
            return ["torch.device", str(value)]
    if numpy is not None and isinstance(value, (numpy.generic, numpy.dtype)):
        return _encode_numpy(numpy, value, place)
    cannot_store(place, value)


def _encode_items(tag: str, items: Iterable[object], place: Place, depth: int) -> Node:
    check_depth(place, depth + 1)
    return [tag, *(encode_value(item, (place, index), depth + 1) for index, item in enumerate(items))]


def _encode_numpy(numpy: Any, value: Any, place: Place) -> Node:
    kind = type(value)
    if kind is numpy.str_:
        return ["numpy.str", encode_str("".join((value,)))]  # str() would drop zeros at the end
    if kind is numpy.bytes_:
        return ["numpy.bytes", _base64(b"".join((value,)))]
    dtype = value if isinstance(value, numpy.dtype) else value.dtype
    name = numpy_dtype_name(dtype)
    if name is None:
        cannot_store(place, value, f"numpy's {dtype} has no place in a file")
    if value is dtype:
        return ["numpy.dtype", name]
    if kind is not dtype.type:
        cannot_store(place, value)
    return ["numpy", name, _base64(value.tobytes())]


# --- decoding ---------------------------------------------------------------------------------------------------


def argument(node: Node, place: Place) -> str:
    if len(node) != 2 or type(node[1]) is not str:
        corrupt(place, f"'{node[0]}' takes one string")
    return node[1]


def _unbase64(node: Node, place: Place) -> bytes:
    try:
        return base64.b64decode(argument(node, place), validate=True)
    except (binascii.Error, ValueError):
        corrupt(place, f"'{node[0]}' is not base64")


def _decode_surrogates(node: Node, place: Place) -> str:
    try:
        return _unbase64(node, place).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        corrupt(place, "'str' is not UTF-8")


def _decode_int(node: Node, place: Place) -> int:
    text = argument(node, place)
    if not re.fullmatch(r"-?0x[0-9a-f]+", text):
        corrupt(place, "'int' is not hexadecimal")
    return int(text, 16)


def _decode_float(node: Node, place: Place) -> float:
    text = argument(node, place)
    if not re.fullmatch(r"[0-9a-f]{16}", text):
        corrupt(place, "'float' is not 16 hexadecimal digits")
    return float(struct.unpack(">d", bytes.fromhex(text))[0])


def _decode_complex(node: Node, place: Place) -> complex:
    parts = [decode_value(part, place) for part in node[1:]]
    if len(parts) != 2 or type(parts[0]) is not float or type(parts[1]) is not float:
        corrupt(place, "'complex' takes two floats")
    return complex(*parts)


def decode_items(node: Node, place: Place) -> list[Any]:
    return [decode_value(item, (place, index)) for index, item in enumerate(node[1:])]


def check_hashable(value: object, place: Place) -> None:
    try:
        hash(value)
    except TypeError:
        corrupt(place, f"a {type(value).__name__} is no key")


def _decode_set(node: Node, place: Place) -> set[Any] | frozenset[Any]:
    items = decode_items(node, place)
    for item in items:
        check_hashable(item, place)
    out = set(items) if node[0] == "set" else frozenset(items)
    if len(out) != len(items):
        corrupt(place, f"'{node[0]}' has an item twice")
    return out


def decode_lengths(node: Node, place: Place) -> tuple[int, ...]:
    """A shape: whole numbers that fit an index."""
    if type(node) is not list or not all(type(length) is int and 0 <= length < 2**62 for length in node):
        corrupt(place, "a shape is a list of lengths")
    return tuple(node)


def _decode_size(node: Node, place: Place) -> Any:
    # May hold negative numbers: a Size need not be that of a tensor.
    if not all(type(length) is int and -(2**63) <= length < 2**63 for length in node[1:]):
        corrupt(place, "'torch.Size' takes whole numbers")
    return _torch().Size(node[1:])


def _torch() -> Any:
    return _arrays.library("torch").torch  # type: ignore[attr-defined]


def _decode_dtype(node: Node, place: Place) -> Any:
    name, torch = argument(node, place), _torch()
    # A table of dtypes and not getattr: the name is the file's.
    dtype = vars(torch).get(name)
    if not isinstance(dtype, torch.dtype):
        corrupt(place, f"torch has no dtype {name[:80]!r}")
    return dtype


def _decode_device(node: Node, place: Place) -> Any:
    name = argument(node, place)
    try:
        if re.fullmatch(r"[a-z]{1,20}(:\d{1,3})?", name):
            return _torch().device(name)
    except RuntimeError:
        pass
    corrupt(place, f"torch has no device {name[:80]!r}")


def _decode_numpy_dtype(node: Node, place: Place) -> Any:
    name = argument(node, place)
    dtype = numpy_dtype(name)
    if dtype is None:
        corrupt(place, f"numpy has no dtype {name[:80]!r} here")
    return dtype


def _decode_numpy(node: Node, place: Place) -> Any:
    if len(node) != 3 or type(node[1]) is not str:
        corrupt(place, "'numpy' takes a dtype and bytes")
    dtype = _decode_numpy_dtype(node[:2], place)
    data = _unbase64([node[0], node[2]], place)
    if len(data) != dtype.itemsize or dtype.kind in "SU":
        corrupt(place, f"{len(data)} bytes are no {dtype}")
    numpy = _arrays.library("numpy").numpy  # type: ignore[attr-defined]
    return numpy.frombuffer(data, dtype)[0]


def _decode_numpy_str(node: Node, place: Place) -> Any:
    text = decode_value(node[1], place) if len(node) == 2 else None
    if type(text) is not str:
        corrupt(place, "'numpy.str' takes one string")
    return _arrays.library("numpy").numpy.str_(text)  # type: ignore[attr-defined]


def _decode_numpy_bytes(node: Node, place: Place) -> Any:
    return _arrays.library("numpy").numpy.bytes_(_unbase64(node, place))  # type: ignore[attr-defined]


_DECODERS: dict[str, Callable[[Node, Place], Any]] = {
    "str": _decode_surrogates,
    "int": _decode_int,
    "float": _decode_float,
    "complex": _decode_complex,
    "bytes": _unbase64,
    "bytearray": lambda node, place: bytearray(_unbase64(node, place)),
    "tuple": lambda node, place: tuple(decode_items(node, place)),
    "set": _decode_set,
    "frozenset": _decode_set,
    "torch.Size": _decode_size,
    "torch.dtype": _decode_dtype,
    "torch.device": _decode_device,
    "numpy": _decode_numpy,
    "numpy.dtype": _decode_numpy_dtype,
    "numpy.str": _decode_numpy_str,
    "numpy.bytes": _decode_numpy_bytes,
}


def tag_of(node: Node, place: Place) -> str:
    """The tag of a list node; "" for what JSON has itself."""
    if type(node) is not list:
        return ""
    if not node or type(node[0]) is not str:
        corrupt(place, "a list without a tag")
    return node[0]


def decode_value(node: Node, place: Place) -> Any:
    tag = tag_of(node, place)
    if tag:
        decoder = _DECODERS.get(tag)
        if decoder is None:
            corrupt(place, f"unknown tag {tag[:80]!r}")
        return decoder(node, place)
    kind = type(node)
    if kind is float and not math.isfinite(node):
        corrupt(place, "a number beyond float64")
    if kind is int and not -_EXACT <= node <= _EXACT:
        corrupt(place, "a whole number beyond 2**53")
    if kind is str and encode_str(node) is not node:
        corrupt(place, "a string with lone surrogates")
    return node


def word(node: Node) -> str:
    """A node in a few words, for a message."""
    tag = node[0] if type(node) is list else ""
    if tag in ("dict", "Counter", "OrderedDict", "list", "tuple"):
        count = len(node) - (2 if tag == "OrderedDict" else 1)
        return f"a {tag} of {count // 2 if tag not in ('list', 'tuple') else count}"
    if tag in TORCH_TAGS or tag == OWN_TAG or (tag == "numpy" and len(node) == 4):
        where = node[3] if type(node[3]) is str else " ".join(map(str, node[3]))
        return f"a tensor of {node[1]} {node[2]} ({tag}, stored as {where[:80]})"
    if tag in ("QTensor", "PerRank"):
        return f"a {tag} {node[1:]}"
    text = repr(decode_value(node, ROOT))
    return text if len(text) <= 80 else f"{text[:80]}..."


# --- text -------------------------------------------------------------------------------------------------------


def dump(node: Node) -> str:
    """A tree as JSON text, ASCII; equal trees give equal texts."""
    return json.dumps(node, separators=(",", ":"), allow_nan=False)


def parse(text: str) -> Node:
    """The tree that dump() wrote. FileCorrupt if the text is no JSON of this kind, or deeper than it can be."""

    def refuse(what: object) -> NoReturn:
        raise ValueError(f"unexpected {str(what)[:80]}")

    try:
        tree = json.loads(text, parse_constant=refuse, object_pairs_hook=refuse)
    except (ValueError, RecursionError) as error:
        raise FileCorrupt(f"the tree of the checkpoint's state is no JSON: {error}") from None
    _check_levels(tree)
    return tree


def _check_levels(tree: Node) -> None:
    level, levels = [tree], 0
    while level:
        levels += 1
        if levels > MAX_DEPTH + 5:
            raise FileCorrupt(f"the tree of the checkpoint's state is nested deeper than {MAX_DEPTH + 4} levels")
        level = [child for node in level if type(node) is list for child in node]
