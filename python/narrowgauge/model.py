"""Whole models: quantize_model swaps a torch model's linear layers for narrow ones in place, save_model and
load_model keep it in one safetensors file.

Not here: reading other projects' model files (importers) and building models (the caller does, on the meta device if
it likes).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from narrowgauge import _native
from narrowgauge._arrays import FLOATS, library
from narrowgauge._native import Format
from narrowgauge._patterns import matches
from narrowgauge.errors import FileCorrupt
from narrowgauge.nn import Embedding, Linear
from narrowgauge.qtensor import QTensor, file_metadata, find_matrix, load_matrix, quantize, read_metadata

FILE_NAME = "model.safetensors"

# done, total -> None; in the caller's unit (layers, bytes).
Progress = Callable[[int, int], None]

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_FILE_DTYPES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


@dataclass(frozen=True)
class LayerReport:
    """One narrowed weight. Energies are sums of squares of the weights and of their errors."""

    layer: str
    shape: tuple[int, int]
    format: Format
    bytes_before: int
    bytes_after: int  # canonical: what a file holds
    bytes_resident: int  # packed: what memory holds
    signal: float
    noise: float

    @property
    def sqnr_db(self) -> float:
        return _decibel(self.signal, self.noise)


@dataclass
class QuantizeReport:
    """What quantize_model did. str() is a table."""

    rows: list[LayerReport] = field(default_factory=list)
    bytes_kept: int = 0  # parameters and buffers that stay as they are

    @property
    def bytes_before(self) -> int:
        """Of the narrowed weights alone, as are bytes_after, bytes_resident and sqnr_db."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @property
    def bytes_resident(self) -> int:
        return sum(row.bytes_resident for row in self.rows)

    @property
    def sqnr_db(self) -> float:
        return _decibel(sum(row.signal for row in self.rows), sum(row.noise for row in self.rows))

    def __str__(self) -> str:
        cells = [("layer", "shape", "format", "SQNR dB", "MiB before", "MiB after")]
        for row in self.rows:
            shape = f"{row.shape[0]} x {row.shape[1]}"
            cells.append(
                (row.layer, shape, str(row.format), f"{row.sqnr_db:.2f}", _mib(row.bytes_before), _mib(row.bytes_after))
            )
        total = f"{len(self.rows)} layers"
        cells.append((total, "", "", f"{self.sqnr_db:.2f}", _mib(self.bytes_before), _mib(self.bytes_after)))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for line in cells:
            left = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
            lines.append("  ".join(left + right))
        return "\n".join([*lines, f"kept as they are: {_mib(self.bytes_kept)} MiB"])


