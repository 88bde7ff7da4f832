"""Fixtures of several files.

`xp` is an array library on a GPU: narrowgauge's own Tensors, and torch where it has a GPU. Tests that take it need a
driver: `LD_LIBRARY_PATH=build/release/tests/simgpu/lib python -m pytest -m cuda` runs them on the simulated one.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import narrowgauge as ng
import numpy as np
import pytest


class OwnTensors:
    """ng.Tensor on cuda:0."""

    Stream = ng.cuda.Stream

    @staticmethod
    def put(array: np.ndarray) -> ng.Tensor:
        if array.dtype == ml_dtypes.bfloat16:
            return ng.Tensor.from_dlpack(array.view(np.uint16)).to("cuda").view("bfloat16")
        return ng.Tensor.from_dlpack(array).to("cuda")

    @staticmethod
    def get(tensor: ng.Tensor) -> np.ndarray:
        host = tensor.to("cpu")
        if host.dtype == "bfloat16":
            return np.from_dlpack(host.view("uint16")).view(ml_dtypes.bfloat16)
        return np.from_dlpack(host)


class TorchTensors:
    """torch's tensors on cuda:0."""

    @staticmethod
    def Stream() -> Any:
        import torch

        return torch.cuda.stream(torch.cuda.Stream())

    @staticmethod
    def put(array: np.ndarray) -> Any:
        import torch

        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
        return torch.from_numpy(array).cuda()

    @staticmethod
    def get(tensor: Any) -> np.ndarray:
        import torch

        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
        return tensor.cpu().numpy()


@pytest.fixture(
    params=[pytest.param("narrowgauge", marks=pytest.mark.cuda), pytest.param("torch", marks=pytest.mark.cuda)]
)
def xp(request: pytest.FixtureRequest) -> Any:
    if reason := ng.cuda.why_unavailable():
        pytest.skip(reason)
    if request.param == "narrowgauge":
        return OwnTensors
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device")
    return TorchTensors


@pytest.fixture
def gpu() -> None:
    """Skips a test where there is no driver."""
    if reason := ng.cuda.why_unavailable():
        pytest.skip(reason)


@pytest.fixture
def kernels() -> None:
    """Skips a test where the build has no kernels."""
    if not ng.cuda.architectures():
        pytest.skip("narrowgauge was built without nvcc")
