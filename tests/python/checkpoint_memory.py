"""A checkpoint's files in memory, as plainly as can be: what writers store, and the Source that readers need."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from narrowgauge.checkpoint.decode import Request
from narrowgauge.checkpoint.plan import Plan, describe, plan
from narrowgauge.checkpoint.state import Encoded, encode
from narrowgauge.checkpoint.tensors import FILE_BYTES


def to_bytes(array: Any) -> np.ndarray:
    """The elements of an array as u8 [*shape, itemsize]."""
    if not isinstance(array, np.ndarray):
        import torch

        array = array.detach().contiguous()
        array = (array.view(torch.int16) if array.dtype == torch.bfloat16 else array).numpy()
    return np.frombuffer(array.tobytes(), np.uint8).reshape(*array.shape, array.dtype.itemsize)


class Files:
    """Tensors written region by region. Every byte is written once, or the tests fail."""

    def __init__(self) -> None:
        self.tensors: dict[str, tuple[str, tuple[int, ...], np.ndarray]] = {}
        self.written: dict[str, np.ndarray] = {}
        self.bytes_read = 0

    def write(self, planned: Plan, ranks: Iterable[Encoded]) -> "Files":
        for name, dtype, shape in planned.tensors:
            assert name not in self.tensors and name.encode()
            self.tensors[name] = dtype, tuple(shape), np.zeros((*shape, FILE_BYTES[dtype]), np.uint8)
            self.written[name] = np.zeros(shape, np.int64)
        for encoded, regions in zip(ranks, planned.regions, strict=True):
            for region in regions:
                name, dtype, shape = planned.tensors[region.tensor]
                stored = encoded.tensors[region.stored]
                assert (stored.name, stored.dtype, tuple(stored.shape)) == (name, dtype, shape)
                width = FILE_BYTES[dtype]
                part = to_bytes(stored.array)
                assert part.shape[-1] == width
                elements = part.reshape(-1, width)[region.start : region.stop]
                if region.box is None:
                    self.tensors[name][2].reshape(-1, width)[region.start : region.stop] = elements
                    self.written[name].reshape(-1)[region.start : region.stop] += 1
                else:
                    where = tuple(slice(*bounds) for bounds in region.box)
                    lengths = [end - begin for begin, end in region.box]
                    self.tensors[name][2][where] = elements.reshape(*lengths, width)
                    self.written[name][where] += 1
        assert all((count == 1).all() for count in self.written.values())
        return self

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        return self.tensors[name][:2]

    def read(self, requests: list[Request]) -> None:
        for name, box, array in requests:
            data = self.tensors[name][2]
            if box is not None:
                data = data[tuple(slice(*bounds) for bounds in box)]
            self.bytes_read += data.size
            target = array if isinstance(array, np.ndarray) else array.numpy()
            assert target.dtype == np.uint8 and target.shape == (data.size,) and target.flags.c_contiguous
            target[:] = data.reshape(-1)

    def map(self, name: str) -> memoryview | None:
        _, shape, data = self.tensors[name]
        return memoryview(data.reshape(-1)) if math.prod(shape) else None


def save(state: Any, **options: Any) -> tuple[str, Files]:
    encoded = encode(state, **options)
    planned = plan([describe(encoded)])
    return planned.document, Files().write(planned, [encoded])