def _decibel(signal: float, noise: float) -> float:
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def quantize_model(
    model: torch.nn.Module,
    format: Format | str | Mapping[str, Format | str],
    *,
    skip: Iterable[str] | None = None,
    search: str = "absmax",
    activations: str = "exact",
    progress: Progress | None = None,
) -> QuantizeReport:
    """Swaps the torch.nn.Linear modules of `model` for narrowgauge.nn.Linear, in place, and reports what it did.

    format: one for all, or {pattern: format}: fnmatch patterns of module names or their last parts, the first that
    matches counts, and what none matches stays. skip: patterns of modules to leave alone; by default "lm_head",
    unless a pattern other than "*" names it. A linear layer whose weight is tied to an embedding stays in that
    embedding's dtype unless such a pattern names it; then the embedding shares the narrow weight.
    activations: of all the layers, as for narrowgauge.linear.
    progress(done, total) is called after each weight.

    Each original weight is let go once its narrow one is made, so the peak is one layer above the model. Weights are
    read as they are: biases, norms and embeddings are not touched. Subclasses of Linear are left alone, since their
    owners may read the weight itself.

    ValueError, before anything is changed: a model without Linear layers, a pattern or skip entry that matches
    none, weights with NaN or infinity or not on the CPU, a format that the activations do not fit.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {name: module for name, module in modules.items() if type(module) is torch.nn.Linear}
    if not linears:
        raise ValueError(f"the model, a {type(model).__name__}, has no torch.nn.Linear layers")
    embeddings: dict[int, list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, torch.nn.Embedding):
            embeddings.setdefault(id(module.weight), []).append(name)

    patterns = dict(format) if isinstance(format, Mapping) else {"*": format}
    formats = {pattern: Format(each) for pattern, each in patterns.items()}
    skips = list(skip) if skip is not None else []
    for what, entries in (("pattern", patterns), ("skip entry", skips)):
        for entry in entries:
            if not any(matches(entry, name) for name in linears):
                raise ValueError(f"{what} '{entry}' matches no Linear layer; there are {', '.join(_some(linears))}")

    # Which weight becomes what: {id of the weight: (format, names of its linear layers)}.
    plan: dict[int, tuple[Format, list[str]]] = {}
    for name, module in linears.items():
        pattern = next((pattern for pattern in patterns if matches(pattern, name)), None)
        if pattern is None or any(matches(entry, name) for entry in skips):
            continue
        named = pattern != "*"
        if not named and ((skip is None and matches("lm_head", name)) or id(module.weight) in embeddings):
            continue
        for other in embeddings.get(id(module.weight), ()):
            embedding = modules[other]
            if type(embedding) is not torch.nn.Embedding or embedding.max_norm is not None:
                raise ValueError(
                    f"'{name}' shares its weight with '{other}', a {type(embedding).__name__} that cannot be narrowed"
                )
        planned = plan.setdefault(id(module.weight), (formats[pattern], []))
        if planned[0] != formats[pattern]:
            raise ValueError(f"'{name}' and '{planned[1][0]}' share a weight, but {formats[pattern]} != {planned[0]}")
        planned[1].append(name)
    for planned_format, names in plan.values():
        _native.check_activations(activations, planned_format)
        weight = linears[names[0]].weight
        if weight.device.type != "cpu":
            raise ValueError(f"the weight of '{names[0]}' is on device {weight.device}, expected cpu")
        if not torch.isfinite(weight).all():
            raise ValueError(f"the weight of '{names[0]}' holds NaN or infinity")
        del weight
    work = [(each, names, embeddings.get(key, [])) for key, (each, names) in plan.items()]
    # The loop below must hold the only references to what it replaces.
    del modules, linears, module
    embedding = None

    report = QuantizeReport()
    for done, (each, names, others) in enumerate(work):
        old: Any = model.get_submodule(names[0])
        q = quantize(old.weight, each, search=search).pack()
        report.rows.append(_layer_report(names[0], old.weight.detach(), q))
        for name in names:
            old = model.get_submodule(name)
            _replace(model, name, Linear(q, old.bias, activations=activations).train(old.training))
        for name in others:
            old = model.get_submodule(name)
            _replace(model, name, Embedding(q, old.weight.dtype, old.padding_idx).train(old.training))
        old = None
        if progress is not None:
            progress(done + 1, len(work))
    narrow = {id(module.packed) for module in model.modules() if isinstance(module, (Linear, Embedding))}
    kept = {id(each): each for each in (*model.parameters(), *model.buffers()) if id(each) not in narrow}
    report.bytes_kept = sum(each.numel() * each.element_size() for each in kept.values())
    return report


def _some(names: Iterable[str]) -> list[str]:
    names = list(names)
    return names if len(names) <= 8 else [*names[:8], f"... ({len(names)})"]


def _layer_report(name: str, weight: torch.Tensor, q: QTensor) -> LayerReport:
    signal = noise = 0.0
    assert q._matrix is not None
    # In blocks of rows: no dequantised copy of the matrix.
    block = max(1, (1 << 20) // max(1, q.cols))
    for start in range(0, q.rows, block):
        rows = torch.arange(start, min(start + block, q.rows))
        exact = weight[start : start + block].float()
        decoded = torch.empty_like(exact, memory_format=torch.contiguous_format)
        _native.gather_rows(q._matrix, rows, decoded)
        signal += float(exact.double().square().sum())
        noise += float(exact.double().sub_(decoded).square().sum())
    return LayerReport(
        layer=name,
        shape=(q.rows, q.cols),
        format=q.format,
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=q.nbytes,
        bytes_resident=q.packed.numel(),
        signal=signal,
        noise=noise,
    )


def _replace(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    if not name:
        raise ValueError("the model itself is the layer to replace; put it into a torch.nn.Sequential")
    setattr(model.get_submodule(parent), child, module)


def save_model(model: torch.nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Writes `directory`/model.safetensors and returns its path: narrow weights canonical, all else plain.

    The file holds every parameter and buffer, non-persistent buffers too, so that load_model can fill a model built
    on the meta device; what is tied is written once. Written atomically: on any failure an old file is intact. Needs
    memory for the canonical form of the narrow weights. OSError if it cannot be written.
    """
    tensors: list[tuple[str, str, tuple[int, ...], Any]] = []
    narrow: dict[str, QTensor] = {}
    tied: dict[str, str] = {}
    embeddings: dict[str, str] = {}
    activations: dict[str, str] = {}
    written: dict[int, str] = {}  # id of the tensor -> its name in the file
    blocks = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (Linear, Embedding)):
            continue
        blocks.add(id(module.packed))
        full = f"{name}.weight" if name else "weight"
        if isinstance(module, Embedding):
            embeddings[full] = str(module.dtype).removeprefix("torch.")
        elif module.activations != "exact":
            activations[full] = module.activations
        if (first := written.setdefault(id(module.packed), full)) != full:
            tied[full] = first
            continue
        narrow[full] = module.weight
        tensors += module.weight.file_tensors(full)
    for name, tensor in _plain(model):
        if id(tensor) in blocks:
            continue
        if (first := written.setdefault(id(tensor), name)) != name:
            tied[name] = first
            continue
        if tensor.device.type != "cpu":
            raise ValueError(f"'{name}' is on device {tensor.device}, expected cpu")
        if tensor.dtype not in _FILE_DTYPES:
            raise ValueError(f"'{name}' has dtype {tensor.dtype}, which the file format lacks")
        data = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        tensors.append((name, _FILE_DTYPES[tensor.dtype], tuple(tensor.shape), data))
    path = Path(directory) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    _native.write_safetensors(
        path, tensors, file_metadata(narrow, tied=tied, embeddings=embeddings, activations=activations)
    )
    return path


