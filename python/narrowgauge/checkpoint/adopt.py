"""Moving torch tensors into page-aligned memory, from where direct I/O writes them without a copy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from narrowgauge._arrays import is_torch

if TYPE_CHECKING:
    import torch


class Adopter:
    """Owns the pool that adopted tensors live in. The pool lives as long as they do, with or without the Adopter."""

    def __init__(self) -> None:
        from narrowgauge.memory import HostPool

        self._pool = HostPool()
        self._storages: set[int] = set()

    @property
    def storages(self) -> frozenset[int]:
        """The addresses of adopted storages."""
        return frozenset(self._storages)

    def move(self, tensors: Iterable[Any]) -> None:
        """Gives the tensors storages in the pool. Those that share a storage share the new one."""
        import torch
        from torch.utils.dlpack import from_dlpack

        moved: dict[int, torch.UntypedStorage] = {}
        with torch.no_grad():
            for tensor in tensors:
                tensor = getattr(tensor, "_local_tensor", tensor)
                if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.numel() == 0:
                    continue
                old = tensor.untyped_storage()
                address = old.data_ptr()
                if address in self._storages:
                    continue
                if address not in moved:
                    new = from_dlpack(self._pool.empty((old.nbytes(),), "uint8")).untyped_storage()
                    new.copy_(old)
                    moved[address] = new
                home = torch.empty(0, dtype=tensor.dtype)
                home.set_(moved[address], tensor.storage_offset(), tensor.size(), tensor.stride())
                tensor.data = home
        self._storages.update(storage.data_ptr() for storage in moved.values())

    def follow(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Moves the optimizer's state, now and whenever it is made or loaded; returns the hooks."""

        def move_state(*_: object) -> None:
            self.move(value for state in optimizer.state.values() for value in state.values() if is_torch(value))

        def after_step(*_: object) -> None:
            if optimizer.state:
                move_state()
                first_step.remove()

        move_state()
        hooks = [optimizer.register_load_state_dict_post_hook(move_state)]
        if not optimizer.state:
            first_step = optimizer.register_step_post_hook(after_step)
            hooks.append(first_step)
        return hooks
