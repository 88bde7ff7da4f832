"""Where arrays come from: the few things that narrowgauge asks of torch and of numpy, behind one interface.

Anything else that speaks DLPack enters as a numpy array from the host (JAX), as a Tensor from a GPU (CuPy). No library
is imported before an array of it, or a request for one, is seen.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import Any

from narrowgauge import _native
from narrowgauge.errors import CudaError

Array = Any  # a torch.Tensor, a numpy.ndarray, or on a GPU a narrowgauge.Tensor

FLOATS = ("float32", "float16", "bfloat16")
_DLPACK_CUDA = 2


def missing(package: str, user: str) -> ImportError:
    return ImportError(f"{user} needs {package}, which is not installed: pip install 'narrowgauge[torch]'")


class Arrays(ABC):
    """One array library. Dtypes are named as both libraries name them: 'float32', 'bfloat16', 'uint8'."""

    has_bfloat16: bool  # in a form that the core can borrow
    device = "cpu"  # where new arrays are made: "cpu" or "cuda:0"
    pickles = True

    @abstractmethod
    def on(self, device: str) -> Arrays:
        """What makes this library's arrays on another device; on the host, those of numpy for narrowgauge's."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A new dense array on the device."""

    @abstractmethod
    def block(self, size: int) -> Array:
        """`size` bytes, not yet touched: on the host aligned to 64 and advised for huge pages, on a GPU to 128."""

    @abstractmethod
    def dtype_name(self, dtype: Any) -> str:
        """The name of a dtype (or of the name of one); TypeError unless it is one of FLOATS."""

    @abstractmethod
    def source(self, array: Array, name: str) -> Array:
        """`array` as the core reads it: float, on the device, dense rows; copied only where it must be."""

    @abstractmethod
    def view(self, array: Array) -> Array:
        """The same memory as the core can borrow it: bytes where the library has a dtype that DLPack lacks."""

    @abstractmethod
    def from_bytes(self, data: Any, dtype: str, shape: tuple[int, ...]) -> Array:
        """A new array with a copy of the bytes of a buffer."""

    @abstractmethod
    def copy(self, array: Array) -> Array: ...

    def assign(self, array: Array, values: Array) -> None:
        """Copies the values of an array of the same shape and dtype into `array`."""
        array[...] = values

    def host(self, array: Array) -> Array:
        """`array` on the host, as numpy or torch has it; itself if it is there."""
        return array

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

    def on(self, device: str) -> Arrays:
        return self if device == "cpu" else library("narrowgauge", device)

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
        if isinstance(array, _native.Tensor):
            array = self.from_tensor(array)
        elif not isinstance(array, self.numpy.ndarray):
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

    def from_tensor(self, tensor: _native.Tensor) -> Array:
        """The memory of a Tensor on the host."""
        if tensor.dtype != "bfloat16":
            return self.numpy.from_dlpack(tensor)
        return self.numpy.from_dlpack(tensor.view("uint16")).view(self._dtype("bfloat16"))

    def copy(self, array: Array) -> Array:
        return array.copy()

    def cast(self, array: Array, dtype: str) -> Array:
        return array.astype(self._dtype(dtype), copy=False)

    def arange(self, stop: int) -> Array:
        return self.numpy.arange(stop, dtype=self.numpy.int64)


class TorchArrays(Arrays):
    has_bfloat16 = True

    def __init__(self, device: str = "cpu") -> None:
        try:
            import torch
        except ImportError:
            raise missing("torch", "this") from None
        self.torch = torch
        self.device = device
        # Run on torch's own threads, so that the two libraries do not compete for the cores.
        _native.adopt_openmp()

    def on(self, device: str) -> Arrays:
        if device != "cpu" and not self.torch.cuda.is_available():
            raise CudaError(
                f"torch {self.torch.__version__} has no CUDA device, expected one for tensors on {device}; matrices "
                "made from numpy arrays need none"
            )
        return library("torch", device)

    # Weights outlive the mode in which they are made: a tensor born in inference mode could not be saved for a
    # backward pass later.

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        with self.torch.inference_mode(False):
            return self.torch.empty(shape, dtype=getattr(self.torch, dtype), device=self.device)

    def block(self, size: int) -> Array:
        block = self.empty((size,), "uint8")
        if self.device == "cpu":
            _native.advise_huge_pages(block)
        return block

    def dtype_name(self, dtype: Any) -> str:
        return _float_name(str(dtype), "the result")

    def source(self, array: Array, name: str) -> Array:
        if str(array.device) != self.device:
            raise ValueError(f"{name} is on device {array.device}, expected {self.device}")
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
            return (
                self.torch.frombuffer(bytearray(data), dtype=getattr(self.torch, dtype)).reshape(shape).to(self.device)
            )

    def copy(self, array: Array) -> Array:
        with self.torch.inference_mode(False):
            return array.clone()

    def cast(self, array: Array, dtype: str) -> Array:
        return array.to(getattr(self.torch, dtype))

    def arange(self, stop: int) -> Array:
        return self.torch.arange(stop, device=self.device)

    def host(self, array: Array) -> Array:
        return array.cpu()


