"""Checkpointer and load_checkpoint as a training loop uses them: modes, back-pressure, errors, retention, layouts."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import narrowgauge as ng
import numpy as np
import pytest
import torch
from narrowgauge import _native
from safetensors import safe_open


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


class Training:
    """A small model with everything that a state may hold: BatchNorm buffers, tied weights, optimizer state."""

    def __init__(self, width: int = 256) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, width, bias=False)
        )
        self.model.register_parameter("tied", self.model[2].weight)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.width = width
        self.step_count = 0

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(8, self.width)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.step_count += 1
        return float(loss)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step_count,
        }


def copy_of(state: Any) -> Any:
    import copy

    return copy.deepcopy(state)


class Gate:
    """A progress callback that holds the background thread until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, done: int, total: int) -> None:
        self.reached.set()
        assert self.open.wait(60)


# --- saving ----------------------------------------------------------------------------------------------------------


def test_a_state_comes_back(tmp_path: Path) -> None:
    training = Training()
    training.step()
    state = training.state()
    with ng.Checkpointer(tmp_path / "run") as ck:
        assert ck.last is None
        assert ck.save(7, state) is True
        ck.wait()
        assert ck.last.step == 7 and ck.last.path == tmp_path / "run" / "step-00000007"
    loaded = ng.load_checkpoint(tmp_path / "run")
    assert equal(loaded, state)
    assert loaded["model"]["tied"].data_ptr() == loaded["model"]["2.weight"].data_ptr()
    assert ng.checkpoint.steps(tmp_path / "run") == [7]
    assert ng.verify_checkpoint(tmp_path / "run") == tmp_path / "run" / "step-00000007"


def test_the_shard_opens_with_safetensors(tmp_path: Path) -> None:
    state = {"a": torch.arange(10.0), "b": {"c": torch.ones(3, dtype=torch.bfloat16)}}
    with ng.Checkpointer(tmp_path) as ck:
        ck.save(1, state)
    with safe_open(tmp_path / "step-00000001" / "model-00000-of-00001.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["a", "b.c"]
        assert torch.equal(file.get_tensor("a"), state["a"])
        assert torch.equal(file.get_tensor("b.c"), state["b"]["c"])


@pytest.mark.parametrize("mode", ["snapshot", "deferred"])
@pytest.mark.parametrize("adopted", [False, True])
def test_training_that_resumes_is_the_same(tmp_path: Path, mode: str, adopted: bool) -> None:
    training = Training()
    with ng.Checkpointer(tmp_path, mode=mode) as ck:
        ck.attach(training.optimizer)
        if adopted:
            ck.adopt(training.model, training.optimizer)
        for _ in range(3):
            training.step()
            ck.save(training.step_count, training.state())
        expected = [training.step() for _ in range(2)]
    assert ng.checkpoint.steps(tmp_path) == [1, 2, 3]

    resumed = Training()
    resumed.step()
    into = resumed.state()
    pointers = {name: tensor.data_ptr() for name, tensor in into["model"].items()}
    loaded = ng.load_checkpoint(tmp_path, into=into)
    assert loaded is into
    assert {name: tensor.data_ptr() for name, tensor in into["model"].items()} == pointers
    resumed.optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["rng"])
    resumed.step_count = loaded["step"]
    assert [resumed.step() for _ in range(2)] == expected


def test_a_snapshot_is_of_the_moment_of_save(tmp_path: Path) -> None:
    gate = Gate()
    tensor = torch.arange(1 << 20, dtype=torch.float32)
    array = np.arange(1000)
    state = {"tensor": tensor, "array": array, "strided": tensor.reshape(1024, 1024).t()}
    expected = copy_of(state)
    with ng.Checkpointer(tmp_path, progress=gate) as ck:
        ck.save(1, state)
        tensor.zero_()
        array[:] = -1
        gate.open.set()
    assert equal(ng.load_checkpoint(tmp_path), expected)


