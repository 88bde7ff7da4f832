"""Matrix multiplications for sm_80: results, counters, and faults that must be found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import simgpu

RNG = np.random.default_rng(0)
Compiled = Callable[..., simgpu.Program]


@pytest.fixture
def program(compiled: Compiled) -> simgpu.Program:
    return compiled("gemm.cu")


def to_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.uint32) << 16).view(np.float32)


def multiply(
    program: simgpu.Program, name: str, m: int, n: int, k: int, kind: str = "f16"
) -> tuple[simgpu.Launch, np.ndarray, np.ndarray]:
    """The launch, its result, and the reference in double precision."""
    x = RNG.standard_normal((m, k)).astype(np.float16)
    w = RNG.standard_normal((k, n)).astype(np.float16)
    if kind == "bf16":
        x, w = to_bf16(x), to_bf16(w)
        reference = from_bf16(x).astype(float) @ from_bf16(w).astype(float)
    else:
        reference = x.astype(float) @ w.astype(float)
    device = simgpu.Device(16 << 20)
    y = device.empty((m, n), np.float32)
    args = [device.array(x), device.array(w), y, m, n, k]
    launch = program.launch(name, (n // 64, (m + 63) // 64), 128, args, device)
    return launch, y.get(), reference


@pytest.mark.parametrize(
    "m, n, k, kind", [(64, 64, 32, "f16"), (64, 512, 512, "f16"), (37, 128, 96, "f16"), (100, 64, 64, "bf16")]
)
def test_gemm(program: simgpu.Program, m: int, n: int, k: int, kind: str) -> None:
    launch, y, reference = multiply(program, "gemm_" + kind, m, n, k, kind)
    launch.clean()
    assert np.abs(y - reference).max() < 1e-4
    totals = launch.totals
    tile_columns, tile_rows = n // 64, (m + 63) // 64
    assert totals["mma"] == tile_columns * tile_rows * 4 * 8 * (k // 16)
    assert totals["macs"] == tile_columns * tile_rows * 64 * 64 * k
    assert totals["shared"]["ldmatrix"]["conflicts"] == 0
    assert totals["global"]["cp.async"]["bytes"] == 2 * k * (tile_columns * m + tile_rows * n)


def test_missing_barrier(program: simgpu.Program) -> None:
    launch, _, _ = multiply(program, "gemm_no_barrier", 64, 64, 128)
    hazards = [h for h in launch.hazards if h.kind == "write after read: no barrier between warps"]
    assert hazards and "gemm.cu:" in hazards[0].where and hazards[0].other.startswith("block (0,0,0) thread (")
    with pytest.raises(simgpu.SimError, match="no barrier between warps"):
        launch.clean()


def test_missing_wait(program: simgpu.Program) -> None:
    launch, y, _ = multiply(program, "gemm_no_wait", 64, 64, 128)
    assert any("asynchronous copy still in flight" in hazard.kind for hazard in launch.hazards)
    assert np.isnan(y).any()


def test_bank_conflicts(program: simgpu.Program) -> None:
    launch, _, _ = multiply(program, "gemm_conflicts", 64, 64, 128)
    launch.clean()
    assert launch.totals["shared"]["ldmatrix"]["conflicts"] > 0
    assert launch.counters.hot_conflicts()[0][2] == "ldmatrix"


@pytest.mark.parametrize(
    "rows_x, rows_y, readonly, message",
    [
        (32, 64, False, "out-of-bounds global cp.async read of 16 bytes at 0x.*its byte 4096.* by block .* thread"),
        (64, 63, False, "out-of-bounds global write of 8 bytes"),
        (64, 64, True, "write of 8 bytes to read-only memory"),
    ],
)
def test_bad_memory(program: simgpu.Program, rows_x: int, rows_y: int, readonly: bool, message: str) -> None:
    device = simgpu.Device(16 << 20)
    x, w = np.zeros((rows_x, 64), np.float16), np.zeros((64, 64), np.float16)
    y = device.array(np.zeros((rows_y, 64), np.float32), readonly=readonly)
    with pytest.raises(simgpu.SimError, match=f"gemm_f16: {message}"):
        program.launch("gemm_f16", (1, 1), 128, [device.array(x), device.array(w), y, 64, 64, 64], device)


def pack_fp6(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) codes s eee mm to 4-bit and 2-bit segments in the order of gemm_fp6's fragments."""
    n, k = codes.shape
    high = (codes >> 2).reshape(n // 16, 16, k // 64, 4, 16)
    low = (codes & 3).reshape(n // 16, 16, k // 64, 4, 16)
    w4 = np.zeros((n // 16, k // 64, 32, 4), np.uint32)
    w2 = np.zeros((n // 16, k // 64, 32, 2), np.uint32)
    g, t = np.arange(32) // 4, np.arange(32) % 4
    for block in range(4):
        for j in range(4):
            row, column = g + 8 * (j >> 1), 2 * t + 8 * (j & 1)
            for half in range(2):
                four = high[:, row, :, block, column + half].transpose(1, 2, 0).astype(np.uint32)
                two = low[:, row, :, block, column + half].transpose(1, 2, 0).astype(np.uint32)
                w4[:, :, :, block] |= four << np.uint32(16 * half + 12 - 4 * j)
                w2[:, :, :, block >> 1] |= two << np.uint32(16 * half + 14 - 2 * ((block & 1) * 4 + j))
    return w4, w2


@pytest.mark.parametrize("m, n, k", [(64, 512, 512), (5, 64, 64)])
def test_fp6(program: simgpu.Program, m: int, n: int, k: int) -> None:
    codes = RNG.integers(0, 64, (n, k)).astype(np.uint32)
    sign, exponent, mantissa = codes >> 5, (codes >> 2) & 7, codes & 3
    magnitude = np.where(exponent == 0, mantissa * 2.0**-4, (1 + mantissa / 4) * 2.0 ** (exponent.astype(float) - 3))
    w = np.where(sign == 1, -magnitude, magnitude)
    w4, w2 = pack_fp6(codes)
    x = RNG.standard_normal((m, k)).astype(np.float16)
    scales = RNG.uniform(0.5, 2, n).astype(np.float32)
    device = simgpu.Device(16 << 20)
    y = device.empty((m, n), np.float16)
    args = [*map(device.array, (x, w4, w2, scales)), y, m, n, k]
    launch = program.launch("gemm_fp6", (n // 64, 1), 128, args, device, shared=2 * 64 * 64 * 2 + 256 * 24)
    launch.clean()
    reference = (x.astype(float) @ w.T) * scales
    assert np.abs(y.get() - reference).max() <= 1e-3 * np.abs(reference).max()
    assert sum(kind["conflicts"] for kind in launch.totals["shared"].values()) == 0
    weight_bytes = n * k * 6 // 8
    assert launch.totals["global"]["cp.async"]["bytes"] == weight_bytes + n // 64 * m * k * 2


def test_every_synchronisation_is_needed(program: simgpu.Program) -> None:
    """Dropping any barrier or wait of the kernel is noticed."""
    seen = 0
    for line, statement, mutant in simgpu.sync_mutants(program.module.text, "gemm_f16"):
        launch, _, _ = multiply(simgpu.Program(mutant), "gemm_f16", 64, 64, 256)
        assert launch.hazards, (line, statement)
        seen += 1
    assert seen == 3


def test_unexecuted(program: simgpu.Program) -> None:
    launch, _, _ = multiply(program, "gemm_f16", 64, 64, 32)
    assert launch.unexecuted()  # with one k-tile the pipelined part of the loop does not run
