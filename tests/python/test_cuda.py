"""narrowgauge.cuda where there is no driver, and a driver that is too old."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import narrowgauge as ng
import pytest


def test_without_a_driver_a_reason_is_given() -> None:
    if ng.cuda.is_available():
        pytest.skip("there is a driver")
    assert ng.cuda.device_count() == 0
    reason = ng.cuda.why_unavailable()
    assert "driver" in reason
    with pytest.raises(ng.CudaError, match="CUDA cannot be used") as raised:
        ng.cuda.device()
    assert reason in str(raised.value)
    with pytest.raises(ng.CudaError):
        ng.cuda.driver_version()


def test_a_library_that_is_no_driver(tmp_path: Path) -> None:
    """Found under the driver's name, it lacks the driver's functions."""
    source = tmp_path / "old.c"
    source.write_text("int cuInit(unsigned flags) { return (int)flags; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    program = "import narrowgauge as ng; print(ng.cuda.is_available(), ng.cuda.why_unavailable())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"LD_LIBRARY_PATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False the NVIDIA driver lacks cuDriverGetVersion: it is older than CUDA 12.0")


@pytest.mark.parametrize("pool", [ng.DevicePool, ng.PinnedPool])
def test_pools_of_gpus_without_one(pool: type[ng.DevicePool] | type[ng.PinnedPool]) -> None:
    if ng.cuda.is_available():
        pytest.skip("there is a driver")
    with pytest.raises(ng.CudaError, match="CUDA cannot be used"):
        pool()
