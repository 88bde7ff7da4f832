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


@pytest.mark.parametrize("name, swizzled", [("wgmma_plain", False), ("wgmma_sw128", True)])
def test_wgmma(program: simgpu.Program, name: str, swizzled: bool) -> None:
    a, b = RNG.standard_normal((2, 64, K)).astype(np.float16)
    device = simgpu.Device(16 << 20)
    y = device.empty((64, 64), np.float32)
    args = [device.array(tiles(a, swizzled)), device.array(tiles(b, swizzled)), y, K]
    launch = program.launch(name, 1, 160, args, device, shared=32768).clean()
    assert np.abs(y.get() - a.astype(float) @ b.astype(float).T).max() < 1e-4
    assert launch.totals["bulk_bytes"] == 2 * 64 * K * 2


def test_faults(program: simgpu.Program) -> None:
    device = simgpu.Device(16 << 20)
    a = device.array(np.ones(64 * K, np.float16))
    y = device.empty((64, 64), np.float32)
    with pytest.raises(simgpu.SimError, match="more arrivals at the mbarrier than its count of 1"):
        program.launch("wgmma_no_empty", 1, 160, [a, a, y, K], device, shared=32768)
    program.launch("wgmma_no_wait", 1, 160, [a, a, y, K], device, shared=32768)
    assert np.isnan(y.get()).any()