def test_states_that_look_like_the_one_before(tmp_path: Path) -> None:
    """What is remembered of a state must never stand in for another one's."""
    a, b, c = torch.arange(6.0), torch.ones(2, 3, dtype=torch.int32), torch.zeros(40)
    module = torch.nn.BatchNorm1d(3)
    states: list[Any] = [
        {"a": a, "b": b, "n": 1, "x": 0.0, "s": "text", "l": [1, None], "m": module.state_dict()},
        {"a": a, "b": b, "n": 2, "x": -0.0, "s": "\x010", "l": [1, None], "m": module.state_dict()},
        {"a": a, "b": b, "n": True, "x": float("inf"), "s": "\u00e9", "l": [1, "y"], "m": module.state_dict()},
        {"a": a.clone(), "b": b, "n": 2**60, "x": 1e-300, "s": "", "l": [1, None], "m": module.state_dict()},
        {"a": a.clone(), "b": b.clone(), "n": 1, "x": 0.0, "s": "a", "l": [1, None], "m": module.state_dict()},
        {"a": a.reshape(2, 3), "b": b, "n": 1, "x": 0.0, "s": "a", "l": [1, None], "m": module.state_dict()},
        {"b": b, "a": a, "n": 1, "x": 0.0, "s": "a", "l": (1, None), "m": module.state_dict()},
        {"b": b, "a": torch.nn.Parameter(a), "n": 1, "x": 0.0, "s": "a", "l": (1, None), "m": module.state_dict()},
        {"u": c[:10], "v": c[20:30]},
        {"u": c[:10], "v": c[20:30].clone()},
        {"u": c[:10], "v": c[5:15]},  # moved into the memory of the other
        {"u": c[:10], "v": c[5:15].double().float()},
        {"u": c[:10], "v": c[:10]},
        {"u": c[:20:2], "v": c[20:30]},
        {"e": torch.empty(0, 3), "z": torch.tensor(7.5)},
        {"e": torch.empty(0, 3), "z": torch.tensor(8.5)},
        {"e": torch.empty(0, 3), "z": torch.tensor(8.5), 1: 2},
        {"e": torch.empty(0, 3), "z": torch.tensor(8.5), True: 2},
        [torch.tensor(1 + 2j).conj(), np.arange(3)],
        [torch.tensor(1 + 3j).conj(), np.arange(3)],
        [],
        [],
    ]
    with ng.Checkpointer(tmp_path) as ck:
        for step, state in enumerate(states):
            for tensor in (a, c):
                tensor.add_(1)
            ck.save(2 * step, state)
            ck.save(2 * step + 1, state)
            ck.wait()
            for saved in (2 * step, 2 * step + 1):
                loaded = ng.load_checkpoint(tmp_path, saved)
                assert equal(loaded, state), (step, loaded, state)
                assert repr(loaded) == repr(state), step  # 0.0 and -0.0, True and 1
            if isinstance(state, dict) and "u" in state:
                state["u"].add_(1)
                loaded["u"].add_(1)
                assert equal(loaded, state), step  # what shared memory still does


def test_nothing_of_a_state_is_kept(tmp_path: Path) -> None:
    import gc
    import weakref

    tensor = torch.ones(1000)
    alive = weakref.ref(tensor)
    with ng.Checkpointer(tmp_path) as ck:
        for step in (1, 2):
            ck.save(step, {"a": tensor})
        ck.wait()
        del tensor
        gc.collect()
        assert alive() is None


# --- deferred --------------------------------------------------------------------------------------------------------


def test_adopted_tensors_are_written_without_a_copy(tmp_path: Path) -> None:
    training = Training(1024)
    with ng.Checkpointer(tmp_path) as ck:
        ck.adopt(training.model, training.optimizer)
        training.step()  # makes the optimizer's state, which is adopted after it
        before = copy_of(training.state())
        ck.save(1, training.state(), mode="deferred")
        ck.wait()
        matrices = 3 * 2 * 1024 * 1024 * 4  # weights and two moments of two layers
        assert ck.last.borrowed_bytes >= matrices
        ck.save(2, training.state(), mode="snapshot")
        ck.wait()
        assert ck.last.borrowed_bytes == 0
    assert equal(ng.load_checkpoint(tmp_path, 1), before)
    assert equal(ng.load_checkpoint(tmp_path, 2), before)


def test_adoption_keeps_values_identity_and_ties(tmp_path: Path) -> None:
    training = Training()
    training.step()
    parameters = list(training.model.parameters())
    before = copy_of(training.state())
    with ng.Checkpointer(tmp_path) as ck:
        ck.adopt(training.model, training.optimizer)
        assert all(a is b for a, b in zip(parameters, training.model.parameters(), strict=True))
        assert equal(training.state(), before)
        weight = training.model[2].weight
        assert training.model.tied is weight and weight.data_ptr() % 4096 == 0
        exp_avg = training.optimizer.state[weight]["exp_avg"]
        assert exp_avg.data_ptr() % 4096 == 0
        training.optimizer.load_state_dict(copy_of(training.optimizer.state_dict()))
        assert training.optimizer.state[weight]["exp_avg"].data_ptr() % 4096 == 0
    training.step()  # the memory outlives the Checkpointer
    assert all(torch.isfinite(parameter).all() for parameter in parameters)


