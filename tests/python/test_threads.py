"""Threads, forks and forced instruction sets."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import narrowgauge as ng
import pytest
import torch
from narrowgauge import _native
from torch.utils.data import DataLoader, Dataset


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("activations", ["exact", "int16", "int8"])
def test_many_threads_at_once(activations: str) -> None:
    q = ng.quantize(torch.randn(192, 576), ng.fp6).pack()
    xs = [torch.randn(1 + i % 5, 576) for i in range(64)]
    expected = [ng.linear(x, q, activations=activations) for x in xs]
    barrier = threading.Barrier(8)

    def work(start: int) -> bool:
        barrier.wait()
        order = [(start * 8 + i) % 64 for i in range(64)]
        return all(torch.equal(ng.linear(xs[i], q, activations=activations), expected[i]) for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_torch_multiplies_between(activations: str) -> None:
    """torch's bf16 products (oneDNN, with AMX where there is one) and ours, in turns in two threads and on the threads
    of OpenMP that both share: with AMX each configures the tiles of these threads for itself."""
    q = ng.quantize(torch.randn(192, 576), ng.fp6).pack()
    w = torch.randn(192, 576).bfloat16()
    xs = [torch.randn(rows, 576).bfloat16() for rows in (1, 3, 16, 40)]

    def products(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ng.linear(x, q, activations=activations), torch.nn.functional.linear(x, w)

    expected = [products(x) for x in xs]
    barrier = threading.Barrier(2)

    def work(start: int) -> bool:
        barrier.wait()
        order = [(start + i) % len(xs) for i in range(200)]
        return all(all(map(torch.equal, products(xs[i]), expected[i])) for i in order)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


def test_many_threads_quantize() -> None:
    w = torch.randn(64, 256)
    expected = ng.quantize(w, ng.int4).codes
    with ThreadPoolExecutor(8) as pool:
        for q in pool.map(lambda _: ng.quantize(w, ng.int4).pack(), range(32)):
            assert torch.equal(q.codes, expected)


class Rows(Dataset):
    def __init__(self, q: ng.QTensor) -> None:
        self.q = q

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return ng.linear(torch.full((256,), float(index)), self.q)


def test_fork_after_use() -> None:
    q = ng.quantize(torch.randn(512, 256), ng.fp6).pack()
    data = Rows(q)
    expected = torch.stack([data[i] for i in range(8)])  # uses the threads before the fork
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=120)
    assert torch.equal(torch.cat(list(loader)), expected)
    assert torch.equal(data[3], expected[3])  # and after it


def test_fork_after_use_without_torch() -> None:
    code = """
import os, numpy as np, narrowgauge as ng
w = np.random.default_rng(0).standard_normal((512, 256), dtype=np.float32)
q = ng.quantize(w, ng.fp6).pack()
y = ng.linear(w, q)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(ng.linear(w, q), y) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert np.array_equal(ng.linear(w, q), y)
assert ng._native.executor_name() == "pool"
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_threads_follow_torch() -> None:
    code = """
import torch, narrowgauge as ng
q = ng.quantize(torch.randn(64, 64), ng.fp6).pack()
assert "openmp" in ng._native.executor_name(), ng._native.executor_name()
torch.set_num_threads(1)
ng.linear(torch.randn(4, 64), q)
assert ng.threads() == 1, ng.threads()
torch.set_num_threads(2)
ng.linear(torch.randn(4, 64), q)
assert ng.threads() == 2, ng.threads()
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_set_threads_is_checked() -> None:
    with pytest.raises(ValueError, match="0"):
        ng.set_threads(0)


def test_results_do_not_depend_on_threads() -> None:
    code = """
import sys, numpy as np, narrowgauge as ng
w = np.random.default_rng(0).standard_normal((333, 257), dtype=np.float32)
q = ng.quantize(w, ng.fp6).pack()
ys = []
for count in (1, 2, 5):
    ng.set_threads(count)
    ys.append(ng.linear(w, q))
assert all(np.array_equal(y, ys[0]) for y in ys)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_forced_isa(isa: str) -> None:
    code = """
import numpy as np, narrowgauge as ng
w = np.random.default_rng(0).standard_normal((37, 200), dtype=np.float32)
q = ng.quantize(w, ng.fp6)
d = q.dequantize()
assert np.abs(ng.linear(w, q.pack()) - w @ d.T).max() < 1e-3
print(ng._native.isa(), q.codes.sum(dtype=np.uint64), q.scales.view(np.uint16).sum(dtype=np.uint64))
"""
    result = run(code, NARROWGAUGE_ISA=isa)
    assert result.returncode == 0, result.stderr
    name, *sums = result.stdout.split()
    assert name == isa
    assert sums == run(code, NARROWGAUGE_ISA="portable").stdout.split()[1:]


def test_isa_that_is_unknown_or_missing() -> None:
    result = run("import narrowgauge as ng; print(ng._native.isa())", NARROWGAUGE_ISA="mmx")
    assert result.returncode != 0 and "ValueError" in result.stderr and "mmx" in result.stderr
    with pytest.raises(ValueError, match="mmx.*portable.*avx2.*avx512"):
        _native.force_isa("mmx")
    lacking = [name for name in ("avx2", "avx512") if name not in _native.supported_isas()]
    for name in lacking:
        with pytest.raises(ValueError, match=name):
            _native.force_isa(name)
        result = run("import narrowgauge as ng; print(ng._native.isa())", NARROWGAUGE_ISA=name)
        assert "ValueError" in result.stderr and name in result.stderr


def test_the_gil_is_free_during_long_calls() -> None:
    q = ng.quantize(torch.randn(1024, 1024), ng.fp6).pack()
    x = torch.randn(512, 1024)
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.0005):
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    for _ in range(10):
        ng.linear(x, q)
    stop.set()
    ticker.join()
    assert ticks > 0
