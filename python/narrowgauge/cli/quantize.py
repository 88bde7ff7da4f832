"""`narrowgauge quantize`: a model, or a bare safetensors file, into a folder with narrow weights."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table

import narrowgauge as ng
from narrowgauge import _native
from narrowgauge._patterns import matches
from narrowgauge.cli.generate import parse_dtype
from narrowgauge.cli.output import JsonOption, Output, human_bytes, table
from narrowgauge.importers import load_causal_lm, require, save_folder

_WEIGHTS = "model.safetensors"
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SKIPPED = ("lm_head", "*embed*", "wte", "wpe")
# What makes a folder of weights a model: carried over beside a safetensors file.
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template.jinja",
               "vocab.json", "merges.txt")  # fmt: skip


class Layer(NamedTuple):
    """One narrow tensor; sqnr is the signal to quantization noise ratio in dB."""

    name: str
    format: str
    sqnr: float
    nbytes: int
    elements: int


def command(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A Hugging Face model folder, a GGUF file or a safetensors file.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    format: Annotated[str, typer.Option(help="The format of the weights, such as fp6 or int4:g64:fp16.")] = "fp6",
    scale_search: Annotated[str, typer.Option(help="How scales are chosen: absmax or mse.")] = "absmax",
    skip: Annotated[list[str] | None, typer.Option(help="A layer's name or pattern to leave as it is.")] = None,
    map: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN=FORMAT", help="Another format for layers of this pattern.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of what stays: float32 or bfloat16. Default: as it is; a GGUF's, float32.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the model in OUT if there is one.")] = False,
    json: JsonOption = False,
) -> None:
    """Quantize the weights of linear layers and write a model folder."""
    output = Output(json)
    formats = parse_formats(format, map or [])
    if scale_search not in ("absmax", "mse"):
        raise typer.BadParameter(f"{scale_search!r}; expected absmax or mse", param_hint="--scale-search")
    check_out(source, out, overwrite)
    if source.suffix == ".safetensors" and source.is_file():
        if dtype is not None:
            raise typer.BadParameter("not for a safetensors file, whose other tensors are copied", param_hint="--dtype")
        layers, kept = quantize_file(source, out, formats, scale_search, skip, output)
    else:
        layers, kept = quantize_model(source, out, formats, scale_search, skip, dtype, output)

    narrow, wide = sum(layer.nbytes for layer in layers), sum(2 * layer.elements for layer in layers)
    size = (out / _WEIGHTS).stat().st_size
    summary = (
        f"{len(layers)} tensors narrow: {human_bytes(narrow)}, {wide / narrow:.2f}x fewer than in bf16. "
        f"Left as they were: {listed(kept)}.\nWrote {out / _WEIGHTS} ({human_bytes(size)})."
    )
    output.result(
        {
            "source": str(source),
            "out": str(out),
            "file_bytes": size,
            "narrow_bytes": narrow,
            "bf16_bytes": wide,
            "layers": [layer._asdict() for layer in layers],
            "kept": kept,
        },
        _table(layers),
        summary,
    )


def parse_formats(format: str, mapping: Sequence[str]) -> dict[str, ng.Format]:
    """{pattern: Format}, the most particular first; the last is '*', the default."""
    formats = {}
    for entry in mapping:
        pattern, equals, name = entry.rpartition("=")
        if not equals or not pattern:
            raise typer.BadParameter(f"{entry!r}; expected PATTERN=FORMAT, such as down_proj=int8", param_hint="--map")
        formats[pattern] = ng.Format(name)
    return {**formats, "*": ng.Format(format)}


def check_out(source: Path, out: Path, overwrite: bool) -> None:
    """Raises unless OUT can be written without losing anything that the user did not name."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT {out} is a file, expected a folder or a new name")
    folder = source if source.is_dir() else source.parent
    if out.exists() and source.exists() and out.resolve() == folder.resolve():
        raise ValueError(f"OUT is the folder of IN ({folder}): choose another, so that the original stays")
    if out.is_dir() and not overwrite and any(out.iterdir()):
        raise ValueError(f"OUT {out} is not empty: choose a new folder, or give --overwrite to replace the model in it")


