"""`narrowgauge eval`: the perplexity of a model on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowgauge.cli.generate import parse_dtype
from narrowgauge.cli.output import JsonOption, Output, table
from narrowgauge.importers import load_causal_lm, require


def command(
    model: Annotated[Path, typer.Argument(help="A narrowgauge folder, a Hugging Face model folder or a GGUF file.")],
    text: Annotated[Path, typer.Option(help="A UTF-8 text file.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    windows: Annotated[int, typer.Option(min=0, help="Windows from the start of the text; 0 takes all.")] = 8,
    offset: Annotated[int, typer.Option(min=0, help="Characters of the text to leave out at its start.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type of what is not narrow: float32 or bfloat16.")] = "float32",
    json: JsonOption = False,
) -> None:
    """Measure perplexity: windows without overlap, no BOS, the first token of each window not scored."""
    output = Output(json)
    require("torch", "demo")
    prose = read_text(text)[offset:]
    loaded = load_causal_lm(model, parse_dtype(dtype))
    from narrowgauge.evaluate import cut_windows, perplexity

    cut = cut_windows(loaded.need_tokenizer(), prose, window, windows or None)
    with output.progress() as progress:
        task = progress.add_task("perplexity", total=len(cut))
        measured = perplexity(loaded.model, cut, lambda done: progress.update(task, completed=done))
    output.result(
        {
            "model": str(model),
            "text": str(text),
            "window": window,
            "windows": len(cut),
            "offset": offset,
            "dtype": dtype,
            "perplexity": measured.value,
            "tokens": measured.tokens,
            "seconds": measured.seconds,
        },
        table(
            ["model", "text", ">windows", ">scored tokens", ">perplexity", ">tokens/s"],
            [
                [
                    loaded.source,
                    text.name,
                    f"{len(cut)} x {window}",
                    measured.tokens,
                    f"{measured.value:.3f}",
                    f"{measured.tokens / measured.seconds:.0f}",
                ]
            ],
        ),
    )


def read_text(path: Path) -> str:
    """A UTF-8 file. FileNotFoundError, or ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such text file: {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}; convert it first, for example with iconv") from error
