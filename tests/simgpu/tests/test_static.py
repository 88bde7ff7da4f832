"""Facts about compiled kernels that need no run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from simgpu import static

GEMM = str(Path(__file__).parent / "gemm.cu")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def test_occupancy() -> None:
    # 80 registers are 2560 for a warp: 25 warps, of which 24 can be split over four partitions: 6 blocks.
    assert static.occupancy("sm_80", 128, 80, 22528) == static.Occupancy(6, 24, 0.375, ("registers",))
    assert static.occupancy("sm_80", 256, 32, 0).share == 1.0
    assert static.occupancy("sm_90a", 160, 90, 200 << 10).blocks == 1
    assert static.occupancy("sm_86", 128, 32, 120 << 10).blocks == 0


@needs_nvcc
def test_resources() -> None:
    kernel = static.resources(GEMM, "sm_80")["gemm_fp6"]
    assert 40 <= kernel.registers <= 128 and kernel.barriers == 1
    assert kernel.spill_stores == kernel.spill_loads == kernel.stack == 0


@needs_nvcc
@pytest.mark.skipif(
    static.tool("cuobjdump") is None or static.tool("nvdisasm") is None,
    reason="cuobjdump and nvdisasm are not installed",
)
def test_sass(tmp_path: Path) -> None:
    cubin = tmp_path / "gemm.cubin"
    subprocess.run(["nvcc", "-cubin", "-arch=sm_80", "-std=c++17", "-o", str(cubin), GEMM], check=True)
    opcodes = static.sass(cubin)["gemm_fp6"]
    assert opcodes["HMMA.16816.F32"] == 32 and opcodes["LDSM.16.M88.4"] == 16
    assert not any(opcode.startswith(("LDL", "STL")) for opcode in opcodes)
