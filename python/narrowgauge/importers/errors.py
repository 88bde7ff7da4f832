"""What an importer or a command raises when something that it needs is not there."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtra(ImportError):
    """An optional dependency is not installed; the message names the `pip install` line."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"this needs {module}, which is not installed: pip install 'narrowgauge[{extra}]'")


class ModelUnavailable(RuntimeError):
    """The model could not be fetched; the message says how to go on without."""


def require(module: str, extra: str) -> Any:
    """Imports `module`, or raises MissingExtra if it is not installed. Errors inside the module pass through."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtra(module, extra) from None
