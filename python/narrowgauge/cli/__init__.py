"""The command line: `narrowgauge doctor | demo | quantize | generate | eval | bench | checkpoint`.

It needs the `cli` extra (typer, rich); most commands need torch too, and those that build models the `demo` extra. A
command whose extra is absent says what to install. docs/cli.md lists commands, JSON fields and exit codes.
"""

from __future__ import annotations

import importlib.util
import sys

OK, FAILED, USAGE, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 130


def main() -> int:
    """Runs the command in sys.argv and returns the process's exit code."""
    for module in ("typer", "rich"):
        if importlib.util.find_spec(module) is None:
            message = f"the command line needs {module}, which is not installed: pip install 'narrowgauge[cli]'"
            print(f"error: {message}", file=sys.stderr)
            return UNAVAILABLE
    from narrowgauge.cli.app import run

    return run(sys.argv[1:])
