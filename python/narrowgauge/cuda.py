"""The NVIDIA GPUs of this machine, as the driver shows them.

>>> ng.cuda.is_available(), ng.cuda.why_unavailable()

The driver's library is looked for when one of these is first called. For want of a GPU only device() and
driver_version() raise.
"""

from __future__ import annotations

from typing import NamedTuple

from narrowgauge import _native


class Device(NamedTuple):
    """A GPU."""

    name: str
    capability: int  # compute capability: 80 for 8.0
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    shared_bytes: int  # that a block may ask for


def is_available() -> bool:
    """Whether a GPU can be used."""
    return not _native.why_no_cuda()


def why_unavailable() -> str:
    """Why no GPU can be used, in a sentence; empty if one can."""
    return _native.why_no_cuda()


def device_count() -> int:
    """GPUs that the driver shows; CUDA_VISIBLE_DEVICES chooses. 0 where there is none."""
    return _native.cuda_device_count()


def device(index: int = 0) -> Device:
    """What the driver says of a GPU. CudaError if there is none, ValueError if there is none of this index."""
    return Device(*_native.cuda_device(index))


def driver_version() -> str:
    """The CUDA version that the driver is for, such as '13.0'. CudaError if there is none."""
    version = _native.cuda_driver_version()
    return f"{version // 1000}.{version % 1000 // 10}"
