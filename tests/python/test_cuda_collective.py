"""Collectives of Tensors on GPUs over NCCL, beside the same ranks on the host: the same bits.

On the simulated GPUs and NCCL: `SIMGPU_DEVICES=3
LD_LIBRARY_PATH=build/release/tests/simgpu/lib:build/release/tests/simnccl/lib python -m pytest -m cuda
tests/python/test_cuda_collective.py`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import narrowgauge as ng
import numpy as np
import pytest
from narrowgauge import _native
from narrowgauge.collective import nccl_unique_id

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpus")]

INT8 = "int8:g64:bf16"
SIZE = 3


@pytest.fixture
def gpus() -> None:
    for reason in (ng.cuda.why_unavailable(), _native.why_no_nccl()):
        if reason:
            pytest.skip(reason)
    if ng.cuda.device_count() < SIZE:
        pytest.skip(f"there are fewer than {SIZE} GPUs")


def run_threads(size: int, make: Callable[[int], ng.Communicator], body: Callable[[ng.Communicator], Any]) -> list[Any]:
    """What body returned, or raised, on every rank."""
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = body(make(rank))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def run_gpus(size: int, body: Callable[[ng.Communicator], Any], **options: Any) -> list[Any]:
    unique_id = nccl_unique_id()
    return run_threads(
        size, lambda rank: ng.Communicator.from_nccl(unique_id, rank, size, device=rank, **options), body
    )


def run_host(size: int, body: Callable[[ng.Communicator], Any]) -> list[Any]:
    comms = ng.Communicator.in_process(size)
    return run_threads(size, lambda rank: comms[rank], body)


def values(rank: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(rank).standard_normal(shape).astype(np.float32)


def on_gpu(array: np.ndarray, comm: ng.Communicator) -> ng.Tensor:
    bits = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
    tensor = ng.Tensor.from_dlpack(bits).to(f"cuda:{comm.rank}")
    return tensor.view("bfloat16") if array.dtype == ml_dtypes.bfloat16 else tensor


def on_host(tensor: ng.Tensor) -> np.ndarray:
    return np.from_dlpack(tensor.to("cpu"))


def check(results: list[Any]) -> None:
    for result in results:
        if isinstance(result, Exception):
            raise result


def everything(comm: ng.Communicator, put: Callable[..., Any], get: Callable[..., np.ndarray]) -> list[np.ndarray]:
    """The results of the collectives of arrays that `put` makes of numpy's."""
    mine = values(comm.rank, 6, 50)
    gathered = comm.all_gather(put(mine), INT8, exact_below=0)
    wire = ng.Wire("int4:g64:fp16", hadamard=True, stochastic=True)
    error = put(np.zeros((6, 50), np.float32))
    part = comm.reduce_scatter(put(mine), wire, op="mean", error=error, seed=3, exact_below=0)
    pending = comm.all_reduce(put(mine), INT8, op="mean", async_op=True, exact_below=0)
    total = pending.wait()
    received = put(np.zeros(60, np.float32))
    comm.all_to_all(put(mine), [100] * SIZE, put(np.zeros(300, np.float32)), [100] * SIZE, INT8)
    comm.all_to_all(put(mine.reshape(-1)[: 20 * SIZE].copy()), [20] * SIZE, received, [20] * SIZE)
    return [get(gathered), get(part), get(error), get(total), get(received)]


def test_every_collective_equals_the_hosts() -> None:
    with_gpus = run_gpus(SIZE, lambda comm: everything(comm, lambda array: on_gpu(array, comm), on_host))
    check(with_gpus)
    on_cpu = run_host(SIZE, lambda comm: everything(comm, np.copy, np.asarray))
    check(on_cpu)
    for rank in range(SIZE):
        for got, expected in zip(with_gpus[rank], on_cpu[rank], strict=True):
            np.testing.assert_array_equal(got, expected)
    exact = np.mean([values(rank, 6, 50).astype(np.float64) for rank in range(SIZE)], axis=0)
    assert np.abs(with_gpus[0][3] - exact).max() < 0.05


