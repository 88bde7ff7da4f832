"""Checkpointer: saves a training state in the background, alone or together with the other ranks of a process group.

The state is taken apart on the caller's thread (state.py), the ranks agree on who writes what (plan.py), and the native
writer copies, writes and commits. What the ranks say to each other goes over two gloo groups of their own: one for the
calls of save(), one for the background.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from narrowgauge import _native
from narrowgauge._arrays import is_torch
from narrowgauge._native import Format
from narrowgauge.checkpoint.adopt import Adopter
from narrowgauge.checkpoint.plan import Plan, Region, describe, plan_alone
from narrowgauge.checkpoint.repeat import Leaves, Repeat, flatten
from narrowgauge.checkpoint.shards import dtensor_type
from narrowgauge.checkpoint.state import Encoded, Stored, encode
from narrowgauge.checkpoint.tensors import FILE_BYTES
from narrowgauge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_MODES = ("snapshot", "deferred")
_WHEN_BUSY = ("wait", "skip", "error")
_SLICE = 0.1  # seconds between looks at the interpreter's signals while waiting


class SaveReport(NamedTuple):
    """What the last committed save did, on this rank."""

    step: int
    path: Path
    bytes: int  # written by this rank
    borrowed_bytes: int  # of those, straight from the state's memory, without a copy
    blocked_seconds: float  # of the native part of save(); what came before is the walk over the state
    seconds: float  # from save() to the commit
    cpu_seconds: float  # of the writer thread
    engine: str  # how bytes reached the disk, such as 'io_uring'


class Checkpointer:
    """Saves checkpoints into a directory of its own; one at a time per directory, which it locks.

    >>> with ng.Checkpointer("run", keep=3) as ck:
    ...     ck.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})

    save() returns as soon as the state may change again; the checkpoint is committed in the background. What goes wrong
    there is raised by the next call, and the checkpoints before are as they were. Use it from one thread. A forked
    child cannot use it: CheckpointError.

    keep, keep_every: committed steps that are kept, the newest `keep` (None: all) and the multiples of `keep_every`.

    mode: 'snapshot' copies the whole state into staging memory before save() returns; it is kept for the next save, so
    the first one takes longer and the process grows by the size of the state. 'deferred' copies all but the parameters
    and the state of attached optimizers (attach), which are read in the background until the optimizer's next step: the
    first that changes them waits. Whatever else changes one of them before that, is found by its version counter, and
    the save fails with CheckpointError. (Changes through `.data` or numpy have no counter and are not found.)

    when_busy: what save() does while another save runs: 'wait', 'skip' (returns False) or 'error'.

    process_group: the ranks that save together, each calling save() with the same steps; by default all, where
    torch.distributed is initialised, else this process alone. Whatever several ranks hold is written once, in shares.
    timeout: seconds after which a rank that does not answer is an error.

    progress: called in the background with (bytes written, bytes in all) of this rank's file.

    format: {pattern: Format} for float tensors to be stored narrow, by name or its last parts, such as
    {"exp_avg": ng.fp8}. They come back in their own dtype, rounded.

    OSError if the directory cannot be used, CheckpointError if another Checkpointer has it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        mode: str = "snapshot",
        when_busy: str = "wait",
        process_group: torch.distributed.ProcessGroup | None = None,
        timeout: float = 600.0,
        progress: Callable[[int, int], None] | None = None,
        format: Mapping[str, Format | str] | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}, expected at least 1, or None to keep all")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every is {keep_every}, expected at least 1, or None")
        self.directory = Path(directory)
        self._mode = _one_of(mode, _MODES, "mode")
        self._when_busy = _one_of(when_busy, _WHEN_BUSY, "when_busy")
        self._formats = dict(format or {})
        self._optimizers: dict[int, weakref.ref[Any]] = {}
        self._hooks: list[Any] = []
        self._adopter: Adopter | None = None
        self._held: list[Any] = []  # memory that the background reads
        self._repeat: Repeat | None = None
        self._process = os.getpid()
        self._ranks = _ranks(process_group, timeout)
        rank, size, exchange = 0, 1, None
        if self._ranks is not None:
            rank, size, exchange = self._ranks.rank, self._ranks.size, self._ranks.in_background
        failure: Exception | None = None
        try:
            self._native = _native.Checkpointer(
                self.directory, keep or 0, keep_every or 0, rank, size, exchange, progress
            )
        except Exception as error:
            failure = error
        if self._ranks is not None:
            self._ranks.agree(failure, "cannot open the directory")
        if failure is not None:
            raise failure
        _open.add(self)

    def save(
        self,
        step: int,
        state: Any,
        *,
        mode: str | None = None,
        overwrite: bool = False,
        lent: Sequence[_native.Tensor] = (),
    ) -> bool:
        """Starts to save `state` as `step`; returns once it may change, True, or False if it was skipped.

        state: dicts, lists, tuples and other plain values with torch tensors, numpy arrays, ng.Tensors and QTensors at
        any depth. What lies on a GPU is copied in the background, in the order of its current stream: work that the
        stream is given after save() waits for that copy, save() does not.
        overwrite: replace the step if it exists; the new one is committed before the old one goes.
        lent: ng.Tensors of the state that nobody writes until wait() returns, in either mode. They are read in the
        background where they are, after the work that their stream had been given, without a copy of their own. They
        count no changes: one that is written all the same is saved as a mixture, and nothing tells.

        What the save before failed with is raised here. TypeError or ValueError, with the place in the state, for what
        cannot be stored; CheckpointError if the step exists. Then nothing was started.
        """
        mode = self._mode if mode is None else _one_of(mode, _MODES, "mode")
        if mode == "deferred" and not self._optimizers:
            raise ValueError("mode is 'deferred', which needs an optimizer that waits for it: call attach(optimizer)")
        if self._skips():
            return False
        rank = 0 if self._ranks is None else self._ranks.rank
        prepared: _Prepared | None = None
        encoded: Encoded | None = None
        failure: Exception | None = None
        try:
            self.wait()
            if step < 0:
                raise ValueError(f"step is {step}, expected at least 0")
            if self._ranks is not None and not overwrite and step in _native.checkpoint_steps(self.directory):
                raise CheckpointError(f"step {step} exists in {self.directory}; overwrite=True replaces it")
            waiting = self._waiting() if mode == "deferred" else []
            key = [tensor.data_ptr() for tensor in waiting]
            leaves = flatten(state) if self._ranks is None and not self._formats else None
            prepared = self._again(leaves, key)
            if prepared is None:
                encoded = encode(state, self._formats, rank)
            _check_lent(lent, [] if encoded is None else encoded.tensors)
        except Exception as error:
            failure = error
        if self._ranks is not None:
            agreed = self._ranks.plan(b"" if encoded is None else describe(encoded), failure)
        elif failure is not None:
            raise failure
        elif encoded is not None:
            agreed = plan_alone(encoded)
        if prepared is None:
            assert encoded is not None
            attached = frozenset(tensor.untyped_storage().data_ptr() for tensor in waiting)
            adopted = frozenset() if self._adopter is None else self._adopter.storages
            prepared = _prepare(agreed, rank, encoded.tensors, attached, adopted, frozenset(map(_where, lent)))
            self._repeat = Repeat.of(
                leaves,
                state,
                encoded.tree,
                encoded.tensors,
                prepared.part_of,
                prepared.parts,
                prepared.watched,
                key,
            )
        self._start(step, prepared, overwrite)
        return True

    def _again(self, leaves: Leaves | None, key: list[int]) -> _Prepared | None:
        """What was prepared for the state before, if this one looks the same."""
        if self._repeat is None or (same := self._repeat.again(leaves, key)) is None:
            return None
        document, watched = same
        return _Prepared(document, self._repeat.parts, watched, {}, [tensor for _, tensor in watched])

    def _start(self, step: int, prepared: _Prepared, overwrite: bool) -> None:
        watched = prepared.watched
        before = [(tensor._version, tensor.data_ptr()) for _, tensor in watched]

        def check() -> str:
            for (name, tensor), seen in zip(watched, before, strict=True):
                if (tensor._version, tensor.data_ptr()) != seen:
                    return (
                        f"tensor '{name}' was changed while it was being saved; call wait() before you change it, or "
                        "save it with mode='snapshot'"
                    )
            return ""

        self._native.save(step, prepared.parts, overwrite, prepared.document, check if watched else None)
        self._held = prepared.held

    # --- waiting ---

    def wait(self) -> None:
        """Waits for the save that runs. Raises what it failed with: CheckpointError, OSError, TimeoutError."""
        try:
            while not self._native.wait_for(_SLICE):
                pass
        finally:
            if os.getpid() == self._process and not self._native.busy():
                self._held = []

    def _wait_released(self) -> None:
        while not self._native.wait_released_for(_SLICE):
            pass

    @property
    def busy(self) -> bool:
        """Whether a save runs."""
        return self._native.busy()

    @property
    def last(self) -> SaveReport | None:
        """Of the last save that was committed; None before the first."""
        report = self._native.last()
        return None if report is None else SaveReport(*report)

    def close(self) -> None:
        """Waits, and gives up optimizers and directory. Raises as wait() does; it is closed all the same."""
        _open.discard(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizers, self._repeat = [], {}, None
        try:
            self._native.close()
        finally:
            self._held = []
            if self._ranks is not None:
                self._ranks.close()
                self._ranks = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpointer('{self.directory}', mode='{self._mode}')"

    def _skips(self) -> bool:
        """Whether save() is to be skipped, on every rank the same; CheckpointError if that is the caller's choice."""
        if self._when_busy == "wait":
            return False
        busy = self.busy
        if self._ranks is not None:
            busy = any(each == b"1" for each in self._ranks.gather(b"1" if busy else b"0"))
        if busy and self._when_busy == "error":
            raise CheckpointError("a save is still running; when_busy='wait' waits for it, 'skip' leaves this one out")
        return busy

    # --- deferred mode ---

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets deferred saves read the parameters and the state of `optimizer` where they are.

        Before each step() the optimizer waits until nothing of it is being read any more, and raises what a save has
        failed with.
        """
        if id(optimizer) in self._optimizers:
            return
        self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self._wait_released()))
        self._optimizers[id(optimizer)] = weakref.ref(optimizer)

    def adopt(self, model: torch.nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Moves parameters, buffers and optimizer state into pages of their own, and attaches the optimizer.

        torch aligns tensors to 64 bytes; direct I/O needs whole pages, so only adopted tensors are written without a
        copy. Tensors keep their identity, values and ties; tensors that share a storage still do. Optimizer state that
        does not exist yet is adopted after the first step, state that is loaded after load_state_dict. The memory
        lives as long as the tensors.
        """
        self.wait()  # a save may be reading the old memory
        if self._adopter is None:
            self._adopter = Adopter()
        if model is not None:
            self._adopter.move([*model.parameters(), *model.buffers()])
        if optimizer is not None:
            self.attach(optimizer)
            self._hooks.extend(self._adopter.follow(optimizer))

    def _waiting(self) -> list[Any]:
        """The tensors that attached optimizers leave alone while they are read; of DTensors the parts that are here."""
        optimizers = (reference() for reference in self._optimizers.values())
        tensors = [tensor for each in optimizers if each is not None for tensor in optimizer_tensors(each)]
        distributed: Any = dtensor_type()
        if distributed is None:
            return tensors
        return [tensor._local_tensor if isinstance(tensor, distributed) else tensor for tensor in tensors]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The parameters of an optimizer and the tensors of its state."""
    tensors = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if is_torch(value)]
    return tensors


# --- parts -----------------------------------------------------------------------------------------------------------


Where = tuple[str, int, int]  # an ng.Tensor's device, address and bytes


class _Prepared(NamedTuple):
    """A state ready for the native writer."""

    document: str
    parts: _native.CheckpointParts
    watched: list[tuple[str, Any]]  # names and tensors that are read in the background
    part_of: dict[int, int]  # a stored tensor: its first part
    held: list[Any]  # what must live until the save has ended
    copies: tuple[Any, ...] = ()  # what must live until it has begun


def _prepare(
    agreed: Plan,
    rank: int,
    tensors: list[Stored],
    attached: frozenset[int],
    adopted: frozenset[int],
    lent: frozenset[Where],
) -> _Prepared:
    """attached, adopted: addresses of storages. lent: where tensors are."""
    parts: list[Any] = []
    watched: list[tuple[str, Any]] = []
    held: list[Any] = []
    copies: list[Any] = []  # dense ones, until the native writer has copied them
    # A stored tensor: its address, bytes per element, whether it is borrowed, whether it is written in place, its GPU.
    dense: dict[int, tuple[int, int, bool, bool, tuple[int, int]]] = {}
    part_of: dict[int, int] = {}
    for region in agreed.regions[rank]:
        if region.stored not in dense:
            stored = tensors[region.stored]
            array = _dense(stored.array)
            counted = bool(attached) and array is stored.array and _within(stored, attached)
            if counted:
                watched.extend((stored.name, source) for source in stored.sources)
            borrowed = counted or (bool(lent) and isinstance(array, _native.Tensor) and _where(array) in lent)
            (held if borrowed else copies).append(array)
            in_place = counted and _within(stored, adopted)
            dense[region.stored] = (_address(array), FILE_BYTES[stored.dtype], borrowed, in_place, _gpu(array))
            part_of[region.stored] = len(parts)
        address, itemsize, borrowed, in_place, gpu = dense[region.stored]
        name, dtype, shape = agreed.tensors[region.tensor]
        flat, bounds = _bounds(region, shape)
        start, size = region.start * itemsize, (region.stop - region.start) * itemsize
        parts.append((name, dtype, shape, flat, bounds, address + start, size, borrowed, in_place, *gpu))
    if rank == 0:  # tensors without elements belong to nobody's regions
        written = {region.tensor for regions in agreed.regions for region in regions}
        for index, (name, dtype, shape) in enumerate(agreed.tensors):
            if index not in written:
                parts.append((name, dtype, shape, False, [(0, length) for length in shape], 0, 0, False, False, -1, 0))
    return _Prepared(agreed.document, _native.CheckpointParts(parts), watched, part_of, held, tuple(copies))


def _within(stored: Stored, storages: frozenset[int]) -> bool:
    """Whether a tensor lies in some of these storages, and counts its changes."""
    return bool(stored.sources) and all(
        is_torch(source) and not source.is_inference() and source.untyped_storage().data_ptr() in storages
        for source in stored.sources
    )


def _where(tensor: _native.Tensor) -> Where:
    return tensor.device, tensor.data_ptr(), tensor.nbytes


def _check_lent(lent: Sequence[_native.Tensor], tensors: list[Stored]) -> None:
    stored = {_where(each.array) for each in tensors if isinstance(each.array, _native.Tensor)} if lent else set()
    for at, tensor in enumerate(lent):
        if not isinstance(tensor, _native.Tensor):
            raise TypeError(f"lent[{at}] is of type {type(tensor).__name__}, expected an ng.Tensor")
        if _where(tensor) not in stored:
            raise ValueError(f"lent[{at}] is no tensor of the state")


def _dense(array: Any) -> Any:
    """`array`, or a dense copy of it."""
    if is_torch(array) or isinstance(array, _native.Tensor):
        return array.contiguous()
    return array if array.flags.c_contiguous else array.copy(order="C")


def _address(array: Any) -> int:
    if is_torch(array) or isinstance(array, _native.Tensor):
        return int(array.data_ptr())
    return int(array.__array_interface__["data"][0])


def _gpu(array: Any) -> tuple[int, int]:
    """The index of the GPU that an array is on and the stream that its work goes to; (-1, 0) on the host."""
    if isinstance(array, _native.Tensor) and array.device != "cpu":
        gpu = int(array.device.removeprefix("cuda:"))
        return gpu, _native.current_stream(gpu).handle
    if is_torch(array) and array.is_cuda:
        import torch

        return array.device.index, torch.cuda.current_stream(array.device).cuda_stream
    return -1, 0


def _bounds(region: Region, shape: tuple[int, ...]) -> tuple[bool, list[tuple[int, int]]]:
    """Where a region is, as the native writer takes it: (flat, bounds)."""
    if region.box is not None:
        return False, list(region.box)
    if region.start == 0 and region.stop == math.prod(shape):
        return False, [(0, length) for length in shape]
    return True, [(region.start, region.stop)]


def _one_of(value: str, choices: tuple[str, ...], name: str) -> str:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected {', '.join(map(repr, choices))}")
    return value


def _ranks(process_group: Any, timeout: float) -> Any:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        if process_group is not None:
            raise ValueError("process_group is given, but torch.distributed is not initialised")
        return None
    from narrowgauge.checkpoint.ranks import Ranks

    ranks = Ranks(process_group, timeout)
    return ranks if ranks.size > 1 else None


# Saves that run when the interpreter ends are waited for: their callbacks need it.
_open: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for checkpointer in list(_open):
        if checkpointer._process == os.getpid():
            checkpointer.close()
