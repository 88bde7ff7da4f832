"""Processes that may die: a Writer that saves step after step until it is killed, and a Worker that reads for us.

Both are forked from a server that has imported torch and done nothing else, so that one starts in milliseconds. The
Worker is apart because a reader may hang, crash, or keep a mapping of a file system that is to be unmounted.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from contents import content
from savers import Contender

# Importing the modules of this folder is cheap once these are there, and the server's path need not lead to them.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed.checkpoint", "safetensors.torch", "narrowgauge", "rich.progress"])

_START_SECONDS = 60


class Lost(Exception):
    """A process hung, died, or failed where nothing had been done to it."""


class Writer:
    """Saves content(1), content(2), ... and reports each number once the contender says that it is safe.

    Each has a step of its own, or with `overwrite` all are step 1. After `last` it waits to be killed.
    """

    def __init__(
        self, contender: type[Contender], directory: Path, *, overwrite: bool = False, last: int | None = None
    ) -> None:
        self._reports, child = _CONTEXT.Pipe(duplex=False)
        self._process: ForkServerProcess = _CONTEXT.Process(
            target=_write, args=(child, contender, directory, overwrite, last), daemon=True
        )
        self._child = child
        self._reported: int | None = None
        self._failure = ""

    def __enter__(self) -> Writer:
        self._process.start()
        self._child.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        self._reports.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def reported(self) -> int | None:
        """The last number that was reported by now. Throws Lost if a save has failed."""
        while self._reports.poll():
            self._receive()
        if self._failure:
            raise Lost(f"a save failed: {self._failure}")
        return self._reported

    def wait_for(self, number: int) -> None:
        while self._reported is None or self._reported < number:
            if not self._reports.poll(_START_SECONDS):
                raise Lost(f"no save of number {number} within {_START_SECONDS} s")
            self._receive()
            if self._failure:
                raise Lost(f"a save failed: {self._failure}")

    def kill(self) -> int | None:
        """Returns the last number that was ever reported. Saves may have failed, if something was done to them."""
        self._process.kill()
        self._process.join()
        while not self._failure:
            self._receive()
        return self._reported

    def _receive(self) -> None:
        try:
            number, failure = self._reports.recv()
        except EOFError:
            number, failure = None, "the process is gone"
        self._reported = number if number is not None else self._reported
        self._failure = failure


class Worker:
    """Calls functions in another process, which is replaced when it hangs or dies."""

    def __enter__(self) -> Worker:
        self._connection, child = _CONTEXT.Pipe()
        self._process: ForkServerProcess = _CONTEXT.Process(target=_serve, args=(child,), daemon=True)
        self._process.start()
        child.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float = 60) -> Any:
        """Throws Lost if the function hangs, crashes, or raises."""
        self._connection.send((function, arguments))
        lost = f"{function.__name__} hung for {timeout:g} s"
        if self._connection.poll(timeout):
            try:
                value, error = self._connection.recv()
            except EOFError:
                self._process.join()
                lost = f"{function.__name__} died with exit code {self._process.exitcode}"
            else:
                if error:
                    raise Lost(f"{function.__name__} raised\n{error}")
                return value
        self.__exit__(None, None, None)
        self.__enter__()
        raise Lost(lost)


def _write(reports: Connection, contender: type[Contender], directory: Path, overwrite: bool, last: int | None) -> None:
    try:
        saver = contender(directory)
        for number in itertools.count(1):
            saver.save(1 if overwrite else number, content(number))
            reports.send((number, ""))
            if number == last:
                break
    except Exception as error:
        reports.send((None, f"{type(error).__name__}: {error}"))
    signal.pause()


def _serve(connection: Connection) -> None:
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = function(*arguments), ""
        except Exception:
            answer = None, traceback.format_exc()
        connection.send(answer)
