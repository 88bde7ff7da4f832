"""The contenders: one class each, with the same few verbs, used as their documentation says.

A contender keeps the newest KEEP checkpoints of a directory, one name a step. It is opened on a directory, saves steps,
and closes; the rest are questions about a directory that any process may ask. `spans` says where in the files of a
checkpoint the bytes of which tensor lie; all other bytes are metadata.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NamedTuple

import narrowgauge as ng
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from contents import State
from torch.distributed.checkpoint.api import CheckpointException

KEEP = 3

# DCP tells at every call that there is no process group, and pickles its own deprecated classes.
logging.getLogger("torch.distributed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="torch.distributed")


class Span(NamedTuple):
    """Bytes [start, stop) of a file hold part of a tensor: what has a checksum of its own, if there are such."""

    path: Path
    start: int
    stop: int
    tensor: str
    chunk: int = 0


class Contender:
    """Base class; what it implements itself is that of the peers."""

    name: ClassVar[str]
    suffix: ClassVar[str] = ""
    # Every name that is there is a checkpoint that loads; damage is named by file, tensor and chunk.
    strict: ClassVar[bool] = False
    # Part of a name that is not a checkpoint yet.
    temporary: ClassVar[str] = ".tmp"
    # The file that describes the others, where there is one.
    manifest: ClassVar[str] = ""
    # Its files differ from another contender's, so that damage to them is another case.
    own_files: ClassVar[bool] = True
    # Files are made durable after they are written, by those who use the contender.
    synced: ClassVar[bool] = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        if self.synced:
            _sync(directory.parent)

    def save(self, step: int, state: State) -> None:
        """Returns when the contender says that the checkpoint is there. An existing step is overwritten."""
        path = self.path(self.directory, step)
        self.write(path, state)
        if self.synced:
            for file in files(path):
                _sync(file)
            if path.is_dir():
                _sync(path)
            _sync(self.directory)
        for old in self.steps(self.directory)[:-KEEP]:
            remove(self.path(self.directory, old))

    def close(self) -> None:
        pass

    @staticmethod
    def write(path: Path, state: State) -> None:
        raise NotImplementedError

    @classmethod
    def path(cls, directory: Path, step: int) -> Path:
        return directory / f"step-{step}{cls.suffix}"

    @classmethod
    def steps(cls, directory: Path) -> list[int]:
        """Ascending, by the names that are there."""
        if not directory.is_dir():
            return []
        names = (re.fullmatch(rf"step-(\d+){re.escape(cls.suffix)}", name) for name in os.listdir(directory))
        return sorted(int(name[1]) for name in names if name)

    @classmethod
    def leftovers(cls, directory: Path) -> list[str]:
        return [name for name in os.listdir(directory) if cls.temporary in name] if directory.is_dir() else []

    @classmethod
    def load(cls, directory: Path, step: int) -> State:
        raise NotImplementedError

    @classmethod
    def verify(cls, path: Path) -> None:
        """Raises if the checkpoint is damaged, where there is such a check beyond loading."""

    @classmethod
    def spans(cls, path: Path) -> list[Span]:
        raise NotImplementedError


class TorchSave(Contender):
    name = "torch.save"
    suffix = ".pt"

    @staticmethod
    def write(path: Path, state: State) -> None:
        torch.save(state, path)

    @classmethod
    def load(cls, directory: Path, step: int) -> State:
        return torch.load(cls.path(directory, step), weights_only=True)

    @classmethod
    def spans(cls, path: Path) -> list[Span]:
        spans = []
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for record in archive.infolist():
                if "/data/" in record.filename:
                    file.seek(record.header_offset + 26)
                    start = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                    spans.append(Span(path, start, start + record.file_size, record.filename))
        return spans


class TorchSaveSynced(TorchSave):
    name = "torch.save + fsync"
    synced = True


class Safetensors(Contender):
    name = "safetensors"
    suffix = ".safetensors"

    @staticmethod
    def write(path: Path, state: State) -> None:
        safetensors.torch.save_file(state, path)

    @classmethod
    def load(cls, directory: Path, step: int) -> State:
        return safetensors.torch.load_file(cls.path(directory, step))

    @classmethod
    def spans(cls, path: Path) -> list[Span]:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        ranges = {name: tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"}
        return [Span(path, 8 + size + start, 8 + size + stop, name) for name, (start, stop) in ranges.items()]


class SafetensorsSynced(Safetensors):
    name = "safetensors + fsync"
    synced = True


class Dcp(Contender):
    """torch.distributed.checkpoint with its default writer, which calls fsync itself."""

    name = "DCP"
    manifest = ".metadata"

    @staticmethod
    def write(path: Path, state: State) -> None:
        with _exceptions():
            dcp.save(state, checkpoint_id=path, no_dist=True)

    @classmethod
    def load(cls, directory: Path, step: int) -> State:
        path = cls.path(directory, step)
        tensors = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in tensors.items()}
        with _exceptions():
            dcp.load(state, checkpoint_id=path, no_dist=True)
        return state

    @classmethod
    def spans(cls, path: Path) -> list[Span]:
        stored = dcp.FileSystemReader(path).read_metadata().storage_data
        return [
            Span(path / item.relative_path, item.offset, item.offset + item.length, index.fqn)
            for index, item in stored.items()
        ]


class Narrowgauge(Contender):
    """The number is kept as one, not as a tensor, so that what is not a tensor is seen too."""

    name = "narrowgauge"
    strict = True
    temporary = ".tmp-"
    manifest = "manifest.json"
    mode: ClassVar[str] = "snapshot"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checkpointer = ng.Checkpointer(directory, keep=KEEP)

    def save(self, step: int, state: State) -> None:
        number = int(state["number"])
        tensors = self.place({name: tensor for name, tensor in state.items() if name != "number"})
        overwrite = step in self.steps(self.directory)
        self.checkpointer.save(step, {**tensors, "number": number}, mode=self.mode, overwrite=overwrite)
        self.checkpointer.wait()

    def place(self, tensors: State) -> State:
        """The same tensors where the mode wants them."""
        return tensors

    def close(self) -> None:
        self.checkpointer.close()

    @classmethod
    def path(cls, directory: Path, step: int) -> Path:
        return directory / f"step-{step:08d}"

    @classmethod
    def steps(cls, directory: Path) -> list[int]:
        return ng.checkpoint.steps(directory) if directory.is_dir() else []

    @classmethod
    def load(cls, directory: Path, step: int) -> State:
        newest = step == cls.steps(directory)[-1]
        state = ng.load_checkpoint(directory, step=None if newest else step)
        return {**state, "number": torch.tensor(state["number"])}

    @classmethod
    def verify(cls, path: Path) -> None:
        ng.verify_checkpoint(path)

    @classmethod
    def spans(cls, path: Path) -> list[Span]:
        manifest = json.loads((path / cls.manifest).read_text())
        chunk = manifest["chunk_bytes"]
        return [
            Span(
                path / manifest["files"][region["file"]]["name"], start, min(start + chunk, stop), tensor["name"], index
            )
            for tensor in manifest["tensors"]
            for region in tensor["regions"]
            for stop in [region["offset"] + region["bytes"]]
            for index, start in enumerate(range(region["offset"], stop, chunk))
        ]


class NarrowgaugeDeferred(Narrowgauge):
    """Written straight from the parameters of an optimizer, which are the same memory at every step."""

    name = "narrowgauge, deferred"
    mode = "deferred"
    own_files = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.parameters = torch.nn.ParameterList()

    def place(self, tensors: State) -> State:
        if [p.shape for p in self.parameters] != [t.shape for t in tensors.values()]:
            new = (torch.nn.Parameter(torch.empty_like(tensor), requires_grad=False) for tensor in tensors.values())
            self.parameters = torch.nn.ParameterList(new)
            self.checkpointer.adopt(self.parameters, torch.optim.SGD(self.parameters))
        for parameter, tensor in zip(self.parameters, tensors.values(), strict=True):
            parameter.copy_(tensor)
        return {name: parameter.detach() for name, parameter in zip(tensors, self.parameters, strict=True)}


OURS: list[type[Contender]] = [Narrowgauge, NarrowgaugeDeferred]
PEERS: list[type[Contender]] = [TorchSave, TorchSaveSynced, Safetensors, SafetensorsSynced, Dcp]


@contextmanager
def _exceptions() -> Iterator[None]:
    """DCP's own exception is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise RuntimeError(str(error)) from error


def files(path: Path) -> list[Path]:
    """The files of a checkpoint, which is a file or a directory."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
