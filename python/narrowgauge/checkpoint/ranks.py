"""What the ranks of a checkpoint say to each other: short messages over gloo groups made for it.

Two groups, since save() and the background thread talk at the same time; gloo, since messages are on the host whatever
the training's own backend is. Each exchange begins with a barrier that names the ranks that do not come.
"""

from __future__ import annotations

import datetime
import hashlib
from typing import Any

import torch
import torch.distributed as dist

from narrowgauge.checkpoint.plan import Plan, plan
from narrowgauge.errors import CheckpointError


class Ranks:
    """The ranks of a process group, as a Checkpointer on each of them uses them: all make the same calls in order."""

    def __init__(self, process_group: Any, timeout: float) -> None:
        members = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        self.rank = members.index(dist.get_rank())
        self.size = len(members)
        self._timeout = datetime.timedelta(seconds=timeout)
        self._groups = []
        self._plans: dict[bytes, Plan] = {}
        if self.size > 1:
            for _ in range(2):
                self._groups.append(
                    dist.new_group(members, timeout=self._timeout, backend="gloo", use_local_synchronization=True)
                )

    def gather(self, message: bytes, background: bool = False) -> list[bytes]:
        """Every rank's message, in order. CheckpointError naming the ranks that do not answer in time."""
        group = self._groups[background]
        try:
            dist.monitored_barrier(group, timeout=self._timeout, wait_all_ranks=True)
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(message)]), group=group)
            lengths = [int(size) for size in sizes]
            # Padded to the longest, as all_gather wants it.
            padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
            padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else padded[:0]
            texts = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(texts, padded, group=group)
        except RuntimeError as error:
            raise CheckpointError(
                f"the ranks that save together did not all answer within {self._timeout.total_seconds():g} s: {error}"
            ) from error
        return [bytes(text[:length].numpy()) for text, length in zip(texts, lengths, strict=True)]

    def in_background(self, message: bytes) -> list[bytes]:
        return self.gather(message, background=True)

    def agree(self, failure: Exception | None, what: str) -> None:
        """Raises on all ranks if one has failed: the failure where it is, CheckpointError elsewhere."""
        self._agree(b"", failure, what)

    def plan(self, description: bytes, failure: Exception | None) -> Plan:
        """Who writes what; made anew only when some rank's description has changed. Raises as agree() does."""
        digest = hashlib.blake2b(description, digest_size=16).digest()
        key = b"".join(self._agree(digest, failure, "cannot save"))
        if key not in self._plans:
            self._plans = {key: plan(self.gather(description))}
        return self._plans[key]

    def _agree(self, message: bytes, failure: Exception | None, what: str) -> list[bytes]:
        if failure is not None:
            message = f"{type(failure).__name__}: {failure}".encode("utf-8", "backslashreplace")
        answers = self.gather((b"+" if failure is None else b"-") + message)
        if failure is not None:
            raise failure
        for rank, answer in enumerate(answers):
            if not answer.startswith(b"+"):
                raise CheckpointError(f"rank {rank} {what}: {answer[1:].decode()}")
        return [answer[1:] for answer in answers]

    def close(self) -> None:
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups = []
