"""DevicePool, PinnedPool and torch's allocator functions; LD_LIBRARY_PATH=.../tests/simgpu/lib makes a GPU for them."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import narrowgauge as ng
import numpy as np
import pytest

HUGE = 2 << 20
SSIZE_MAX = (1 << 63) - 1

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def gpu() -> None:
    if reason := ng.cuda.why_unavailable():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """As CUDAPluggableAllocator loads it."""
    out = ctypes.CDLL(ng._native.__file__)
    out.ng_torch_cuda_malloc.restype = ctypes.c_void_p
    out.ng_torch_cuda_malloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    out.ng_torch_cuda_free.restype = None
    out.ng_torch_cuda_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    return out


def test_torch_allocates_and_frees(library: ctypes.CDLL) -> None:
    first = library.ng_torch_cuda_malloc(1000, 0, None)
    second = library.ng_torch_cuda_malloc(HUGE, 0, None)
    assert first % 512 == 0 and second % 512 == 0 and abs(first - second) >= 1000
    library.ng_torch_cuda_free(first, 1000, 0, None)
    assert library.ng_torch_cuda_malloc(900, 0, None) == first  # the same stream: at once
    library.ng_torch_cuda_free(first, 900, 0, None)
    library.ng_torch_cuda_free(second, HUGE, 0, None)


def test_torch_gets_null_where_there_is_nothing(library: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> None:
    assert library.ng_torch_cuda_malloc(0, 0, None) is None
    assert library.ng_torch_cuda_malloc(-5, 0, None) is None
    assert library.ng_torch_cuda_malloc(SSIZE_MAX, 0, None) is None
    assert library.ng_torch_cuda_malloc(16 * ng.cuda.device().memory_bytes, 0, None) is None
    assert library.ng_torch_cuda_malloc(1, ng.cuda.device_count(), None) is None
    assert library.ng_torch_cuda_malloc(1, -1, None) is None
    library.ng_torch_cuda_free(None, 5, 0, None)
    library.ng_torch_cuda_free(12345, 5, 0, None)
    library.ng_torch_cuda_free(12345, 5, 99, None)
    assert capfd.readouterr() == ("", "")


def test_torch_frees_at_exit() -> None:
    """Tensors die after the interpreter, in no order."""
    code = """
import atexit, ctypes, narrowgauge as ng
library = ctypes.CDLL(ng._native.__file__)
library.ng_torch_cuda_malloc.restype = ctypes.c_void_p
block = library.ng_torch_cuda_malloc(ctypes.c_ssize_t(100), 0, None)
held = [ng.DevicePool(), ng.PinnedPool(), ng.PinnedPool().empty(5, "f32")]
held.append(held)
atexit.register(lambda: library.ng_torch_cuda_free(ctypes.c_void_p(block), ctypes.c_ssize_t(100), 0, None))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_pinned_tensors() -> None:
    pool = ng.PinnedPool("4MiB")
    assert pool.limit == 4 << 20
    tensor = pool.empty((3, 5), "f32")
    array = np.from_dlpack(tensor)
    array[:] = 7
    assert tensor.device == "cpu" and tensor.data_ptr() % 4096 == 0 and (np.from_dlpack(tensor) == 7).all()
    with pytest.raises(MemoryError, match="limit is 4194304"):
        pool.empty(1 << 20, "f32")
    with pytest.raises(TypeError, match="unknown dtype"):
        pool.empty(1, "fp8")
    assert pool.statistics().blocks == 1 and pool.statistics().peak == 4096
    assert repr(pool) == "PinnedPool(4096 bytes in use, 2097152 reserved, limit 4194304)"
    del tensor, array
    assert pool.statistics().blocks == 0
    assert pool.trim() == HUGE
    with pytest.raises(ValueError, match="no device cuda:99"):
        ng.PinnedPool(device=99)


def test_device_pool() -> None:
    pool = ng.DevicePool(limit="1GiB")
    assert (pool.device, pool.limit, pool.is_asleep, pool.trim()) == (0, 1 << 30, False, 0)
    assert repr(pool) == "DevicePool(0 bytes in use, 0 reserved, limit 1073741824)"
    with pytest.raises(ValueError, match="needs a sink"):
        pool.sleep(discard=False)
    with pytest.raises(ValueError, match="awake"):
        pool.wake()
    pool.sleep()
    assert pool.is_asleep
    with pytest.raises(ValueError, match="asleep"):
        pool.sleep()
    with pytest.raises(ValueError, match="asleep"):
        pool.empty(1, "u8")
    pool.wake()
    assert not pool.is_asleep and pool.statistics().reserved == 0
    with pytest.raises(ValueError, match="no device cuda:99"):
        ng.DevicePool(99)


def test_device_tensors_keep_address_and_contents_over_a_sleep() -> None:
    class DictSink:
        def __init__(self) -> None:
            self.kept: dict[int, bytes] = {}

        def put(self, key: int, data: memoryview) -> None:
            self.kept[key] = bytes(data)

        def get(self, key: int, data: memoryview) -> None:
            data[:] = self.kept[key]

    array = np.arange(100_000, dtype=np.float32)
    pool = ng.DevicePool(limit="4MiB")
    tensor = pool.empty(100_000, "f32")
    assert tensor.device == "cuda:0" and pool.statistics().in_use == 400_384  # units of 512 bytes
    tensor.copy_from(ng.Tensor.from_dlpack(array))
    address = tensor.data_ptr()
    pool.sleep(discard=False, sink=DictSink())
    pool.wake()
    assert tensor.data_ptr() == address and np.array_equal(np.from_dlpack(tensor.to("cpu")), array)
    with pytest.raises(MemoryError, match="limit is 4194304"):
        pool.empty(2 << 20, "f32")
    with ng.cuda.Stream() as stream:
        other = pool.empty(10, "u8")
    del stream  # the tensor keeps it
    del other, tensor
    assert pool.statistics().blocks == 0