def _plain(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters and buffers, each name of what is tied."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def load_model(
    directory: str | os.PathLike[str], model: torch.nn.Module, *, progress: Progress | bool = False
) -> torch.nn.Module:
    """Fills `model` from what save_model wrote, and returns it.

    `model` has the same structure with torch.nn.Linear (or narrow) layers; all or part of it may be on the meta
    device (built under `with torch.device("meta")`), and nothing of it needs to be initialised. The file is mapped;
    narrow weights are packed straight from it. Parameters take the file's dtype; what was tied is tied again.
    progress: called with (bytes done, bytes in all), or True for a bar on the terminal (needs rich).

    ValueError: the file does not fit the model, or its version or a format is unknown; FileCorrupt: it is not sound.
    Names, shapes and formats are checked before the model is changed.
    """
    file = _native.SafetensorsFile(Path(directory) / FILE_NAME)
    content = read_metadata(file)
    entries, tied, embeddings = content["tensors"], content["tied"], content["embeddings"]
    activations = content["activations"]
    modules = dict(model.named_modules(remove_duplicate=False))
    targets = dict(_plain(model))
    parts = {f"{name}.{part}" for name in entries for part in ("codes", "scales", "zeros", "global_scale")}
    plain = [name for name in file.names() if name not in parts]

    # Narrow weights by the names of the modules that have them, tied ones included.
    places: dict[str, str] = {name: name for name in entries}
    places.update({alias: name for alias, name in tied.items() if name in entries})
    for full, name in places.items():
        old: Any = modules.get(full.rpartition(".")[0])
        if old is None or not full.endswith("weight"):
            raise ValueError(f"{file.path} holds '{full}', but the model has no such layer")
        if not isinstance(old, (torch.nn.Linear, torch.nn.Embedding, Linear, Embedding)):
            raise ValueError(f"'{full}' is narrow in {file.path}, but the layer is a {type(old).__name__}")
        if tuple(old.weight.shape) != tuple(entries[name]["shape"]):
            raise ValueError(f"'{full}' is {entries[name]['shape']} in {file.path}, but {list(old.weight.shape)} here")
        if embeddings.get(full, FLOATS[0]) not in FLOATS:
            raise FileCorrupt(f"{file.path}: the embedding '{full}' has the unknown dtype {embeddings[full]!r}")
        try:
            _native.check_activations(activations.get(full, "exact"), Format(entries[name]["format"]))
        except ValueError as error:
            raise ValueError(f"{file.path}: '{full}': {error}") from None
        targets.pop(full, None)
        targets.pop(f"{full.removesuffix('weight')}packed", None)
    for name in plain:
        dtype, shape, _ = file.info(name)
        if name not in targets:
            raise ValueError(f"{file.path} holds '{name}', but the model has no such tensor")
        if tuple(shape) != tuple(targets[name].shape):
            raise ValueError(f"'{name}' is {list(shape)} in {file.path}, but {list(targets[name].shape)} here")
        if dtype not in _TORCH_DTYPES:
            raise ValueError(f"{file.path}: '{name}' has dtype {dtype}, which torch lacks")
    filled = set(plain) | {alias for alias, name in tied.items() if name in plain}
    known = {id(targets[name]) for name in plain}
    optional = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in modules.items()
        for name in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(name)) is None or buffer.device.type != "meta"
    }
    missing = [name for name, each in targets.items() if name not in filled | optional and id(each) not in known]
    if missing:
        raise ValueError(f"{file.path} lacks {', '.join(map(repr, _some(missing)))}, which the model has")
    for alias in tied:
        if alias not in places and alias not in targets:
            raise ValueError(f"{file.path} ties '{alias}', but the model has no such tensor")
    arrays = library("torch")
    matrices = {name: find_matrix(file, name, entry) for name, entry in entries.items()}

    total = sum(file.info(name)[2] for name in file.names())
    with _progress(progress) as report:
        done = 0
        for name, matrix in matrices.items():
            q = load_matrix(matrix, arrays, pack=True)
            for full in [full for full, held in places.items() if held == name]:
                path = full.rpartition(".")[0]
                old = modules.pop(path)  # the last reference: what is replaced is let go
                new: torch.nn.Module
                if isinstance(old, (torch.nn.Linear, Linear)):
                    new = Linear(q, old.bias, activations=activations.get(full, "exact"))
                else:
                    yields = old.dtype if isinstance(old, Embedding) else old.weight.dtype
                    yields = getattr(torch, embeddings[full]) if full in embeddings else yields
                    new = Embedding(q, yields, old.padding_idx)
                _replace(model, path, new.train(old.training))
                old = None
            done += q.nbytes
            report(done, total)
        for name in plain:
            dtype, shape, size = file.info(name)
            value = arrays.from_bytes(file.bytes(name), str(_TORCH_DTYPES[dtype]).removeprefix("torch."), tuple(shape))
            _fill(model, targets[name], value)
            done += size
            report(done, total)
    for alias, name in tied.items():
        if alias not in places:
            owner, _, attribute = alias.rpartition(".")
            source, _, source_attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, getattr(model.get_submodule(source), source_attribute))
    return model


def _fill(model: torch.nn.Module, target: torch.Tensor, value: torch.Tensor) -> None:
    """Gives `target`, wherever the model holds it, the given value; the same object where that is possible."""
    with torch.no_grad():
        if target.device.type != "meta" and target.dtype == value.dtype:
            target.copy_(value)
            return
    if isinstance(target, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=target.requires_grad and value.is_floating_point())
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, each in held.items():
                if each is target:
                    held[name] = value  # type: ignore[assignment]


@contextmanager
def _progress(progress: Progress | bool) -> Iterator[Progress]:
    if callable(progress):
        yield progress
        return
    if progress and sys.stderr.isatty():
        try:
            from rich import progress as rich_progress
            from rich.console import Console
        except ImportError:
            pass
        else:
            columns = (
                rich_progress.TextColumn("loading"),
                rich_progress.BarColumn(),
                rich_progress.DownloadColumn(),
                rich_progress.TransferSpeedColumn(),
            )
            with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("loading")
                yield lambda done, total: bar.update(task, completed=done, total=total)
            return
    yield lambda done, total: None
