"""The library's kernels of collectives (cuda/kernels/sm80_wire.cu): what they compute, and what they move.

The C++ tests compare them with the CPU bit for bit; here they run on lengths of every kind, free of hazards.
"""

from __future__ import annotations

import ctypes
import shutil
from ctypes import c_bool, c_float, c_int32, c_int64, c_uint8
from typing import Any

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


def prepare(program: simgpu.Program, n: int) -> simgpu.Launch:
    """Input with error through a Hadamard matrix."""
    device = simgpu.Device()
    x, error = device.array(values(n).astype(np.float16), readonly=True), device.array(values(n, 1))
    out = device.empty(n, np.float32)
    launch = run(program, "prepare", PrepareArgs(x.ptr, F16, error.ptr, True, out.ptr, n), device)
    both = values(n).astype(np.float16).astype(np.float32) + values(n, 1)
    np.testing.assert_array_equal(error.get(), both)
    np.testing.assert_allclose(out.get(), hadamard(both), atol=1e-5)
    return launch


def keep_error(program: simgpu.Program, n: int) -> simgpu.Launch:
    """Of what was sent through a Hadamard matrix as it was: none."""
    device = simgpu.Device()
    sent, kept = device.array(hadamard(values(n)).astype(np.float32)), device.array(values(n))
    launch = run(program, "keep_error", KeepErrorArgs(sent.ptr, True, kept.ptr, n), device)
    np.testing.assert_allclose(kept.get(), 0, atol=1e-5)
    return launch


def finish(program: simgpu.Program, n: int) -> simgpu.Launch:
    """The mean of three peers' elements that travel as they are."""
    device = simgpu.Device()
    whole = [np.round(values(n, seed) * 20).astype(np.float16) for seed in range(3)]
    peers = [device.array(each, readonly=True) for each in whole]
    out = device.empty(n, np.float32)
    pointers = (c_int64 * PEERS)(*[peer.ptr for peer in peers])
    launch = run(program, "finish", FinishArgs(pointers, 3, F16, False, 3, out.ptr, F32, n), device)
    np.testing.assert_array_equal(out.get(), sum(each.astype(np.float32) for each in whole) / np.float32(3))
    return launch


@pytest.mark.parametrize("n", [1, 63, 64, 640, 1111])
def test_input_with_error_through_a_hadamard_matrix(program: simgpu.Program, n: int) -> None:
    prepare(program, n)
    keep_error(program, n)


def test_an_error_that_is_not_finite_is_forgotten(program: simgpu.Program) -> None:
    device = simgpu.Device()
    sent, kept = device.array(np.array([1, np.inf, np.nan, 4], np.float32)), device.array(np.full(4, 3, np.float32))
    run(program, "keep_error", KeepErrorArgs(sent.ptr, False, kept.ptr, 4), device)
    np.testing.assert_array_equal(kept.get(), [2, 0, 0, -1])


# Bytes of an element: fp16 input and its error there, the error and what is sent back; and so on.
@pytest.mark.parametrize(
    "kernel, loaded, stored", [(prepare, 2 + 4, 4 + 4), (keep_error, 4 + 4, 4), (finish, 3 * 2, 4)]
)
def test_every_byte_moves_once(program: simgpu.Program, kernel: Any, loaded: int, stored: int) -> None:
    n = 4096
    moved = kernel(program, n).totals["global"]
    assert (moved["load"]["sectors"] * 32, moved["store"]["sectors"] * 32) == (loaded * n, stored * n)


def test_lanes_speak_by_shuffles_alone(program: simgpu.Program) -> None:
    """No kernel has a synchronisation that could be missing, nor memory that would need one."""
    for kernel in program.kernels.values():
        assert not list(simgpu.sync_mutants(program.module, kernel)), kernel.name
        assert not [variable for variable in kernel.variables if variable.space == "shared"], kernel.name
