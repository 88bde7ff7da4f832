"""QTensor: a matrix in a Format, and quantize, which makes one.

A QTensor owns its weights once: canonical (codes, scales, ... in their own arrays; portable, what files hold) or
packed for one device (one block; fast). Its arrays are torch tensors if it was made from one, otherwise numpy arrays,
or on a GPU narrowgauge's Tensors. Work on a GPU goes to the current stream, torch's for torch tensors, else that of
`with stream:` (ng.cuda.Stream).
Not thread-safe while pack or unpack runs; reading from many threads is fine.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any, NamedTuple

from narrowgauge import _arrays, _native
from narrowgauge._arrays import Array, Arrays
from narrowgauge._native import Format

_SCALE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "e8m0": "uint8", "e4m3": "uint8"}
FILE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
_FILE_VERSION = 1


class Canonical(NamedTuple):
    """The arrays of a canonical matrix of `rows` x `cols` elements.

    codes u8 [rows, row_bytes], little-endian bit order; scales [rows, groups] in the Format's scale type (e8m0 and
    e4m3 as u8); zeros u8 [rows, groups] for uintN; global_scale f32 [1] for e4m3 scales.
    """

    codes: Array
    scales: Array
    zeros: Array | None = None
    global_scale: Array | None = None


def canonical_parts(format: Format, rows: int, cols: int) -> list[tuple[str, str, tuple[int, ...]] | None]:
    """(name, dtype, shape) of each array of a canonical matrix; None for an absent one."""
    groups = format.groups(cols)
    return [
        ("codes", "uint8", (rows, format.row_bytes(cols))),
        ("scales", _SCALE_DTYPES[format.scale], (rows, groups)),
        ("zeros", "uint8", (rows, groups)) if format.has_zero_point else None,
        ("global_scale", "float32", (1,)) if format.has_global_scale else None,
    ]


class QTensor:
    """A matrix in a Format. Made by quantize, load or from_canonical; `shape` is that of the original weights."""

    __slots__ = (
        "__weakref__",
        "_arrays",
        "_canonical",
        "_matrix",
        "_name",
        "_packed",
        "cols",
        "format",
        "rows",
        "shape",
    )

    format: Format
    shape: tuple[int, ...]
    rows: int  # the product of all axes but the last
    cols: int  # the last axis

    def __init__(self, format: Format | str, shape: tuple[int, ...], arrays: Arrays) -> None:
        self.format = Format(format)
        self._name = str(self.format)
        self.shape = tuple(int(length) for length in shape)
        if not self.shape or min(self.shape) < 0:
            raise ValueError(f"shape is {self.shape}, expected at least one axis and no negative length")
        self.rows, self.cols = math.prod(self.shape[:-1]), self.shape[-1]
        self._arrays = arrays
        self._canonical: Canonical | None = None
        self._packed: Array | None = None
        # Set exactly while packed: what _native.linear takes.
        self._matrix: _native.PackedMatrix | None = None

    @classmethod
    def from_canonical(cls, format: Format | str, shape: tuple[int, ...], canonical: Canonical) -> QTensor:
        """Takes the arrays, without a copy. ValueError if a shape does not fit, TypeError for a wrong dtype."""
        q = cls(format, shape, _arrays.library_of(canonical.codes, "codes"))
        names = ("codes", "scales", "zeros", "global_scale")
        for name, part, array in zip(names, canonical_parts(q.format, q.rows, q.cols), canonical, strict=True):
            if (part is None) != (array is None):
                raise ValueError(f"{name}: format {q.format} has {'none' if part is None else 'one'}")
            if part is None or array is None:
                continue
            dtype = str(array.dtype).removeprefix("torch.")
            if tuple(array.shape) != part[2]:
                raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {part[2]} for {q.format} {q.shape}")
            if dtype != part[1] and not (part[1] == "bfloat16" and dtype == "uint16"):
                raise TypeError(f"{name} has dtype {dtype}, expected {part[1]}")
        q._canonical = canonical
        return q

    def _new_canonical(self) -> Canonical:
        parts = canonical_parts(self.format, self.rows, self.cols)
        return Canonical(*(part and self._arrays.empty(part[2], part[1]) for part in parts))

    def _borrow(self, canonical: Canonical) -> tuple[Array, Array, Array | None, Array | None]:
        view = self._arrays.view
        codes, scales, zeros, global_scale = canonical
        return view(codes), view(scales), zeros, global_scale

    @property
    def is_packed(self) -> bool:
        return self._matrix is not None

    @property
    def packed(self) -> Array:
        """The packed block, u8 [bytes]; opaque, for this process only. ValueError if the matrix is canonical."""
        if self._packed is None:
            raise ValueError("the matrix is not packed; call pack() first")
        return self._packed

    def canonical(self) -> Canonical:
        """The canonical arrays, on the matrix's device; new ones, unpacked bit for bit, if it is packed."""
        q = self._unpacked()
        assert q._canonical is not None
        return q._canonical

    def _unpacked(self) -> QTensor:
        """The matrix, canonical: itself, or a copy."""
        if self._matrix is None:
            return self
        q = QTensor(self.format, self.shape, self._arrays)
        canonical = q._new_canonical()
        _native.unpack(self._matrix, *q._borrow(canonical))
        q._canonical = canonical
        return q

    @property
    def codes(self) -> Array:
        """u8 [rows, row_bytes]. Unpacks if the matrix is packed, as do scales, zeros and global_scale."""
        return self.canonical().codes

    @property
    def scales(self) -> Array:
        """[rows, groups] in the Format's scale type."""
        return self.canonical().scales

    @property
    def zeros(self) -> Array | None:
        """u8 [rows, groups]; None unless the Format has zero points."""
        return self.canonical().zeros

    @property
    def global_scale(self) -> Array | None:
        """f32 [1]; None unless the Format has a global scale."""
        return self.canonical().global_scale

    @property
    def device(self) -> str:
        """Where the arrays are: "cpu" or "cuda:0"."""
        return self._arrays.device

    def to(self, device: str) -> QTensor:
        """The matrix on "cpu", "cuda" or "cuda:1": itself, or a canonical copy. CudaError if there is no such GPU.

        A GPU's arrays are torch's if this matrix's are; from the others' GPU arrays the way back is to numpy's.
        """
        device = _native.device_name(device)
        if device == self.device:
            return self
        target = self._arrays.on(device)  # refused before anything is unpacked
        q = self._unpacked()
        parts = (None if part is None else q._move(part, target) for part in q.canonical())
        return QTensor.from_canonical(self.format, self.shape, Canonical(*parts))

    def _move(self, array: Array, target: Arrays) -> Array:
        if isinstance(target, _arrays.TorchArrays):
            return array.to(target.device)
        host = self._arrays.host(array)
        if target.device == "cpu":
            return host
        return target.from_bytes(host.reshape(-1).view("uint8"), str(host.dtype), tuple(host.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical arrays, whichever form the matrix is in."""
        return sum(_native.canonical_bytes(self.format, self.rows, self.cols))

    def pack(self, device: str | None = None) -> QTensor:
        """Packs in place for "cpu", "cuda" or "cuda:1", by default the device that it is on, and returns self.

        The matrix moves there, whatever form it is in elsewhere, and what it had before is let go. On a GPU packing is
        work of its current stream, and nothing waits for it. CudaError if no GPU can be used, or none by torch.
        """
        device = self.device if device is None else _native.device_name(device)
        if self._matrix is None or device != self.device:
            arrays = self._arrays.on(device)  # refused before anything is unpacked
            q = self._unpacked().to(device)
            self._set_packed(q._pack_new(q._borrow(q.canonical()), arrays))
        return self

    def _pack_new(self, canonical: tuple[Any, Any, Any | None, Any | None], arrays: Arrays) -> _native.PackedMatrix:
        """pre: the canonical arrays are on the device of `arrays`."""
        block = arrays.block(_native.packed_bytes(self.format, self.rows, self.cols, arrays.device))
        return _native.pack(self.format, self.rows, self.cols, *canonical, block)

    def _set_packed(self, matrix: _native.PackedMatrix) -> None:
        self._packed, self._matrix, self._canonical = matrix.array, matrix, None
        self._arrays = _arrays.library_of(matrix.array, "packed")

    def unpack(self) -> QTensor:
        """Makes the matrix canonical in place and returns self."""
        if self._matrix is not None:
            self._canonical = self.canonical()
            self._packed = self._matrix = None
        return self

    def assign(self, other: QTensor) -> None:
        """Copies the values of a matrix of the same format and shape into this one's memory, in the form it is in."""
        if (self.format, self.shape) != (other.format, other.shape):
            raise ValueError(f"the other is {other.format} {other.shape}, expected {self.format} {self.shape}")
        if self._matrix is not None:
            q = other._unpacked().to(self.device)
            _native.pack(self.format, self.rows, self.cols, *q._borrow(q.canonical()), self.packed)
            return
        for mine, its in zip(self.canonical(), other.to(self.device).canonical(), strict=True):
            if mine is not None:
                self._arrays.assign(mine, its)

    def dequantize(self, dtype: Any = "float32") -> Array:
        """The weights [*shape] in `dtype`: float32, float16 or bfloat16, as a name or the array library's dtype."""
        name = self._arrays.dtype_name(dtype)
        via = name if name != "bfloat16" or self._arrays.has_bfloat16 else "float32"
        out = self._arrays.empty((self.rows, self.cols), via)
        if self._matrix is not None and self.device == "cpu":
            _native.gather_rows(self._matrix, self._arrays.arange(self.rows), out)
        else:
            _native.dequantize(self.format, self.rows, self.cols, *self._borrow(self.canonical()), out)
        return self._arrays.cast(out, name).reshape(self.shape)

    def file_tensors(self, name: str) -> list[tuple[str, str, tuple[int, ...], Array]]:
        """The canonical arrays as _native.write_safetensors takes them, called `<name>.codes` and so on."""
        parts = canonical_parts(self.format, self.rows, self.cols)
        q = self.to("cpu")
        return [
            (f"{name}.{part[0]}", FILE_DTYPES[part[1]], part[2], q._arrays.view(array))
            for part, array in zip(parts, q.canonical(), strict=True)
            if part is not None
        ]

    def save(self, path: str | os.PathLike[str], name: str = "weight") -> None:
        """Writes a safetensors file with the canonical arrays, atomically. OSError if it cannot."""
        _native.write_safetensors(os.fspath(path), self.file_tensors(name), file_metadata({name: self}))

    @staticmethod
    def load(path: str | os.PathLike[str], name: str | None = None, *, library: str | None = None) -> QTensor:
        """The matrix called `name` (by default the only one) of a file.

        library: 'torch' or 'numpy', whose arrays it has; by default torch where it is already imported.
        FileCorrupt if the file is not what it claims to be, ValueError if it holds no such matrix.
        """
        file = _native.SafetensorsFile(os.fspath(path))
        entries = read_metadata(file)["tensors"]
        if name is None:
            if len(entries) != 1:
                raise ValueError(
                    f"{path} holds {len(entries)} narrow matrices, expected one or a name: {list(entries)}"
                )
            name = next(iter(entries))
        if name not in entries:
            raise ValueError(f"{path} holds no narrow matrix '{name}', only {list(entries)}")
        arrays = _arrays.library(library or ("torch" if "torch" in sys.modules else "numpy"))
        return load_matrix(find_matrix(file, name, entries[name]), arrays)

    def __repr__(self) -> str:
        form = "packed" if self.is_packed else "canonical"
        where = "" if self.device == "cpu" else f"{self.device}, "
        return f"QTensor(shape={self.shape}, format='{self.format}', {where}{form}, nbytes={self.nbytes})"

    # Copies and pickles carry the canonical arrays where they leave the process: the packed layout is its own.

    def __copy__(self) -> QTensor:
        q = QTensor(self.format, self.shape, self._arrays)
        q._canonical, q._packed, q._matrix = self._canonical, self._packed, self._matrix
        return q

    def __deepcopy__(self, memo: dict[int, Any]) -> QTensor:
        q = QTensor(self.format, self.shape, self._arrays)
        if self._matrix is None:
            q._canonical = Canonical(*(part if part is None else self._arrays.copy(part) for part in self.canonical()))
        else:
            block = self._arrays.block(_native.packed_bytes(self.format, self.rows, self.cols, self.device))
            self._arrays.assign(block, self.packed)
            q._set_packed(_native.PackedMatrix(block, self.format, self.rows, self.cols))
        memo[id(self)] = q
        return q

    def __reduce__(self) -> tuple[Any, ...]:
        q = self if self._arrays.pickles else self.to("cpu")
        return _rebuild, (str(q.format), q.shape, tuple(q.canonical()), self.is_packed)


def _rebuild(format: str, shape: tuple[int, ...], canonical: tuple[Array, ...], packed: bool) -> QTensor:
    q = QTensor.from_canonical(format, shape, Canonical(*canonical))
    return q.pack() if packed else q


def quantize(
    w: Array,
    format: Format | str,
    *,
    search: str = "absmax",
    nan: str = "error",
    stochastic: bool = False,
    seed: int = 0,
    full_range: bool = False,
    e8m0_ceil: bool = False,
) -> QTensor:
    """`w` [..., cols] (float32, float16 or bfloat16, any strides) as a canonical QTensor in `format`.

    search: 'absmax' (scale = amax / largest code value) or 'mse' (the best of a small grid around it, per group).
    nan: 'error' (ValueError naming the first NaN or infinity; on a GPU at the stream's next synchronize()), 'saturate'
    (the largest finite float, and 0 for NaN) or 'keep' (all values of the group become NaN).
    stochastic, seed: stochastic rounding, the same on every machine for a seed in [0, 2**64).
    full_range: intN uses -2**(N-1) too. e8m0_ceil: e8m0 scales are rounded up, so that nothing saturates.
    """
    arrays = _arrays.library_of(w, "w")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 0 <= seed < 2**64")
    q = QTensor(format, tuple(w.shape), arrays)
    canonical = q._new_canonical()
    source = arrays.source(w, "w")
    _native.quantize(
        source, q.format, q.rows, q.cols, *q._borrow(canonical), search, nan, stochastic, seed, full_range, e8m0_ceil
    )
    q._canonical = canonical
    return q


def file_metadata(tensors: dict[str, QTensor], **more: Any) -> dict[str, str]:
    """The __metadata__ of a file with these matrices: one JSON entry, and what transformers looks for."""
    entries = {name: {"format": str(q.format), "shape": list(q.shape)} for name, q in tensors.items()}
    content = {"version": _FILE_VERSION, "tensors": entries, **more}
    return {"format": "pt", "narrowgauge": json.dumps(content, separators=(",", ":"))}


def read_metadata(file: _native.SafetensorsFile) -> dict[str, Any]:
    """What file_metadata wrote, checked. ValueError if there is none, FileCorrupt if it is not sound."""
    from narrowgauge.errors import FileCorrupt

    text = file.metadata.get("narrowgauge")
    if text is None:
        raise ValueError(f"{file.path} was not written by narrowgauge: its metadata has no entry 'narrowgauge'")
    try:
        content = json.loads(text)
        version, entries = content["version"], content["tensors"]
        tied, embeddings = content.get("tied", {}), content.get("embeddings", {})
        for entry in entries.values():
            if not isinstance(entry["format"], str) or not entry["shape"]:
                raise TypeError
            if not all(type(length) is int and 0 <= length < 2**62 for length in entry["shape"]):
                raise TypeError
        activations = content.get("activations", {})
        names = (*tied.values(), *embeddings.values(), *activations.values())
        if not all(isinstance(value, str) for value in names):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise FileCorrupt(f"{file.path}: its metadata entry 'narrowgauge' is not sound: {text[:200]!r}") from None
    if version != _FILE_VERSION:
        raise ValueError(f"{file.path} has version {version!r}, this narrowgauge reads version {_FILE_VERSION}")
    return {"tensors": entries, "tied": tied, "embeddings": embeddings, "activations": activations}


class FileMatrix(NamedTuple):
    """A matrix of an open file, found sound: its parts as canonical_parts gives them, and views of their bytes."""

    format: Format
    shape: tuple[int, ...]
    parts: list[tuple[str, str, tuple[int, ...]] | None]
    buffers: list[memoryview | None]


def find_matrix(file: _native.SafetensorsFile, name: str, entry: dict[str, Any]) -> FileMatrix:
    """Matrix `name`, `entry` its metadata. ValueError for an unknown format, FileCorrupt where arrays do not fit."""
    from narrowgauge.errors import FileCorrupt

    shape = tuple(entry["shape"])
    rows, cols = math.prod(shape[:-1]), shape[-1]
    try:
        format = Format(entry["format"])
        _native.canonical_bytes(format, rows, cols)
    except (ValueError, TypeError) as error:  # TypeError: more rows than 64 bits hold
        raise ValueError(f"{file.path}: tensor '{name}': {error}") from None
    parts = canonical_parts(format, rows, cols)
    buffers: list[memoryview | None] = []
    for part in parts:
        if part is None:
            buffers.append(None)
            continue
        key = f"{name}.{part[0]}"
        try:
            dtype, found, _ = file.info(key)
        except KeyError:
            raise FileCorrupt(f"{file.path}: tensor '{key}' is missing") from None
        expected = FILE_DTYPES[part[1]]
        if (dtype, tuple(found)) != (expected, part[2]):
            raise FileCorrupt(
                f"{file.path}: '{key}' is {dtype} {list(found)}, expected {expected} {list(part[2])} "
                f"for {format} {list(shape)}"
            )
        buffers.append(file.bytes(key))
    return FileMatrix(format, shape, parts, buffers)


def load_matrix(matrix: FileMatrix, arrays: Arrays, *, pack: bool = False) -> QTensor:
    """A copy of a file's matrix; packed straight from the mapping if `pack`."""
    q = QTensor(matrix.format, matrix.shape, arrays)
    if pack:
        # The codes are read in place; scales are copied, for a foreign file may hold them unaligned.
        codes, scales, zeros, global_scale = matrix.buffers
        assert scales is not None
        canonical = codes, bytearray(scales), zeros, global_scale and bytearray(global_scale)
        q._set_packed(q._pack_new(canonical, arrays))
    else:
        pairs = zip(matrix.parts, matrix.buffers, strict=True)
        q._canonical = Canonical(*(part and arrays.from_bytes(data, part[1], part[2]) for part, data in pairs))
    return q
