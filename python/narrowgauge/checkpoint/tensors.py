"""What a checkpoint asks of torch and of numpy: how each dtype is stored, and memory seen as bytes.

A tensor's *form* says how a file holds it. Safetensors has no name for every dtype: what it lacks is stored as other
numbers of the same bytes (complex128 as F64 [..., 2], fp8 variants as U8), and the state's tree keeps the true dtype.
Values keep every bit; the order of axes in memory is not kept: what comes back is dense and row-major.

Neither library is imported here before an array of it, or a request for one, is seen.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from narrowgauge import _arrays
from narrowgauge._arrays import Array
from narrowgauge.qtensor import QTensor

# Bytes of an element of a file's dtypes. The sub-byte ones are absent: nothing here is stored in them.
FILE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class Form(NamedTuple):
    """How a file holds the tensors of a dtype: as `file` with the shape [*shape, *tail]."""

    name: str  # of the true dtype, as the tree has it
    file: str
    tail: tuple[int, ...]
    itemsize: int  # of the true dtype
    indirect: bool  # not as its library has it


class Span(NamedTuple):
    """The bytes [begin, end) that an array's elements lie in."""

    begin: int
    end: int


def dense_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    for length in reversed(shape):
        strides.append(itemsize)
        itemsize *= max(length, 1)
    return tuple(reversed(strides))


def span_of(start: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Span:
    """The memory of an array without empty axes."""
    reach = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
    begin = start + sum(each for each in reach if each < 0)
    return Span(begin, start + sum(each for each in reach if each > 0) + itemsize)


class Library(ABC):
    """One array library. `flat` arrays are dense bytes, u8 [n]."""

    name: str
    bytes_form: Form  # of uint8

    @abstractmethod
    def form(self, dtype: Any) -> Form | None:
        """None for a dtype that cannot be stored."""

    @abstractmethod
    def form_named(self, name: str) -> Form | None:
        """The form whose `name` a tree gives; None if there is none."""

    @abstractmethod
    def stored(self, array: Array, form: Form) -> Array:
        """`array` as a file holds it, of a dtype that DLPack knows; a view unless numpy needs a copy."""

    @abstractmethod
    def start(self, array: Array) -> int:
        """The address of the first element."""

    @abstractmethod
    def strides(self, array: Array) -> tuple[int, ...]:
        """In bytes."""

    @abstractmethod
    def is_dense(self, array: Array) -> bool:
        """Whether it is row-major without gaps."""

    @abstractmethod
    def allocate(self, size: int) -> Array:
        """A new flat array."""

    @abstractmethod
    def borrow(self, buffer: Any) -> Array:
        """The memory of a buffer as a flat array, which keeps the buffer alive; it may be read-only."""

    @abstractmethod
    def view(self, flat: Array, form: Form, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]) -> Array:
        """Part of the memory of `flat`, offset and strides in bytes. pre: it lies inside."""

    @abstractmethod
    def flat(self, array: Array) -> Array:
        """The bytes of a dense array."""

    @abstractmethod
    def copy(self, target: Array, source: Array) -> None: ...

    @abstractmethod
    def is_plain(self, array: Array) -> bool:
        """Whether its memory holds its values, and not their conjugates or negatives."""

    @abstractmethod
    def changed(self, array: Array) -> None:
        """Says that its memory was written to, which autograd must know."""

    @abstractmethod
    def form_of_torch(self, form: Form) -> Form | None:
        """The form of arrays that hold the tensors of a torch dtype; their bits, if there is no such dtype here."""

    @abstractmethod
    def dequantize(self, q: QTensor, form: Form) -> Array: ...

    def span(self, array: Array) -> Span:
        """pre: `array` is not empty."""
        return span_of(self.start(array), tuple(array.shape), self.strides(array), array.dtype.itemsize)

    def view_memory(self, begin: int, end: int, owners: list[Array]) -> Array:
        """Bytes [begin, end) of the process as a flat array, which keeps `owners` alive."""
        buffer = (ctypes.c_ubyte * (end - begin)).from_address(begin)
        buffer.owners = owners  # type: ignore[attr-defined]
        return self.borrow(buffer)


_TORCH_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
TORCH_FORMS = {
    **{name: Form(name, file, (), FILE_BYTES[file], False) for name, file in _TORCH_DTYPES.items()},
    "float8_e4m3fn": Form("float8_e4m3fn", "F8_E4M3", (), 1, True),
    "float8_e5m2": Form("float8_e5m2", "F8_E5M2", (), 1, True),
    "float8_e8m0fnu": Form("float8_e8m0fnu", "F8_E8M0", (), 1, True),
    "float8_e4m3fnuz": Form("float8_e4m3fnuz", "U8", (), 1, True),
    "float8_e5m2fnuz": Form("float8_e5m2fnuz", "U8", (), 1, True),
    "float4_e2m1fn_x2": Form("float4_e2m1fn_x2", "U8", (), 1, True),
    "complex32": Form("complex32", "F16", (2,), 4, True),
    "complex128": Form("complex128", "F64", (2,), 16, True),
}

