"""Tensors on a GPU: copies, DLPack and CUDA's array interface, streams and events, and what is refused."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import ml_dtypes
import narrowgauge as ng
import numpy as np
import pytest

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]

DTYPES = [
    "float32",
    "float16",
    "float64",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "bool",
]


def numbers(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (100_003,)])
def test_copies_there_and_back(xp: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    array = numbers(shape, dtype)
    tensor = xp.put(array)
    assert np.array_equal(xp.get(tensor), array)


def test_what_a_tensor_says_of_itself() -> None:
    tensor = ng.Tensor.from_dlpack(numbers((4, 6))).to("cuda:0")
    assert (tensor.device, tensor.shape, tensor.dtype, tensor.nbytes) == ("cuda:0", (4, 6), "float32", 96)
    assert "device=cuda:0" in repr(tensor)
    assert tensor.to("cuda").data_ptr() == tensor.data_ptr()  # it is there
    assert tensor.__dlpack_device__() == (2, 0)
    interface = tensor.__cuda_array_interface__
    assert interface["shape"] == (4, 6) and interface["typestr"] == "<f4" and interface["strides"] == (24, 4)
    assert interface["data"] == (tensor.data_ptr(), False) and interface["version"] == 3 and interface["stream"] == 1
    with ng.cuda.Stream() as stream:
        assert tensor.__cuda_array_interface__["stream"] == stream.handle
    with pytest.raises(AttributeError, match="bfloat16"):
        _ = ng.Tensor.from_dlpack(numbers((2,), np.uint16)).to("cuda").view("bfloat16").__cuda_array_interface__
    with pytest.raises(AttributeError, match="host memory"):
        _ = tensor.to("cpu").__cuda_array_interface__


def test_reshape_and_view_share_the_memory() -> None:
    array = numbers((4, 6))
    tensor = ng.Tensor.from_dlpack(array).to("cuda")
    flat = tensor.reshape([24])
    assert flat.shape == (24,) and flat.data_ptr() == tensor.data_ptr()
    with pytest.raises(ValueError, match=r"\[4, 6\] cannot be reshaped to \[5, 5\]"):
        tensor.reshape([5, 5])
    assert np.array_equal(np.from_dlpack(tensor.view("int32").to("cpu")), array.view(np.int32))
    with pytest.raises(ValueError, match="another width"):
        tensor.view("uint8")


def test_sources_with_strides_are_made_dense_on_the_host() -> None:
    array = numbers((4, 6))[:, ::2]
    assert np.array_equal(np.from_dlpack(ng.Tensor.from_dlpack(array).to("cuda").to("cpu")), array)


def test_copy_from(xp: Any) -> None:
    array, other = numbers((7, 3)), numbers((7, 3)) + 1
    target = ng.Tensor.from_dlpack(xp.put(array))
    target.copy_from(ng.Tensor.from_dlpack(xp.put(other)))
    assert np.array_equal(np.from_dlpack(target.to("cpu")), other)
    target.copy_from(ng.Tensor.from_dlpack(array))
    host = ng.HostPool().empty((7, 3), "f32")
    host.copy_from(target)
    assert np.array_equal(np.from_dlpack(host), array)
    with pytest.raises(ValueError, match=r"float32\[7, 2\] is copied into one of float32\[7, 3\]"):
        target.copy_from(ng.Tensor.from_dlpack(numbers((7, 2))))
    read_only = numbers((7, 3))
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        ng.Tensor.from_dlpack(read_only).copy_from(target)


def test_background_copies_are_done_after_the_stream() -> None:
    array = numbers((1 << 16,))
    source = ng.Tensor.from_dlpack(array)
    with ng.cuda.Stream() as stream:
        there = source.to("cuda", non_blocking=True)
        back = ng.HostPool().empty((1 << 16,), "f32")
        back.copy_from(there, non_blocking=True)
        stream.synchronize()
        assert stream.is_done()
    assert np.array_equal(np.from_dlpack(back), array)


def test_streams_and_events() -> None:
    first, second = ng.cuda.Stream(), ng.cuda.Stream(0)
    assert first.handle != second.handle and first.device == 0 and not first.is_capturing()
    assert ng.cuda.current_stream().handle == 0
    with first:
        with second:
            assert ng.cuda.current_stream(0).handle == second.handle
        assert ng.cuda.current_stream().handle == first.handle
        a = ng.Tensor.from_dlpack(numbers((64,))).to("cuda", non_blocking=True)
    event = ng.cuda.Event()
    assert event.is_done()  # never recorded
    event.record(first)
    second.wait(event)
    with second:
        assert np.array_equal(np.from_dlpack(a.to("cpu")), numbers((64,)))
    event.synchronize()
    borrowed = ng.cuda.Stream(0, first.handle)
    assert borrowed.handle == first.handle
    borrowed.synchronize()
    with pytest.raises(ValueError, match="not entered last"):
        first.__exit__(None, None, None)
    with pytest.raises(ValueError, match="there is no device cuda:99"):
        ng.cuda.Stream(99)


# --- DLPack ----------------------------------------------------------------------------------------------------------


class Foreign:
    """Another library's array on the GPU, which notes the stream that it is asked for."""

    def __init__(self, tensor: ng.Tensor, device: tuple[int, int] = (2, 0)) -> None:
        self.tensor, self.device, self.streams = tensor, device, []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None, max_version: tuple[int, int] | None = None) -> Any:
        self.streams.append(stream)
        return self.tensor.__dlpack__(stream=stream, max_version=max_version)


