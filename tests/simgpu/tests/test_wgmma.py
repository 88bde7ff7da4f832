"""A warp-specialised Hopper kernel: bulk copies, mbarriers and wgmma, and the faults that its pipeline can have."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import simgpu

RNG = np.random.default_rng(1)
K = 256


@pytest.fixture
def program(compiled: Callable[..., simgpu.Program]) -> simgpu.Program:
    return compiled("wgmma.cu", "sm_90a")


def tiles(x: np.ndarray, swizzled: bool) -> np.ndarray:
    """64 x K as tiles of 64 x 64 in the layout that the kernel's descriptors name."""
    out = []
    for start in range(0, x.shape[1], 64):
        chunks = x[:, start : start + 64].reshape(64, 8, 8)
        if swizzled:
            tile, row = np.empty_like(chunks), np.arange(64)
            for q in range(8):
                tile[row, q ^ (row & 7)] = chunks[row, q]
        else:
            tile = chunks.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3)
        out.append(tile.ravel())
    return np.concatenate(out)


@pytest.mark.parametrize(
    "name, swizzled, decay", [("plain", False, 1), ("sw128", True, 1), ("sw128", True, 0.5), ("pipelined", True, 1)]
)
def test_wgmma(program: simgpu.Program, name: str, swizzled: bool, decay: float) -> None:
    a, b = RNG.standard_normal((2, 64, K)).astype(np.float16)
    device = simgpu.Device(16 << 20)
    y = device.empty((64, 64), np.float32)
    args = [device.array(tiles(a, swizzled)), device.array(tiles(b, swizzled)), y, K, decay]
    launch = program.launch(f"wgmma_{name}", 1, 160, args, device, shared=32768).clean()
    factors = np.repeat(decay ** np.arange(K // 64 - 1, -1, -1.0), 64)
    assert np.abs(y.get() - (a * factors) @ b.astype(float).T).max() < 1e-4
    assert launch.totals["bulk_bytes"] == 2 * 64 * K * 2


def test_overrun_of_the_ring(program: simgpu.Program) -> None:
    device = simgpu.Device(16 << 20)
    a, y = device.array(np.ones(64 * K, np.float16)), device.empty((64, 64), np.float32)
    with pytest.raises(simgpu.SimError, match="more arrivals at the mbarrier than its count of 1"):
        program.launch("wgmma_no_empty", 1, 160, [a, a, y, K, 1], device, shared=32768)


@pytest.mark.parametrize("name", ["no_wait", "no_last_wait"])
def test_missing_wait(program: simgpu.Program, name: str) -> None:
    device = simgpu.Device(16 << 20)
    a, y = device.array(np.ones(64 * K, np.float16)), device.empty((64, 64), np.float32)
    program.launch(f"wgmma_{name}", 1, 160, [a, a, y, K, 1], device, shared=32768)
    assert np.isnan(y.get()).all()