def quantize_model(
    source: Path,
    out: Path,
    formats: dict[str, ng.Format],
    search: str,
    skip: list[str] | None,
    dtype: str | None,
    output: Output,
) -> tuple[list[Layer], list[str]]:
    """A model folder or GGUF, by way of a transformers model."""
    require("torch", "demo")
    keep_as = parse_dtype(dtype) if dtype else None
    lm = load_causal_lm(source)
    with output.progress() as progress:
        task = progress.add_task("quantizing")
        report = ng.quantize_model(
            lm.model,
            formats,
            skip=skip,
            search=search,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    kept = [name for name, _ in lm.model.named_parameters()]
    if keep_as is not None:  # now, so that the narrow weights were made from the original ones
        from narrowgauge.importers.huggingface import cast_parameters

        cast_parameters(lm.model, keep_as)
    save_folder(lm.model, lm.tokenizer, out)
    return [
        Layer(row.layer, str(row.format), row.sqnr_db, row.bytes_after, row.shape[0] * row.shape[1])
        for row in report.rows
    ], kept


def quantize_file(
    source: Path, out: Path, formats: dict[str, ng.Format], search: str, skip: list[str] | None, output: Output
) -> tuple[list[Layer], list[str]]:
    """A bare safetensors file: its 2-D float tensors named *.weight, without building a model.

    Nothing says which of them is an embedding: names that look like one stay, as does lm_head, unless --skip is given
    or a --map pattern names them.
    """
    require("torch", "torch")
    from narrowgauge._arrays import library
    from narrowgauge.qtensor import file_metadata

    arrays = library("torch")
    file = _native.SafetensorsFile(source)
    narrow: dict[str, ng.QTensor] = {}
    layers, kept = [], []
    names = sorted(file.names())
    with output.progress() as progress:
        for name in progress.track(names, description="quantizing"):
            dtype, shape, _ = file.info(name)
            matrix = len(shape) == 2 and dtype in _FLOATS and name.endswith(".weight")
            if not matrix or (pattern := chosen(name.removesuffix(".weight"), formats, skip)) is None:
                kept.append(name)
                continue
            weight = arrays.from_bytes(file.bytes(name), _FLOATS[dtype], tuple(shape))
            format = formats[pattern]
            try:
                q = ng.quantize(weight, format, search=search)
            except ValueError as error:
                raise ValueError(f"{source}: tensor '{name}': {error}") from error
            narrow[name] = q
            layers.append(Layer(name, str(format), sqnr(weight, q), q.nbytes, weight.numel()))
    if not layers:
        raise ValueError(
            f"{source} holds no 2-D float tensor named *.weight that is not skipped: nothing to quantize. "
            f"It holds {listed(names)}"
        )
    tensors = [part for name, q in narrow.items() for part in q.file_tensors(name)]
    tensors += [(name, *file.info(name)[:2], file.bytes(name)) for name in kept]
    out.mkdir(parents=True, exist_ok=True)
    # The loader asks for these of the layers that turn out to be embeddings.
    types = {name: _FLOATS[file.info(name)[0]] for name in narrow}
    _native.write_safetensors(out / _WEIGHTS, tensors, file_metadata(narrow, tied={}, embeddings=types))
    for pattern in _COMPANIONS:
        for companion in source.parent.glob(pattern):
            shutil.copy2(companion, out / companion.name)
    return layers, kept


def chosen(layer: str, formats: Iterable[str], skip: Iterable[str] | None) -> str | None:
    """The first pattern that matches the layer's name or its last parts, as quantize_model() has it; None to skip."""
    pattern = next(each for each in formats if matches(each, layer))
    default = () if pattern != "*" else _SKIPPED
    return None if any(matches(each, layer) for each in (default if skip is None else skip)) else pattern


def sqnr(weight: Any, q: ng.QTensor) -> float:
    """Signal to quantization noise ratio in dB; infinite without noise."""
    wide = weight.float()
    noise = (wide - q.dequantize("float32")).double().square().sum().item()
    return 10 * math.log10(wide.double().square().sum().item() / noise) if noise > 0 else math.inf


def listed(names: Sequence[str], limit: int = 6) -> str:
    """Names for a sentence, the first few and the count of the rest."""
    if not names:
        return "none"
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _table(layers: list[Layer]) -> Table:
    """One line per kind of layer: the same last part of the name and the same format."""
    kinds: dict[tuple[str, str], list[Layer]] = defaultdict(list)
    for layer in layers:
        kinds[layer.name.removesuffix(".weight").rpartition(".")[2], layer.format].append(layer)
    rows = [
        [
            kind,
            len(group),
            format,
            f"{min(layer.sqnr for layer in group):.1f}",
            f"{sum(layer.sqnr for layer in group) / len(group):.1f}",
            human_bytes(sum(layer.nbytes for layer in group)),
        ]
        for (kind, format), group in kinds.items()
    ]
    return table(["layer", ">tensors", "format", ">worst SQNR dB", ">mean", ">bytes"], rows)
