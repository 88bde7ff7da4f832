"""The file tier as Python sees it: arrays of every kind, errors, lifetimes. Its workings: tests/cpp/io."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import narrowgauge as ng
import numpy as np
import pytest


@pytest.fixture
def tier(tmp_path: Path) -> Any:
    with ng.FileTier(tmp_path / "tier") as tier:
        yield tier


def test_arrays_come_back(tier: Any) -> None:
    arrays = [
        np.arange(10, dtype=np.float32),
        np.zeros((3, 0)),
        np.array(7 + 2j),
        np.random.default_rng(0).standard_normal((300, 1000)),
        np.array([True, False, True]),
    ]
    for key, array in enumerate(arrays):
        tier.put(key, array)
    for key, array in enumerate(arrays):
        out = np.empty_like(array)
        tier.get(key, out)
        np.testing.assert_array_equal(out, array)
    assert tier.in_use >= sum(array.nbytes for array in arrays)


def test_torch_tensors_of_any_dtype(tier: Any) -> None:
    torch = pytest.importorskip("torch")
    for key, dtype in enumerate((torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64)):
        tensor = torch.randint(0, 2, (1000,)).to(dtype)
        tier.put(key, tensor)
        out = torch.zeros(1000, dtype=dtype)
        tier.get(key, out)
        assert torch.equal(out.view(torch.uint8), tensor.view(torch.uint8))


def test_only_the_bytes_count(tier: Any) -> None:
    tier.put(2**64 - 1, np.array([1.0, 2.0], dtype=np.float32))
    out = bytearray(8)
    tier.get(2**64 - 1, out)
    assert bytes(out) == np.array([1.0, 2.0], dtype=np.float32).tobytes()


def test_refusals(tier: Any, tmp_path: Path) -> None:
    array = np.zeros((4, 4))
    tier.put(1, array)
    with pytest.raises(ValueError, match="no buffer under key 2"):
        tier.get(2, array)
    with pytest.raises(ValueError, match="has 128 bytes, asked for were 64"):
        tier.get(1, np.zeros(8))
    with pytest.raises(ValueError, match="not contiguous"):
        tier.get(1, array.T[::2])
    with pytest.raises(TypeError):
        tier.get(1, b"\0" * 128)  # read-only
    with pytest.raises(TypeError):
        tier.put(-1, array)
    with pytest.raises(TypeError):
        tier.put(1, "text")
    tier.drop(1)
    tier.drop(1)
    with pytest.raises(ValueError, match="no buffer under key 1"):
        tier.get(1, array)
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(FileExistsError):
        ng.FileTier(tmp_path / "taken")
    with pytest.raises(FileNotFoundError):
        ng.FileTier(tmp_path / "missing" / "tier")


def test_limit(tmp_path: Path) -> None:
    with ng.FileTier(tmp_path / "tier", limit=8192) as tier:
        tier.put(1, np.zeros(8192, dtype=np.uint8))
        with pytest.raises(MemoryError, match="8192 of 8192 are in use"):
            tier.put(2, np.zeros(1))
        tier.drop(1)
        tier.put(2, np.zeros(1))
        assert tier.in_use == 4096


def test_closing(tmp_path: Path) -> None:
    tier = ng.FileTier(tmp_path / "tier")
    assert list(tmp_path.iterdir()) == []  # the name goes at once
    tier.close()
    with pytest.raises(ValueError, match="closed"):
        tier.put(1, np.zeros(1))
    with pytest.raises(ValueError, match="closed"):
        tier.close()


def test_threads(tier: Any) -> None:
    def work(first: int) -> None:
        rng = np.random.default_rng(first)
        for round in range(20):
            array = rng.standard_normal(int(rng.integers(1, 50_000)))
            tier.put(first + round % 5, array)
            out = np.empty_like(array)
            tier.get(first + round % 5, out)
            if not np.array_equal(out, array):
                failures.append(round)

    failures: list[int] = []
    threads = [threading.Thread(target=work, args=(10 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_child_process_is_kept_out(tier: Any) -> None:
    tier.put(1, np.ones(3))
    child = os.fork()
    if child == 0:
        try:
            tier.get(1, np.zeros(3))
        except ng.Error as error:
            os._exit(0 if "before fork()" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    out = np.zeros(3)
    tier.get(1, out)
    np.testing.assert_array_equal(out, np.ones(3))
