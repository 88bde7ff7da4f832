"""The application: its commands, and what becomes of an error."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from narrowgauge.cli import FAILED, INTERRUPTED, OK, UNAVAILABLE
from narrowgauge.cli.bench import command as bench
from narrowgauge.cli.checkpoint import app as checkpoint
from narrowgauge.cli.demo import command as demo
from narrowgauge.cli.doctor import command as doctor
from narrowgauge.cli.evaluate import command as evaluate
from narrowgauge.cli.generate import command as generate
from narrowgauge.cli.output import Output
from narrowgauge.cli.quantize import command as quantize
from narrowgauge.errors import Error
from narrowgauge.importers.errors import ModelUnavailable

app = typer.Typer(
    name="narrowgauge",
    help="Narrow number formats for large models: fewer bytes, moved at the hardware's limit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("doctor")(doctor)
app.command("demo")(demo)
app.command("quantize")(quantize)
app.command("generate")(generate)
app.command("eval")(evaluate)
app.command("bench")(bench)
app.add_typer(checkpoint, name="checkpoint")


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code. Errors that a user can mend are one line; others are bugs."""
    output = Output("--json" in arguments)
    try:
        app(list(arguments))
    except SystemExit as done:  # typer ends so, after help and after a usage error too
        return done.code if isinstance(done.code, int) else OK if done.code is None else FAILED
    except (ImportError, ModelUnavailable) as error:  # an extra that is absent; the message has the pip line
        output.error(error)
        return UNAVAILABLE
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does. Python's flush at exit must not meet the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (ValueError, OSError, MemoryError, Error) as error:
        output.error(error)
        return FAILED
    except KeyboardInterrupt:
        output.note("interrupted")
        return INTERRUPTED
    return OK
