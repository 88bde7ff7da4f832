"""Bytes carried by MPI through mpi4py.

MPI cannot be told to stop: a transfer that is given up leaves its memory to MPI for ever, as in transport_mpi.hpp.
"""

from __future__ import annotations

import time
from typing import Any

from mpi4py import MPI

_given_up: list[_Transfer] = []


class _Transfer:
    """A nonblocking collective and what it reads and writes."""

    def __init__(self, request: Any, timeout: float, *memory: memoryview) -> None:
        self._request, self._timeout, self._memory = request, timeout, memory

    def wait(self) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._request.Test():
            if time.monotonic() > deadline:
                _given_up.append(self)
                raise TimeoutError(f"not complete within {self._timeout:g} s")
            time.sleep(0)

    def __del__(self) -> None:
        if self._request and self not in _given_up and not MPI.Is_finalized():
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
        request = self._communicator.Iallgather([sent, len(sent), MPI.BYTE], [received, len(sent), MPI.BYTE])
        return _Transfer(request, self._timeout, sent, received)

    def all_to_all(
        self, sent: memoryview, sent_bytes: list[int], received: memoryview, received_bytes: list[int], operation: str
    ) -> _Transfer:
        request = self._communicator.Ialltoallv([sent, sent_bytes, MPI.BYTE], [received, received_bytes, MPI.BYTE])
        return _Transfer(request, self._timeout, sent, received)

    def split(self, color: int) -> MpiTransport:
        part = self._communicator.Split(color, self.rank)
        transport = MpiTransport(part, self._timeout)
        part.Free()
        return transport
