"""Memory from pools: of the host, page-locked, and of GPUs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple, Protocol

from narrowgauge import _native
from narrowgauge._native import Tensor

_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

_SHORT_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
    "u8": "uint8",
    "i8": "int8",
    "u16": "uint16",
    "i16": "int16",
    "u32": "uint32",
    "i32": "int32",
    "u64": "uint64",
    "i64": "int64",
}


class PoolStatistics(NamedTuple):
    """What a pool holds at one instant, in bytes of whole pages, or of 512 bytes on a GPU."""

    in_use: int
    """Held by tensors."""
    blocks: int
    """Their number."""
    peak: int
    """The largest `in_use` so far."""
    reserved: int
    """Had from the system: in use, cached and free."""
    cached: int
    """Free, but in the threads' caches, or still used by work on a GPU."""
    largest_free: int
    """The longest free run."""
    bad_frees: int
    """Deallocations that named no block, and were ignored."""
    fragmentation: float
    """1 - largest_free / free: 0 while what is free is in one piece."""


class Sink(Protocol):
    """Where the contents of a sleeping pool wait. The views are valid during the call only."""

    def put(self, key: int, data: memoryview) -> None:
        """Keeps a copy of the bytes. If it raises, the pool stays awake."""

    def get(self, key: int, data: memoryview) -> None:
        """Fills the view with what was put under the key. If it raises, the pool stays asleep."""


class HostPool:
    """A pool of host memory: page-aligned, in huge pages where possible, faulted in before its first use. Thread-safe.

    limit: the most bytes that tensors may hold, as a number or as text such as "8GiB", "512MiB" or "1.5GB"; what the
    pool has reserved may be more. huge_pages: ask the system for 2 MiB pages. numa_node: bind all memory to this node.
    """

    def __init__(
        self, limit: int | str | None = None, *, huge_pages: bool = True, numa_node: int | None = None
    ) -> None:
        self._pool = _native.HostPool(None if limit is None else size_in_bytes(limit, "limit"), huge_pages, numa_node)

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Tensor:
        """A new dense tensor, contents undefined; dtype: "bf16", "bfloat16", torch.bfloat16 or a numpy dtype.

        MemoryError, with the request and the statistics, if the limit or the system refuses.
        """
        return self._pool.empty(_shape(shape), _dtype_name(dtype))

    @property
    def limit(self) -> int | None:
        return self._pool.limit

    @property
    def is_asleep(self) -> bool:
        return self._pool.is_asleep

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(**self._pool.statistics())

    def trim(self) -> int:
        """Gives free memory back to the system, in stretches of 2 MiB. Returns the bytes given back."""
        return self._pool.trim()

    def sleep(self, discard: bool = True, sink: Sink | _native.PageSink | None = None) -> None:
        """Gives all physical memory back to the system until wake(); tensors keep their addresses.

        discard=True loses the contents; discard=False first puts them into `sink`. Until wake() tensors may die, but
        not be made, read or written; memory that is registered for I/O must be released before.
        """
        _check_sleep(discard, sink)
        self._pool.sleep(sink)

    def wake(self) -> None:
        """Undoes sleep(): faults the memory in and fetches what was put. May be tried again if it raises."""
        self._pool.wake()

    def huge_page_bytes(self) -> int:
        """How much of the pool lies in huge pages now, as the kernel reports it (slow)."""
        return self._pool.huge_page_bytes()

    def __repr__(self) -> str:
        return _repr(self)


class PinnedPool:
    """A pool of page-locked host memory, which copies to and from GPUs need to be fast and asynchronous. Thread-safe.

    limit: as HostPool's. The system cannot give page-locked memory to anyone else: keep it small. All GPUs may use it;
    device only says through which one it is asked for. It does not sleep. CudaError where there is no GPU.
    """

    def __init__(self, limit: int | str | None = None, *, device: int = 0) -> None:
        self._pool = _native.PinnedPool(None if limit is None else size_in_bytes(limit, "limit"), device)

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Tensor:
        """A new dense tensor in host memory, as HostPool.empty() makes it.

        Copies that use it must be done before it dies.
        """
        return self._pool.empty(_shape(shape), _dtype_name(dtype))

    @property
    def limit(self) -> int | None:
        return self._pool.limit

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(**self._pool.statistics())

    def trim(self) -> int:
        """Gives memory back to the system where all that was taken at once is free. Returns the bytes given back."""
        return self._pool.trim()

    def __repr__(self) -> str:
        return _repr(self)


