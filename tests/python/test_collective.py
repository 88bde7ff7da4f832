"""Communicator in Python: ranks of this process, and of torch.distributed."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import narrowgauge as ng
import numpy as np
import pytest
from narrowgauge import _native
from thread_ranks import run_ranks


def run_processes(job: str, size: int, folder: Path, codes: list[int] | None = None) -> None:
    """Runs a job of collective_ranks.py as every rank of a gloo process group. codes: what they end with, if not 0."""
    command = [sys.executable, str(Path(__file__).with_name("collective_ranks.py")), job]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder / job)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == (codes or [0] * size)[rank], f"rank {rank}: {output}"


def values(rank: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(rank).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_collectives_within_a_process(library: str) -> None:
    torch = pytest.importorskip("torch") if library == "torch" else None
    wire = "int8:g64:bf16"

    def array(data: np.ndarray) -> Any:
        return torch.from_numpy(data) if torch else data

    def body(comm: ng.Communicator) -> list[np.ndarray]:
        mine = array(values(comm.rank, 6, 100))
        gathered = comm.all_gather(mine, wire, exact_below=0)
        part = comm.reduce_scatter(mine, wire, op="mean", exact_below=0)
        everything = comm.all_reduce(mine, wire, exact_below=0)
        assert comm.all_reduce(mine, wire, out=mine, exact_below=0) is mine
        assert type(gathered) is type(mine)
        return [np.asarray(result) for result in (gathered, part, everything, mine)]

    inputs = [values(rank, 6, 100) for rank in range(3)]
    for rank, (gathered, part, everything, in_place) in enumerate(run_ranks(3, body)):
        assert gathered.shape == (18, 100) and part.shape == (2, 100) and everything.shape == (6, 100)
        np.testing.assert_allclose(gathered, np.concatenate(inputs), atol=0.02)
        np.testing.assert_allclose(part, np.mean(inputs, axis=0)[2 * rank : 2 * rank + 2], atol=0.02)
        np.testing.assert_allclose(everything, np.sum(inputs, axis=0), atol=0.1)
        np.testing.assert_array_equal(in_place, everything)


def test_what_arrives_is_what_quantize_gives() -> None:
    wire = ng.Wire("int4:g64:fp16")
    expected = ng.quantize(values(0, 1, 1000), ng.Format("int4:g64:fp16")).dequantize("float32")
    for result in run_ranks(2, lambda comm: comm.all_gather(values(comm.rank, 1, 1000), wire, exact_below=0)):
        np.testing.assert_array_equal(result[:1], expected)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_gathered_weights_are_multiplied_as_they_travelled(library: str) -> None:
    torch = pytest.importorskip("torch") if library == "torch" else None

    def array(data: np.ndarray) -> Any:
        return torch.from_numpy(data) if torch else data

    def body(comm: ng.Communicator) -> tuple[ng.QTensor, np.ndarray]:
        q = comm.all_gather_qtensor(array(values(comm.rank, 8, 256)), "int8:g64:bf16", chunk_bytes=1000)
        return q, np.asarray(ng.linear(array(values(9, 3, 256)), q.pack()))

    weights = np.concatenate([values(rank, 8, 256) for rank in range(3)])
    expected = ng.quantize(weights, "int8:g64:bf16")
    for q, y in run_ranks(3, body):
        assert q.shape == (24, 256)
        np.testing.assert_array_equal(np.asarray(q.codes), expected.codes)
        np.testing.assert_array_equal(y, ng.linear(values(9, 3, 256), expected.pack()))


def test_plans_say_what_is_done() -> None:
    def body(comm: ng.Communicator) -> None:
        small, large = np.full(1000, 0.3, np.float32), np.zeros(1 << 18, np.float32)
        assert comm.plan("all_reduce", small, "int4").wire == ng.Wire()
        np.testing.assert_array_equal(comm.all_reduce(small, "int4:g64:bf16"), small + small)
        forced = comm.plan("all_reduce", small, "int4:g64:bf16", exact_below=0)
        assert forced.wire == forced.inside == ng.Wire("int4:g64:bf16")
        assert (comm.all_reduce(small, "int4:g64:bf16", exact_below=0) != small + small).any()
        assert comm.plan("all_gather", large[: 1 << 17], "int8:g64:bf16").wire.format is not None
        assert comm.plan("all_gather", large[: (1 << 17) - 1], "int8:g64:bf16").wire.format is None
        assert "1048576 bytes are not fewer than" in str(comm.plan("reduce_scatter", large, "int8:g64:bf16"))

    assert run_ranks(2, body) == [None, None]
    plan = ng.collective.plan("all_reduce", 1 << 22, "bfloat16", "int8:g64:bf16", size=8, node_size=4)
    assert plan.wire == ng.Wire("int8:g64:bf16") and plan.inside == ng.Wire()
    assert 0 < plan.sent_across < plan.sent_bytes and plan.chunks == 2
    with pytest.raises(ValueError, match="collective is 'broadcast'"):
        ng.collective.plan("broadcast", 1, "float32", None, size=1)
    with pytest.raises(ValueError, match="exact_below is -1"):
        ng.collective.plan("all_reduce", 1, "float32", None, size=1, exact_below=-1)


def test_secondary_shards_need_nodes_and_memory() -> None:
    def body(comm: ng.Communicator) -> None:
        comm.all_gather(values(0, 4), secondary=ng.SecondaryShard())

    assert all("expected a node_size" in str(error) for error in run_ranks(2, body))
    assert ng.SecondaryShard(ng.HostPool(limit=4096)).nbytes == 0


def test_exact_and_asynchronous() -> None:
    def body(comm: ng.Communicator) -> Any:
        pending = [comm.all_reduce(np.full(10, comm.rank + i, np.float32), async_op=True) for i in range(3)]
        return [handle.wait()[0] for handle in pending]

    assert run_ranks(2, body) == [[1, 3, 5], [1, 3, 5]]


def test_all_to_all() -> None:
    def body(comm: ng.Communicator) -> np.ndarray:
        sent = np.arange(4, dtype=np.float32) + 10 * comm.rank
        received = np.empty(2 if comm.rank == 0 else 6, np.float32)
        counts = [1, 1] if comm.rank == 0 else [3, 3]
        return comm.all_to_all(sent, [1, 3], received, counts)

    first, second = run_ranks(2, body)
    np.testing.assert_array_equal(first, [0, 10])
    np.testing.assert_array_equal(second, [1, 2, 3, 11, 12, 13])


def test_errors_name_what_is_wrong() -> None:
    wrong: list[tuple[type[Exception], str, Callable[[ng.Communicator], Any]]] = [
        (ValueError, "expected one with groups", lambda comm: comm.all_gather(values(0, 4), "int8")),
        (ValueError, "without a global scale", lambda comm: comm.all_gather(values(0, 4), ng.nvfp4)),
        (ValueError, "op is 'max', expected 'sum' or 'mean'", lambda comm: comm.all_reduce(values(0, 4), op="max")),
        (ValueError, "expected a first axis that 2 divides", lambda comm: comm.reduce_scatter(values(0, 3))),
        (ValueError, "out has 3 elements; expected 4", lambda comm: comm.all_reduce(values(0, 4), out=values(0, 3))),
        (ValueError, "shard is int64", lambda comm: comm.all_gather(np.zeros(4, np.int64))),
        (ValueError, "expected a Format", lambda comm: comm.all_gather_qtensor(values(0, 4, 64), None)),
        (ValueError, "expected [rows, cols]", lambda comm: comm.all_gather_qtensor(values(0, 64), "int8:g64:bf16")),
        (ValueError, "expected whole groups", lambda comm: comm.all_gather_qtensor(values(0, 4, 65), "int8:g64:bf16")),
        (TypeError, "input is a list", lambda comm: comm.all_reduce([1.0])),
    ]
    for kind, message, call in wrong:
        for error in run_ranks(2, call):
            assert isinstance(error, kind) and message in str(error), error


def test_ranks_that_disagree_or_stay_away() -> None:
    for error in run_ranks(2, lambda comm: comm.all_reduce(values(0, 4 + comm.rank))):
        assert isinstance(error, ng.TransportError)
        assert "of 4 float32" in str(error) and "of 5 float32" in str(error)
    late = run_ranks(2, lambda comm: time.sleep(1) if comm.rank else comm.all_reduce(values(0, 4)), timeout=0.1)
    assert isinstance(late[0], TimeoutError) and "rank 1 did not come within 100 ms" in str(late[0])
    with pytest.raises(ValueError, match="timeout is 0"):
        ng.Communicator.in_process(2, timeout=0)
    with pytest.raises(ValueError, match="0 ranks"):
        ng.Communicator.in_process(0)


def test_wire() -> None:
    wire = ng.Wire(ng.int4, hadamard=True)
    assert str(wire) == "int4:g64:fp16+hadamard" and wire == ng.Wire("int4", True)
    assert wire != ng.Wire(ng.int4) and hash(wire) == hash(ng.Wire(ng.int4, True))
    assert str(ng.Wire()) == "exact"


def test_over_torch_distributed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    run_processes("collectives", 3, tmp_path)
    run_processes("nodes", 4, tmp_path)


def test_ddp_hook(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    run_processes("ddp", 2, tmp_path)


def test_fsdp(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    run_processes("fsdp", 4, tmp_path)
    run_processes("secondary", 4, tmp_path)


def test_deepspeed_function(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    run_processes("deepspeed", 4, tmp_path)


def test_a_rank_that_dies_is_an_error_in_time(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    run_processes("dies", 3, tmp_path, codes=[0, -signal.SIGKILL, 0])
    run_processes("stuck", 2, tmp_path)


class NeverArrives:
    """A transport of two ranks that agree, and then wait in vain: its carrier still has the memory."""

    rank, size, name = 0, 2, "nothing"

    def __init__(self) -> None:
        self.flying: list[memoryview] = []

    def all_gather(self, sent: memoryview, received: memoryview, operation: str) -> NeverArrives:
        if len(sent) == 256:  # the description
            received[:256] = received[256:] = sent
        else:
            self.flying += sent, received
        return self

    def all_to_all(
        self, sent: memoryview, sent_bytes: list[int], received: memoryview, received_bytes: list[int], operation: str
    ) -> NeverArrives:
        self.flying += sent, received
        return self

    def wait(self) -> None:
        if self.flying:
            raise RuntimeError("lost")


def test_bytes_on_their_way_keep_their_memory() -> None:
    transport, pool = NeverArrives(), ng.HostPool()
    comm = ng.Communicator(_native.communicator(transport, 0, pool._pool))
    with pytest.raises(ng.TransportError, match="lost"):
        comm.all_reduce(values(0, 5000), "int8:g64:bf16", exact_below=0)
    del comm
    gc.collect()
    assert pool.statistics().in_use >= sum(len(view) for view in transport.flying) > 5000
    for view in transport.flying:
        view[:] = bytes(len(view))
    del view
    transport.flying.clear()
    assert pool.statistics().in_use == 0


@pytest.mark.skipif(not shutil.which("mpirun") or not importlib.util.find_spec("mpi4py"), reason="no MPI or mpi4py")
def test_over_mpi() -> None:
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    script = Path(__file__).with_name("mpi_ranks.py")
    command = ["mpirun", "--oversubscribe", "-n", "4", sys.executable, str(script)]
    done = subprocess.run(command, env=os.environ | as_root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Communicator(rank 0 of 4, nodes of 2, MPI)" in done.stdout


def test_no_process_group() -> None:
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match="init_process_group"):
        ng.Communicator.from_torch()
