"""Each kind of error arrives as the Python exception that its name promises."""

import copy
import errno
import pickle
from pathlib import Path

import narrowgauge as ng
import pytest
import torch
from narrowgauge import _native


def test_hierarchy() -> None:
    assert issubclass(ng.Error, RuntimeError) and issubclass(ng.PerformanceWarning, UserWarning)
    assert issubclass(ng.FileCorrupt, ng.Error) and issubclass(ng.FileCorrupt, ValueError)
    error = pickle.loads(pickle.dumps(ng.FileCorrupt("why")))
    assert type(error) is ng.FileCorrupt and str(copy.copy(error)) == "why"


def test_invalid_argument_is_a_value_error() -> None:
    with pytest.raises(ValueError) as caught:
        _native.packed_bytes(ng.fp6, -1, 16)
    assert type(caught.value) is ValueError and "-1" in str(caught.value)


def test_sizes_that_overflow() -> None:
    for rows, cols in ((2**62, 16), (2**40, 2**40)):
        with pytest.raises(ValueError):
            _native.packed_bytes(ng.fp6, rows, cols)


def test_system_error_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        _native.SafetensorsFile(tmp_path / "absent.safetensors")
    assert caught.value.errno == errno.ENOENT and "absent.safetensors" in str(caught.value)


def test_corrupt_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(ng.FileCorrupt) as caught:
        _native.SafetensorsFile(path)
    assert type(caught.value) is ng.FileCorrupt


def test_memory_that_cannot_be_had() -> None:
    q = ng.quantize(torch.zeros(1, 0), ng.fp6)
    with pytest.raises((MemoryError, RuntimeError, ValueError)):
        q._arrays.empty((2**50,), "float32")


def test_messages_name_what_was_seen_and_what_was_expected() -> None:
    q = ng.quantize(torch.randn(8, 16), ng.int8).pack()
    with pytest.raises(ValueError, match=r"x has shape \[3, 15\], expected \[..., 16\]"):
        ng.linear(torch.randn(3, 15), q)
    with pytest.raises(ValueError, match="index 1 is 8; expected 0 <= index < 8"):
        _native.gather_rows(q._matrix, torch.tensor([0, 8]), torch.empty(2, 16))


def test_import_is_light() -> None:
    import subprocess
    import sys

    code = """
import sys, narrowgauge
heavy = {"torch", "numpy", "typer", "rich", "transformers", "gguf", "matplotlib", "safetensors", "ml_dtypes"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert "quantize_model" in dir(narrowgauge)
try:
    narrowgauge.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
