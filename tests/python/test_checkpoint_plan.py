"""Which rank writes what: every element once, evenly, the same on every rank; disagreement; DTensors of real ranks."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_memory import Files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from narrowgauge.checkpoint.decode import decode
from narrowgauge.checkpoint.plan import CUT_BYTES, UNCUT_BYTES, Plan, describe, plan
from narrowgauge.checkpoint.state import Encoded, PerRank, Stored, encode
from narrowgauge.checkpoint.tensors import FILE_BYTES

Box = tuple[tuple[int, int], ...]


def encoded(tensors: list[tuple[str, str, tuple[int, ...], Box | None]]) -> Encoded:
    """A rank's part of a state, as encode would have it; its arrays hold their places in the whole tensor."""
    stored = []
    for name, dtype, shape, box in tensors:
        width = FILE_BYTES[dtype]
        array = np.arange(math.prod(shape), dtype=f"u{width}").reshape(shape)
        if box is not None:
            array = array[tuple(slice(*bounds) for bounds in box)]
        stored.append(Stored(name, dtype, shape, box, array, ()))
    return Encoded(["list"], [], stored, len(stored))


def write(ranks: list[Encoded]) -> tuple[Plan, Files]:
    planned = plan([describe(each) for each in ranks])
    return planned, Files().write(planned, ranks)


def check_arrays(planned: Plan, files: Files) -> None:
    for name, dtype, shape in planned.tensors:
        values = np.arange(math.prod(shape), dtype=f"u{FILE_BYTES[dtype]}")
        assert files.tensors[name][2].tobytes() == values.tobytes(), name


def written(planned: Plan, rank: int) -> int:
    widths = [FILE_BYTES[tensor.dtype] for tensor in planned.tensors]
    return sum((region.stop - region.start) * widths[region.tensor] for region in planned.regions[rank])


LENGTHS = st.sampled_from([0, 1, 2, 3, 5, 7, 64])
SHAPES = st.lists(LENGTHS, max_size=4).map(tuple) | st.sampled_from(
    [(), (33000,), (300, 130), (1, 1, 40000), (5, 7, 900)]
)


def cuts(draw: st.DrawFn, length: int, parts: int) -> list[tuple[int, int]]:
    inner = sorted(draw(st.lists(st.integers(0, length), min_size=parts - 1, max_size=parts - 1)))
    edges = [0, *inner, length]
    return list(itertools.pairwise(edges))


@st.composite
def worlds(draw: st.DrawFn) -> list[Encoded]:
    """Ranks in a mesh [copies, rows, columns]; each tensor is whole everywhere or cut along two of its axes."""
    copies, rows, columns = draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)))
    held: list[list[Any]] = [[] for _ in range(copies * rows * columns)]
    for number in range(draw(st.integers(0, 6))):
        shape, dtype = draw(SHAPES), draw(st.sampled_from(["U8", "BF16", "F32", "C64"]))
        whole = [(0, length) for length in shape]
        first = second = None
        if shape and draw(st.booleans()):
            first = draw(st.integers(0, len(shape) - 1))
            second = draw(st.sampled_from([axis for axis in range(len(shape)) if axis != first] or [None]))
        first_cuts = cuts(draw, shape[first], rows) if first is not None else []
        second_cuts = cuts(draw, shape[second], columns) if second is not None else []
        for rank in range(len(held)):
            box = list(whole)
            if first is not None:
                box[first] = first_cuts[rank // columns % rows]
            if second is not None:
                box[second] = second_cuts[rank % columns]
            held[rank].append((f"t{number}", dtype, shape, None if box == whole else tuple(box)))
    return [encoded(each) for each in held]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds())
def test_every_element_is_written_once(ranks: list[Encoded]) -> None:
    planned, files = write(ranks)  # Files checks the once
    check_arrays(planned, files)
    assert plan([describe(each) for each in ranks]) == planned


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_replicas_share_the_bytes(world: int) -> None:
    shapes = [(100, 1000), (7,), (3000, 129), (64, 64), (), (0, 5), (99999,), (20000,), (1, 50000, 2)]
    tensors = [(f"t{i}", ("F32", "BF16", "U8")[i % 3], shape, None) for i, shape in enumerate(shapes)]
    planned, files = write([encoded(tensors)] * world)
    check_arrays(planned, files)
    total = sum(math.prod(shape) * FILE_BYTES[dtype] for _, dtype, shape, _ in tensors)
    assert all(abs(written(planned, rank) - total / world) <= CUT_BYTES for rank in range(world))
    pieces = [region for regions in planned.regions for region in regions]
    assert len(pieces) - len({region.tensor for region in pieces}) <= world - 1
    for region in pieces:
        _, dtype, shape = planned.tensors[region.tensor]
        assert region.box is None and region.start * FILE_BYTES[dtype] % CUT_BYTES == 0
        assert region.stop == math.prod(shape) or region.stop * FILE_BYTES[dtype] % CUT_BYTES == 0


def test_small_tensors_come_from_the_first_holder() -> None:
    tensors = [(f"t{i}", "U8", (UNCUT_BYTES,), None) for i in range(7)] + [("big", "U8", (UNCUT_BYTES + 4096,), None)]
    planned, _ = write([encoded(tensors)] * 3)
    assert [len(regions) for regions in planned.regions] == [7, 1, 1]
    assert abs(written(planned, 1) - written(planned, 2)) <= CUT_BYTES


