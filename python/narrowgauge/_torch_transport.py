"""Bytes carried by torch.distributed: uint8 tensors over the memory that the core hands out."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def _tensor(memory: memoryview) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8) if len(memory) else torch.empty(0, dtype=torch.uint8)


class TorchTransport:
    """A process group as the core sees a transport (python/bindings/collective.cpp)."""

    def __init__(self, group: Any = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("torch.distributed has no process group; expected init_process_group to have been called")
        self._group = dist.group.WORLD if group is None else group
        self.rank = dist.get_rank(self._group)
        self.size = dist.get_world_size(self._group)
        self.name = f"torch.distributed {dist.get_backend(self._group)}"
        if self.rank < 0:
            raise ValueError("this process is not in the group; expected one of its ranks")
        # Older versions know it by a name of which newer ones warn.
        self._gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def all_gather(self, sent: memoryview, received: memoryview, operation: str) -> Any:
        return self._gather(_tensor(received), _tensor(sent), group=self._group, async_op=True)

    def all_to_all(
        self, sent: memoryview, sent_bytes: list[int], received: memoryview, received_bytes: list[int], operation: str
    ) -> Any:
        return dist.all_to_all_single(
            _tensor(received), _tensor(sent), received_bytes, sent_bytes, group=self._group, async_op=True
        )

    def split(self, color: int) -> TorchTransport:
        colors: list[Any] = [None] * self.size
        dist.all_gather_object(colors, color, group=self._group)
        ranks = dist.get_process_group_ranks(self._group)
        mine = [rank for rank, other in zip(ranks, colors, strict=True) if other == color]
        return TorchTransport(dist.new_group(mine, use_local_synchronization=True))
