"""Collectives with narrow numbers on the wire, over torch.distributed or MPI, or between threads of one process.

>>> comm = ng.Communicator.from_torch()
>>> comm.all_reduce(gradient, "int8:g64:bf16", op="mean", out=gradient)

Values are quantised as they leave a rank and added up in fp32 in the order of the ranks, so that every rank that gets a
result gets the same bits, every time. A NaN or an infinity arrives as NaN.
"""

from __future__ import annotations

import math
from typing import Any, Generic, TypeVar

from narrowgauge import _arrays, _native
from narrowgauge._arrays import Array
from narrowgauge._native import CHUNKS, EXACT_BELOW, CollectivePlan, Format, Wire
from narrowgauge.memory import HostPool
from narrowgauge.qtensor import QTensor

WireLike = Wire | Format | str | None
Result = TypeVar("Result")


def as_wire(wire: WireLike) -> Wire:
    """A Wire as it is; a Format, or its name, as a Wire of it; None: elements travel as they are."""
    return wire if isinstance(wire, Wire) else Wire(wire)


def plan(
    collective: str,
    numel: int,
    dtype: str,
    wire: WireLike,
    *,
    size: int,
    node_size: int = 0,
    inside: WireLike = None,
    chunks: int = CHUNKS,
    chunk_bytes: int | None = None,
    exact_below: int = EXACT_BELOW,
) -> CollectivePlan:
    """How "all_gather", "reduce_scatter" or "all_reduce" is done with a tensor by `size` ranks: a function of its
    arguments alone, so all ranks decide alike.

    numel: of the whole tensor: what all_gather gives, what the others take. dtype: "float32", "float16" or "bfloat16".
    Elements travel as they are, and results are exact, if the wires say so, or the tensor has fewer than `exact_below`
    bytes, or there is one rank (unless exact_below is 0); else they travel in the Formats of the wires.

    The plan has `wire`, `inside`, the `reason`, `chunks`, and `sent_bytes` by rank 0, of which `sent_across` to other
    nodes; str() makes a line of it.
    """
    options = _options(wire, inside, chunks, chunk_bytes, 0, exact_below)
    return _native.plan_collective(collective, numel, dtype, size, node_size, options)


class SecondaryShard:
    """This rank's part of a tensor that was gathered, kept as it travelled, so that the ranks of a node can have all of
    it again without the other nodes (hpZ of ZeRO++).

    >>> secondary = ng.SecondaryShard(pool)
    >>> weights = comm.all_gather(shard, "int8:g64:bf16", secondary=secondary)  # from all nodes
    >>> weights = comm.all_gather(shard, "int8:g64:bf16", secondary=secondary)  # from this one
    >>> optimizer.step(); secondary.invalidate()

    It takes numel / node_size elements in the wire's Format, from `pool`: a HostPool, perhaps with a limit, or None for
    one of its own. Used by one thread at a time.
    """

    def __init__(self, pool: HostPool | None = None) -> None:
        self._native = _native.SecondaryShard(None if pool is None else pool._pool)

    @property
    def is_filled(self) -> bool:
        return self._native.is_filled

    @property
    def nbytes(self) -> int:
        """Bytes held, filled or not."""
        return self._native.nbytes

    def invalidate(self) -> None:
        """The tensor has changed: the next all_gather fills it again, in the same memory. All ranks call it."""
        self._native.invalidate()


class Pending(Generic[Result]):
    """A collective that was started: wait() returns its result. Ranks wait in the order in which they started.

    It keeps its tensors alive; they must not be written before wait() has returned. On a GPU wait() gives the rest of
    the work to the stream that the collective was started in, and waits for nothing.
    """

    def __init__(self, pending: _native.Pending, result: Result, tensors: tuple[Any, ...]) -> None:
        self._pending, self._result, self._tensors = pending, result, tensors

    def wait(self) -> Result:
        """TransportError if ranks do not agree or one has gone; TimeoutError if one does not come in time."""
        self._pending.wait()
        self._tensors = ()
        return self._result


