"""Narrow matrices packed for a GPU, and linear there: from Python, as a module and as an operator."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import narrowgauge as ng
import numpy as np
import pytest

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]
FORMATS = ["fp6", "nvfp4", "uint5:g32:fp16", "int8", "nf4", "fp8"]
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32).astype(dtype)


def same_arrays(a: ng.QTensor, b: ng.QTensor) -> bool:
    pairs = zip(a.to("cpu").canonical(), b.to("cpu").canonical(), strict=True)
    return all((x is None and y is None) or np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def check(y: np.ndarray, x: np.ndarray, q: ng.QTensor, bias: np.ndarray | None = None) -> None:
    """Asserts the bound that linear.hpp states."""
    w, x64 = q.dequantize().astype(np.float64), x.astype(np.float64)
    exact, size = x64 @ w.T, np.abs(x64) @ np.abs(w).T
    if bias is not None:
        exact, size = exact + bias.astype(np.float64), size + np.abs(bias.astype(np.float64))
    bound = 2.0**-24 * (16 + q.cols / 16) * size + ROUNDOFF[y.dtype.name] * np.abs(exact) + 2.0**-25
    assert (np.abs(y.astype(np.float64) - exact) <= bound).all()


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_packing_keeps_every_bit(format: str) -> None:
    """From the host, from the GPU in canonical form, and back by every way."""
    q = ng.quantize(normal(70, 131), format)
    there = q.__copy__().pack("cuda")
    assert there.is_packed and there.device == "cuda:0" and there.packed.device == "cuda:0" and not q.is_packed
    assert there.packed.nbytes == ng._native.packed_bytes(q.format, 70, 131, "cuda")
    assert repr(there) == f"QTensor(shape=(70, 131), format='{q.format}', cuda:0, packed, nbytes={q.nbytes})"
    assert there.pack() is there and there.pack("cuda:0") is there and there.to("cuda") is there
    canonical = q.to("cuda")
    assert same_arrays(canonical, q) and same_arrays(canonical.pack(), q)  # where it is
    block = np.from_dlpack(there.packed.to("cpu"))
    assert canonical.is_packed and np.array_equal(np.from_dlpack(canonical.packed.to("cpu")), block)
    host = there.to("cpu")
    assert host.device == "cpu" and not host.is_packed and same_arrays(host, q)
    assert there.codes.device == "cuda:0" and there.is_packed
    assert there.unpack() is there and not there.is_packed and there.device == "cuda:0" and same_arrays(there, q)
    back = there.pack().pack("cpu")
    assert back is there and back.device == "cpu" and same_arrays(back, q)
    assert same_arrays(back.pack("cuda").unpack(), q)


@pytest.mark.usefixtures("kernels")
def test_packed_matrices_are_dequantized() -> None:
    q = ng.quantize(normal(20, 100), ng.fp6)
    there = q.__copy__().pack("cuda").dequantize("float16")
    assert there.device == "cuda:0" and np.array_equal(np.from_dlpack(there.to("cpu")), q.dequantize("float16"))


def test_packed_matrices_are_saved_copied_and_assigned(tmp_path: Path) -> None:
    q, other = (ng.quantize(normal(rows, 96)[:24], ng.int4) for rows in (24, 48))
    there = q.__copy__().pack("cuda")
    there.save(tmp_path / "w.safetensors")
    assert same_arrays(ng.QTensor.load(tmp_path / "w.safetensors", library="numpy"), q)
    with ng.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"q": there})
    assert same_arrays(ng.load_checkpoint(tmp_path / "run")["q"], q)

    pickled = pickle.loads(pickle.dumps(there))
    assert pickled.is_packed and same_arrays(pickled, q)
    deep = copy.deepcopy(there)
    assert deep.is_packed and deep.device == "cuda:0" and same_arrays(deep, q)
    block = there.packed
    there.assign(other.__copy__().pack())
    assert there.packed is block and same_arrays(there, other) and same_arrays(deep, q)
    ng.load_checkpoint(tmp_path / "run", into={"q": there})
    assert there.packed is block and there.device == "cuda:0" and same_arrays(there, q)
    q.assign(other.pack("cuda"))
    assert not q.is_packed and q.device == "cpu" and same_arrays(q, other)


def test_torch_without_cuda_cannot_have_matrices_there() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("torch has a CUDA device")
    q = ng.quantize(torch.ones(4, 16), ng.fp6)
    for move in (q.pack, q.to):
        with pytest.raises(ng.CudaError, match=r"torch .* has no CUDA device, expected one for tensors on cuda:0"):
            move("cuda")
    assert not q.is_packed and q.device == "cpu"


# --- linear ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(130,), (2, 3, 130)])
@pytest.mark.parametrize("format", FORMATS)
def test_linear(xp: Any, format: str, shape: tuple[int, ...], dtype: str) -> None:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    q, x, bias = ng.quantize(normal(70, 130), format), normal(*shape, dtype=kind), normal(70)
    there = q.__copy__().pack("cuda")
    for b in (None, bias):
        y = xp.get(ng.linear(xp.put(x), there, None if b is None else xp.put(b)))
        assert y.shape == (*shape[:-1], 70) and y.dtype == kind
        check(y, x, q, b)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("rows", [3, 20])
def test_residual(xp: Any, rows: int) -> None:
    """Added in fp32 before y is rounded: what is left of y shows that the product was not rounded first."""
    q, x = ng.quantize(normal(70, 130), ng.fp6), normal(rows, 130, dtype=np.float16)
    there, on_cpu = q.__copy__().pack("cuda"), q.__copy__().pack()
    residual = (-ng.linear(x.astype(np.float32), on_cpu)).astype(np.float16)
    y = xp.get(ng.linear(xp.put(x), there, residual=xp.put(residual))).astype(float)
    expected = x.astype(float) @ q.dequantize("float32").astype(float).T + residual.astype(float)
    assert np.abs(y).max() < 2e-2 and np.abs(y - expected).max() < 2e-4
    assert np.abs(ng.linear(x, on_cpu, residual=residual) - expected).max() < 2e-4
    with pytest.raises(ValueError, match="residual is on device cpu, expected cuda:0, where q is"):
        ng.linear(xp.put(x), there, residual=residual)


@pytest.mark.usefixtures("kernels")
def test_work_goes_to_the_current_stream() -> None:
    """Also that of a product whose columns are split, which needs a workspace; the same bits every time."""
    q, x = ng.quantize(normal(64, 4096), ng.fp6), normal(1, 4096, dtype=np.float16)
    there, there_x = q.__copy__().pack("cuda"), ng.Tensor.from_dlpack(x).to("cuda")
    with ng.cuda.Stream() as stream:
        results = [ng.linear(there_x, there) for _ in range(3)]
        stream.synchronize()
    with ng.cuda.Stream():
        results.append(ng.linear(there_x, there).to("cpu"))
    first, *others = (np.from_dlpack(y.to("cpu")) for y in results)
    check(first, x, q)
    assert all(np.array_equal(first, y) for y in others)


@pytest.mark.usefixtures("kernels")
def test_nothing_waits() -> None:
    """On a driver that runs nothing until somebody waits for it."""
    if "LD_LIBRARY_PATH" not in os.environ:
        pytest.skip("only the simulated driver can be asked to be late")
    code = """
