"""Ranks that save together over gloo: every layout into every other, and a rank that is killed. checkpoint_job.py has
what each rank does and checks."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import narrowgauge as ng
import pytest
import torch

JOB = Path(__file__).with_name("checkpoint_job.py")


def start(job: str, world: int, store: Path, directory: Path) -> list[subprocess.Popen[str]]:
    environment = os.environ | {"WORLD_SIZE": str(world), "STORE": str(store), "JOB": job, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, JOB, directory],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def finish(ranks: list[subprocess.Popen[str]]) -> list[str]:
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, errors
    return [output for output, _ in outputs]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_save_and_load_together(world: int, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    finish(start("save_and_load", world, tmp_path / "store", directory))
    # This process is another number of ranks: one.
    replicated, sharded = (ng.load_checkpoint(directory, step) for step in (1, 2))
    assert isinstance(sharded["model"]["0.weight"], torch.Tensor)
    assert sharded["model"]["0.weight"].shape == (1000, 96)
    assert list(replicated["optimizer"]["state"]) == list(sharded["optimizer"]["state"])
    for step in (1, 2, 3, 4):
        folder = ng.verify_checkpoint(directory, step)
        assert len(list(folder.glob("*.safetensors"))) == world
    if world == 3:
        finish(start("load", 2, tmp_path / "store2", directory))
        finish(start("load", 1, tmp_path / "store1", directory))


def test_a_killed_rank_is_an_error_on_the_others(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    ranks = start("die", 3, tmp_path / "store", directory)
    victim = random.Random(os.getpid()).randrange(3)
    assert ranks[0].stdout is not None
    for _ in range(3):
        ranks[0].stdout.readline()
    time.sleep(random.random() * 0.1)
    ranks[victim].send_signal(signal.SIGKILL)
    committed = -1
    for number, rank in enumerate(ranks):
        output, errors = rank.communicate(timeout=120)
        steps = [int(line) for line in output.split("\n") if line.isdigit()]
        committed = max([committed, *steps])
        if number != victim:
            assert rank.returncode == 0, errors
            assert "error:" in output, output
    newest = ng.checkpoint.steps(directory)[-1]
    assert newest >= max(committed, 2)
    state = ng.load_checkpoint(directory)
    assert state["step"] == newest
    assert all((tensor == newest).all() for tensor in state["model"].values())
    ng.Checkpointer(directory).close()
    assert not [path for path in directory.iterdir() if ".tmp-" in path.name]