def test_dlpack_orders_both_sides() -> None:
    array = numbers((5, 3))
    foreign = Foreign(ng.Tensor.from_dlpack(array).to("cuda"))
    tensor = ng.Tensor.from_dlpack(foreign)
    assert tensor.device == "cuda:0" and tensor.data_ptr() == foreign.tensor.data_ptr()
    with ng.cuda.Stream() as stream:
        again = ng.Tensor.from_dlpack(foreign)
    assert foreign.streams == [1, stream.handle]
    del foreign, tensor
    assert np.array_equal(np.from_dlpack(again.to("cpu")), array)


def test_dlpack_exports() -> None:
    array = numbers((5, 3))
    tensor = ng.Tensor.from_dlpack(array).to("cuda")
    assert np.array_equal(np.from_dlpack(tensor, device="cpu"), array)  # numpy 2.1 and later ask for the host
    with pytest.raises(BufferError, match="by a copy only"):
        tensor.__dlpack__(dl_device=(1, 0), copy=False)
    with pytest.raises(BufferError, match=r"cannot be exported to DLPack device \(2, 1\)"):
        tensor.__dlpack__(dl_device=(2, 1))
    for stream in (0, -2):
        with pytest.raises(ValueError, match=f"stream is {stream}"):
            tensor.__dlpack__(stream=stream)
    tensor.__dlpack__(stream=-1)
    with pytest.raises(ValueError, match="host memory"):
        tensor.to("cpu").__dlpack__(stream=1)
    copied = ng.Tensor.from_dlpack(Copying(tensor))
    assert copied.data_ptr() != tensor.data_ptr()
    assert np.array_equal(np.from_dlpack(copied.to("cpu")), array)


class Copying:
    def __init__(self, tensor: ng.Tensor) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.tensor.__dlpack__(copy=True, **arguments)


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A module with an array type that lends GPU memory through DLPack's exchange table, as torch does."""
    folder = tmp_path_factory.mktemp("producer")
    source = Path(__file__).with_name("cuda_producer.cpp")
    include = f"-I{sysconfig.get_path('include')}"
    bindings = f"-I{source.parents[2] / 'python' / 'bindings'}"
    library = folder / f"cuda_producer{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["c++", "-std=c++20", "-shared", "-fPIC", include, bindings, "-o", library, source], check=True)
    sys.path.insert(0, str(folder))
    try:
        import cuda_producer

        return cuda_producer
    finally:
        sys.path.remove(str(folder))