import numpy as np, narrowgauge as ng
q = ng.quantize(np.ones((64, 4096), np.float32), ng.fp6).pack("cuda")
x = ng.Tensor.from_dlpack(np.ones((1, 4096), np.float16)).to("cuda")
with ng.cuda.Stream() as stream:
    y = ng.linear(x, q)
    assert not stream.is_done()
    stream.synchronize()
assert np.array_equal(np.from_dlpack(y.to("cpu")), np.full((1, 64), 4096, np.float16))
"""
    environment = {**os.environ, "SIMGPU_DELAY": "adversarial"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("kernels")
def test_two_gpus() -> None:
    if "LD_LIBRARY_PATH" not in os.environ:
        pytest.skip("the number of devices is the simulated driver's to choose")
    code = """
import numpy as np, narrowgauge as ng
if ng.cuda.device_count() != 2:
    raise SystemExit(77)
x = ng.Tensor.from_dlpack(np.ones((2, 64), np.float16))
q = ng.quantize(np.ones((16, 64), np.float32), ng.int8).pack("cuda:1")
assert q.packed.device == q.codes.device == q.device == "cuda:1"
for device, other in (("cuda:1", "cuda:0"), ("cuda:0", "cuda:1")):
    assert q.pack(device) is q and q.device == device
    y = ng.linear(x.to(device), q)
    assert y.device == device and np.array_equal(np.from_dlpack(y.to("cpu")), np.full((2, 16), 64, np.float16))
    try:
        ng.linear(x.to(other), q)
    except ValueError as error:
        assert f"x is on device {other}, expected {device}" in str(error), error
    else:
        raise AssertionError("no error")
    assert np.array_equal(np.from_dlpack(q.to(other).codes.to("cpu")), np.full((16, 64), 127, np.uint8))