# Tags of torch's tensors in a tree: (a Parameter, requires a gradient).
TORCH_TAGS = {
    "torch": (False, False),
    "torch.grad": (False, True),
    "torch.Parameter": (True, True),
    "torch.Parameter.frozen": (True, False),
}


# ng.Tensors: their tag, their dtypes, which are called as torch's, and the most axes that they have.
OWN_TAG = "Tensor"
OWN_DTYPES = frozenset(_TORCH_DTYPES) - {"complex64"}
OWN_AXES = 8


class TorchLibrary(Library):
    name = "torch"

    def __init__(self) -> None:
        self.torch = torch = _arrays.library("torch").torch  # type: ignore[attr-defined]
        self.dtypes = {name: getattr(torch, name) for name in TORCH_FORMS if hasattr(torch, name)}
        self.forms = {dtype: TORCH_FORMS[name] for name, dtype in self.dtypes.items()}
        self.bytes_form = self.forms[torch.uint8]

    def form(self, dtype: Any) -> Form | None:
        return self.forms.get(dtype)

    def form_named(self, name: str) -> Form | None:
        return self.forms.get(self.dtypes.get(name))

    def stored(self, array: Array, form: Form) -> Array:
        if form.tail:
            return self.torch.view_as_real(array)
        return array.view(self.torch.uint8) if form.indirect else array

    def start(self, array: Array) -> int:
        return int(array.data_ptr())

    def strides(self, array: Array) -> tuple[int, ...]:
        return tuple(stride * array.dtype.itemsize for stride in array.stride())

    def is_dense(self, array: Array) -> bool:
        return bool(array.is_contiguous())

    # Tensors outlive the mode in which they are made: one born in inference mode could not be trained.

    def allocate(self, size: int) -> Array:
        with self.torch.inference_mode(False):
            return self.torch.empty(size, dtype=self.torch.uint8, device="cpu")

    def borrow(self, buffer: Any) -> Array:
        if not len(buffer):
            return self.allocate(0)
        with self.torch.inference_mode(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return self.torch.frombuffer(buffer, dtype=self.torch.uint8)

    def view(self, flat: Array, form: Form, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]) -> Array:
        # Not Tensor.view: tensors that share a storage are equals, as they were when they were saved, and none is a
        # view of another to autograd.
        steps = tuple(stride // form.itemsize for stride in strides)
        with self.torch.inference_mode(False):
            array = self.torch.empty(0, dtype=self.dtypes[form.name], device="cpu")
            return array.set_(flat.untyped_storage(), offset // form.itemsize, shape, steps)

    def flat(self, array: Array) -> Array:
        with self.torch.inference_mode(False):
            flat = self.torch.empty(0, dtype=self.torch.uint8, device="cpu")
            start = array.storage_offset() * array.dtype.itemsize
            return flat.set_(array.untyped_storage(), start, (array.nbytes,), (1,))

    def form_of_torch(self, form: Form) -> Form | None:
        return form

    def dequantize(self, q: QTensor, form: Form) -> Array:
        return q.dequantize(form.name)

    def is_plain(self, array: Array) -> bool:
        return not (array.is_neg() or (array.is_complex() and array.is_conj()))

    def changed(self, array: Array) -> None:
        if not array.is_inference():
            self.torch.autograd.graph.increment_version(array)

    def trained(self, array: Array, parameter: bool, grad: bool) -> Array:
        """The same memory as a Parameter, or as a tensor that requires a gradient."""
        with self.torch.inference_mode(False):
            return self.torch.nn.Parameter(array, grad) if parameter else array.detach().requires_grad_(grad)

    def copy(self, target: Array, source: Array) -> None:
        with self.torch.inference_mode(target.is_inference()), self.torch.no_grad():
            for axis, (length, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
                if length > 1 and stride == 0:  # an expanded tensor, which copy_() refuses
                    target, source = target.narrow(axis, 0, 1), source.narrow(axis, 0, 1)
            target.copy_(source)


# Of the names that numpy gives: the dtypes that need more than a width. All others are U8.
_NUMPY_FORMS = {
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
_NUMPY_KINDS = {"u": "U", "i": "I", "f": "F"}
# numpy's own, as dtype.str has them: no objects, no structures, no void.
_NUMPY_NAME = re.compile(r"[<>|][biufcSU]\d{1,10}|[<>][mM]8(\[\w{1,24}\])?")


def numpy_dtype_name(dtype: Any) -> str | None:
    """A name that numpy_dtype takes; None for a dtype that cannot be stored."""
    if dtype.type.__module__ == "ml_dtypes":
        return str(dtype.name)
    if dtype.char in "qQ" and dtype.isnative:  # a type of its own, though equal to int64
        return "longlong" if dtype.char == "q" else "ulonglong"
    name = str(dtype.str)
    stored = _NUMPY_NAME.fullmatch(name) and dtype.itemsize and not dtype.metadata and dtype.subdtype is None
    return name if stored else None


def numpy_dtype(name: str) -> Any | None:
    """The dtype of that name; None if there is none, or not on this machine."""
    numpy = _arrays.library("numpy").numpy  # type: ignore[attr-defined]
    if name in ("longlong", "ulonglong"):
        return numpy.dtype(name)
    try:
        if _NUMPY_NAME.fullmatch(name):
            dtype = numpy.dtype(name)
            return dtype if dtype.str == name and dtype.itemsize else None
        import ml_dtypes

        kind = vars(ml_dtypes).get(name)
        return numpy.dtype(kind) if isinstance(kind, type) and issubclass(kind, numpy.generic) else None
    except (TypeError, ValueError, OverflowError, ImportError):
        return None


class NumpyLibrary(Library):
    name = "numpy"

    def __init__(self) -> None:
        self.numpy = _arrays.library("numpy").numpy  # type: ignore[attr-defined]
        self.bytes_form = Form("|u1", "U8", (), 1, False)

    def form(self, dtype: Any) -> Form | None:
        name = numpy_dtype_name(dtype)
        if name is None:
            return None
        size = dtype.itemsize
        file, tail = "U8", () if size == 1 else (size,)
        if dtype.type.__module__ == "ml_dtypes":
            if name in _NUMPY_FORMS:
                file, tail = _NUMPY_FORMS[name], ()
        elif dtype.isnative:
            if dtype.kind == "b":
                file, tail = "BOOL", ()
            elif dtype.kind in _NUMPY_KINDS and size <= 8:
                file, tail = f"{_NUMPY_KINDS[dtype.kind]}{8 * size}", ()
            elif dtype.kind in "mM":
                file, tail = "I64", ()
            elif dtype.kind == "c" and size <= 16:
                file, tail = ("C64", ()) if size == 8 else ("F64", (2,))
        plain = dtype.type.__module__ == "numpy" and dtype.kind in "biufc" and not tail
        return Form(name, file, tail, size, not plain)

    def form_named(self, name: str) -> Form | None:
        dtype = numpy_dtype(name)
        return None if dtype is None else self.form(dtype)

    def stored(self, array: Array, form: Form) -> Array:
        dtype = array.dtype
        if form.tail:
            dense = self.numpy.ascontiguousarray(array).reshape(-1)
            part = self.numpy.float64 if form.file == "F64" else self.numpy.uint8
            return dense.view(part).reshape(array.shape + form.tail)
        if not form.indirect:
            return array
        return array.view(f"i{dtype.itemsize}" if dtype.kind in "mM" else f"u{dtype.itemsize}")

    def start(self, array: Array) -> int:
        return int(array.__array_interface__["data"][0])

    def strides(self, array: Array) -> tuple[int, ...]:
        return tuple(array.strides)

    def is_dense(self, array: Array) -> bool:
        return bool(array.flags.c_contiguous)

    def allocate(self, size: int) -> Array:
        return self.numpy.empty(size, self.numpy.uint8)

    def borrow(self, buffer: Any) -> Array:
        return self.numpy.frombuffer(buffer, self.numpy.uint8)

    def view(self, flat: Array, form: Form, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]) -> Array:
        dtype = numpy_dtype(form.name)
        if 0 in shape:
            return self.numpy.empty(shape, dtype)
        return self.numpy.ndarray(shape, dtype, flat, offset, strides)

    def flat(self, array: Array) -> Array:
        return array.reshape(-1).view(self.numpy.uint8)

    def copy(self, target: Array, source: Array) -> None:
        self.numpy.copyto(target, source)

    def is_plain(self, array: Array) -> bool:
        return True

    def changed(self, array: Array) -> None:
        pass

    def dequantize(self, q: QTensor, form: Form) -> Array:
        if form.name == "<u2":
            raise _arrays.missing("ml_dtypes", "a narrow tensor of bfloat16 without torch")
        return q.dequantize(self.numpy.dtype(numpy_dtype(form.name)).name)

    def form_of_torch(self, form: Form) -> Form | None:
        dtype = numpy_dtype(form.name)  # one of ml_dtypes, if any
        if form.name in _TORCH_DTYPES or form.name == "complex128":
            dtype = dtype or self.numpy.dtype(form.name if form.name != "bfloat16" else "uint16")
        elif dtype is None and not form.tail:
            dtype = self.numpy.dtype("uint8")
        return None if dtype is None else form._replace(name=str(numpy_dtype_name(dtype)))


_libraries: dict[str, Library] = {}


def library(name: str) -> Any:
    """The library 'torch' or 'numpy'. ImportError, naming what to install, if it is absent."""
    if name not in _libraries:
        _libraries[name] = TorchLibrary() if name == "torch" else NumpyLibrary()
    return _libraries[name]
