"""Matrix multiplications for sm_80: results, counters, and faults that must be found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import simgpu
from cases import multiply, multiply_fp6

Compiled = Callable[..., simgpu.Program]


@pytest.fixture
def program(compiled: Compiled) -> simgpu.Program:
    return compiled("gemm.cu")


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


@pytest.mark.parametrize("m, n, k", [(64, 512, 512), (5, 64, 64)])
def test_fp6(program: simgpu.Program, m: int, n: int, k: int) -> None:
    launch = multiply_fp6(program, m, n, k)
    assert sum(kind["conflicts"] for kind in launch.totals["shared"].values()) == 0
    weight_bytes = n * k * 6 // 8
    assert launch.totals["global"]["cp.async"]["bytes"] == weight_bytes + n // 64 * m * k * 2


def test_unexecuted(program: simgpu.Program) -> None:
    launch, _, _ = multiply(program, "gemm_f16", 64, 64, 32)
    assert launch.unexecuted()  # with one k-tile the pipelined part of the loop does not run
