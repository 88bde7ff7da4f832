"""What the tests of simgpu share: compiled CUDA files, once for a session, and the reason where there is no nvcc."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import simgpu

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def compiled() -> Callable[..., simgpu.Program]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    programs: dict[str, simgpu.Program] = {}

    def get(name: str, arch: str = "sm_80") -> simgpu.Program:
        if name not in programs:
            programs[name] = simgpu.compile(HERE / name, arch)
        return programs[name]

    return get
