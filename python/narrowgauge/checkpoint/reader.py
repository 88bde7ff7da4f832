"""Loading and verifying: which checkpoint of a directory, and the files behind state.py's names."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from narrowgauge import _native
from narrowgauge._arrays import Array, is_torch
from narrowgauge.checkpoint.decode import Request, decode
from narrowgauge.checkpoint.restore import restore
from narrowgauge.errors import CheckpointCorrupt, CheckpointError, FileCorrupt

_VERIFY = ("chunks", "off")


class LoadReport(NamedTuple):
    """Bytes of a load."""

    bytes: int  # that the state wanted
    bytes_read: int  # from files
    bytes_direct: int  # of those, past the page cache


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """The committed steps in a directory, rising. OSError if it cannot be read."""
    return _native.checkpoint_steps(Path(directory))


def find(path: str | os.PathLike[str], step: int | None = None) -> Path:
    """The folder of one checkpoint: `path` itself, or the newest one, or the one of `step`, in `path`.

    CheckpointError if there is none, OSError if `path` cannot be read.
    """
    path = Path(path)
    # By its name too, so that one without its manifest is called damaged.
    if (path / "manifest.json").exists() or re.fullmatch(r"step-\d{8,}", path.name):
        if step is not None and _native.checkpoint_name(step) != path.name:
            raise CheckpointError(f"{path} is one checkpoint, not a directory that holds step {step}")
        return path
    known = steps(path)
    if step is None:
        if not known:
            raise CheckpointError(f"{path} holds no committed checkpoint")
        step = known[-1]
    elif step not in known:
        raise CheckpointError(f"{path} holds no step {step}; its steps are {_some(known)}")
    return path / _native.checkpoint_name(step)


def load_checkpoint(
    path: str | os.PathLike[str],
    step: int | None = None,
    *,
    into: Any = None,
    map: str | Sequence[str] | None = None,
    lazy: bool = False,
    verify: str = "chunks",
    library: str | None = None,
    rank: int | None = None,
    report: Callable[[LoadReport], None] | None = None,
) -> Any:
    """The state that was saved: of the newest committed checkpoint in `path`, of `step`, or of the checkpoint `path`.

    into: a state to fill in place, which is returned; tensors keep their memory. DTensors, such as FSDP2's, get the
    part that is theirs, on any number of ranks; only that is read. ValueError, before anything is changed, if the two
    states do not fit. Without `into` sharded tensors come whole.

    map: patterns of names, such as "model" or "optimizer.state.*.exp_avg": only what matches is loaded. Dict entries
    that do not are left out, list and tuple items None.

    lazy: tensors are views of the files, read when they are used and **not verified**, where they lie in one piece.
    They are read-only: writing to one is undefined.

    verify: 'chunks' compares the checksum of every chunk that is read; a chunk is 1 MiB. 'off' reads exactly the bytes
    that are wanted.

    library: 'numpy' gives numpy arrays for torch tensors. rank: whose PerRank values to load; by default this
    process's rank in torch.distributed, else 0. report: called with the number of bytes read.

    CheckpointError if there is no such checkpoint, CheckpointCorrupt if it is damaged, OSError. After CheckpointCorrupt
    a state given as `into` may be filled in part.
    """
    if verify not in _VERIFY:
        raise ValueError(f"verify is {verify!r}, expected 'chunks' or 'off'")
    if lazy and into is not None:
        raise ValueError("lazy views cannot be filled into a state; give one of lazy and into")
    folder = find(path, step)
    patterns = [map] if isinstance(map, str) else map
    rank = _rank() if rank is None else rank
    try:
        source = Files(_native.Checkpoint(folder), verify == "chunks")
        document = source.checkpoint.state
        if into is not None:
            state = restore(document, source, into, patterns=patterns, rank=rank)
        else:
            state = decode(document, source, patterns=patterns, lazy=lazy, library=library, rank=rank)
    except FileCorrupt as error:
        raise CheckpointCorrupt(f"{error}{_advice(folder)}") from None
    if report is not None:
        report(source.report)
    return state


def verify_checkpoint(
    path: str | os.PathLike[str], step: int | None = None, *, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Reads a whole checkpoint and compares every checksum; returns its folder.

    path, step: as in load_checkpoint. progress: called with (bytes done, bytes in all), from any thread.
    CheckpointCorrupt naming file, tensor and chunk.
    """
    folder = find(path, step)
    _native.Checkpoint(folder).verify(progress)
    return folder


class Files:
    """The tensors of an open checkpoint, as decode and restore ask for them."""

    def __init__(self, checkpoint: _native.Checkpoint, verify: bool = True) -> None:
        self.checkpoint = checkpoint
        self.verify = verify
        self.report = LoadReport(0, 0, 0)

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        found = self.checkpoint.info(name)
        if found is None:
            raise KeyError(name)
        return found

    def read(self, requests: list[Request]) -> None:
        arguments = []
        for name, box, array in requests:
            bounds = [(0, length) for length in self.info(name)[1]] if box is None else list(box)
            arguments.append((name, False, bounds, _address(array), array.nbytes))
        self.report = LoadReport(*self.checkpoint.read(arguments, self.verify))

    def map(self, name: str) -> memoryview | None:
        return self.checkpoint.map(name)


def _address(array: Array) -> int:
    own = is_torch(array) or isinstance(array, _native.Tensor)
    return int(array.data_ptr() if own else array.__array_interface__["data"][0])


def _rank() -> int:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0
    return int(distributed.get_rank())


def _advice(folder: Path) -> str:
    """What to load instead."""
    try:
        known = steps(folder.parent)
    except OSError:
        return ""
    before = [step for step in known if _native.checkpoint_name(step) < folder.name]
    return f"; the checkpoint before it is step {before[-1]}" if before and folder.name.startswith("step-") else ""


def _some(known: list[int]) -> str:
    return ", ".join(str(step) for step in known[-5:]) + (" (the last five)" if len(known) > 5 else "") or "none"
