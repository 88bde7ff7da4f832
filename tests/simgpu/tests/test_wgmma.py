"""A warp-specialised Hopper kernel: bulk copies, mbarriers and wgmma, and the faults that its pipeline can have."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import simgpu
from cases import multiply_wgmma

K = 256


@pytest.fixture
def program(compiled: Callable[..., simgpu.Program]) -> simgpu.Program:
    return compiled("wgmma.cu", "sm_90a")


@pytest.mark.parametrize(
    "name, swizzled, decay", [("plain", False, 1), ("sw128", True, 1), ("sw128", True, 0.5), ("pipelined", True, 1)]
)
def test_wgmma(program: simgpu.Program, name: str, swizzled: bool, decay: float) -> None:
    launch = multiply_wgmma(program, f"wgmma_{name}", swizzled, K, decay)
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
