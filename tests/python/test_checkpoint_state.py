"""A state taken apart and put together: types and values, shared memory, refusals, hostile documents, in place."""

import collections
import copy
import json
import math
import random
import struct
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import narrowgauge as ng
import numpy as np
import pytest
import torch
from checkpoint_memory import Files, save, to_bytes
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from narrowgauge.checkpoint import values
from narrowgauge.checkpoint.decode import decode
from narrowgauge.checkpoint.restore import restore
from narrowgauge.checkpoint.state import PerRank, encode
from narrowgauge.checkpoint.tensors import TORCH_FORMS

TORCH_DTYPES = [getattr(torch, name) for name in TORCH_FORMS]
NUMPY_DTYPES = [
    *"?bBhHiIlLqQefdgFDG",
    ">i2",
    ">f4",
    ">c16",
    "M8[ns]",
    "m8[25s]",
    "S3",
    "U5",
    ">U2",
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e4m3b11fnuz,
    ml_dtypes.float8_e8m0fnu,
    ml_dtypes.int4,
]


def torch_bytes(t: torch.Tensor) -> bytes:
    t = t.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    """Equal in type, value and every bit; dicts in order too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        flags = a.requires_grad == b.requires_grad and a.dtype == b.dtype and a.shape == b.shape
        return flags and torch_bytes(a) == torch_bytes(b)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.dtype.char == b.dtype.char and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, ng.QTensor):
        facts = (a.format, a.shape, a.is_packed) == (b.format, b.shape, b.is_packed)
        return facts and all(x is y or same(x, y) for x, y in zip(a.canonical(), b.canonical(), strict=True))
    if isinstance(a, PerRank):
        return same(a.value, b.value)
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        equal = len(a) == len(b) and all(same(x, y) for x, y in pairs)
        return equal and same(getattr(a, "_metadata", None), getattr(b, "_metadata", None))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (set, frozenset)):
        rest = list(b)
        return len(a) == len(b) and all(any(same(x, y) for y in rest) for x in a)
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    return bool(a == b)


def round_trip(state: Any, **options: Any) -> Any:
    return decode(*save(state, **options))


# --- values -----------------------------------------------------------------------------------------------------

NAN = struct.unpack("d", struct.pack("Q", 0x7FF8_0000_DEAD_BEEF))[0]
FLOATS = st.floats() | st.sampled_from([-0.0, math.inf, -math.inf, math.nan, -math.nan, NAN, 5e-324])
TEXTS = (
    st.text(st.characters()) | st.text(st.characters(codec=None), max_size=4) | st.sampled_from(["\ud83d\ude00", "\0"])
)
NUMPY_SCALARS = st.sampled_from(
    [np.dtype(d).type(1) for d in "?bBhHiIlLqQefdgFDG"]
    + [np.float32(-0.0), np.float64("nan"), np.str_("a\0"), np.bytes_(b"x\0"), np.str_(""), np.datetime64("2026-01-02")]
    + [np.timedelta64("NaT"), np.datetime64("NaT"), ml_dtypes.bfloat16(1.5), ml_dtypes.float8_e5m2(2), np.True_]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**2000), 2**2000),
    FLOATS,
    st.builds(complex, FLOATS, FLOATS),
    TEXTS,
    st.binary(),
    NUMPY_SCALARS,
    st.sampled_from([torch.float32, torch.bfloat16, torch.qint8, torch.device("cpu"), torch.device("cuda:3")]),
    st.sampled_from([torch.Size([]), torch.Size([2, -1])]),
)
KEYS = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3))
DTYPES = st.sampled_from([np.dtype(d) for d in (">f4", "i8", "q", "S2", ml_dtypes.bfloat16)])


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(inner, max_size=4)
    pairs = st.dictionaries(KEYS, inner, max_size=4)
    return st.one_of(items, items.map(tuple), pairs, pairs.map(OrderedDict), pairs.map(Counter), items.map(PerRank))


STATES = st.recursive(
    KEYS | st.binary().map(bytearray) | st.sets(KEYS, max_size=3) | DTYPES,
    lambda inner: containers(inner).filter(lambda s: not nested_per_rank(s)),
    max_leaves=20,
)


def nested_per_rank(value: Any, inside: bool = False) -> bool:
    if isinstance(value, PerRank):
        return inside or nested_per_rank(value.value, True)
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(nested_per_rank(child, inside) for child in children)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STATES)
@example({1: "a", "1": "b", (1,): 2, None: 3})
@example({math.nan: 1, NAN: 2})
@example([2**53, 2**53 + 1, -(2**53) - 1, 10**5000])
@example([np.longlong(1), np.int64(1), True, 1, 1.0, np.float64(1), 1 + 0j])
@example({"a": {"b": 1}, "a.b": 2})
def test_values_come_back_with_type_and_value(state: Any) -> None:
    document, files = save(state)
    json.loads(document, parse_constant=lambda name: pytest.fail(name))
    assert document.isascii()
    back = decode(document, files)
    assert same(back, state)
    assert encode(back).tree == encode(state).tree


def test_a_key_is_one_key() -> None:
    for key in (1, 1.0, True, np.float32(1), 1 + 0j):
        (back,) = round_trip({key: "x"})
        assert type(back) is type(key)
    # Objects that occur twice come back as two equal ones.
    shared = [1]
    back = round_trip([shared, shared])
    assert back == [[1], [1]] and back[0] is not back[1]


def test_torch_metadata_of_a_state_dict() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    back = round_trip({"model": model.state_dict()})["model"]
    assert same(back, model.state_dict()) and back._metadata["1"] == {"version": 2}
    odd = OrderedDict(a=1)
    odd.other = 2
    with pytest.raises(TypeError, match=r"state\['m'\] has an attribute 'other'"):
        encode({"m": odd})


class Point(collections.namedtuple("Point", "x y")):
    pass


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"opt": {"foo": object()}}, r"state\['opt'\]\['foo'\]: <class 'builtins.object'> cannot be stored"),
        ([1, {"a": Point(1, 2)}], r"state\[1\]\['a'\]: <class '.*Point'> cannot .* tuple"),
        ({"m": torch.nn.Linear(1, 1)}, r"state\['m'\]: <class 'torch.nn.*Linear'> cannot .* state_dict\(\)"),
        ({"d": collections.defaultdict(int)}, r"defaultdict.* cannot be stored .* dict"),
        ({Point(1, 2): 1}, "Point"),
        ({"a": [{1: {object(): 1}}]}, r"state\['a'\]\[0\]\[1\]\[<object"),
        ({"a": (1, {2, b"", Point(1, 2)})}, r"state\['a'\]\[1\]\[\d\]: .*Point"),
        (range(3), "range"),
        (lambda: 0, "function"),
        (int, "type"),
        (..., "ellipsis"),
        (np.array([object()]), "array of object cannot"),
        (np.zeros(2, [("a", "i4"), ("b", "f4")]), "give each field"),
        (np.zeros(1, [("a", "i4")])[0], "void"),
        (np.ma.masked_array([1.0]), "MaskedArray"),
        (np.array(["a"], np.dtypes.StringDType()), "StringDType"),
        (np.dtype("f4", metadata={"a": 1}), "no place in a file"),
        (torch.zeros(2, 2).to_sparse(), r"layout torch.sparse_coo .* to_dense\(\)"),
        (torch.zeros(2, 2).to_sparse_csr(), "layout torch.sparse_csr"),
        (torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8), r"torch.qint8 .* int_repr\(\)"),
        (torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]), "nested"),
        (torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)], layout=torch.jagged), "NestedTensor"),
        (torch.zeros(2, dtype=torch.int4), "torch.int4"),
        (PerRank([PerRank(1)]), r"state.value\[0\] is a PerRank inside a PerRank"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_place(state: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        encode(state)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"state\['w'\] is on device meta, expected cpu"):
        encode({"w": torch.empty(2, device="meta")})


def test_states_that_contain_themselves_or_are_too_deep() -> None:
    state: dict[str, Any] = {"a": []}
    state["a"].append(state)
    with pytest.raises(ValueError, match=r"state\['a'\]\[0\] contains itself"):
        encode(state)
    ordered = OrderedDict()
    ordered._metadata = ordered
    with pytest.raises(ValueError, match="contains itself|deeper"):
        encode(ordered)
    deep: Any = torch.zeros(6).as_strided((2, 2), (1, 2))
    for _ in range(values.MAX_DEPTH):
        deep = [deep]
    state = {"x": PerRank(deep)}
    document, files = save(state)
    assert same(decode(document, files), state)
    assert json_depth(json.loads(document)) <= 64
    with pytest.raises(ValueError, match=r"\[0\] is nested deeper than 60 levels"):
        encode([deep])
    key: Any = ()
    for _ in range(values.MAX_DEPTH + 1):
        key = (key,)
    with pytest.raises(ValueError, match="nested deeper"):
        encode({key: 1})


def json_depth(node: Any) -> int:
    return 1 + max(map(json_depth, node), default=0) if isinstance(node, list) else 0


# --- tensors ----------------------------------------------------------------------------------------------------


def torch_example(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return torch.empty(0, dtype=dtype).set_(data.untyped_storage(), 0, shape)


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_torch_tensors_of_every_dtype(dtype: torch.dtype) -> None:
    base = torch_example(dtype, (4, 6))
    state = {
        "plain": base,
        "scalar": torch_example(dtype, ()),
        "empty": torch.empty((0, 3), dtype=dtype),
        "transposed": torch_example(dtype, (4, 6)).t(),
        "strided": torch_example(dtype, (4, 6))[::2, 1::2],
    }
    document, files = save(state)
    assert same(decode(document, files), state)
    assert same(decode(document, files, lazy=True), state)
    target = {key: torch.empty_like(value) for key, value in state.items()}
    pointers = [value.data_ptr() for value in target.values()]
    assert restore(document, files, target) is target
    assert same(target, state) and pointers == [value.data_ptr() for value in target.values()]


@pytest.mark.parametrize("dtype", NUMPY_DTYPES, ids=lambda dtype: np.dtype(dtype).str + np.dtype(dtype).name)
def test_numpy_arrays_of_every_dtype(dtype: Any) -> None:
    dtype = np.dtype(dtype)
    numbers = np.arange(24) % 2 if dtype.kind == "b" else np.arange(24)

    def array() -> np.ndarray:
        return (numbers.astype(np.float32).astype(dtype) if dtype.kind == "V" else numbers.astype(dtype)).reshape(4, 6)

    state = {
        "plain": array(),
        "scalar": np.array(array()[1, 1]),
        "empty": np.empty((0, 3), dtype),
        "fortran": np.asfortranarray(array()),
        "strided": array()[::2, ::-2],
    }
    state["scalar"] = state["scalar"].astype(dtype)
    document, files = save(state)
    back = decode(document, files)
    for key, value in state.items():
        assert same(back[key], value), key
        assert back[key].flags.writeable and back[key].flags.c_contiguous
    assert same(decode(document, files, lazy=True), state)
    target = {key: np.zeros_like(value) for key, value in state.items()}
    assert same(restore(document, files, target), state)


def test_what_a_tensor_is_beyond_its_values() -> None:
    z = torch.randn(3, 4, dtype=torch.complex64)
    state = {
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "frozen": torch.nn.Parameter(torch.arange(3), requires_grad=False),
        "leaf": torch.randn(3, requires_grad=True),
        "result": torch.randn(3, requires_grad=True) * 2,
        "conjugate": z.conj(),
        "negative": z.conj().imag,
        "both": torch.view_as_real(z),
    }
    with torch.inference_mode():
        state["inference"] = torch.randn(2)
        document, files = save(state)
        back = decode(document, files)
    assert same(back, state)
    assert back["result"].is_leaf and not back["inference"].is_inference()
    (back["parameter"] * 2).sum().backward()
    assert restore(document, files, copy.deepcopy({**state, "result": state["leaf"].detach() * 2}))


def test_in_place_of_conjugates_and_under_autograd() -> None:
    z = torch.randn(3, dtype=torch.complex64)
    document, files = save({"z": z, "w": torch.ones(3)})
    target = {"z": torch.zeros(3, dtype=torch.complex64).conj(), "w": torch.nn.Parameter(torch.zeros(3))}
    loss = (target["w"] ** 2).sum()
    restore(document, files, target)
    assert torch.equal(target["z"], z) and target["z"].is_conj() and torch.equal(target["w"], torch.ones(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_names_are_paths_and_unique() -> None:
    t = torch.zeros(1)
    q = ng.quantize(torch.randn(2, 16), ng.fp8)
    state = {
        "model": OrderedDict({"layers.0.weight": t.clone(), "layers": [{"weight": t.clone()}]}),
        "opt": {"state": {0: {"exp_avg": t.clone()}, "0": {"exp_avg": t.clone()}}},
        "w@3": t.clone(),
        "rank0": {"x": t.clone()},
        "x": PerRank(t.clone()),
        "q": q,
        "q.codes": t.clone(),
        "é\ud800": t.clone(),
        "": t.clone(),
        "long" * 1000: t.clone(),
        "__metadata__": t.clone(),
    }
    names = [stored.name for stored in encode(state).tensors]
    assert names[:7] == [
        "model.layers.0.weight",
        "model.layers.0.weight~2",
        "opt.state.0.exp_avg",
        "opt.state.0.exp_avg~2",
        "w@3~",
        "rank0.x~",
        "q.codes",
    ]
    assert {"q.codes~2", "é\\ud800", "state", "__metadata__~"} < set(names) and names[-1] == "rank0.x"
    assert len(set(names)) == len(names) and max(map(len, names)) == 512
    assert same(round_trip(state), state)
    assert same(round_trip(t), t) and same(round_trip([t])[0], t)


def test_encode_copies_nothing() -> None:
    w, n = torch.nn.Parameter(torch.randn(4, 4)), np.arange(4.0)
    by_name = {stored.name: stored for stored in encode({"w": w, "n": n, "z": torch.zeros(2).conj()}).tensors}
    assert by_name["w"].array.data_ptr() == w.data_ptr() and not by_name["w"].array.requires_grad
    assert by_name["w"].sources == (w,) and by_name["n"].sources == (n,)
    assert np.shares_memory(by_name["n"].array, n)
    z = torch.zeros(2, dtype=torch.complex64).conj()
    assert encode(z).tensors[0].sources == ()


# --- shared memory ----------------------------------------------------------------------------------------------


def test_tied_weights_are_stored_once_and_come_back_tied() -> None:
    model = torch.nn.Module()
    model.embed, model.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
    model.head.weight = model.embed.weight
    state = {"model": model.state_dict(), "parameters": list(model.parameters())}
    encoded = encode(state)
    assert [stored.name for stored in encoded.tensors] == ["model.embed.weight"]
    assert len(encoded.tensors[0].sources) == 3
    document, files = save(state)
    for back in (decode(document, files), decode(document, files, lazy=True)):
        embed, head = back["model"]["embed.weight"], back["model"]["head.weight"]
        assert embed is head and back["parameters"][0].data_ptr() == embed.data_ptr()
        assert same(back["model"], state["model"]) and isinstance(back["parameters"][0], torch.nn.Parameter)
    target = copy.deepcopy(model)
    torch.nn.init.zeros_(target.embed.weight)
    files.bytes_read = 0
    restore(document, files, {"model": target.state_dict(), "parameters": list(target.parameters())})
    assert torch.equal(target.head.weight, model.head.weight) and files.bytes_read == 60


def test_overlapping_views_share_one_storage() -> None:
    base = torch.arange(24.0)
    state = {
        "rows": base[4:16].view(3, 4),
        "column": base[4:16].view(3, 4)[:, 1],
        "later": base[10:20],
        "bits": base[12:14].view(torch.int32),
        "apart": base[22:],
        "twice": base[4:16].view(3, 4),
    }
    document, files = save(state)
    assert {name: tensor[:2] for name, tensor in files.tensors.items()} == {
        "rows.memory": ("U8", (64,)),
        "apart": ("F32", (2,)),
    }
    for lazy in (False, True):
        back = decode(document, files, lazy=lazy)
        assert same(back, state)
        start = back["rows"].data_ptr()
        offsets = {key: value.data_ptr() - start for key, value in back.items() if key != "apart"}
        assert offsets == {"rows": 0, "column": 4, "later": 24, "bits": 32, "twice": 0}
        assert back["twice"] is back["rows"] and not back["rows"]._is_view()
        if not lazy:
            back["later"].fill_(-1)
            assert back["rows"][1, 2] == -1
    clean = decode(document, files)
    target = {key: value.clone() for key, value in state.items()}
    for value in target.values():
        value.zero_()
    assert same(restore(document, files, target), clean)
    flat = torch.zeros(24)
    target = {**decode(document, files), "apart": flat[22:]}
    assert same(restore(document, files, target), clean)


def test_one_tensor_that_spans_the_others_is_their_base() -> None:
    w = torch.randn(4, 4)
    state = {"flat": w.view(-1), "w": w, "t": w.t(), "half": w[:2]}
    document, files = save(state)
    assert {name: tensor[:2] for name, tensor in files.tensors.items()} == {"flat": ("F32", (16,))}
    back = decode(document, files)
    assert same(back, state) and len({value.data_ptr() for value in back.values()}) == 1
    assert same(decode(document, files, patterns=["half"]), {"half": state["half"]})


def test_a_small_view_stores_only_its_elements() -> None:
    big = torch.zeros(1 << 20)
    document, files = save({"a": big[5:7], "b": big[10:1000:100], "n": np.zeros(1 << 20)[7:9]})
    assert [tensor[1] for tensor in files.tensors.values()] == [(2,), (10,), (2,)]
    assert decode(document, files)["a"].untyped_storage().nbytes() == 8


def test_expanded_tensors_keep_their_size() -> None:
    state = {"t": torch.arange(3.0).expand(100000, 3), "n": np.broadcast_to(np.arange(2), (1000, 2))}
    document, files = save(state)
    assert sorted(tensor[1] for tensor in files.tensors.values()) == [(2,), (3,)]
    back = decode(document, files)
    assert same(back, state) and back["t"].untyped_storage().nbytes() == 12
    back["t"][0].zero_()
    assert same(restore(document, files, back), state)
    document, files = save({"t": torch.randn(4, 3)})
    with pytest.raises(ValueError, match=r"state\['t'\] overlaps itself in the state"):
        restore(document, files, {"t": torch.zeros(3).expand(4, 3)})


def test_numpy_views_share_memory_too() -> None:
    base = np.arange(12, dtype=np.int32)
    mixed = np.zeros(3, [("a", "<i4"), ("b", "<f8")])
    state = {"a": base[2:8], "b": base[6:1:-2], "c": base[4:6].view(np.float32), "x": mixed["a"], "y": mixed["b"]}
    document, files = save(state)
    assert {name: tensor[:2] for name, tensor in files.tensors.items()} == {
        "a": ("I32", (6,)),
        "x.memory": ("U8", (36,)),
    }
    back = decode(document, files)
    assert same(back, state)
    back["a"][:] = 7
    assert (back["b"] == 7).all() and np.may_share_memory(back["x"], back["y"])
    state["a"][:] = 3
    document, files = save(state)
    assert same(restore(document, files, back), state)


def test_views_at_odd_offsets_are_refused() -> None:
    raw = torch.arange(64, dtype=torch.uint8)
    misaligned = raw[2:18].view(torch.int16), raw[4:12].view(torch.int32)
    with pytest.raises(ValueError, match=r"state\[1\], of int32, begins 2 bytes .* shares with state\[0\]"):
        encode([misaligned[0][:6], misaligned[1]])


# --- matrices in a Format ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [*ng.format_aliases(), "uint4:g64:bf16"])
def test_qtensors(format: str) -> None:
    w = torch.randn(6, 130)
    state = {
        "canonical": ng.quantize(w, format),
        "packed": ng.quantize(w, format).pack(),
        "numpy": ng.quantize(w.numpy(), format),
    }
    state["again"] = state["packed"]
    document, files = save(state)
    assert "canonical.codes" in files.tensors
    back = decode(document, files)
    assert same(back, state) and back["again"] is back["packed"]
    target = {key: ng.quantize(torch.zeros(6, 130), format) for key in state}
    target["again"] = target["packed"].pack()
    block = target["packed"].packed
    restore(document, files, target)
    assert same(target["packed"], state["packed"]) and target["packed"].packed is block
    assert torch.equal(target["numpy"].codes, torch.from_numpy(state["numpy"].codes))
    other = {key: ng.quantize(torch.zeros(6, 130), "int3:g16:fp16") for key in state}
    with pytest.raises(ValueError, match=r"state\['canonical'\]: the checkpoint has a QTensor of .*\[6, 130\]"):
        restore(document, files, other)


def test_narrow_storage_by_name() -> None:
    torch.manual_seed(0)
    state = {
        "w": torch.randn(8, 64),
        "opt": {
            "state": {
                0: {"exp_avg": torch.randn(8, 64), "step": torch.tensor(3.0)},
                1: {"exp_avg": torch.randn(64).bfloat16()},
                2: {"exp_avg": torch.arange(4), "exp_avg_sq": torch.randn(4)},
                3: {"exp_avg": torch.randn(8, 64, dtype=torch.float64)},
                4: {"exp_avg": np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)},
                5: {"exp_avg": torch.nn.Parameter(torch.randn(3, 5, 64).half())},
            }
        },
    }
    formats = {"exp_avg": ng.fp8, "*": "fp4"}
    exact = {k: v for k, v in formats.items() if k != "*"}
    document, files = save(state, formats=exact)
    assert files.tensors["opt.state.0.exp_avg.codes"][:2] == ("U8", (8, 64))
    assert files.tensors["opt.state.1.exp_avg.codes"][:2] == ("U8", (1, 64))
    back = decode(document, files)
    for index, key in ((0, "exp_avg"), (1, "exp_avg"), (4, "exp_avg"), (5, "exp_avg")):
        ours, theirs = state["opt"]["state"][index][key], back["opt"]["state"][index][key]
        lossy = ng.quantize(ours, ng.fp8).dequantize(str(ours.dtype).removeprefix("torch."))
        assert type(ours) is type(theirs) and theirs.dtype == ours.dtype and theirs.shape == ours.shape
        assert np.array_equal(to_bytes(theirs), to_bytes(lossy.reshape(ours.shape)))
        back["opt"]["state"][index][key] = ours
    assert same(back, state)
    target = copy.deepcopy(state)
    expected = decode(document, files)
    assert same(restore(document, files, target), expected)
    assert "w.codes" in {stored.name for stored in encode(state, formats).tensors}


def test_narrow_storage_refuses_what_it_would_spoil() -> None:
    with pytest.raises(ValueError, match=r"state\['m'\] cannot be stored as fp8.*: .*nan"):
        encode({"m": torch.tensor([1.0, math.nan])}, {"m": ng.fp8})
    w = torch.randn(4, 4)
    for state in ({"m": w, "w": w}, {"m": w[:2], "w": w}):
        with pytest.raises(ValueError, match=r"state\['m'\] shares memory with state\['w'\]"):
            encode(state, {"m": ng.fp8})
    assert len(encode({"m": w, "w": w}, {"*": ng.fp8}).tensors) == 2


# --- what belongs to a rank -------------------------------------------------------------------------------------


def test_random_states_resume() -> None:
    generator = np.random.default_rng(3)
    torch_generator = torch.Generator().manual_seed(5)
    random.seed(1)

    def states() -> dict[str, Any]:
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "legacy": np.random.get_state(legacy=False),
            "generator": generator.bit_generator.state,
            "torch": torch.get_rng_state(),
            "own": torch_generator.get_state(),
        }

    saved = {"rng": PerRank(states()), "step": 1}
    document, files = save(saved)
    expected = [
        random.random(),
        np.random.rand(),
        generator.random(),
        torch.rand(2),
        torch.rand(2, generator=torch_generator),
    ]
    back = decode(document, files)["rng"].value
    random.setstate(back["python"])
    np.random.set_state(back["numpy"])
    generator.bit_generator.state = back["generator"]
    torch.set_rng_state(back["torch"])
    torch_generator.set_state(back["own"])
    again = [
        random.random(),
        np.random.rand(),
        generator.random(),
        torch.rand(2),
        torch.rand(2, generator=torch_generator),
    ]
    assert all(np.array_equal(x, y) for x, y in zip(expected, again, strict=True))
    np.random.set_state(back["legacy"])


def test_a_rank_that_the_checkpoint_does_not_know() -> None:
    document, files = save({"rng": PerRank([torch.ones(2), 3]), "w": torch.ones(1)})
    with pytest.raises(ValueError, match=r"state\['rng'\] is PerRank, of 1 ranks, and this is rank 2"):
        decode(document, files, rank=2)
    assert decode(document, files, rank=2, patterns=["w"]) == {"w": torch.ones(1)}
    target = {"rng": PerRank([torch.zeros(2), 4]), "w": torch.zeros(1)}
    restore(document, files, target, rank=2)
    assert target["rng"].value[1] == 4 and not target["rng"].value[0].any() and target["w"] == 1
    restore(document, files, target)
    assert target["rng"].value[1] == 3 and target["rng"].value[0].all()


# --- in place, and parts ----------------------------------------------------------------------------------------


def trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 + seed)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    for _ in range(3 + seed):
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "losses": [0.5] * (3 + seed),
        "at": (3 + seed, torch.full((2,), float(seed))),
        "tags": {"a", seed},
    }
    return model, optimizer, state


def test_a_training_state_made_anew_and_in_place() -> None:
    model, _, state = trained(0)
    document, files = save(state)
    assert same(decode(document, files), state)
    other, _, target = trained(1)
    kept = {"losses": target["losses"], "tensor": target["at"][1], "model": target["model"]}
    assert not torch.equal(other[0].weight, model[0].weight)
    assert restore(document, files, target) is target
    assert same(target, state) and torch.equal(other[0].weight, model[0].weight)
    assert target["losses"] is kept["losses"] and target["at"][1] is kept["tensor"] and target["model"] is kept["model"]
    _, optimizer, _ = trained(1)
    optimizer.load_state_dict(target["optimizer"])
    assert optimizer.param_groups[0]["lr"] == state["optimizer"]["param_groups"][0]["lr"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].pop("0.bias"), r"state\['model'\]: the checkpoint has the key '0.bias', .* has none"),
        (lambda s: s["model"].update(new=torch.zeros(1)), r"state\['model'\]: .* none of that name, .* the key 'new'"),
        (lambda s: s["optimizer"]["state"].clear(), r"state\['optimizer'\]\['state'\]: .* the key 0, 1, 2, 3, ... \(6"),
        (
            lambda s: s["model"].update({"0.bias": torch.zeros(9)}),
            r"state\['model'\]\['0.bias'\]: the checkpoint has a torch tensor of float32 \[8\], .* float32 \[9\]",
        ),
        (lambda s: s["model"].update({"0.bias": torch.zeros(8).half()}), r"of float16 \[8\]"),
        (lambda s: s["model"].update({"0.bias": np.zeros(8, np.float32)}), "ndarray"),
        (lambda s: s["model"].update({"0.bias": None}), "has None"),
        (lambda s: s.update(model=dict(s["model"])), "a OrderedDict, the state to be filled has a dict of"),
        (lambda s: s.update(losses=(1.0,)), "has a list, .* a tuple of 1"),
        (lambda s: s.update(at=(1, torch.zeros(2), 3)), r"state\['at'\]: the checkpoint has 2 items, .* has 3"),
        (lambda s: s.update(at=(torch.zeros(2), torch.zeros(2))), r"state\['at'\]\[0\]: the checkpoint has 3"),
        (lambda s: s["optimizer"]["param_groups"][0].update(lr=[1]), r"\['lr'\]: .* a list of 1"),
    ],
)
def test_a_mismatch_is_found_before_anything_changes(change: Any, message: str) -> None:
    document, files = save(trained(0)[2])
    target = trained(1)[2]
    change(target)
    before = copy.deepcopy(target)
    with pytest.raises(ValueError, match=message):
        restore(document, files, target)
    assert same(target, before)


def test_two_tensors_for_one_memory_are_refused() -> None:
    document, files = save({"a": torch.zeros(4), "b": torch.ones(4)})
    shared = torch.zeros(6)
    with pytest.raises(ValueError, match=r"state\['a'\] and state\['b'\] share memory in the state, .* 'a' and 'b'"):
        restore(document, files, {"a": shared[:4], "b": shared[2:]})
    readonly = np.zeros(2)
    readonly.flags.writeable = False
    document, files = save({"a": np.ones(2)})
    with pytest.raises(ValueError, match="read-only"):
        restore(document, files, {"a": readonly})


def test_parts_of_a_state() -> None:
    state = trained(0)[2]
    document, files = save(state)
    assert same(decode(document, files, patterns=["model"]), {"model": state["model"]})
    files.bytes_read = 0
    back = decode(document, files, patterns=["0.weight", "lr"])
    assert files.bytes_read == 4 * 8 * 4
    assert same(dict(back["model"]), {"0.weight": state["model"]["0.weight"]})
    assert back["optimizer"] == {"param_groups": [{"lr": state["optimizer"]["param_groups"][0]["lr"]}]}
    assert same(decode(document, files, patterns=["at.1"]), {"at": (None, state["at"][1])})
    with pytest.raises(ValueError, match=r"no part .* matches \['nothing'\]"):
        decode(document, files, patterns=["nothing"])
    target = trained(1)[2]
    target["optimizer"] = None
    losses = list(target["losses"])
    restore(document, files, target, patterns=["model", "at.0"])
    assert same(target["model"], state["model"]) and target["losses"] == losses and target["at"][0] == 3
    with pytest.raises(ValueError, match="no part"):
        restore(document, files, target, patterns=["nothing"])


# --- without torch ----------------------------------------------------------------------------------------------


def test_numpy_arrays_for_torch_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {str(dtype): torch_example(dtype, (2, 3)) for dtype in TORCH_DTYPES}
    state |= {"size": torch.Size([1]), "dtype": torch.float32, "device": torch.device("cpu")}
    document, files = save(state)
    back = decode(document, files, library="numpy")
    for dtype in TORCH_DTYPES:
        assert back[str(dtype)].tobytes() == torch_bytes(state[str(dtype)])
    assert back["torch.bfloat16"].dtype == ml_dtypes.bfloat16 and back["torch.complex128"].dtype == np.complex128
    assert (back["size"], back["dtype"], back["device"]) == ((1,), "float32", "cpu")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    bits = decode(document, files, library="numpy", patterns=["*float*"])
    assert bits["torch.bfloat16"].dtype == np.uint16 and bits["torch.float8_e5m2"].dtype == np.uint8
    with pytest.raises(TypeError, match=r"state\['torch.complex32'\]: no numpy dtype holds torch.complex32"):
        decode(document, files, library="numpy")


def test_without_torch_and_without_numpy() -> None:
    program = """
