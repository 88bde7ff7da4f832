"""The NVIDIA GPUs of this machine, as the driver shows them, and the order of work on them.

>>> ng.cuda.is_available(), ng.cuda.why_unavailable()
>>> with ng.cuda.Stream() as stream:
...     q = ng.quantize(w, ng.fp6)        # w on cuda:0
...     stream.synchronize()              # raises what went wrong on the GPU

The driver's library is looked for when one of these is first called. For want of a GPU only device(),
driver_version() and the making of streams, events and tensors raise.
"""

from __future__ import annotations

from typing import NamedTuple

from narrowgauge import _native
from narrowgauge._native import Event, Stream, current_stream

__all__ = [
    "Device",
    "Event",
    "Stream",
    "architectures",
    "current_stream",
    "device",
    "device_count",
    "driver_version",
    "is_available",
    "why_unavailable",
]


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


def architectures() -> str:
    """What this build has kernels for, such as 'sm_80 sm_90 compute_80'; empty if it was made without nvcc."""
    return _native.cuda_architectures()
