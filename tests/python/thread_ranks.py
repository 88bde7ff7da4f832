"""Ranks of collectives that are threads of the test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import narrowgauge as ng
from narrowgauge import _native


def run_ranks(
    size: int, body: Callable[[ng.Communicator], Any], node_size: int = 0, *, timeout: float = 60
) -> list[Any]:
    """What body returned, or raised, on every rank. timeout: seconds that a rank waits for another."""
    results: list[Any] = [None] * size

    def rank(transport: Any, index: int) -> None:
        try:
            results[index] = body(ng.Communicator(_native.communicator(transport, node_size, None)))
        except Exception as error:
            results[index] = error

    transports = _native.in_process_transports(size, timeout)
    threads = [threading.Thread(target=rank, args=(each, index)) for index, each in enumerate(transports)]
    transports.clear()  # a rank that ends has gone
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def results_of(*arguments: Any, **options: Any) -> list[Any]:
    """What body returned on every rank of run_ranks; raises what a rank has raised."""
    results = run_ranks(*arguments, **options)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
