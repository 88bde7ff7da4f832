"""What ranks do in test_collective.py over MPI: mpirun -n 4 python mpi_ranks.py."""

from __future__ import annotations

import narrowgauge as ng
import numpy as np
from mpi4py import MPI
from narrowgauge import _native
from narrowgauge._mpi_transport import MpiTransport

WIRE = "int8:g64:bf16"


def values(rank: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(rank).standard_normal(shape).astype(np.float32)


def collectives(node_size: int) -> None:
    comm = ng.Communicator.from_mpi(MPI.COMM_WORLD, node_size)
    rank, size = comm.rank, comm.size
    assert (rank, size, comm.node_size) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, node_size)
    inputs = [values(peer, size, 1001) for peer in range(size)]
    options = {"wire": WIRE, "inside": WIRE, "chunk_bytes": 1000, "exact_below": 0}
    part = comm.reduce_scatter(inputs[rank], op="mean", **options)
    np.testing.assert_allclose(part, np.mean(inputs, axis=0)[rank : rank + 1], atol=0.03)
    everything = comm.all_reduce(inputs[rank], **options)
    np.testing.assert_allclose(everything, np.sum(inputs, axis=0), atol=0.2)
    for copy in MPI.COMM_WORLD.allgather(everything):
        np.testing.assert_array_equal(copy, everything)
    np.testing.assert_allclose(comm.all_gather(inputs[rank], **options), np.concatenate(inputs), atol=0.03)
    assert comm.all_gather(np.empty(0, np.float32)).shape == (0,)
    pieces = [index + 1 for index in range(size)]
    received = np.empty(size * pieces[rank], np.float32)
    comm.all_to_all(np.full(sum(pieces), rank, np.float32), pieces, received, [pieces[rank]] * size)
    assert received.tolist() == [float(peer) for peer in range(size) for _ in range(pieces[rank])]
    try:
        comm.all_reduce(np.zeros(10 + rank, np.float32))
    except ng.TransportError as error:
        assert f"of {10 + rank} float32" in str(error), error
    else:
        raise AssertionError("a mismatch was not seen")
    if rank == 0:
        print(comm)


def late() -> None:
    """Ranks that come only when rank 0 has given them up: what it has given up still completes."""
    world = MPI.COMM_WORLD
    transport = MpiTransport(world, 0.2 if world.rank == 0 else 60)
    if world.rank == 0:
        comm = ng.Communicator(_native.communicator(transport, 0, None))
        try:
            comm.all_reduce(values(0, 100), WIRE, exact_below=0)
        except TimeoutError as error:
            assert "all_reduce" in str(error) and "rank 0: " in str(error), error
        else:
            raise AssertionError("rank 0 did not give up")
        for peer in range(1, world.size):
            world.send(None, dest=peer)
    else:
        world.recv(source=0)
        # Rank 0 is where ranks compare their descriptions, of 256 bytes.
        everyone = bytearray(256 * world.size)
        transport.all_gather(memoryview(bytearray(256)), memoryview(everyone), "late").wait()
        assert any(everyone[:256])
    world.Barrier()


if __name__ == "__main__":
    collectives(0)
    collectives(2)
    late()
