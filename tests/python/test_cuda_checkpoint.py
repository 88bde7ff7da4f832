"""Checkpoints of what lies on a GPU, on the simulated one: contents, order, restoring in place, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import narrowgauge as ng
import numpy as np
import pytest

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]


def put(array: np.ndarray) -> ng.Tensor:
    return ng.Tensor.from_dlpack(array).to("cuda")


def get(tensor: ng.Tensor) -> np.ndarray:
    return np.from_dlpack(tensor.to("cpu"))


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "large": rng.standard_normal((3000, 1000)).astype(np.float32),  # more than all staging buffers
        "odd": rng.integers(0, 255, 1237).astype(np.uint8),
        "empty": np.empty((0, 3), np.float16),
        "scalar": np.array(seed, np.int64),
    }


def test_a_state_on_the_gpu(tmp_path: Path) -> None:
    first, second = arrays(1), arrays(2)
    state = {"gpu": {name: put(array) for name, array in first.items()}, "host": first["odd"], "step": 1}
    state["gpu"]["bf16"] = put(np.arange(100, dtype=np.uint16)).view("bfloat16")
    state["twice"] = state["gpu"]["odd"]
    with ng.Checkpointer(tmp_path) as ck:
        with ng.cuda.Stream():
            ck.save(1, state)
            for name, array in second.items():  # in the stream's order: after the copy
                state["gpu"][name].copy_from(ng.Tensor.from_dlpack(array))
        ck.wait()
    loaded = ng.load_checkpoint(tmp_path)
    for name, array in first.items():
        assert loaded["gpu"][name].device == "cpu"
        assert np.array_equal(np.from_dlpack(loaded["gpu"][name]), array), name
    assert loaded["gpu"]["bf16"].dtype == "bfloat16" and loaded["twice"] is loaded["gpu"]["odd"]
    assert loaded["step"] == 1 and np.array_equal(loaded["host"], first["odd"])

    ng.load_checkpoint(tmp_path, into=state)
    for name, array in first.items():
        assert state["gpu"][name].device == "cuda:0"
        assert np.array_equal(get(state["gpu"][name]), array), name


LENT = """
import resource, sys
import narrowgauge as ng, numpy as np

first, second = (np.full(24 << 20, value, np.float32) for value in (1, 2))
pinned = ng.PinnedPool().empty(first.size, "f32")
np.from_dlpack(pinned)[:] = second
tensor, small = ng.Tensor.from_dlpack(first).to("cuda"), ng.Tensor.from_dlpack(first[:9]).to("cuda")
kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ng.Checkpointer(sys.argv[1]) as ck, ng.cuda.Stream():
    small.copy_from(ng.Tensor.from_dlpack(second[:9]))
    tensor.copy_from(pinned, non_blocking=True)  # runs when somebody waits for it
    ck.save(1, {"tensor": tensor, "small": small}, lent=[tensor])
    ck.wait()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kibibytes) >> 10)
loaded = ng.load_checkpoint(sys.argv[1])
assert np.array_equal(np.from_dlpack(loaded["tensor"]), second), "not what the stream had been given"
assert np.array_equal(np.from_dlpack(loaded["small"]), second[:9])
"""


def test_lent_tensors_are_read_where_they_are(tmp_path: Path) -> None:
    """After the work of their stream, and by way of staging buffers: without lent=, 96 MiB more."""
    environment = {**os.environ, "SIMGPU_DELAY": "adversarial"}
    command = [sys.executable, "-c", LENT, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64


def test_what_cannot_be_lent(tmp_path: Path) -> None:
    tensor = put(np.ones(3, np.float32))
    with ng.Checkpointer(tmp_path) as ck:
        with pytest.raises(ValueError, match=r"lent\[1\] is no tensor of the state"):
            ck.save(1, {"tensor": tensor}, lent=[tensor, put(np.ones(3, np.float32))])
        with pytest.raises(TypeError, match=r"lent\[0\] is of type ndarray, expected an ng.Tensor"):
            ck.save(1, {"tensor": tensor}, lent=[np.ones(3)])
    assert not list(tmp_path.glob("step-*"))


@pytest.mark.usefixtures("kernels")
def test_matrices_on_the_gpu(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    q = ng.quantize(put(w), ng.int8)
    with ng.Checkpointer(tmp_path) as ck:
        ck.save(1, {"q": q})
    loaded = ng.load_checkpoint(tmp_path)["q"]
    assert loaded.device == "cpu" and np.array_equal(loaded.dequantize(), ng.quantize(w, ng.int8).dequantize())
    other = ng.quantize(put(np.zeros_like(w)), ng.int8)
    ng.load_checkpoint(tmp_path, into={"q": other})
    assert other.device == "cuda:0" and np.array_equal(get(other.codes), get(q.codes))


def test_restoring_what_does_not_fit(tmp_path: Path) -> None:
    with ng.Checkpointer(tmp_path) as ck:
        ck.save(1, {"a": put(np.zeros((3, 4), np.float32))})
    for other in (np.zeros((3, 5), np.float32), np.zeros((3, 4), np.int32)):
        with pytest.raises(ValueError, match=r"a Tensor of float32 \[3, 4\]"):
            ng.load_checkpoint(tmp_path, into={"a": put(other)})
    with pytest.raises(ValueError, match=r"a Tensor of float32 \[3, 4\]"):
        ng.load_checkpoint(tmp_path, into={"a": np.zeros((3, 4), np.float32)})


def test_tools_read_it(tmp_path: Path) -> None:
    with ng.Checkpointer(tmp_path) as ck:
        ck.save(7, {"weight": put(np.ones(5, np.float32))})
    ng.verify_checkpoint(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "narrowgauge", "checkpoint", "show", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0 and "weight" in done.stdout, done.stderr


def test_host_tensors_are_saved_too(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    state = {"dense": ng.Tensor.from_dlpack(array), "strided": ng.Tensor.from_dlpack(array[:, ::2])}
    state["bf16"] = ng.Tensor.from_dlpack(np.ones(3, ml_dtypes.bfloat16).view(np.uint16)).view("bfloat16")
    with ng.Checkpointer(tmp_path) as ck:
        ck.save(1, state)
    loaded = ng.load_checkpoint(tmp_path)
    assert np.array_equal(np.from_dlpack(loaded["dense"]), array)
    assert np.array_equal(np.from_dlpack(loaded["strided"]), array[:, ::2])
    assert loaded["bf16"].dtype == "bfloat16"
