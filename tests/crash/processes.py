"""Processes that may die: a Writer that saves step after step until it is killed, and a Worker that reads for us.

Both are forked from a server that has imported torch and done nothing else, so that one starts in milliseconds. The
Worker is apart because a reader may hang, crash, or keep a mapping of a file system that is to be unmounted.
"""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import signal
import tempfile
import time
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

# What a Writer's process tells, with a number or a text.
_BEGUN, _SAVED, _FAILED = "begun", "saved", "failed"


class Lost(Exception):
    """A process hung, died, or failed where nothing had been done to it."""


class Writer:
    """Saves content(1), content(2), ... and reports each number once the contender says that it is safe.

    Each has a step of its own, or with `overwrite` all are step 1. After `last` it waits to be killed. `midway` tells
    after kill() whether a save was going on.
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
        self.midway = False
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
            kind, value = self._reports.recv()
        except EOFError:
            kind, value = _FAILED, "the process is gone"
        if kind == _FAILED:
            self._failure = value
        else:
            self.midway = kind == _BEGUN
        if kind == _SAVED:
            self._reported = value


class Worker:
    """Calls functions in another process, which is replaced when it hangs or dies."""

    def __enter__(self) -> Worker:
        self._connection, child = _CONTEXT.Pipe()
        self._stacks = tempfile.NamedTemporaryFile("r")
        self._process: ForkServerProcess = _CONTEXT.Process(target=_serve, args=(child, self._stacks.name), daemon=True)
        self._process.start()
        child.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._stacks.close()

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float = 60) -> Any:
        """Throws Lost if the function hangs, crashes, or raises."""
        self._connection.send((function, arguments))
        # In two halves: for the first, everything may have been stopped or the machine suspended.
        if self._connection.poll(timeout / 2) or self._connection.poll(timeout / 2):
            try:
                value, error = self._connection.recv()
            except EOFError:
                self._process.join()
                lost = f"{function.__name__} died with exit code {self._process.exitcode}"
            else:
                if error:
                    raise Lost(f"{function.__name__} raised\n{error}")
                return value
        else:
            lost = f"{function.__name__} hung for {timeout:g} s\n{self._where()}"
        self.__exit__(None, None, None)
        self.__enter__()
        raise Lost(lost)

    def _where(self) -> str:
        """The Python stack of every thread of a process that hangs."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        return self._stacks.read()


def _write(reports: Connection, contender: type[Contender], directory: Path, overwrite: bool, last: int | None) -> None:
    try:
        saver = contender(directory)
        for number in itertools.count(1):
            state = content(number)
            reports.send((_BEGUN, number))
            saver.save(1 if overwrite else number, state)
            reports.send((_SAVED, number))
            if number == last:
                break
    except Exception as error:
        reports.send((_FAILED, f"{type(error).__name__}: {error}"))
    signal.pause()


def _serve(connection: Connection, stacks: str) -> None:
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file)
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
