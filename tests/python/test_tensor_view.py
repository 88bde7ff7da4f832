"""Borrowing arrays: torch through DLPack's exchange table, everything else through the fallback, bad ones refused."""

import shutil
import subprocess
import threading
from pathlib import Path

import narrowgauge as ng
import numpy as np
import pytest
import torch
from narrowgauge import _native


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
def test_torch_is_borrowed_without_a_copy(dtype: torch.dtype) -> None:
    assert _native.is_matrix(torch.zeros(3, 4, dtype=dtype))
    assert _native.is_matrix(torch.zeros(0, 4, dtype=dtype))


def test_writes_reach_the_callers_memory() -> None:
    q = ng.quantize(torch.eye(16), ng.int8).pack()
    for out in (torch.zeros(2, 16), np.zeros((2, 16), np.float32), memoryview(np.zeros((2, 16), np.float32))):
        _native.gather_rows(q._matrix, np.array([3, 5]), out)
        assert np.array_equal(np.asarray(out), np.eye(16, dtype=np.float32)[[3, 5]])


def test_views_with_strides() -> None:
    x = torch.zeros(4, 6, 8)
    assert _native.is_matrix(x[:, 2:4][:1])
    assert _native.is_matrix(x[0, ::2])
    assert not _native.is_matrix(x[:, 2:4])  # the leading axes do not flatten
    assert not _native.is_matrix(x[:, :, ::2])
    assert not _native.is_matrix(x.transpose(1, 2))
    assert not _native.is_matrix(np.zeros((4, 4), np.float32)[:, ::-1])


def test_parameters_and_subclasses() -> None:
    assert _native.is_matrix(torch.nn.Parameter(torch.zeros(2, 2)))
    for _ in range(40):  # more types than the cache holds
        kind = type("Sub", (torch.Tensor,), {})
        assert _native.is_matrix(torch.zeros(2, 2).as_subclass(kind))


def test_many_threads_see_new_types() -> None:
    kinds = [type(f"Sub{i}", (torch.Tensor,), {}) for i in range(64)]
    failures = []

    def work() -> None:
        for kind in kinds:
            if not _native.is_matrix(torch.zeros(2, 2).as_subclass(kind)):
                failures.append(kind)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("bad", [3, "text", [[1.0]], object()])
def test_no_array(bad: object) -> None:
    with pytest.raises(TypeError, match="packed is a"):
        _native.PackedMatrix(bad, ng.int8, 16, 16)
    with pytest.raises(TypeError, match=f"x is a .*{type(bad).__name__}"):
        _native.is_matrix(bad, "x")


def test_wrong_dtype() -> None:
    with pytest.raises(TypeError, match="x has dtype complex64"):
        _native.is_matrix(torch.zeros(2, dtype=torch.complex64), "x")
    with pytest.raises(TypeError, match="w"):
        ng.quantize(torch.zeros(2, 2, dtype=torch.float64), "int8")


def test_other_devices_and_fake_tensors() -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError), match="meta"):
        _native.is_matrix(torch.zeros(2, 2, device="meta"), "x")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="x has no memory behind it"):
        _native.is_matrix(fake, "x")


def test_too_many_axes() -> None:
    for array in (torch.zeros([1] * 9), np.zeros([1] * 9, np.float32)):
        with pytest.raises(ValueError, match="x has 9 axes, at most 8"):
            _native.is_matrix(array, "x")


def test_read_only_arrays_are_read_and_not_written() -> None:
    frozen = np.zeros((2, 16), np.float32)
    frozen.flags.writeable = False
    assert _native.is_matrix(frozen)
    q = ng.quantize(np.eye(16, dtype=np.float32), ng.int8).pack()
    with pytest.raises(TypeError, match="out is a .*ndarray, expected a writable"):
        _native.gather_rows(q._matrix, np.arange(2), frozen)


