"""The library's kernels of collectives (cuda/kernels/sm80_wire.cu): what they compute, and what they move.

The C++ tests compare them with the CPU bit for bit; here they run on lengths of every kind, free of hazards.
"""

from __future__ import annotations

import ctypes
import shutil
from ctypes import c_bool, c_float, c_int32, c_int64, c_uint8

import numpy as np
import pytest
import simgpu
from shipped import image
from test_quantize import structure

PEERS = 64
F32, F16, BF16 = 0, 1, 2

PrepareArgs = structure(
    "PrepareArgs", source=c_int64, type=c_uint8, error=c_int64, hadamard=c_bool, to=c_int64, n=c_int64
)
KeepErrorArgs = structure("KeepErrorArgs", sent=c_int64, hadamard=c_bool, error=c_int64, n=c_int64)
FinishArgs = structure(
    "FinishArgs",
    peer=c_int64 * PEERS,
    peers=c_int32,
    type=c_uint8,
    hadamard=c_bool,
    divisor=c_float,
    to=c_int64,
    to_type=c_uint8,
    n=c_int64,
)


@pytest.fixture(scope="module")
def program() -> simgpu.Program:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    return image("sm80_wire")


def run(program: simgpu.Program, name: str, args: ctypes.Structure, device: simgpu.Device) -> simgpu.Launch:
    kernel = program.find(name)
    assert kernel.params[0].size == ctypes.sizeof(args)
    return program.launch(name, -(-args.n // 512), 256, [bytes(args)], device).clean()


def values(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def hadamard(x: np.ndarray) -> np.ndarray:
    """Blocks of 64, and what is left over in powers of two."""
    out = x.astype(np.float64)
    done = 0
    while done < len(x):
        length = 64
        while length > len(x) - done:
            length //= 2
        matrix = np.ones((1, 1))
        while len(matrix) < length:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        out[done : done + length] = matrix @ out[done : done + length] / np.sqrt(length)
        done += length
    return out


@pytest.mark.parametrize("n", [1, 63, 64, 640, 1111])
def test_input_with_error_through_a_hadamard_matrix(program: simgpu.Program, n: int) -> None:
    device = simgpu.Device()
    x, error = device.array(values(n).astype(np.float16), readonly=True), device.array(values(n, 1))
    out = device.empty(n, np.float32)
    run(program, "prepare", PrepareArgs(x.ptr, F16, error.ptr, True, out.ptr, n), device)
    both = values(n).astype(np.float16).astype(np.float32) + values(n, 1)
    np.testing.assert_array_equal(error.get(), both)
    np.testing.assert_allclose(out.get(), hadamard(both), atol=1e-5)

    kept = device.array(both)
    run(program, "keep_error", KeepErrorArgs(out.ptr, True, kept.ptr, n), device)
    np.testing.assert_allclose(kept.get(), 0, atol=1e-5)


def test_an_error_that_is_not_finite_is_forgotten(program: simgpu.Program) -> None:
    device = simgpu.Device()
    sent, kept = device.array(np.array([1, np.inf, np.nan, 4], np.float32)), device.array(np.full(4, 3, np.float32))
    run(program, "keep_error", KeepErrorArgs(sent.ptr, False, kept.ptr, 4), device)
    np.testing.assert_array_equal(kept.get(), [2, 0, 0, -1])


def test_means_of_elements_that_travel_as_they_are(program: simgpu.Program) -> None:
    n = 4096
    device = simgpu.Device()
    whole = [np.round(values(n, seed) * 20).astype(np.float16) for seed in range(3)]
    peers = [device.array(each, readonly=True) for each in whole]
    out = device.empty(n, np.float32)
    pointers = (c_int64 * PEERS)(*[peer.ptr for peer in peers])
    launch = run(program, "finish", FinishArgs(pointers, 3, F16, False, 3, out.ptr, F32, n), device)
    np.testing.assert_array_equal(out.get(), sum(each.astype(np.float32) for each in whole) / np.float32(3))
    # Each byte once.
    assert launch.totals["global"]["load"]["sectors"] * 32 == 3 * 2 * n
    assert launch.totals["global"]["store"]["sectors"] * 32 == 4 * n
