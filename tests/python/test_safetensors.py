"""Safetensors files both ways: ours open in every reader of the safetensors package, and theirs open in ours.

Also what the bindings add to the C++ tests in tests/cpp/io: buffers, lifetimes, exceptions, threads.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from narrowgauge._native import SafetensorsFile, write_safetensors
from narrowgauge.errors import FileCorrupt

safetensors = pytest.importorskip("safetensors")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

NUMPY_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16", "U32": "uint32",
    "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip
# Those that numpy lacks, by torch's names.
TORCH_DTYPES = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(seed).integers(0, 2 if dtype == "BOOL" else 100, shape)
    return values.astype(NUMPY_DTYPES[dtype])


def read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    file = SafetensorsFile(path)
    return {name: (*file.info(name)[:2], bytes(file.bytes(name))) for name in file.names()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def every_dtype() -> dict[str, np.ndarray[Any, Any]]:
    arrays = {f"a.{dtype}": array(dtype, (3, 5), seed) for seed, dtype in enumerate(NUMPY_DTYPES)}
    arrays |= {
        "scalar": array("F32", ()),
        "none": array("I64", (0, 4)),
        'odd "name"\n\\ \u20ac\U0001f600': array("U8", (1,)),
    }
    return arrays


def dtype_of(values: np.ndarray[Any, Any]) -> str:
    return next(name for name, each in NUMPY_DTYPES.items() if values.dtype == each)


def write(path: Path, arrays: dict[str, np.ndarray[Any, Any]], metadata: dict[str, str]) -> None:
    write_safetensors(path, [(name, dtype_of(a), list(a.shape), a) for name, a in arrays.items()], metadata)


def test_our_files_open_in_safetensors_numpy(path: Path) -> None:
    arrays = every_dtype()
    write(path, arrays, {"k": "v", "\u20ac\n": ""})
    loaded = safetensors_numpy.load_file(path)
    assert loaded.keys() == arrays.keys()
    for name, expected in arrays.items():
        np.testing.assert_array_equal(loaded[name], expected, strict=True)


def test_our_files_open_in_safe_open(path: Path) -> None:
    arrays = every_dtype()
    metadata = {"k": "v", "\u20ac\n": ""}
    write(path, arrays, metadata)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == metadata
        assert list(file.offset_keys()) == SafetensorsFile(path).names()
        for name, expected in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), expected, strict=True)


def test_our_files_open_in_safetensors_torch(path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    arrays = every_dtype()
    tensors = {name: torch.from_numpy(a) for name, a in arrays.items()}
    dtypes = {name: dtype_of(a) for name, a in arrays.items()}
    for dtype, torch_name in TORCH_DTYPES.items():
        tensors[dtype] = torch.arange(6.0).reshape(2, 3).to(getattr(torch, torch_name))
        dtypes[dtype] = dtype
    write_safetensors(path, [(name, dtypes[name], list(t.shape), t) for name, t in tensors.items()], {})
    loaded = safetensors_torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert loaded[name].dtype == expected.dtype, name
        assert loaded[name].shape == expected.shape, name
        assert bytes(loaded[name].contiguous().reshape(-1).view(torch.uint8)) == bytes(
            expected.reshape(-1).view(torch.uint8)
        ), name


def test_their_files_open_in_ours(path: Path) -> None:
    arrays = every_dtype()
    safetensors_numpy.save_file(arrays, path, metadata={"a": "b"})
    assert SafetensorsFile(path).metadata == {"a": "b"}
    loaded = read(path)
    assert loaded.keys() == arrays.keys()
    for name, expected in arrays.items():
        assert loaded[name] == (dtype_of(expected), expected.shape, expected.tobytes())


def test_torch_files_open_in_ours(path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    tensors = {dtype: torch.arange(7.0).to(getattr(torch, name)) for dtype, name in TORCH_DTYPES.items()}
    safetensors_torch.save_file(tensors, path)
    loaded = read(path)
    for dtype, expected in tensors.items():
        assert loaded[dtype] == (dtype, (7,), bytes(expected.view(torch.uint8)))


@settings(max_examples=100, deadline=None)
@given(
    names=st.lists(st.text(max_size=20).filter(lambda name: name != "__metadata__"), unique=True, max_size=6),
    data=st.data(),
    metadata=st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=4),
)
def test_any_names_shapes_and_metadata_round_trip(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], data: st.DataObject, metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    arrays = {}
    for name in names:
        dtype = data.draw(st.sampled_from(sorted(NUMPY_DTYPES)))
        arrays[name] = array(dtype, tuple(data.draw(st.lists(st.integers(0, 4), max_size=4))))
    write(path, arrays, metadata)
    assert SafetensorsFile(path).metadata == metadata
    assert read(path) == {name: (dtype_of(a), a.shape, a.tobytes()) for name, a in arrays.items()}
    with safetensors.safe_open(path, framework="np") as file:
        assert (file.metadata() or {}) == metadata
        for name, expected in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), expected, strict=True)


@settings(max_examples=300, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4))
def test_what_ours_accepts_of_an_altered_file_theirs_accepts_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "altered.safetensors"
    write(path, {"a": array("F32", (2, 3)), "b": array("U8", (4,)), "c": array("I16", (1, 1))}, {"k": "v"})
    content = bytearray(path.read_bytes())
    for position, value in edits:
        content[position % len(content)] = value
    path.write_bytes(content)
    try:
        ours = read(path)
    except FileCorrupt:
        return
    theirs = dict(safetensors.deserialize(bytes(content)))
    assert ours == {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in theirs.items()}


def test_any_contiguous_buffer_can_be_written(path: Path) -> None:
    frozen = np.arange(4, dtype=np.uint8)
    frozen.flags.writeable = False
    for buffer in (b"\0\1\2\3", bytearray(b"\0\1\2\3"), memoryview(b"\0\1\2\3"), frozen, frozen.reshape(2, 2)):
        write_safetensors(path, [("a", "U8", [4], buffer)], {})
        assert bytes(SafetensorsFile(path).bytes("a")) == b"\0\1\2\3"
    # The bytes of a file, even of the one that is being replaced.
    write_safetensors(path, [("b", "U8", [2, 2], SafetensorsFile(path).bytes("a"))], {})
    assert read(path) == {"b": ("U8", (2, 2), b"\0\1\2\3")}
    write_safetensors(path, [("a", "U8", [0], b"")], {})
    assert read(path) == {"a": ("U8", (0,), b"")}


def test_bytes_are_a_read_only_view_that_keeps_the_file(path: Path) -> None:
    values = np.arange(1000, dtype=np.float32)
    write(path, {"a": values}, {})
    view = SafetensorsFile(path).bytes("a")
    gc.collect()
    os.unlink(path)
    assert view.readonly and view.nbytes == 4000
    loaded = np.frombuffer(view, np.float32)
    np.testing.assert_array_equal(loaded, values)
    with pytest.raises(ValueError, match="read-only"):
        loaded[0] = 1


def test_wrong_arguments_are_named(path: Path) -> None:
    def expect(kind: type[Exception], text: str, *tensor: Any, metadata: Any = None) -> None:
        with pytest.raises(kind, match=text):
            write_safetensors(path, [tensor], metadata or {})
        assert not path.exists()

    ones = np.ones((4, 4), np.float32)
    expect(ValueError, r'tensor "a" has 64 bytes, but shape \[4\] of F32 takes 16', "a", "F32", [4], ones)
    expect(ValueError, 'unknown dtype "float32"; the dtypes are BOOL', "a", "float32", [4, 4], ones)
    expect(ValueError, "not contiguous", "a", "F32", [4, 2], ones[:, ::2])
    expect(ValueError, "not contiguous", "a", "F32", [4, 4], ones.T)
    expect(ValueError, "negative axis", "a", "F32", [-4, -4], ones)
    expect(TypeError, "incompatible", "a", "F32", [4, 4], ones.tolist())
    expect(TypeError, "incompatible", "a", "F32", [4, 4], None)
    expect(TypeError, "incompatible", "a", "F32", [4, 4], ones, metadata={"a": 1})
    with pytest.raises(ValueError, match='two tensors are named "a"'):
        write_safetensors(path, [("a", "F32", [4, 4], ones)] * 2, {})


def test_missing_tensors_and_files(path: Path) -> None:
    write(path, {"a": array("U8", (1,))}, {})
    file = SafetensorsFile(str(path))
    assert file.path == path
    with pytest.raises(KeyError, match=r"no tensor named 'b' in .*x\.safetensors"):
        file.info("b")
    with pytest.raises(KeyError, match="no tensor named 'b'"):
        file.bytes("b")
    with pytest.raises(FileNotFoundError, match=r"cannot open .*missing") as caught:
        SafetensorsFile(path.parent / "missing")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(IsADirectoryError):
        SafetensorsFile(path.parent)
    with pytest.raises(FileNotFoundError, match="no-folder"):
        write_safetensors(path.parent / "no-folder" / "x", [], {})


def test_altered_files_raise_file_corrupt(path: Path) -> None:
    write(path, {"a": array("F32", (8,))}, {})
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header == {"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}
    for altered in (content[:-1], content + b"\0", content[:5], b"", content[:9], content.replace(b"[8]", b"[9]")):
        path.write_bytes(altered)
        with pytest.raises(FileCorrupt, match=r"x\.safetensors: "):
            SafetensorsFile(path)
        assert issubclass(FileCorrupt, ValueError)


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    write(path, {"a": array("U8", (10,))}, {})
    before = path.read_bytes()
    # A limit on file sizes stands for the full disk; in a child, since the hard limit cannot be raised again.
    program = (
        "import errno, sys, narrowgauge._native as native\n"
        "try:\n"
        "    native.write_safetensors(sys.argv[1], [('a', 'U8', [1 << 20], bytes(1 << 20))], {})\n"
        "except OSError as error:\n"
        "    assert error.errno == errno.EFBIG and sys.argv[1] in str(error), error\n"
        "    sys.exit(7)\n"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    child = subprocess.run([sys.executable, "-B", "-c", program, str(path)], preexec_fn=limit)
    assert child.returncode == 7
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_threads_share_one_file(path: Path) -> None:
    arrays = {f"t{i}": array("F32", (50, 50), i) for i in range(20)}
    write(path, arrays, {})
    file = SafetensorsFile(path)
    wrong: list[str] = []

    def check() -> None:
        for _ in range(20):
            wrong.extend(name for name, a in arrays.items() if bytes(file.bytes(name)) != a.tobytes())

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