class DeviceArrays(Arrays):
    """narrowgauge's own Tensors on a GPU, in the order of its current stream."""

    has_bfloat16 = True
    pickles = False

    def __init__(self, device: str) -> None:
        self.device = device

    def on(self, device: str) -> Arrays:
        return library("numpy") if device == "cpu" else library("narrowgauge", device)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return _native.empty(list(shape), dtype, self.device)

    def block(self, size: int) -> Array:
        return self.empty((size,), "uint8")

    def dtype_name(self, dtype: Any) -> str:
        return _float_name(str(getattr(dtype, "name", dtype)), "the result")

    def source(self, array: Array, name: str) -> Array:
        if not isinstance(array, _native.Tensor):
            array = _native.Tensor.from_dlpack(array)
        if array.device != self.device:
            raise ValueError(f"{name} is on device {array.device}, expected {self.device}")
        _float_name(array.dtype, name)
        return array

    def view(self, array: Array) -> Array:
        return array

    def from_bytes(self, data: Any, dtype: str, shape: tuple[int, ...]) -> Array:
        return _native.tensor_from_bytes(data, dtype, list(shape), self.device)

    def copy(self, array: Array) -> Array:
        new = self.empty(array.shape, array.dtype)
        self.assign(new, array)
        return new

    def assign(self, array: Array, values: Array) -> None:
        array.copy_from(values)

    def cast(self, array: Array, dtype: str) -> Array:
        assert array.dtype == dtype  # made so, since has_bfloat16
        return array

    def arange(self, stop: int) -> Array:
        raise NotImplementedError  # rows are gathered on the CPU

    def host(self, array: Array) -> Array:
        numpy = library("numpy")
        assert isinstance(numpy, NumpyArrays)
        return numpy.from_tensor(array.to("cpu"))


_libraries: dict[tuple[str, str], Arrays] = {}


def library(name: str, device: str = "cpu") -> Arrays:
    """The library 'torch', 'numpy' (on the host only) or 'narrowgauge' (on a GPU only), making arrays on a device.

    ImportError, naming what to install, if it is absent.
    """
    key = name, device
    if key not in _libraries:
        if name == "torch":
            _libraries[key] = TorchArrays(device)
        elif name == "numpy" and device == "cpu":
            _libraries[key] = NumpyArrays()
        elif name == "narrowgauge" and device != "cpu":
            _libraries[key] = DeviceArrays(device)
        else:
            raise ValueError(f"unknown array library '{name}' on {device}, expected 'torch' or 'numpy'")
    return _libraries[key]


def is_torch(array: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def library_of(array: Any, name: str) -> Arrays:
    """The library that serves `array`, on its device; TypeError, with `name`, if it is no array."""
    if is_torch(array):
        return library("torch", str(array.device) if array.is_cuda else "cpu")  # meta and others are refused later
    if isinstance(array, _native.Tensor):
        return library("numpy") if array.device == "cpu" else library("narrowgauge", array.device)
    if hasattr(array, "__dlpack__"):  # numpy arrays have it too
        kind, index = array.__dlpack_device__()
        return library("narrowgauge", f"cuda:{index}") if kind == _DLPACK_CUDA else library("numpy")
    raise TypeError(f"{name} is a {type(array).__name__}, expected a torch tensor or a numpy array")