import sys
for name in {absent!r}: sys.modules[name] = None
import narrowgauge
from narrowgauge.checkpoint.state import encode, PerRank
from narrowgauge.checkpoint.plan import describe, plan
from narrowgauge.checkpoint.decode import decode
from narrowgauge.checkpoint.restore import restore
assert sys.modules.get("numpy") is None, "numpy is imported before it is needed"
state = {{"a": 1, "r": PerRank({{1.5}}), "b": [b"x", "y"]}}
if "numpy" not in {absent!r}:
    sys.path.insert(0, {path!r})
    from checkpoint_memory import save
    import numpy as np
    state["n"] = np.arange(3)
    document, files = save(state)
    back = restore(document, files, {{**state, "n": np.zeros(3, int), "a": 2}})
    assert back["n"].tolist() == [0, 1, 2] and back["a"] == 1, back
    assert decode(document, files)["n"].tolist() == [0, 1, 2]
else:
    document = plan([describe(encode(state))]).document
    class Nothing:
        def read(self, requests): assert not requests
    assert decode(document, Nothing()) == state
"""
    for absent in (["torch"], ["torch", "numpy"]):
        code = program.format(absent=absent, path=str(Path(__file__).parent))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# --- hostile documents ------------------------------------------------------------------------------------------


def hostile_state() -> Any:
    w = torch.randn(4, 6)
    return {
        "w": w,
        "part": w[1:, 2:],
        "n": np.arange(3, dtype=">i4"),
        "q": ng.quantize(torch.randn(4, 32), ng.fp6),
        "m": torch.randn(2, 32),
        "p": torch.nn.Parameter(torch.zeros(2)),
        "z": torch.zeros(2, dtype=torch.complex128),
        "r": PerRank((1, torch.zeros(2))),
        "o": OrderedDict(a=1),
        "c": Counter("aab"),
        "v": [1, 2.5, math.nan, 2**70, 1j, "\ud800", b"x", bytearray(b"y"), {1, 2}, frozenset("a"), (1,), None, True],
        "t": [
            torch.float32,
            torch.device("cpu"),
            torch.Size([1]),
            np.float32(1),
            np.dtype("f4"),
            np.str_("a"),
            np.bytes_(b""),
        ],
    }


HOSTILE = save(hostile_state(), formats={"m": ng.fp8})
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2**31, 2**53, 2**62, 2**64, 10**30, 0.5, 1e308])
    | st.sampled_from(
        ["", "w", "q.codes", "float32", "<f4", ">U99999999999", "|O", "os", "dict", "view", "list", "int"]
    )
    | st.sampled_from(
        ["torch", "torch.Parameter", "numpy", "QTensor", "PerRank", "tuple", "set", "0x1", "AA==", "\ud800"]
    )
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


def places(node: Any, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    inner = (
        [place for at, child in enumerate(node) for place in places(child, (*path, at))] if type(node) is list else []
    )
    return [path, *inner]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    tree = json.loads(HOSTILE[0])
    everywhere = places(tree)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(everywhere))
        if not path:
            continue
        node = tree
        try:
            for step in path[:-1]:
                node = node[step]
            node[path[-1]]
        except (IndexError, TypeError):
            continue
        if type(node) is not list:
            continue
        kind = draw(st.sampled_from(["replace", "delete", "insert", "copy", "repeat"]))
        if kind == "replace":
            node[path[-1]] = draw(ANY_JSON)
        elif kind == "delete":
            del node[path[-1]]
        elif kind == "insert":
            node.insert(path[-1], draw(ANY_JSON))
        elif kind == "repeat":
            node.insert(path[-1], copy.deepcopy(node[path[-1]]))
        else:
            other: Any = json.loads(HOSTILE[0])
            for step in draw(st.sampled_from(everywhere)):
                other = other[step]
            node[path[-1]] = other
    return json.dumps(tree)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_mutated_documents_are_refused_or_read(document: str) -> None:
    assume(document != HOSTILE[0])
    for lazy in (False, True):
        try:
            decode(document, HOSTILE[1], lazy=lazy)
        except ng.FileCorrupt as error:
            assert len(str(error)) < 2000
    try:
        restore(document, HOSTILE[1], hostile_state())
    except ng.FileCorrupt:
        pass
    except ValueError as error:
        assert "the state" in str(error)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"a": 1}, "JSON"),
        (["dict", "a"], "a key without a value"),
        (["dict", "a", 1, "a", 2], "the key 'a' occurs twice"),
        (["dict", 1, 1, True, 2], "the key 'True' occurs twice"),
        (["dict", ["list"], 1], "unknown tag 'list'"),
        (["dict", ["bytearray", ""], 1], "a bytearray is no key"),
        (["set", ["set"]], "a set is no key"),
        (["set", 1, 1.0], "an item twice"),
        (["os.system", "true"], "unknown tag 'os.system'"),
        ([], "a list without a tag"),
        ([[]], "a list without a tag"),
        (["int", "0x"], "hexadecimal"),
        (["int", 5], "takes one string"),
        (["float", "zz"], "16 hexadecimal digits"),
        (["complex", 1.0, 2], "two floats"),
        (["bytes", "a"], "base64"),
        (["str", "/w=="], "UTF-8"),
        (["torch.dtype", "Tensor"], "no dtype 'Tensor'"),
        (["torch.device", "nothing:0"], "no device"),
        (["torch.Size", 0.5], "whole numbers"),
        (["numpy", "<f4", "AA=="], "1 bytes are no float32"),
        (["numpy.dtype", "O"], "no dtype 'O'"),
        (["numpy.dtype", "<U999999999999"], "no dtype"),
        (2**53 + 1, "beyond 2\\*\\*53"),
        (["torch", "float32", [4, 6], "absent"], "no tensor 'absent'"),
        (["torch", "float32", [6, 4], "w"], r"'w' is F32 \[4, 6\] in the files, expected F32 \[6, 4\]"),
        (["torch", "int32", [4, 6], "w"], "expected I32"),
        (["torch", "float31", [4, 6], "w"], "no dtype 'float31'"),
        (["torch.Parameter", "int64", [1], "w"], "no gradient"),
        (["torch", "float32", [-1], "w"], "a shape is a list of lengths"),
        (["torch", "float32", [2**40, 2**40], "w"], "beyond any memory"),
        (["torch", "float32", [4, 6], ["view", "w", 4, 24, 4]], r"bytes \[4, 100\) of 'w', which has 96"),
        (["torch", "float32", [4], ["view", "w", -4, 4]], r"bytes \[-4, 12\)"),
        (["torch", "float32", [2], ["view", "w", 4, -4]], "steps that torch does not have"),
        (["torch", "float32", [2], ["view", "w", 2, 4]], "steps that torch does not have"),
        (["numpy", "<f4", [3], ["view", "w", 0, -4]], r"bytes \[-8, 4\)"),
        (["torch", "float32", [2], ["view", "w", 0]], "a stride for each axis"),
        (["torch", "float32", [2], ["view", ["w"], 0, 4]], "name is a string"),
        (["torch", "int64", [2, 32], ["narrow", "fp8", "m.codes", "m.scales"]], "never narrow"),
        (["torch", "float32", [2, 32], ["narrow", "fp9", "m.codes", "m.scales"]], "fp9"),
        (["torch", "float32", [2, 32], ["narrow", "fp8", "m.codes"]], "has 1 arrays"),
        (["torch", "float32", [3, 32], ["narrow", "fp8", "m.codes", "m.scales"]], r"expected U8 \[3, 32\]"),
        (["QTensor", "torch", False, "fp6", [2**61, 2**61], ["q.codes", "q.scales"]], "state"),
        (["QTensor", "jax", False, "fp6", [4, 32], ["q.codes", "q.scales"]], "takes a library"),
        (["PerRank", 7], "PerRank"),
        (["OrderedDict"], "a key without a value"),
    ],
)
def test_hostile_nodes(node: Any, message: str) -> None:
    document = json.dumps(["state", node, []])
    with pytest.raises(ng.FileCorrupt, match=message):
        decode(document, HOSTILE[1])


def test_hostile_texts() -> None:
    deep = "[" * 100 + "]" * 100
    for document in (
        "",
        "null",
        "[]",
        '["state"]',
        '["state",NaN,[]]',
        '["state",1e999,[]]',
        '["state",1,[1],[]]',
        deep,
    ):
        with pytest.raises(ng.FileCorrupt):
            decode(document, HOSTILE[1])
    with pytest.raises(ng.FileCorrupt, match="deeper|no JSON"):
        decode("[" * 100000 + "]" * 100000, HOSTILE[1])
    with pytest.raises(ng.FileCorrupt, match="PerRank"):
        decode('["state",["PerRank",0],[["PerRank",0]]]', HOSTILE[1])


def test_files_in_memory_are_a_source() -> None:
    assert isinstance(HOSTILE[1], Files)
