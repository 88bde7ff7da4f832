"""Global memory of the simulated device, and the windows of the generic address space.

Each byte has flags beside it: allocated, initialised, read-only, freed. Allocations are never reused and lie REDZONE
bytes apart, so that running over an end hits unallocated memory, and what was freed is known as that for ever. Fresh
memory holds 0xff, which is NaN in every float format: a value that was never written does not pass for a result. Blocks
run one batch after the other, so weak ordering between blocks is not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

GLOBAL_BASE = 0x7F_0000_0000_00
SHARED_WINDOW = 0x10_0000_0000
LOCAL_WINDOW = 0x20_0000_0000
WINDOW = 0x10_0000_0000  # bytes of each window
REDZONE = 512

ALLOCATED, INITIALISED, READ_ONLY, FREED = 1, 2, 4, 8

POISON = 0xFF


class Buffer:
    """One allocation, seen as an array of `dtype` and `shape`."""

    def __init__(self, device: Device, offset: int, nbytes: int, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
        self.device = device
        self.offset = offset
        self.nbytes = nbytes
        self.dtype = np.dtype(dtype)
        self.shape = shape

    @property
    def ptr(self) -> int:
        """The address that a kernel sees."""
        return self.device.base + self.offset

    @property
    def _slice(self) -> slice:
        return slice(self.offset, self.offset + self.nbytes)

    def get(self) -> np.ndarray:
        out: np.ndarray = self.device.bytes[self._slice].copy().view(self.dtype).reshape(self.shape)
        return out

    def set(self, values: ArrayLike) -> None:
        array = np.ascontiguousarray(values, self.dtype)
        if array.nbytes != self.nbytes:
            raise ValueError(f"a buffer of {self.nbytes} bytes cannot take an array of {array.nbytes} bytes")
        self.device.bytes[self._slice] = array.view(np.uint8).ravel()
        self.device.flags[self._slice] |= INITIALISED

    def free(self) -> None:
        """Whatever touches it from now on is an error."""
        self.device.flags[self._slice] = FREED
        self.device.bytes[self._slice] = POISON


class Device:
    """Simulated device memory of a fixed size."""

    def __init__(self, memory: int = 256 << 20) -> None:
        self.base = GLOBAL_BASE  # the address of its first byte
        self.bytes = np.zeros(memory, np.uint8)
        self.flags = np.zeros(memory, np.uint8)
        self.views = words(self.bytes)
        self.flag_views = words(self.flags)
        self.top = REDZONE
        self.buffers: list[Buffer] = []

    def allocate(
        self, nbytes: int, dtype: DTypeLike = np.uint8, shape: tuple[int, ...] | None = None, align: int = 256
    ) -> Buffer:
        offset = (self.top + align - 1) // align * align
        end = offset + nbytes
        if end + REDZONE > self.bytes.size:
            raise MemoryError(
                f"{nbytes} bytes do not fit: {max(0, self.bytes.size - REDZONE - offset)} of the simulated device's "
                f"{self.bytes.size} bytes are free"
            )
        self.top = end + REDZONE
        self.bytes[offset:end] = POISON
        self.flags[offset:end] = ALLOCATED
        buffer = Buffer(self, offset, nbytes, dtype, (nbytes,) if shape is None else shape)
        self.buffers.append(buffer)
        return buffer

    def array(self, values: ArrayLike, readonly: bool = False) -> Buffer:
        """A copy of an array; with `readonly` a kernel that writes to it is stopped."""
        array = np.ascontiguousarray(values)
        buffer = self.allocate(array.nbytes, array.dtype, array.shape)
        buffer.set(array)
        if readonly:
            self.flags[buffer.offset : buffer.offset + buffer.nbytes] |= READ_ONLY
        return buffer

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike) -> Buffer:
        """Uninitialised: reading it before writing it is a hazard."""
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        return self.allocate(int(np.prod(dims)) * np.dtype(dtype).itemsize, dtype, dims)

    def zeros(self, shape: int | Sequence[int], dtype: DTypeLike) -> Buffer:
        buffer = self.empty(shape, dtype)
        buffer.set(np.zeros(buffer.shape, dtype))
        return buffer

    def offsets(self, addresses: np.ndarray) -> np.ndarray:
        """Where addresses lie in `bytes`; not inside it for those that are not this device's."""
        return addresses - self.base

    def address(self, offset: int) -> int:
        return self.base + int(offset)

    def common_flags(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """The flags that all bytes of each access have. pre: the accesses are aligned to their size."""
        flags = self.flag_views[min(size, 8)][words_of(offsets, size)]
        if size > 8:
            flags = np.bitwise_and.reduce(flags, axis=1)
        for half in (4, 2, 1):
            if size > half:
                flags = flags & (flags >> (8 * half))
        out: np.ndarray = flags & 0xFF
        return out

    def mark_initialised(self, offsets: np.ndarray, size: int) -> None:
        """pre: the accesses are aligned to their size."""
        unit = min(size, 8)
        self.flag_views[unit][words_of(offsets, size)] |= int.from_bytes([INITIALISED] * unit, "little")

    def was_freed(self, offset: int) -> bool:
        return bool(self.flags[offset] & FREED)

    def where(self, address: int) -> str:
        """Where an address lies, for error messages."""
        offset = int(address) - self.base

        def distance(buffer: Buffer) -> int:
            return max(buffer.offset - offset, offset - (buffer.offset + buffer.nbytes) + 1, 0)

        if not self.buffers:
            return "nothing is allocated"
        nearest = min(self.buffers, key=distance)
        return (
            f"the nearest allocation has {nearest.nbytes} bytes at {nearest.ptr:#x}; "
            f"the access is at its byte {offset - nearest.offset}"
        )


def words(array: np.ndarray) -> dict[int, np.ndarray]:
    """Bytes as unsigned integers, by their size."""
    return {size: array.view(f"u{size}") for size in (1, 2, 4, 8)}


def words_of(offsets: np.ndarray, size: int) -> np.ndarray:
    """The words of min(size, 8) bytes that aligned accesses consist of: one for each, or a row of several."""
    first = offsets // min(size, 8)
    return first if size <= 8 else first[:, None] + np.arange(size // 8)