def test_deferred_mode_needs_an_optimizer(tmp_path: Path) -> None:
    with ng.Checkpointer(tmp_path, mode="deferred") as ck, pytest.raises(ValueError, match="attach"):
        ck.save(1, {"a": torch.ones(3)})


def test_the_step_waits_for_a_deferred_save(tmp_path: Path) -> None:
    gate = Gate()
    training = Training()
    training.step()
    expected = copy_of(training.state())
    with ng.Checkpointer(tmp_path, mode="deferred", progress=gate) as ck:
        ck.attach(training.optimizer)
        ck.save(1, training.state())
        assert gate.reached.wait(60)
        stepped = threading.Thread(target=training.step)
        stepped.start()
        stepped.join(0.3)
        assert stepped.is_alive()
        gate.open.set()
        stepped.join()
    assert equal(ng.load_checkpoint(tmp_path), expected)


def test_what_the_optimizer_does_not_own_is_copied(tmp_path: Path) -> None:
    """BatchNorm's buffers and a moving average change before the next step."""
    gate = Gate()
    training = Training()
    training.step()
    average = [parameter.detach().clone() for parameter in training.model.parameters()]
    state = {**training.state(), "average": average}
    expected = copy_of(state)
    with ng.Checkpointer(tmp_path, mode="deferred", progress=gate) as ck:
        ck.attach(training.optimizer)
        ck.save(1, state)
        training.model(torch.randn(8, training.width))  # moves the buffers
        for tensor in average:
            tensor.mul_(0.5)
        gate.open.set()
    assert not equal(training.state()["model"], expected["model"])
    assert equal(ng.load_checkpoint(tmp_path), expected)


def test_a_copy_of_a_borrowed_tensor_is_not_borrowed(tmp_path: Path) -> None:
    gate = Gate()
    gate.open.set()
    training = Training()
    with ng.Checkpointer(tmp_path, mode="deferred", progress=gate) as ck:
        ck.attach(training.optimizer)
        weight = training.model[0].weight.detach()
        ck.save(1, {"w": weight})
        ck.wait()
        gate.open.clear()
        copy = weight.clone()
        ck.save(2, {"w": copy})
        copy.zero_()
        gate.open.set()
    assert torch.equal(ng.load_checkpoint(tmp_path)["w"], weight)


@pytest.mark.parametrize("what", ["parameter", "state"])
def test_a_change_of_a_borrowed_tensor_is_found(tmp_path: Path, what: str) -> None:
    gate = Gate()
    training = Training()
    training.step()
    with ng.Checkpointer(tmp_path, mode="deferred", progress=gate) as ck:
        ck.attach(training.optimizer)
        ck.save(1, training.state(), mode="snapshot")
        gate.open.set()
        ck.wait()
        gate.open.clear()
        ck.save(2, training.state())
        weight = training.model[0].weight
        target = weight if what == "parameter" else training.optimizer.state[weight]["exp_avg"]
        with torch.no_grad():
            target.add_(1)
        gate.open.set()
        with pytest.raises(ng.CheckpointError, match=r"model.0.weight" if what == "parameter" else r"exp_avg"):
            ck.wait()
        assert ng.checkpoint.steps(tmp_path) == [1]
        ck.save(2, training.state())
    assert equal(ng.load_checkpoint(tmp_path), training.state())


# --- back-pressure and errors ----------------------------------------------------------------------------------------


def test_when_busy(tmp_path: Path) -> None:
    state = {"a": torch.ones(1000)}
    for choice in ("skip", "error", "wait"):
        gate = Gate()
        with ng.Checkpointer(tmp_path / choice, when_busy=choice, progress=gate) as ck:
            assert ck.save(1, state)
            assert gate.reached.wait(60) and ck.busy
            if choice == "skip":
                assert ck.save(2, state) is False
            elif choice == "error":
                with pytest.raises(ng.CheckpointError, match="still running"):
                    ck.save(2, state)
            else:
                threading.Timer(0.2, gate.open.set).start()
                assert ck.save(2, state)
            gate.open.set()
        assert ng.checkpoint.steps(tmp_path / choice) == ([1, 2] if choice == "wait" else [1])