def test_replicas_of_shards_are_cut_between_rows() -> None:
    boxes = [((0, 500), (0, 300)), ((500, 1001), (0, 300))]
    ranks = [encoded([("w", "F32", (1001, 300), boxes[rank % 2])]) for rank in range(6)]
    planned, files = write(ranks)
    check_arrays(planned, files)
    assert planned.regions[0][0].box == ((0, 167), (0, 300)) and planned.regions[5][0].box == ((834, 1001), (0, 300))
    wide = [encoded([("w", "F32", (1, 60000, 3), ((0, 1), (30000 * r, 30000 * r + 30000), (0, 3)))]) for r in (0, 1)]
    planned, files = write([wide[0], wide[1], wide[0]])
    check_arrays(planned, files)
    assert [regions[0].box[1] for regions in planned.regions] == [(0, 15000), (30000, 60000), (15000, 30000)]


def test_parts_that_do_not_cover_the_tensor_are_refused() -> None:
    for boxes in ([(0, 2), (2, 3)], [(0, 3), (2, 4)], [(1, 4)], [(0, 4), (0, 2)], [(0, 0), (0, 3)]):
        ranks = [encoded([("w", "F32", (4, 2), (box, (0, 2)))]) for box in boxes]
        with pytest.raises(ValueError, match=r"tensor 'w' \[4, 2\] is not covered once"):
            plan([describe(each) for each in ranks])
    holes = [((0, 2), (0, 2)), ((2, 4), (2, 4)), ((0, 2), (2, 4))]
    with pytest.raises(ValueError, match="3 parts"):
        plan([describe(encoded([("w", "F32", (4, 4), box)])) for box in holes])


def test_many_tensors_and_ranks_are_planned_quickly() -> None:
    world, count = 64, 1000
    shapes = [(4096 + 64 * (i % 3), 512) for i in range(count)]

    def description(rank: int) -> bytes:
        tensors = []
        for number, shape in enumerate(shapes):
            rows = shape[0] // 32
            begin = rows * (rank % 32)
            tensors.append((f"model.layers.{number}.weight", "BF16", shape, [[begin, begin + rows], [0, shape[1]]]))
        return json.dumps(['["list"]', "[]", json.dumps(tensors), []]).encode()

    descriptions = [description(rank) for rank in range(world)]
    start = time.thread_time()
    planned = plan(descriptions)
    spent = time.thread_time() - start
    assert all(abs(written(planned, rank) - written(planned, 0)) <= 140 * 1024 for rank in range(world))
    assert spent < 5  # about 0.5 s; a plan that is quadratic in anything takes minutes


# --- states -----------------------------------------------------------------------------------------------------


def test_what_a_rank_has_for_itself() -> None:
    states = [
        {
            "w": torch.ones(40000),
            "rng": PerRank({"torch": torch.full((3,), float(rank)), "seed": rank, "n": [0] * rank}),
        }
        for rank in range(3)
    ]
    ranks = [encode(state, rank=rank) for rank, state in enumerate(states)]
    planned, files = write(ranks)
    assert [tensor.name for tensor in planned.tensors] == ["w", *(f"rank{rank}.rng.torch" for rank in range(3))]
    for rank in range(3):
        own = decode(planned.document, files, rank=rank)["rng"].value
        assert own["seed"] == rank and own["torch"].tolist() == [rank] * 3 and own["n"] == [0] * rank


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"a": {"step": 1}}, {"a": {"step": 2}}, r"state\['a'\]\['step'\] is 1 on rank 0 and 2 on rank 1: .*PerRank"),
        ({"a": 1}, {"a": 1.0}, "is 1 on rank 0 and 1.0 on rank 1"),
        ({"a": 1}, {"a": True}, "is 1 on rank 0 and True"),
        ({"a": 1}, {"b": 1}, r"state has the key 'a' on rank 0 and the key 'b' on rank 1"),
        ([1, (2, "x")], [1, (2, "y")], r"state\[1\]\[1\] is 'x' on rank 0 and 'y'"),
        ([1], [1, 2], "state is a list of 1 on rank 0 and a list of 2"),
        ({"a": 1}, {"a": 1, "b": 2}, "a dict of 1 on rank 0 and a dict of 2"),
        ({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, r"state\['w'\] is a tensor of float32 \[2\] .* float32 \[3\]"),
        ({"w": torch.zeros(2)}, {"w": torch.zeros(2).half()}, r"float32 \[2\] .* and a tensor of float16 \[2\]"),
        ({"w": torch.zeros(2)}, {"w": None}, "and None on rank 1"),
        ({"r": PerRank(1)}, {"r": 1}, "is a PerRank"),
        ({"x": math.nan}, {"x": math.inf}, r"state\['x'\] is nan on rank 0 and inf"),
    ],
)
def test_ranks_that_disagree(one: Any, other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan([describe(encode(one)), describe(encode(other, rank=1))])


def test_sets_are_the_same_in_every_process() -> None:
    program = "from narrowgauge.checkpoint.state import encode; print(encode({'s': set('abcdefgh')}).tree)"
    trees = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(trees) == 1


# --- DTensors, of real processes --------------------------------------------------------------------------------

WORKER = Path(__file__).with_name("checkpoint_ranks.py")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_distributed_tensors(world: int, tmp_path: Path) -> None:
    """checkpoint_ranks.py has what each rank checks."""
    pytest.importorskip("torch.distributed.tensor")
    environment = {**os.environ, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "STORE": str(tmp_path / "store")}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for rank, process in enumerate(processes):
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, f"rank {rank}:\n{output}"
    finally:
        for process in processes:
            process.kill()