"""
    environment = {**os.environ, "SIMGPU_DEVICES": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode == 77:
        pytest.skip("there is one GPU")
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("kernels")
def test_other_libraries_cross_by_dlpack() -> None:
    class Foreign:
        """An array of a library that narrowgauge does not know, as CuPy is."""

        def __init__(self, tensor: ng.Tensor) -> None:
            self.tensor, self.__dlpack__, self.__dlpack_device__ = tensor, tensor.__dlpack__, tensor.__dlpack_device__

    q, x = ng.quantize(normal(16, 64), ng.int8).pack("cuda"), normal(3, 64, dtype=np.float16)
    y = ng.linear(Foreign(ng.Tensor.from_dlpack(x).to("cuda")), q)
    check(np.from_dlpack(y.to("cpu")), x, q.to("cpu"))


@pytest.mark.usefixtures("kernels")
def test_canonical_weights_work_with_a_warning() -> None:
    q, x = ng.quantize(normal(16, 64), ng.fp6), normal(2, 64, dtype=np.float16)
    there = q.to("cuda")
    with pytest.warns(ng.PerformanceWarning, match=r"q\.pack"):
        y = ng.linear(ng.Tensor.from_dlpack(x).to("cuda"), there)
    check(np.from_dlpack(y.to("cpu")), x, q)
    assert not there.is_packed


@pytest.mark.usefixtures("kernels")
def test_empty() -> None:
    for rows, n in ((0, 16), (3, 0)):
        q = ng.quantize(normal(n, 64), ng.fp6).pack("cuda")
        y = ng.linear(ng.Tensor.from_dlpack(normal(rows, 64, dtype=np.float16)).to("cuda"), q)
        assert y.shape == (rows, n) and y.device == "cuda:0"


def test_wrong_arguments() -> None:
    q = ng.quantize(normal(16, 64), ng.fp6)
    here = normal(2, 64, dtype=np.float16)
    there, packed, bias = ng.Tensor.from_dlpack(here).to("cuda"), q.__copy__().pack("cuda"), normal(16)
    for canonical in (q, q.__copy__().pack()):
        with pytest.raises(ValueError, match="x is on device cuda:0, expected cpu, where q is"):
            ng.linear(there, canonical)
    for moved in (packed, q.to("cuda")):
        with pytest.raises(ValueError, match="x is on device cpu, expected cuda:0, where q is"):
            ng.linear(here, moved)
    with pytest.raises(ValueError, match="bias is on device cpu, expected cuda:0, where q is"):
        ng.linear(there, packed, bias)
    with pytest.raises(ValueError, match="bias is on device cuda:0, expected cpu, where q is"):
        ng.linear(here, q.pack(), ng.Tensor.from_dlpack(bias).to("cuda"))
    with pytest.raises(TypeError, match="x has dtype float32, expected float16, bfloat16 on cuda:0"):
        ng.linear(ng.Tensor.from_dlpack(normal(2, 64)).to("cuda"), packed)
    with pytest.raises(ValueError, match=r"x has shape \[2, 32\], expected \[..., 64\]"):
        ng.linear(ng.Tensor.from_dlpack(normal(2, 32, dtype=np.float16)).to("cuda"), packed)
    with pytest.raises(ValueError, match=r"bias has shape \[15\], expected \[16\]"):
        ng.linear(there, packed, ng.Tensor.from_dlpack(normal(15)).to("cuda"))
    with pytest.raises(ValueError, match="dy is on cuda:0, expected host memory|packed is on cuda:0"):
        ng._native.linear_backward_input(there, packed._matrix)
    with pytest.raises(ValueError, match="packed is on cuda:0, expected host memory"):
        ng._native.gather_rows(packed._matrix, np.arange(2), normal(2, 64))
    with pytest.raises(ValueError, match=r"packed has \d+ bytes, expected \d+"):
        ng._native.PackedMatrix(ng._native.empty([q.packed.nbytes], "uint8", "cuda"), q.format, 16, 64)
    with pytest.raises(ValueError, match="there is no device cuda:7"):
        q.pack("cuda:7")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        q.pack("gpu")
    assert q.device == "cpu" and q.is_packed


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
def test_modules_move() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device")
    first = ng.nn.Linear.from_linear(torch.nn.Linear(96, 48), ng.fp6)
    tied = ng.nn.Linear(first.weight)
    model, x = torch.nn.ModuleDict({"first": first, "tied": tied}).half(), torch.randn(3, 96).half()
    expected, state = first(x), {name: value.clone() for name, value in model.state_dict().items()}
    model.to("cuda")
    assert first.packed.is_cuda and first.packed is tied.packed and first.weight.device == "cuda:0"
    assert torch.allclose(first(x.cuda()).cpu(), expected, rtol=1e-2, atol=1e-2)
    assert all(torch.equal(value.cpu(), state[name]) for name, value in model.state_dict().items())
    model.load_state_dict(state)
    model.to("cpu")
    assert torch.equal(first(x), expected) and first.packed is tied.packed


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
def test_the_example_of_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text(encoding="utf-8")
    section = page[page.index("\n## Linear\n") :]
    (program,) = re.findall(r"```python\n(.*?)```", section.split("\n## ", 2)[1], re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(program, "docs/cuda.md", "exec"), names)
    check(np.from_dlpack(names["y"].to("cpu")), names["x"], names["q"].to("cpu"), names["bias"])