class DevicePool:
    """A pool of the memory of one GPU, in the order of its current stream (ng.cuda.Stream). Thread-safe.

    limit: as HostPool's. A tensor is for the stream that is current when it is made: what that stream frees it may
    reuse at once, others when the work before is done. CudaError where there is no GPU.

    PyTorch's tensors can come from such a pool, one for each GPU, before the first of them is made:

    >>> path = narrowgauge._native.__file__
    >>> pool = torch.cuda.memory.CUDAPluggableAllocator(path, "ng_torch_cuda_malloc", "ng_torch_cuda_free")
    >>> torch.cuda.memory.change_current_allocator(pool)

    torch then does not raise OutOfMemoryError where memory is out, but a RuntimeError when the tensor is used;
    Tensor.record_stream() does nothing, and CUDA graphs must be captured without allocating.
    """

    def __init__(self, device: int = 0, limit: int | str | None = None) -> None:
        self._pool = _native.DevicePool(device, None if limit is None else size_in_bytes(limit, "limit"))

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Tensor:
        """A new dense tensor on the GPU, as HostPool.empty()."""
        return self._pool.empty(_shape(shape), _dtype_name(dtype))

    @property
    def device(self) -> int:
        return self._pool.device

    @property
    def limit(self) -> int | None:
        return self._pool.limit

    @property
    def is_asleep(self) -> bool:
        return self._pool.is_asleep

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(**self._pool.statistics())

    def trim(self) -> int:
        """Gives free memory back to the GPU, in granules of 2 MiB. Returns the bytes given back."""
        return self._pool.trim()

    def sleep(self, discard: bool = True, sink: Sink | _native.PageSink | None = None) -> None:
        """As HostPool.sleep(), of the GPU's memory; waits for all work on the GPU first."""
        _check_sleep(discard, sink)
        self._pool.sleep(sink)

    def wake(self) -> None:
        """Undoes sleep(). MemoryError if the GPU's memory was taken meanwhile; may be tried again if it raises."""
        self._pool.wake()

    def __repr__(self) -> str:
        return _repr(self)


def _repr(pool: HostPool | PinnedPool | DevicePool) -> str:
    counts = pool.statistics()
    limit = "none" if pool.limit is None else str(pool.limit)
    return f"{type(pool).__name__}({counts.in_use} bytes in use, {counts.reserved} reserved, limit {limit})"


def _check_sleep(discard: bool, sink: Any) -> None:
    if discard and sink is not None:
        raise ValueError("sleep: a sink is given, but discard=True keeps nothing; expected discard=False")
    if not discard and sink is None:
        raise ValueError("sleep: discard=False needs a sink, which keeps the contents; got None")


def _shape(shape: int | Sequence[int]) -> list[int]:
    return [shape] if isinstance(shape, int) else list(shape)


def size_in_bytes(size: int | str, name: str) -> int:
    """A number of bytes from a number or a text such as "8GiB"; ValueError, naming `name`, for anything else."""
    expected = f"expected a number of bytes above 0, or a text such as {', '.join(map(repr, ('8GiB', '1.5GB')))}"
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"{name} is a {type(size).__name__}, {expected}")
    value = size
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size, re.ASCII)
        if match is None or (match[2] or "B") not in _UNITS:
            raise ValueError(f"{name} is {size!r}, {expected}; units are {', '.join(_UNITS)}")
        value = int(Decimal(match[1]) * _UNITS[match[2] or "B"])
    assert isinstance(value, int)
    if not 0 < value < 1 << 63:
        raise ValueError(f"{name} is {size!r}, {expected}, below 2^63")
    return value


def _dtype_name(dtype: Any) -> str:
    # torch's dtypes print as 'torch.bfloat16'; numpy's have a name, and numpy's scalar types are called by it.
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", str(dtype))
    name = str(name).removeprefix("torch.")
    return _SHORT_DTYPES.get(name, name)
