"""narrowgauge.cuda where there is no driver, and a driver that is too old."""

from __future__ import annotations

import re
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


SHIM = Path(__file__).parents[2] / "cpp/src/core/shim/cuda.hpp"
TOO_OLD = """
int cuDriverGetVersion(int* version) { *version = 11080; return 0; }
"""
DOES_NOT_START = """
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuInit(unsigned flags) { return 803; }
int cuGetErrorName(int result, const char** name) { *name = "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"; return 0; }
int cuGetErrorString(int result, const char** text) { *text = "another version is loaded"; return 0; }
"""
HAS_NO_DEVICE = """
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGetCount(int* count) { *count = 0; return 0; }
"""


@pytest.mark.parametrize(
    "functions, complete, reason",
    [
        ("int cuInit(unsigned flags) { return 0; }", False, "lacks cuDriverGetVersion: it is older than CUDA 12.0"),
        (TOO_OLD, True, "is for CUDA 11.8, expected at least 12.0: install a newer one"),
        (
            DOES_NOT_START,
            True,
            "does not start: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (another version is loaded)",
        ),
        (HAS_NO_DEVICE, True, "finds no device (is CUDA_VISIBLE_DEVICES empty?)"),
    ],
)
def test_drivers_that_cannot_be_used(tmp_path: Path, functions: str, complete: bool, reason: str) -> None:
    """complete: it has all functions of the driver, those that are not given here doing nothing."""
    source = tmp_path / "driver.c"
    names = re.findall(r"F\((cu\w+),", SHIM.read_text()) if complete else []
    others = [name for name in names if f" {name}(" not in functions]
    source.write_text(functions + "".join(f"int {name}(void) {{ return 0; }}\n" for name in others))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    program = "import narrowgauge as ng; print(ng.cuda.is_available(), ng.cuda.why_unavailable())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"LD_LIBRARY_PATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"False the NVIDIA driver {reason}")


@pytest.mark.parametrize("pool", [ng.DevicePool, ng.PinnedPool])
def test_pools_of_gpus_without_one(pool: type[ng.DevicePool] | type[ng.PinnedPool]) -> None:
    if ng.cuda.is_available():
        pytest.skip("there is a driver")
    with pytest.raises(ng.CudaError, match="CUDA cannot be used"):
        pool()