def test_a_failure_in_the_background_is_raised_at_the_next_call(tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise OverflowError("no progress today")

    with ng.Checkpointer(tmp_path) as ck:
        ck.save(1, {"a": torch.ones(3)})
    ck = ng.Checkpointer(tmp_path, progress=fail)
    ck.save(2, {"a": torch.zeros(3)})
    with pytest.raises(OverflowError, match="no progress"):
        ck.save(3, {"a": torch.zeros(3)})
    ck.wait()
    ck.save(4, {"a": torch.zeros(3)})
    with pytest.raises(OverflowError):
        ck.close()
    assert ng.checkpoint.steps(tmp_path) == [1]
    with ng.Checkpointer(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-00000001"]


def test_what_cannot_be_stored_is_named_and_nothing_starts(tmp_path: Path) -> None:
    with ng.Checkpointer(tmp_path) as ck:
        with pytest.raises(TypeError, match=r"state\['optimizer'\]"):
            ck.save(1, {"optimizer": torch.optim.SGD(torch.nn.Linear(2, 2).parameters())})
        assert not ck.busy
        with pytest.raises(ValueError, match="-1"):
            ck.save(-1, {})
        itself: list[Any] = [torch.ones(1)]
        itself.append(itself)
        with pytest.raises(ValueError, match=r"state\[1\] contains itself"):
            ck.save(1, itself)
        ck.save(1, {})
        with pytest.raises(ng.CheckpointError, match="exists"):
            ck.save(1, {})
        ck.save(1, {"new": 1}, overwrite=True)
    assert ng.load_checkpoint(tmp_path) == {"new": 1}


def test_wrong_options_are_named(tmp_path: Path) -> None:
    for options, words in [
        ({"keep": 0}, "keep is 0"),
        ({"keep_every": 0}, "keep_every is 0"),
        ({"mode": "later"}, "'snapshot', 'deferred'"),
        ({"when_busy": "panic"}, "'wait', 'skip', 'error'"),
        ({"format": {"*": "fp99"}}, "fp99"),
    ]:
        with pytest.raises(ValueError, match=words):
            ng.Checkpointer(tmp_path, **options).save(1, {"a": torch.ones(2)})  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        ng.Checkpointer(tmp_path / "file")


def test_one_saver_a_directory(tmp_path: Path) -> None:
    with ng.Checkpointer(tmp_path):
        with pytest.raises(ng.CheckpointError, match="another Checkpointer"):
            ng.Checkpointer(tmp_path)
        code = f"import narrowgauge as ng; ng.Checkpointer({str(tmp_path)!r})"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another Checkpointer" in other.stderr
    ng.Checkpointer(tmp_path).close()


def test_a_forked_child_cannot_save(tmp_path: Path) -> None:
    with ng.Checkpointer(tmp_path) as ck:
        pid = os.fork()
        if pid == 0:
            try:
                ck.save(1, {})
                os._exit(1)
            except ng.CheckpointError:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        ck.save(1, {})
    assert ng.checkpoint.steps(tmp_path) == [1]


def test_a_save_ends_before_the_interpreter_does(tmp_path: Path) -> None:
    code = f"""
import narrowgauge as ng, torch, time
ck = ng.Checkpointer({str(tmp_path)!r}, progress=lambda done, total: time.sleep(0.2))
ck.save(1, {{"a": torch.ones(10)}})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert torch.equal(ng.load_checkpoint(tmp_path)["a"], torch.ones(10))


def test_ctrl_c_reaches_a_waiting_process(tmp_path: Path) -> None:
    code = f"""
import narrowgauge as ng, os, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
ck = ng.Checkpointer({str(tmp_path)!r}, progress=lambda done, total: time.sleep(2))
ck.save(1, {{"a": b"x"}})
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    ck.wait()
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - start < 1.9)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout == "interrupted True\n"
    assert ng.load_checkpoint(tmp_path) == {"a": b"x"}


def test_a_killed_saver_leaves_the_newest_commit(tmp_path: Path) -> None:
    code = f"""
import narrowgauge as ng, torch
ck = ng.Checkpointer({str(tmp_path)!r}, keep=2)
for step in range(10**6):
    ck.save(step, {{"step": step, "w": torch.full((200_000,), float(step))}})
    ck.wait()
    print(step, flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(5):
        reported = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    reported = max([reported, *(int(line) for line in child.stdout.read().split())])
    child.wait()
    state = ng.load_checkpoint(tmp_path)
    assert state["step"] >= reported
    assert torch.equal(state["w"], torch.full((200_000,), float(state["step"])))
    with ng.Checkpointer(tmp_path):
        assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


# --- retention, narrow storage ---------------------------------------------------------------------------------------


def test_retention(tmp_path: Path) -> None:
    with ng.Checkpointer(tmp_path, keep=2, keep_every=5) as ck:
        for step in range(1, 9):
            ck.save(step, {"step": step})
    assert ng.checkpoint.steps(tmp_path) == [5, 7, 8]
    assert [ng.load_checkpoint(tmp_path, step)["step"] for step in (5, 7, 8)] == [5, 7, 8]


def test_narrow_storage(tmp_path: Path) -> None:
    training = Training()
    training.step()
    state = training.state()
    with ng.Checkpointer(tmp_path, format={"exp_avg": ng.fp8}) as ck:
        ck.save(1, state)
    loaded = ng.load_checkpoint(tmp_path)
    for key, value in state["optimizer"]["state"].items():
        back = loaded["optimizer"]["state"][key]
        assert torch.equal(back["exp_avg_sq"], value["exp_avg_sq"])
        expected = ng.quantize(value["exp_avg"], ng.fp8).dequantize(torch.float32)
        assert torch.equal(back["exp_avg"], expected)
    assert equal(loaded["model"], state["model"])


# --- loading ---------------------------------------------------------------------------------------------------------


def test_which_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        ng.load_checkpoint(tmp_path / "absent")
    with pytest.raises(ng.CheckpointError, match="no committed checkpoint"):
        ng.load_checkpoint(tmp_path)
    with ng.Checkpointer(tmp_path) as ck:
        for step in (1, 2):
            ck.save(step, {"step": step})
    assert ng.load_checkpoint(tmp_path)["step"] == 2
    assert ng.load_checkpoint(tmp_path, 1)["step"] == 1
    assert ng.load_checkpoint(tmp_path / "step-00000001")["step"] == 1
    with pytest.raises(ng.CheckpointError, match="its steps are 1, 2"):
        ng.load_checkpoint(tmp_path, 3)


def test_parts_of_a_state(tmp_path: Path) -> None:
    training = Training()
    training.step()
    state = training.state()
    with ng.Checkpointer(tmp_path) as ck:
        ck.save(1, state)
    assert equal(ng.load_checkpoint(tmp_path, map="model"), {"model": state["model"]})
    averages = ng.load_checkpoint(tmp_path, map=["exp_avg", "step"])
    assert set(averages) == {"optimizer", "step"}
    assert equal(averages["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
    with pytest.raises(ValueError, match="nothing"):
        ng.load_checkpoint(tmp_path, map="nothing")


def test_bytes_read(tmp_path: Path) -> None:
    wanted, other = torch.randn(1 << 20), torch.randn(1 << 20)
    with ng.Checkpointer(tmp_path) as ck:
        ck.save(1, {"wanted": wanted, "other": other, "small": torch.ones(3)})
    reports: list[Any] = []
    into = {"wanted": torch.zeros(1 << 20), "small": torch.zeros(3)}
    for verify in ("chunks", "off"):
        loaded = ng.load_checkpoint(tmp_path, map=["wanted", "small"], verify=verify, report=reports.append)
        assert equal(loaded, {"wanted": wanted, "small": torch.ones(3)})
        assert reports[-1].bytes == wanted.nbytes + 12
    chunk = 1 << 20
    assert wanted.nbytes <= reports[0].bytes_read <= wanted.nbytes + 2 * chunk
    assert reports[1].bytes_read == wanted.nbytes + 12
    with pytest.raises(ValueError, match="'chunks' or 'off'"):
        ng.load_checkpoint(tmp_path, verify="some")
    with pytest.raises(ValueError, match="lazy"):
        ng.load_checkpoint(tmp_path, lazy=True, into=into)


def test_lazy_views(tmp_path: Path) -> None:
    state = {"a": torch.randn(1000, 100), "b": [torch.arange(5), 7]}
    with ng.Checkpointer(tmp_path) as ck:
        ck.save(1, state)
    reports: list[Any] = []
    loaded = ng.load_checkpoint(tmp_path, lazy=True, report=reports.append)
    assert reports[0].bytes_read == 0
    assert equal(loaded, state)
    tensor = loaded["a"]
    del loaded
    assert torch.equal(tensor, state["a"])  # the mapping lives as long as a view


def test_into_a_state_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    with ng.Checkpointer(tmp_path) as ck:
        ck.save(1, {"a": torch.ones(4), "b": torch.ones(2, 3)})
    for target, words in [
        ({"a": torch.zeros(4), "b": torch.zeros(3, 2)}, r"\['b'\]"),
        ({"a": torch.zeros(4), "b": torch.zeros(2, 3, dtype=torch.float64)}, "float64"),
        ({"a": torch.zeros(4)}, r"'b'"),
        ({"a": torch.zeros(4), "b": torch.zeros(2, 3), "c": torch.zeros(1)}, r"'c'"),
    ]:
        with pytest.raises(ValueError, match=words):
            ng.load_checkpoint(tmp_path, into=target)
        assert torch.equal(target["a"], torch.zeros(4))


def damage(path: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def test_damage_is_named_and_the_one_before_loads(tmp_path: Path) -> None:
    with ng.Checkpointer(tmp_path) as ck:
        for step in (1, 2):
            ck.save(step, {"w": torch.full((100_000,), float(step))})
    shard = tmp_path / "step-00000002" / "model-00000-of-00001.safetensors"

    def flip(content: bytearray) -> None:
        content[300_000] ^= 16

    damage(shard, flip)
    with pytest.raises(ng.CheckpointCorrupt, match=r"model-00000-of-00001.*\"w\", chunk 0.*before it is step 1"):
        ng.load_checkpoint(tmp_path)
    with pytest.raises(ng.CheckpointCorrupt, match="chunk 0"):
        ng.verify_checkpoint(tmp_path)
    assert issubclass(ng.CheckpointCorrupt, (ng.FileCorrupt, ValueError))
    assert torch.equal(ng.load_checkpoint(tmp_path, 1)["w"], torch.full((100_000,), 1.0))
    assert ng.load_checkpoint(tmp_path, verify="off")["w"].shape == (100_000,)


def test_a_checkpoint_without_its_manifest_is_damaged(tmp_path: Path) -> None:
    with ng.Checkpointer(tmp_path) as ck:
        ck.save(1, {"w": torch.ones(4)})
    manifest = tmp_path / "step-00000001" / "manifest.json"
    manifest.rename(tmp_path / "elsewhere")
    for path in (tmp_path, tmp_path / "step-00000001"):
        with pytest.raises(ng.CheckpointCorrupt, match="manifest.json"):
            ng.load_checkpoint(path)
    manifest.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ng.CheckpointCorrupt, match="manifest.json"):
        ng.load_checkpoint(tmp_path)


def test_a_hostile_state_is_refused(tmp_path: Path) -> None:
    """A manifest whose checksum is right and whose state is not what encode writes."""
    with ng.Checkpointer(tmp_path) as ck:
        ck.save(1, {"w": torch.ones(4)})
    manifest = tmp_path / "step-00000001" / "manifest.json"
    body = json.loads(manifest.read_text())
    body["state"] = '["state",["object","os.system"],[]]'
    del body["crc32c"]
    text = json.dumps(body)[:-1]
    # CRC32C bit by bit
    crc = 0xFFFFFFFF
    for byte in text.encode():
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    manifest.write_text(f'{text},"crc32c":"{crc ^ 0xFFFFFFFF:08x}"}}\n')
    assert _native.Checkpoint(manifest.parent).step == 1
    with pytest.raises(ng.CheckpointCorrupt):
        ng.load_checkpoint(tmp_path)


def test_numpy_without_torch(tmp_path: Path) -> None:
    code = f"""
import sys
import narrowgauge as ng, numpy as np
state = {{"w": np.arange(12.0).reshape(3, 4), "name": "x", "n": 3}}
with ng.Checkpointer({str(tmp_path)!r}) as ck:
    ck.save(1, state)
back = ng.load_checkpoint({str(tmp_path)!r})
assert back["w"].dtype == np.float64 and (back["w"] == state["w"]).all() and back["name"] == "x"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