@pytest.mark.usefixtures("kernels")
def test_the_path_that_torch_takes(producer: Any) -> None:
    """Borrowed through the exchange table; the work goes to the producer's own stream."""
    w = numbers((32, 64)) - 50
    memory = ng.Tensor.from_dlpack(w).to("cuda")
    stream = ng.cuda.Stream()
    array = producer.Array(memory.data_ptr(), 32, 64, 0, stream.handle)
    format = ng.Format("int8:row:fp32")
    codes, scales = (
        ng._native.empty(shape, dtype, "cuda") for shape, dtype in (([32, 64], "uint8"), ([32, 1], "float32"))
    )
    ng._native.quantize(
        array, format, 32, 64, codes, scales, None, None, "absmax", "error", False, 0, False, False
    )  # fmt: skip
    assert producer.asked_for_stream() == 1
    stream.synchronize()
    expected = ng.quantize(w, format)
    assert np.array_equal(np.from_dlpack(codes.to("cpu")), expected.codes)
    assert np.array_equal(np.from_dlpack(scales.to("cpu")), expected.scales)
    assert ng._native.is_matrix(array, "x")
    with pytest.raises(ValueError, match="array is on cuda:0, expected host memory"):
        ng._native.stream_read(array)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("cols", "arrays"), [(128, 1), (4096, 2)], ids=["no workspace", "a workspace"])
def test_the_path_that_torch_takes_for_linear(producer: Any, cols: int, arrays: int) -> None:
    """y and the workspace are the producer's arrays, and the work goes to its stream."""
    x, w = ((numbers((rows, cols)) % 5 - 2).astype(np.float16) for rows in (2, 64))
    q = ng.quantize(w, ng.int8)
    memory, arena = ng.Tensor.from_dlpack(x).to("cuda"), ng._native.empty([1 << 20], "uint8", "cuda")
    stream = ng.cuda.Stream()
    array = producer.Array(memory.data_ptr(), 2, cols, 0, stream.handle, 16)
    with stream:
        packed = ng.quantize(w, ng.int8).pack("cuda")
    producer.allocate_from(arena.data_ptr())
    before = producer.made()
    y = ng._native.linear(array, packed._matrix)
    assert type(y) is producer.Array and producer.made() - before == arrays
    stream.synchronize()
    begin = y.data - arena.data_ptr()
    got = np.from_dlpack(arena.to("cpu"))[begin : begin + 2 * 2 * 64].view(np.float16).reshape(2, 64)
    expected = x.astype(np.float64) @ q.dequantize().astype(np.float64).T
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    producer.allocate_from(0)
    with pytest.raises(MemoryError, match="the test gave no memory"):
        ng._native.linear(array, packed._matrix)
    with pytest.raises(ValueError, match="x is on cuda:0, expected cpu"):
        ng._native.linear(array, q.pack()._matrix)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    tensor = ng.Tensor.from_dlpack(numbers((4, 4)))
    for name in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", ""):
        with pytest.raises(ValueError, match="unknown device"):
            tensor.to(name)
    with pytest.raises(ValueError, match="there is no device cuda:7"):
        tensor.to("cuda:7")
    with pytest.raises(ValueError, match="DLPack type 13"):
        ng.Tensor.from_dlpack(Foreign(tensor, (13, 0)))
    there = tensor.to("cuda")
    with pytest.raises(ValueError, match="array is on cuda:0, expected host memory"):
        ng._native.stream_read(there)


def test_a_forked_child_is_refused() -> None:
    ng.cuda.Stream()
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe()

    def child() -> None:
        try:
            ng.cuda.Stream()
        except ng.CudaError as error:
            send.send(str(error))
        else:
            send.send("no error")

    process = context.Process(target=child)
    process.start()
    assert "forked child" in receive.recv()
    process.join()


