"""Where arrays come from: the few things that narrowgauge asks of torch and of numpy, behind one interface.

Anything else that speaks DLPack (JAX, CuPy on the host) enters as a numpy array. Neither library is imported before
an array of it, or a request for one, is seen.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import Any

from narrowgauge import _native

Array = Any  # a torch.Tensor or a numpy.ndarray

FLOATS = ("float32", "float16", "bfloat16")


def missing(package: str, user: str) -> ImportError:
    return ImportError(f"{user} needs {package}, which is not installed: pip install 'narrowgauge[torch]'")


class Arrays(ABC):
    """One array library. Dtypes are named as both libraries name them: 'float32', 'bfloat16', 'uint8'."""

    has_bfloat16: bool  # in a form that the core can borrow

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A new dense array on the host."""

    @abstractmethod
    def block(self, size: int) -> Array:
        """`size` bytes aligned to 64, advised for huge pages and not yet touched."""

    @abstractmethod
    def dtype_name(self, dtype: Any) -> str:
        """The name of a dtype (or of the name of one); TypeError unless it is one of FLOATS."""

    @abstractmethod
    def source(self, array: Array, name: str) -> Array:
        """`array` as the core reads it: float, on the host, dense rows; copied only where it must be."""

    @abstractmethod
    def view(self, array: Array) -> Array:
        """The same memory as the core can borrow it: bytes where the library has a dtype that DLPack lacks."""

    @abstractmethod
    def from_bytes(self, data: Any, dtype: str, shape: tuple[int, ...]) -> Array:
        """A new array with a copy of the bytes of a buffer."""

    @abstractmethod
    def copy(self, array: Array) -> Array: ...

    @abstractmethod
    def cast(self, array: Array, dtype: str) -> Array: ...

    @abstractmethod
    def arange(self, stop: int) -> Array:
        """int64 [0, stop)."""


def _float_name(name: str, what: str) -> str:
    name = name.removeprefix("torch.")
    if name not in FLOATS:
        raise TypeError(f"{what} has dtype {name}, expected {', '.join(FLOATS)}")
    return name


class NumpyArrays(Arrays):
    # numpy has no bfloat16 of its own, and the dtype that ml_dtypes adds does not cross DLPack: such arrays pass
    # through float32, which holds every bfloat16 and from which one rounding gives the same result.
    has_bfloat16 = False

    def __init__(self) -> None:
        try:
            import numpy
        except ImportError:
            raise missing("numpy", "an array without torch") from None
        self.numpy = numpy

    def _dtype(self, name: str) -> Any:
        if name != "bfloat16":
            return self.numpy.dtype(name)
        try:
            import ml_dtypes
        except ImportError:
            return self.numpy.dtype("uint16")  # the bits
        return self.numpy.dtype(ml_dtypes.bfloat16)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return self.numpy.empty(shape, self._dtype(dtype))

    def block(self, size: int) -> Array:
        memory = self.numpy.empty(size + 63, self.numpy.uint8)
        start = -memory.ctypes.data % 64
        block = memory[start : start + size]
        _native.advise_huge_pages(block)
        return block

    def dtype_name(self, dtype: Any) -> str:
        return _float_name(dtype if isinstance(dtype, str) else self.numpy.dtype(dtype).name, "the result")

    def source(self, array: Array, name: str) -> Array:
        if not isinstance(array, self.numpy.ndarray):
            array = self.numpy.from_dlpack(array)
        if _float_name(array.dtype.name, name) == "bfloat16":
            return array.astype(self.numpy.float32)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        return array if array.flags.c_contiguous else self.numpy.ascontiguousarray(array)

    def view(self, array: Array) -> Array:
        return array.view(self.numpy.uint8) if array.dtype.name == "bfloat16" else array

    def from_bytes(self, data: Any, dtype: str, shape: tuple[int, ...]) -> Array:
        return self.numpy.frombuffer(data, self.numpy.uint8).copy().view(self._dtype(dtype)).reshape(shape)

    def copy(self, array: Array) -> Array:
        return array.copy()

    def cast(self, array: Array, dtype: str) -> Array:
        return array.astype(self._dtype(dtype), copy=False)

    def arange(self, stop: int) -> Array:
        return self.numpy.arange(stop, dtype=self.numpy.int64)


class TorchArrays(Arrays):
    has_bfloat16 = True

    def __init__(self) -> None:
        try:
            import torch
        except ImportError:
            raise missing("torch", "this") from None
        self.torch = torch
        # Run on torch's own threads, so that the two libraries do not compete for the cores.
        _native.adopt_openmp()

    # Weights outlive the mode in which they are made: a tensor born in inference mode could not be saved for a
    # backward pass later.

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        with self.torch.inference_mode(False):
            return self.torch.empty(shape, dtype=getattr(self.torch, dtype), device="cpu")

    def block(self, size: int) -> Array:
        block = self.empty((size,), "uint8")
        _native.advise_huge_pages(block)
        return block

    def dtype_name(self, dtype: Any) -> str:
        return _float_name(str(dtype), "the result")

    def source(self, array: Array, name: str) -> Array:
        if array.device.type != "cpu":
            raise ValueError(f"{name} is on device {array.device}, expected cpu")
        if array.layout is not self.torch.strided:
            raise TypeError(f"{name} has layout {array.layout}, expected a strided tensor")
        _float_name(str(array.dtype), name)
        array = array.detach().resolve_neg()
        return array if array.dim() == 0 or _native.is_matrix(array, name) else array.contiguous()

    def view(self, array: Array) -> Array:
        return array

    def from_bytes(self, data: Any, dtype: str, shape: tuple[int, ...]) -> Array:
        if not len(data):
            return self.empty(shape, dtype)
        with self.torch.inference_mode(False):
            return self.torch.frombuffer(bytearray(data), dtype=getattr(self.torch, dtype)).reshape(shape)

    def copy(self, array: Array) -> Array:
        with self.torch.inference_mode(False):
            return array.clone()

    def cast(self, array: Array, dtype: str) -> Array:
        return array.to(getattr(self.torch, dtype))

    def arange(self, stop: int) -> Array:
        return self.torch.arange(stop)


_libraries: dict[str, Arrays] = {}


def library(name: str) -> Arrays:
    """The library 'torch' or 'numpy'. ImportError, naming what to install, if it is absent."""
    if name not in _libraries:
        if name not in ("torch", "numpy"):
            raise ValueError(f"unknown array library '{name}', expected 'torch' or 'numpy'")
        _libraries[name] = TorchArrays() if name == "torch" else NumpyArrays()
    return _libraries[name]


def is_torch(array: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def library_of(array: object, name: str) -> Arrays:
    """The library that serves `array`; TypeError, with `name`, if it is no array."""
    if is_torch(array):
        return library("torch")
    if hasattr(array, "__dlpack__"):  # numpy arrays have it too
        return library("numpy")
    raise TypeError(f"{name} is a {type(array).__name__}, expected a torch tensor or a numpy array")