def test_shards_are_gathered_as_a_qtensor_on_the_gpu() -> None:
    def body(comm: ng.Communicator) -> tuple[str, bytes]:
        shard = values(comm.rank, 2, 128).astype(ml_dtypes.bfloat16)
        with ng.cuda.Stream(comm.rank):
            q = comm.all_gather_qtensor(on_gpu(shard, comm), INT8)
            return q.codes.device, on_host(q.codes).tobytes()

    results = run_gpus(2, body)
    check(results)
    rows = np.concatenate([values(rank, 2, 128).astype(ml_dtypes.bfloat16) for rank in range(2)])
    expected = ng.quantize(rows, INT8).codes.tobytes()
    assert results == [("cuda:0", expected), ("cuda:1", expected)]


class UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * 128),)


def test_a_communicator_of_the_callers_is_used_and_left() -> None:
    driver, nccl = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnccl.so.2")
    context, handle = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1) == 0
    assert driver.cuCtxPushCurrent_v2(context) == 0
    identity = UniqueId.from_buffer_copy(nccl_unique_id())
    assert nccl.ncclCommInitRankConfig(ctypes.byref(handle), 1, identity, 0, None) == 0
    assert driver.cuCtxPopCurrent_v2(None) == 0
    assert handle.value is not None

    x = ng.Tensor.from_dlpack(values(0, 100)).to("cuda:1")
    with pytest.raises(ValueError, match="expected one of cuda:1"):
        ng.Communicator.from_nccl(handle.value)
    comm = ng.Communicator.from_nccl(handle.value, device=1)
    assert "NCCL" in repr(comm) and (comm.rank, comm.size) == (0, 1)
    np.testing.assert_array_equal(on_host(comm.all_gather(x)), values(0, 100))
    del comm
    assert nccl.ncclCommDestroy(handle) == 0


def test_what_from_nccl_does_not_take() -> None:
    with pytest.raises(ValueError, match="an ncclComm_t knows both"):
        ng.Communicator.from_nccl(1234, 0, 1)
    with pytest.raises(ValueError, match="expected both beside a unique id"):
        ng.Communicator.from_nccl(nccl_unique_id(), 0)
    with pytest.raises(ValueError, match="expected 128"):
        ng.Communicator.from_nccl(b"short", 0, 1)
    with pytest.raises(TimeoutError, match="rank 0 of 2: the other ranks did not come within 200 ms"):
        ng.Communicator.from_nccl(nccl_unique_id(), 0, 2, timeout=0.2)


def test_ranks_that_disagree_are_told_what() -> None:
    def body(comm: ng.Communicator) -> None:
        comm.all_reduce(on_gpu(values(0, 100 + comm.rank), comm), INT8)

    for error in run_gpus(2, body):
        assert isinstance(error, ng.TransportError)
        assert "all_reduce of sums of 100 float32" in str(error) and "of 101 float32" in str(error)


def test_a_rank_that_does_not_come_is_a_timeout() -> None:
    done = threading.Event()

    def body(comm: ng.Communicator) -> None:
        x = on_gpu(values(comm.rank, 100), comm)
        comm.all_gather(x)
        if comm.rank == 1:
            done.wait(60)
            return
        try:
            on_host(comm.all_gather(x))
        finally:
            done.set()

    late, other = run_gpus(2, body, timeout=1.5)
    assert isinstance(late, TimeoutError) and "all_gather of 100 float32" in str(late) and "rank 0 of 2" in str(late)
    assert other is None


def test_what_lies_elsewhere_is_refused() -> None:
    def body(comm: ng.Communicator) -> None:
        x = on_gpu(values(0, 64), comm)
        with pytest.raises(ValueError, match="expected tensors on it"):
            comm.all_gather(values(0, 64))
        with pytest.raises(ValueError, match="out is on cpu, expected cuda:0"):
            comm.all_gather(x, out=np.zeros(64, np.float32))
        with pytest.raises(ValueError, match="carries host memory"):
            ng.Communicator.in_process(1)[0].all_gather(x)

    check(run_gpus(1, body))
