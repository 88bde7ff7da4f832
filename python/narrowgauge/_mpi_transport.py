"""Bytes carried by MPI through mpi4py.

MPI cannot be told to stop, so bytes pass through memory of the transfer's own, which one that is given up leaves to
MPI, as in transport_mpi.hpp.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

_given_up: list[_Transfer] = []


class _Transfer:
    """A nonblocking collective: `start` gives its request for the two buffers."""

    def __init__(
        self, sent: memoryview, received: memoryview, timeout: float, start: Callable[[bytearray, bytearray], Any]
    ) -> None:
        self._sent, self._received = bytearray(sent), bytearray(len(received))
        self._to, self._timeout = received, timeout
        self._request = start(self._sent, self._received)

    def wait(self) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._request.Test():
            if time.monotonic() > deadline:
                _given_up.append(self)
                raise TimeoutError(f"not complete within {self._timeout:g} s")
            time.sleep(0)
        self._to[:] = self._received

    def __del__(self) -> None:
        if getattr(self, "_request", None) and self not in _given_up and not MPI.Is_finalized():
            _given_up.append(self)


class MpiTransport:
    """An mpi4py communicator as the core sees a transport (python/bindings/collective.cpp).

    It has a duplicate of it, which lives until MPI ends: freeing one is a collective call, and the collector of garbage
    keeps no order between ranks.
    """

    name = "MPI"

    def __init__(self, communicator: MPI.Intracomm, timeout: float) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout:g} s, expected more than 0")
        self._communicator = communicator.Dup()
        self._communicator.Set_errhandler(MPI.ERRORS_RETURN)
        self._timeout = timeout
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    def all_gather(self, sent: memoryview, received: memoryview, operation: str) -> _Transfer:
        def start(mine: bytearray, everyone: bytearray) -> Any:
            return self._communicator.Iallgather([mine, len(mine), MPI.BYTE], [everyone, len(mine), MPI.BYTE])

        return _Transfer(sent, received, self._timeout, start)

    def all_to_all(
        self, sent: memoryview, sent_bytes: list[int], received: memoryview, received_bytes: list[int], operation: str
    ) -> _Transfer:
        def start(mine: bytearray, ours: bytearray) -> Any:
            return self._communicator.Ialltoallv([mine, sent_bytes, MPI.BYTE], [ours, received_bytes, MPI.BYTE])

        return _Transfer(sent, received, self._timeout, start)

    def split(self, color: int) -> MpiTransport:
        part = self._communicator.Split(color, self.rank)
        transport = MpiTransport(part, self._timeout)
        part.Free()
        return transport
