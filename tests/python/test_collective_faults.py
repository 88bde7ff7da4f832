"""Faults of ZeRO++ and its peers, one test for each, which names it. Ranks are threads of this process.

DeepSpeed's are of runtime/comm/coalesced_collectives.py and csrc/quantization as of 2026; numbers are its issues.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import narrowgauge as ng
import numpy as np
import pytest
from thread_ranks import results_of, run_ranks

INT8, INT4 = "int8:g64:bf16", "int4:g64:bf16"
ROTATED = ng.Wire(INT4, hadamard=True)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative_error(value: np.ndarray, exact: np.ndarray) -> float:
    value, exact = value.astype(np.float64), exact.astype(np.float64)
    return float(np.linalg.norm(value - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("shape", [(1024,), (16, 64), (4, 4, 64)])
def test_the_mean_is_that_of_all_ranks_for_every_shape(shape: tuple[int, ...]) -> None:
    # qgZ added up within nodes and divided by the number of nodes (in 0.19.8 still): matrices came out node_size times
    # too large; vectors, which took another path, did not.
    inputs = [normal(rank, *shape) for rank in range(4)]
    expected = np.mean(inputs, axis=0)

    def body(comm: ng.Communicator) -> Any:
        return comm.reduce_scatter(inputs[comm.rank], INT8, op="mean", inside=INT8, exact_below=0)

    got = np.concatenate(results_of(4, body, node_size=2))
    assert relative_error(got, expected) < 0.02


def test_bf16_gradients_are_read_as_bf16() -> None:
    # stage 3 handed bf16 gradients to kernels of __half: norm x764, cosine 0.85 for N(0, 1e-3) (#3992, #4852).
    inputs = [(1e-3 * normal(rank, 8, 256)).astype(ml_dtypes.bfloat16) for rank in range(2)]
    torch = pytest.importorskip("torch")

    def body(comm: ng.Communicator) -> np.ndarray:
        mine = torch.from_numpy(inputs[comm.rank].view(np.int16)).view(torch.bfloat16)
        result = comm.reduce_scatter(mine, INT8, op="mean", exact_below=0)
        assert result.dtype == torch.bfloat16
        return result.float().numpy()  # type: ignore[no-any-return]

    got = np.concatenate(results_of(2, body))
    expected = np.mean([each.astype(np.float32) for each in inputs], axis=0)
    assert relative_error(got, expected) < 0.02


@pytest.mark.parametrize("numel", [1, 7, 8, 63, 65, 1001])
@pytest.mark.parametrize("size", [2, 3])
def test_vectors_and_odd_sizes_are_quantised_too(size: int, numel: int) -> None:
    # Vectors, and sizes that 2 x ranks did not divide, travelled in full precision after a warning, or were silently
    # wrong (#5054, #5056). Here what arrives is what quantize gives.
    mine = normal(5, numel)

    def body(comm: ng.Communicator) -> Any:
        every = mine if comm.rank == 1 else np.zeros_like(mine)
        return comm.reduce_scatter(np.tile(every, comm.size), INT4, exact_below=0)

    expected = ng.quantize(mine[None], INT4).dequantize("float32")[0]
    for part in results_of(size, body):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("numel", range(1, 18))
def test_weights_of_any_number_of_elements_are_gathered(numel: int) -> None:
    # qwZ: "Qantized weight requires the number of weights be a multiple of 8".
    shards = [normal(rank, numel) for rank in range(3)]
    for gathered in results_of(3, lambda comm: comm.all_gather(shards[comm.rank], INT8, exact_below=0)):
        assert relative_error(gathered, np.concatenate(shards)) < 0.02


def test_parameters_smaller_than_the_number_of_ranks() -> None:
    # A small parameter raised with 2048 ranks (#6659).
    for everything in results_of(
        9, lambda comm: comm.all_reduce(np.full(1, comm.rank, np.float32), INT8, exact_below=0)
    ):
        np.testing.assert_allclose(everything, [36], rtol=0.02)


@pytest.mark.parametrize(("size", "node_size"), [(4, 2), (6, 2), (6, 3), (9, 3)])
def test_nodes_are_what_the_caller_says(size: int, node_size: int) -> None:
    # Ranks of a node were accelerator.device_count(), wrong where each process sees one device; odd numbers of nodes
    # failed (#4386, #5054).
    inputs = [normal(rank, size, 130) for rank in range(size)]

    def body(comm: ng.Communicator) -> Any:
        assert comm.node_size == node_size
        return comm.reduce_scatter(inputs[comm.rank], INT8, op="mean", inside=INT8, exact_below=0)

    got = np.concatenate(results_of(size, body, node_size))
    assert relative_error(got, np.mean(inputs, axis=0)) < 0.02


def test_nodes_that_do_not_divide_the_ranks_are_refused() -> None:
    for error in run_ranks(4, lambda comm: comm, node_size=3):
        assert isinstance(error, ValueError) and "3" in str(error) and "4" in str(error)


def test_error_feedback_is_of_a_tensor() -> None:
    # LoCo counted the steps of all parameters in one index, kept errors in int8 and took fp16 only.
    steps = 50
    # int4 rounds all but the first element of a group of the one, and none of the other, to zero.
    gradients = [np.full(64, 0.05, np.float32), normal(1, 300)]
    gradients[0][0] = 1

    def body(comm: ng.Communicator) -> list[np.ndarray]:
        inputs = [np.tile(each, comm.size) for each in gradients]
        errors = [np.zeros_like(each) for each in inputs]
        totals = [np.zeros_like(each) for each in gradients]
        for _ in range(steps):
            for input, error, total in zip(inputs, errors, totals, strict=True):
                total += comm.reduce_scatter(input, INT4, op="mean", error=error, exact_below=0)
        return totals

    for totals in results_of(2, body):
        for total, gradient in zip(totals, gradients, strict=True):
            # What is owed is never more than half a step of the group.
            np.testing.assert_allclose(total, steps * gradient, atol=np.abs(gradient).max() / 7)


def test_sums_of_many_fp16_ranks_do_not_overflow() -> None:
    # qgZ added up in __half2: 9 x 10000 is infinite there, and small terms are lost.
    def body(comm: ng.Communicator) -> Any:
        return comm.all_reduce(np.full(64, 10000, np.float16), INT8, op="mean", exact_below=0)

    for mean in results_of(9, body):
        np.testing.assert_allclose(mean.astype(np.float32), 10000, rtol=0.01)


def test_the_largest_value_is_not_clamped() -> None:
    # +absmax became code 128 and was clamped to 127; -absmax was not: the largest gradients shrank, on one side.
    x = np.tile(np.array([4, -4, 1, -1], np.float32), 16)
    for wire in (INT8, INT4):
        for gathered in results_of(2, lambda comm, wire=wire: comm.all_gather(x, wire, exact_below=0)):  # type: ignore[misc]
            np.testing.assert_array_equal(gathered[0::4], -gathered[1::4])
            np.testing.assert_allclose(gathered[0::4], 4, rtol=2**-8)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wire", [INT8, INT4, ROTATED], ids=str)
def test_what_is_not_finite_arrives_as_nan(wire: Any, value: float) -> None:
    # absmax skipped a NaN and the code of one was finite, so that an overflow was hidden from the loss scaler.
    def body(comm: ng.Communicator) -> list[Any]:
        x = normal(comm.rank, 4, 256)
        if comm.rank == 1:
            x[1, 70] = value
        options = {"wire": wire, "inside": INT8, "exact_below": 0}
        return [
            comm.reduce_scatter(x, **options),
            comm.all_reduce(x, **options),
            comm.all_gather(x, wire, exact_below=0),
        ]

    for node_size in (0, 2):
        results = results_of(4, body, node_size)
        group = np.s_[1, 64:128]
        for rank, (part, everything, gathered) in enumerate(results):
            assert np.isfinite(part).all() == (rank != 1)
            for whole, row in ((everything, 1), (gathered, 5)):
                assert np.isnan(whole[row, group[1]]).all()
                assert np.isfinite(np.delete(whole, row, 0)).all()
        assert np.isnan(results[1][0][0, group[1]]).all() and np.isfinite(results[1][0][0, 128:]).all()


@pytest.mark.parametrize("value", [0, 1e-40])
def test_zeros_and_subnormals_arrive_finite(value: float) -> None:
    # A group of zeros took scale 1; hpZ gave zero or NaN losses (#4851, #5059, #7606).
    x = np.full(128, value, np.float32)
    for everything in results_of(3, lambda comm: comm.all_reduce(x, INT8, exact_below=0)):
        np.testing.assert_allclose(everything, 3 * x, rtol=0, atol=2e-38)  # half a step of bf16's smallest scale


def test_views_that_are_not_aligned() -> None:
    # cudaErrorMisalignedAddress (#3827).
    for offset in range(1, 5):
        x = normal(offset, 1000)
        for gathered in results_of(
            2, lambda comm, x=x, offset=offset: comm.all_gather(x[offset:], INT8, exact_below=0)
        ):
            assert relative_error(gathered, np.tile(x[offset:], 2)) < 0.02


@pytest.mark.parametrize(
    "calls",
    [
        lambda comm: comm.all_reduce(normal(0, 64 + comm.rank), INT8, exact_below=0),
        lambda comm: comm.all_reduce(normal(0, 64), (INT8, INT4)[comm.rank], exact_below=0),
        lambda comm: comm.all_reduce(normal(0, 64), INT8, op=("sum", "mean")[comm.rank], exact_below=0),
        lambda comm: comm.all_reduce(normal(0, 64).astype((np.float32, np.float16)[comm.rank]), INT8, exact_below=0),
        lambda comm: (
            comm.all_gather(normal(0, 64), INT8, exact_below=0)
            if comm.rank
            else comm.all_reduce(normal(0, 64), INT8, exact_below=0)
        ),
    ],
    ids=["numel", "format", "op", "dtype", "collective"],
)
def test_ranks_that_differ_get_an_error_and_do_not_hang(calls: Callable[[ng.Communicator], Any]) -> None:
    # A rank with another plan hung the others until a watchdog came (hpZ: #4906, #5030), or read garbage.
    errors = run_ranks(2, calls)
    assert all(isinstance(error, ng.TransportError) for error in errors), errors
    assert str(errors[0]).count("rank") >= 2