# --- QTensors --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
def test_qtensors_move(xp: Any) -> None:
    w = numbers((24, 96)) - 50
    there = ng.quantize(xp.put(w), ng.nvfp4)
    here = ng.quantize(w, ng.nvfp4)
    assert there.device == "cuda:0" and here.device == "cpu" and there.nbytes == here.nbytes
    for moved in (there.to("cpu"), pickle.loads(pickle.dumps(there)).to("cpu"), here.to("cuda").to("cpu")):
        assert moved.device == "cpu"
        for mine, its in zip(moved.canonical(), here.canonical(), strict=True):
            assert (mine is None) == (its is None)
            assert mine is None or np.array_equal(np.asarray(mine), np.asarray(its))
    assert np.array_equal(xp.get(there.dequantize()), here.dequantize())


@pytest.mark.usefixtures("kernels")
def test_qtensors_are_saved_from_the_gpu(xp: Any, tmp_path: Path) -> None:
    w = numbers((24, 96)) - 50
    ng.quantize(xp.put(w), ng.int4).save(tmp_path / "w.safetensors")
    loaded = ng.QTensor.load(tmp_path / "w.safetensors", library="numpy")
    assert np.array_equal(loaded.dequantize(), ng.quantize(w, ng.int4).dequantize())


@pytest.mark.usefixtures("kernels")
def test_nan_is_raised_at_the_wait(xp: Any) -> None:
    w = numbers((4, 64))
    w[2, 5] = np.nan
    with ng.cuda.Stream() as stream:
        ng.quantize(ng.Tensor.from_dlpack(w).to("cuda"), ng.fp8)
        with pytest.raises(ValueError, match=r"\[2, 5\]|133"):
            stream.synchronize()
        stream.synchronize()  # said once


@pytest.mark.usefixtures("kernels")
def test_nan_is_kept(xp: Any) -> None:
    w = numbers((4, 64))
    w[2, 5] = np.nan
    there = ng.quantize(xp.put(w), ng.nvfp4, nan="keep").dequantize()
    assert np.array_equal(xp.get(there), ng.quantize(w, ng.nvfp4, nan="keep").dequantize(), equal_nan=True)


@pytest.mark.usefixtures("kernels")
def test_two_gpus() -> None:
    """What is on one is not mistaken for what is on the other."""
    if "LD_LIBRARY_PATH" not in os.environ:
        pytest.skip("the number of devices is the simulated driver's to choose")
    code = """
import numpy as np, narrowgauge as ng
if ng.cuda.device_count() != 2:
    raise SystemExit(77)
w = np.arange(64, dtype=np.float32).reshape(4, 16)
first, second = ng.Tensor.from_dlpack(w).to("cuda:0"), ng.Tensor.from_dlpack(w).to("cuda:1")
assert second.device == "cuda:1" and ng.quantize(second, "int8").device == "cuda:1"
assert np.array_equal(np.from_dlpack(first.to("cuda:1").to("cpu")), w)
try:
    ng.quantize(second, "int8").dequantize()
    ng._native.quantize(second, ng.Format("int8"), 4, 16, ng._native.empty([4, 16], "uint8", "cuda:0"),
                        ng._native.empty([4, 1], "float32", "cuda:0"), None, None, "absmax", "error", False, 0,
                        False, False)
except ValueError as error:
    assert "weights is on cuda:1, expected cuda:0" in str(error), error
else:
    raise AssertionError("no error")
try:
    ng.cuda.Event(1).record(ng.cuda.Stream(0))
except ValueError as error:
    assert "an event of cuda:1 is recorded in a stream of cuda:0" in str(error), error
"""
    environment = {**os.environ, "SIMGPU_DEVICES": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    if done.returncode == 77:
        pytest.skip("there is one GPU")
    assert done.returncode == 0, done.stderr