def test_packed_block_is_checked() -> None:
    size = _native.packed_bytes(ng.fp6, 16, 128)
    block = torch.empty(size + 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"packed has {size + 64} bytes, expected {size}"):
        _native.PackedMatrix(block, ng.fp6, 16, 128)
    with pytest.raises(ValueError, match="aligned to 64"):
        _native.PackedMatrix(block[1 : 1 + size], ng.fp6, 16, 128)
    with pytest.raises(ValueError, match="not contiguous"):
        _native.PackedMatrix(torch.empty(2 * size, dtype=torch.uint8)[::2], ng.fp6, 16, 128)


def test_memory_that_a_framework_moves() -> None:
    w, x = torch.randn(32, 64), torch.randn(3, 64)
    q = ng.quantize(w, ng.fp6).pack()
    y = ng.linear(x, q)
    q.packed.share_memory_()
    assert torch.equal(ng.linear(x, q), y)


ABI = r"""
#include <cstddef>
#include "ATen/dlpack.h"
#include "dlpack.hpp"
using namespace ng::dlpack;
#define SAME(ours, our_field, theirs, their_field) \
  static_assert(offsetof(ours, our_field) == offsetof(theirs, their_field) && \
                sizeof(ours::our_field) == sizeof(theirs::their_field))
static_assert(kMajorVersion == DLPACK_MAJOR_VERSION);
static_assert(int{kCpu} == kDLCPU && int{kCuda} == kDLCUDA && int{kCudaHost} == kDLCUDAHost);
static_assert(sizeof(Tensor) == sizeof(DLTensor) && sizeof(ManagedTensor) == sizeof(DLManagedTensorVersioned));
static_assert(sizeof(ExchangeApi) == sizeof(DLPackExchangeAPI));
SAME(Version, major, DLPackVersion, major);
SAME(Device, type, DLDevice, device_type);
SAME(Device, id, DLDevice, device_id);
SAME(DataType, code, DLDataType, code);
SAME(DataType, bits, DLDataType, bits);
SAME(DataType, lanes, DLDataType, lanes);
SAME(Tensor, data, DLTensor, data);
SAME(Tensor, device, DLTensor, device);
SAME(Tensor, ndim, DLTensor, ndim);
SAME(Tensor, dtype, DLTensor, dtype);
SAME(Tensor, shape, DLTensor, shape);
SAME(Tensor, strides, DLTensor, strides);
SAME(Tensor, byte_offset, DLTensor, byte_offset);
SAME(ManagedTensor, context, DLManagedTensorVersioned, manager_ctx);
SAME(ManagedTensor, deleter, DLManagedTensorVersioned, deleter);
SAME(ManagedTensor, flags, DLManagedTensorVersioned, flags);
SAME(ManagedTensor, tensor, DLManagedTensorVersioned, dl_tensor);
SAME(ExchangeApi, header, DLPackExchangeAPI, header);
SAME(ExchangeApi, allocate, DLPackExchangeAPI, managed_tensor_allocator);
SAME(ExchangeApi, managed_from_object, DLPackExchangeAPI, managed_tensor_from_py_object_no_sync);
SAME(ExchangeApi, managed_to_object, DLPackExchangeAPI, managed_tensor_to_py_object_no_sync);
SAME(ExchangeApi, view_from_object, DLPackExchangeAPI, dltensor_from_py_object_no_sync);
SAME(ExchangeApi, current_work_stream, DLPackExchangeAPI, current_work_stream);
"""


def test_our_dlpack_is_the_real_one(tmp_path: Path) -> None:
    bindings = Path(__file__).parents[2] / "python" / "bindings"
    include = Path(torch.__file__).parent / "include"
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not (include / "ATen" / "dlpack.h").exists():
        pytest.skip("needs a C++ compiler and torch's headers")
    source = tmp_path / "abi.cpp"
    source.write_text(ABI)
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{include}", f"-I{bindings}", str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
