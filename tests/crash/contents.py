"""What the savers save: tensors that are a function of a number, so that any mixture of two saves is seen.

Every byte depends on the number, the number itself lies in the tensor `number`, and a state is right only if it is
equal bit for bit to what its number gives. The sizes are small but awkward: several chunks, exactly one, odd tails, no
dimension, no element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch

State = dict[str, torch.Tensor]

_LAYOUT: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "model.embed.weight": (torch.bfloat16, (1234, 1024)),
    "model.mlp.weight": (torch.bfloat16, (512, 1024)),
    "model.norm.weight": (torch.float32, (333,)),
    "model.mask": (torch.bool, (3, 1001)),
    "model.empty": (torch.float32, (0, 4)),
    "optimizer.step": (torch.float32, ()),
    "optimizer.exp_avg": (torch.float32, (301, 1021)),
    "optimizer.exp_avg_sq": (torch.float16, (77, 501)),
}


@lru_cache(maxsize=8)
def content(number: int, copies: int = 1) -> State:
    """About 5 MB for each copy. Shared by all callers: do not write to it."""
    state = {"number": torch.tensor(number)}
    for copy in range(copies):
        for index, (name, (dtype, shape)) in enumerate(_LAYOUT.items()):
            generator = np.random.Generator(np.random.SFC64((number % 2**64, copy, index)))
            data = bytearray(generator.bytes(math.prod(shape) * dtype.itemsize))
            tensor = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            if dtype is torch.bool:
                tensor &= 1
            state[name if copy == 0 else f"{name}.{copy}"] = tensor.view(dtype).reshape(shape)
    return state


def difference(state: Mapping[str, torch.Tensor], number: int, copies: int = 1) -> str:
    """The first respect in which `state` is not content(number, copies), or ""."""
    expected = content(number, copies)
    if state.keys() != expected.keys():
        return f"tensors {sorted(state.keys() ^ expected.keys())} are missing or too many"
    for name, tensor in expected.items():
        found = state[name]
        if found.dtype != tensor.dtype or found.shape != tensor.shape:
            return f"{name} is {found.dtype} {tuple(found.shape)}"
        if not torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)):
            return f"{name} is not that of number {number}"
    return ""