class Communicator:
    """The ranks that take part in collectives, and their nodes.

    Made by from_torch, from_mpi, from_nccl or in_process. Tensors are dense float32, float16 or bfloat16 torch tensors
    or numpy arrays on the host, of any shape; with from_nccl Tensors or torch tensors on its GPU. `wire` says how
    elements travel: a Wire, a Format or its name, None for as they are. With nodes, `wire` is between them and `inside`
    within one. All ranks call the same collectives in the same order. A Communicator is used by one thread at a time.

    Every collective takes `async_op`: False waits and returns the result, True returns a Pending; and `chunks` and
    `chunk_bytes`: at most so many, of at least so many bytes of all ranks' elements (None: 4 MiB, 2 of reduce_scatter),
    are on the wire while others are coded. Tensors of fewer than `exact_below` bytes (1 MiB) travel as they are, since
    that is faster, and their results are exact; `exact_below=0` keeps to the wires. plan() says what is done.
    """

    def __init__(self, native: _native.Communicator) -> None:
        self._native = native

    @classmethod
    def from_torch(cls, group: Any = None, node_size: int = 0, *, pool: HostPool | None = None) -> Communicator:
        """The ranks of a torch.distributed process group (None: the default one), whose backend carries the bytes.

        node_size: ranks [0, node_size) of it are the first node, and so on; 0: no nodes. ValueError if it does not
        divide their number; ImportError without torch. A collective call. The group's timeout is that of collectives.
        pool: memory for what is on the wire, None: a HostPool of its own, which keeps what it has had.
        """
        from narrowgauge._torch_transport import TorchTransport

        _arrays.library("torch")
        return cls(_native.communicator(TorchTransport(group), node_size, None if pool is None else pool._pool))

    @classmethod
    def from_nccl(
        cls,
        comm: bytes | int,
        rank: int | None = None,
        size: int | None = None,
        *,
        device: int = 0,
        node_size: int = 0,
        timeout: float = 300,
    ) -> Communicator:
        """Ranks on NVIDIA GPUs, cuda:`device` here, over NCCL: the copy that torch has loaded, or libnccl.so.2.

        comm: what nccl_unique_id() gave one of the ranks, the same on all, with `rank` and `size`; all must call this.
        Or the address of an ncclComm_t of yours, which must outlive this and is used by nothing else meanwhile; NCCL
        then works in the device's current stream, otherwise in one of its own.

        A collective is given to the stream that is current for its first tensor, and so is what wait() does: the GPU is
        waited for by the first call of a kind only. The results are the host's, bit for bit. A rank that is not there
        within `timeout` seconds, or is lost, is noticed in the background: every later call raises what happened, and
        so does the next synchronize() of a Stream of the device or copy to the host. TransportError without NCCL.
        """
        if isinstance(comm, int):
            if rank is not None or size is not None:
                raise ValueError(f"rank is {rank}, size is {size}; expected None, an ncclComm_t knows both")
            transport = _native.adopted_nccl_transport(comm, _native.current_stream(device), timeout)
        else:
            if rank is None or size is None:
                raise ValueError(f"rank is {rank}, size is {size}; expected both beside a unique id")
            transport = _native.nccl_transport(comm, rank, size, device, timeout)
        return cls(_native.communicator(transport, node_size, None))

    @classmethod
    def from_mpi(cls, comm: Any, node_size: int = 0, *, timeout: float = 300) -> Communicator:
        """The ranks of an mpi4py communicator, by nonblocking collectives of bytes on a duplicate of it.

        node_size: as in from_torch. timeout: seconds that a wait takes at most; MPI does not say which rank is late,
        and what has timed out leaves the memory of its bytes to MPI. The duplicate lives until MPI ends. MPI calls are
        made by the thread that uses the Communicator. A collective call. ImportError without mpi4py.
        """
        from narrowgauge._mpi_transport import MpiTransport

        return cls(_native.communicator(MpiTransport(comm, timeout), node_size, None))

    @classmethod
    def in_process(cls, size: int, *, timeout: float = 300) -> list[Communicator]:
        """Ranks of this process without nodes, for tests and teaching: each is for a thread of its own."""
        return [
            cls(_native.communicator(transport, 0, None)) for transport in _native.in_process_transports(size, timeout)
        ]

    @property
    def rank(self) -> int:
        return self._native.rank

    @property
    def size(self) -> int:
        return self._native.size

    @property
    def node_size(self) -> int:
        """Ranks of a node; 0 if there is but one level."""
        return self._native.node_size

    def __repr__(self) -> str:
        nodes = f", nodes of {self.node_size}" if self.node_size else ""
        return f"Communicator(rank {self.rank} of {self.size}{nodes}, {self._native.transport})"

    def plan(
        self,
        collective: str,
        tensor: Array,
        wire: WireLike,
        *,
        inside: WireLike = None,
        chunks: int = CHUNKS,
        chunk_bytes: int | None = None,
        exact_below: int = EXACT_BELOW,
    ) -> CollectivePlan:
        """How the collective of that name is done with its first argument: see narrowgauge.collective.plan. Local."""
        numel = _numel(tensor) * (self.size if collective == "all_gather" else 1)
        options = _options(wire, inside, chunks, chunk_bytes, 0, exact_below)
        return _native.plan_collective(collective, numel, _name(tensor), self.size, self.node_size, options)

    def all_gather(
        self,
        shard: Array,
        wire: WireLike = None,
        *,
        out: Array | None = None,
        inside: WireLike = None,
        secondary: SecondaryShard | None = None,
        seed: int = 0,
        async_op: bool = False,
        chunks: int = CHUNKS,
        chunk_bytes: int | None = None,
        exact_below: int = EXACT_BELOW,
    ) -> Any:
        """The shards of all ranks, one behind the other along the first axis, in `out` or a new array of its dtype.

        What comes from another node has travelled by `wire` too when it goes on, so `inside` is not used.

        secondary: with nodes, what keeps this tensor: if it is filled, what it holds is gathered within the node and
        the shard's values are not read; else all is gathered and it is filled. On all ranks alike. ValueError without
        nodes, or if it holds another kind of tensor; MemoryError beyond its pool's limit.
        """
        arrays = _arrays.library_of(shard, "shard")
        if out is None:
            first, rest = (shard.shape[0], shard.shape[1:]) if shard.shape else (1, ())
            out = arrays.empty((self.size * first, *rest), _name(shard))
        pending = self._native.all_gather(
            _borrowed(shard),
            _borrowed(out),
            _options(wire, inside, chunks, chunk_bytes, seed, exact_below),
            None if secondary is None else secondary._native,
        )
        return _result(pending, out, (shard, out, secondary), async_op)

    def all_gather_qtensor(
        self,
        shard: Array,
        wire: WireLike,
        *,
        seed: int = 0,
        async_op: bool = False,
        chunks: int = CHUNKS,
        chunk_bytes: int | None = None,
    ) -> Any:
        """The rows of all ranks' shards [rows, cols] as they travelled: a canonical QTensor [size * rows, cols].

        linear multiplies with it, so that weights which are gathered narrow are never made wide. The same codes as
        quantize() gives for all rows. ValueError unless rows are whole groups, for an exact wire and for hadamard.
        """
        wire = as_wire(wire)
        if wire.format is None:
            raise ValueError("the wire is exact, expected a Format, which a QTensor has")
        if len(shard.shape) != 2:
            raise ValueError(f"shard has shape {list(shard.shape)}, expected [rows, cols]")
        rows, cols = self.size * shard.shape[0], shard.shape[1]
        q = QTensor(wire.format, (rows, cols), _arrays.library_of(shard, "shard"))
        canonical = q._canonical = q._new_canonical()
        codes, scales, zeros, _ = q._borrow(canonical)
        pending = self._native.all_gather_codes(
            _borrowed(shard), codes, scales, zeros, rows, cols, _options(wire, None, chunks, chunk_bytes, seed, 0)
        )
        return _result(pending, q, (shard, canonical), async_op)

    def reduce_scatter(
        self,
        input: Array,
        wire: WireLike = None,
        *,
        op: str = "sum",
        out: Array | None = None,
        inside: WireLike = None,
        error: Array | None = None,
        seed: int = 0,
        async_op: bool = False,
        chunks: int = CHUNKS,
        chunk_bytes: int | None = None,
        exact_below: int = EXACT_BELOW,
    ) -> Any:
        """This rank's part of the sum or "mean" of all inputs: of `size` equal parts along the first axis, its own.

        error: float32 with as many elements as the input, zeros at first: what rounding leaves of this input is kept
        there and added to the next (error feedback), so that over steps nothing is lost.

        ValueError if the first axis has no `size` parts and no `out` is given.
        """
        arrays = _arrays.library_of(input, "input")
        if out is None:
            if not input.shape or input.shape[0] % self.size:
                raise ValueError(f"input has shape {list(input.shape)}, expected a first axis that {self.size} divides")
            out = arrays.empty((input.shape[0] // self.size, *input.shape[1:]), _name(input))
        pending = self._native.reduce_scatter(
            _borrowed(input), _borrowed(out), op, _options(wire, inside, chunks, chunk_bytes, seed, exact_below), error
        )
        return _result(pending, out, (input, out, error), async_op)

    def all_reduce(
        self,
        input: Array,
        wire: WireLike = None,
        *,
        op: str = "sum",
        out: Array | None = None,
        inside: WireLike = None,
        error: Array | None = None,
        seed: int = 0,
        async_op: bool = False,
        chunks: int = CHUNKS,
        chunk_bytes: int | None = None,
        exact_below: int = EXACT_BELOW,
    ) -> Any:
        """The sum or "mean" of all inputs, the same bits on all ranks. `out` may be `input`. All is rounded twice.

        error: as in reduce_scatter; it is of the first rounding.
        """
        arrays = _arrays.library_of(input, "input")
        if out is None:
            out = arrays.empty(tuple(input.shape), _name(input))
        pending = self._native.all_reduce(
            _borrowed(input), _borrowed(out), op, _options(wire, inside, chunks, chunk_bytes, seed, exact_below), error
        )
        return _result(pending, out, (input, out, error), async_op)

    def all_to_all(
        self,
        input: Array,
        input_numels: list[int],
        out: Array,
        out_numels: list[int],
        wire: WireLike = None,
        *,
        seed: int = 0,
        async_op: bool = False,
        chunks: int = CHUNKS,
    ) -> Any:
        """Sends input_numels[i] elements, in their order, to each rank i; out_numels[i] come from it, into `out`.

        There are always `chunks`, since ranks have different numbers of elements.
        """
        pending = self._native.all_to_all(
            _borrowed(input),
            input_numels,
            _borrowed(out),
            out_numels,
            _options(wire, None, chunks, None, seed, 0),
        )
        return _result(pending, out, (input, out), async_op)


def nccl_unique_id() -> bytes:
    """What the ranks of a Communicator.from_nccl must share; good for one. TransportError without NCCL."""
    return _native.nccl_unique_id()


def _options(
    wire: WireLike, inside: WireLike, chunks: int, chunk_bytes: int | None, seed: int, exact_below: int
) -> _native.CollectiveOptions:
    return _native.CollectiveOptions(as_wire(wire), as_wire(inside), chunks, chunk_bytes, seed, exact_below)


def _borrowed(array: Array) -> Array:
    return array.detach() if _arrays.is_torch(array) else array


def _numel(array: Array) -> int:
    return math.prod(array.shape)


def _name(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.")


def _result(pending: _native.Pending, out: Any, tensors: tuple[Any, ...], async_op: bool) -> Any:
    handle = Pending(pending, out, tensors)
    return handle if async_op else handle.wait()
