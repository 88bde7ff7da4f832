"""Where a command's words go: results to stdout, all else to stderr.

With --json stdout carries one JSON object and nothing else: the result, or {"error": ...} if the command failed.
Without it the result is text and tables. Progress shows on a terminal only.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

_PLAIN_WIDTH = 132  # of tables in a file or pipe


class Output:
    """The two streams of one command."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._out = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
        self._err = Console(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        """A remark to the person who waits."""
        self._err.print(escape(text))

    def result(self, value: dict[str, Any], *renderables: RenderableType) -> None:
        """The command's result: `value` with --json, else the renderables."""
        if self._as_json:
            print(json.dumps(_finite(value), indent=2))
            return
        for renderable in renderables:
            self._out.print(renderable)

    def stream(self, text: str) -> None:
        """A piece of the result that is shown as it comes; with --json it waits for result()."""
        if not self._as_json:
            print(text, end="", flush=True)

    def error(self, error: BaseException) -> None:
        message = str(error) or type(error).__name__
        if self._as_json:
            print(json.dumps({"error": {"kind": type(error).__name__, "message": message}}, indent=2))
        self._err.print(f"[red]error:[/] {escape(message)}", soft_wrap=True)

    def progress(self, *columns: ProgressColumn) -> Progress:
        """Bars with `columns`; by default how many of how many are done, and the time."""
        default = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(
            *(columns or default),
            console=self._err,
            transient=True,
            disable=self._as_json or not sys.stderr.isatty(),
        )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """A table; columns whose name starts with '>' are aligned right."""
    result = Table(title=title, title_justify="left")
    for column in columns:
        result.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        result.add_row(*(escape(str(cell)) for cell in row))
    return result


def human_bytes(count: int) -> str:
    """1234567 -> '1.23 MB' (decimal units)."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
