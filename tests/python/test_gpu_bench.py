"""bench/gpu.py: that it runs, on the simulated GPU, and that it notices wrong results. Its times mean nothing there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import narrowgauge as ng
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

import gpu as bench  # noqa: E402


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ng.cuda, "why_unavailable", lambda: "no driver here")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert bench.main() == 0
    assert "no GPU to measure: no driver here" in capsys.readouterr().out


@pytest.mark.cuda
def test_it_runs(gpu: None, kernels: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tests = tmp_path / "test_one.py"
    tests.write_text("import pytest\n\n@pytest.mark.cuda\ndef test_one():\n    pass\n")
    png, figures = tmp_path / "gpu.png", tmp_path / "gpu.json"
    small = ["--shape", "64x128", "--rows", 1, 9, "--formats", "fp6", "int4", "--rounds", 1, "--repeat", 1]
    done = run(*small, "--gigabytes", 0, "--tests", tests, "--png", png, "--json", figures)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout and "results are right" in done.stdout
    assert png.read_bytes().startswith(b"\x89PNG")
    mine = [each for each in json.loads(figures.read_text())["results"] if each["kernel"] in ("fp6", "int4")]
    assert [(each["kernel"], each["m"]) for each in mine] == [("fp6", 1), ("int4", 1), ("fp6", 9), ("int4", 9)]
    assert all(each["p10_us"] > 0 and each["share_of_limit"] > 0 for each in mine)


@pytest.mark.cuda
def test_failed_tests_end_it(gpu: None, kernels: None, tmp_path: Path) -> None:
    tests = tmp_path / "test_one.py"
    tests.write_text("import pytest\n\n@pytest.mark.cuda\ndef test_one():\n    assert False\n")
    done = run("--tests", tests)
    assert done.returncode == 1 and "nothing was timed" in done.stderr and "limit" not in done.stdout


@pytest.mark.cuda
def test_wrong_results_are_noticed(gpu: None, kernels: None) -> None:
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((64, 128)).astype(np.float32), rng.standard_normal((3, 128)).astype(np.float16)
    arrays = bench.Arrays()
    case, decoded = bench.narrow_case(w, "fp6", 0)
    bench.check(case, arrays, x, decoded)
    decoded[5, 7] += 0.01
    with pytest.raises(AssertionError, match="fp6, M=3: error"):
        bench.check(case, arrays, x, decoded)
    loose = case._replace(tolerance=0.2)
    bench.check(loose, arrays, x, w)
    with pytest.raises(AssertionError, match="expected at most 0.2"):
        bench.check(loose, arrays, x, -w)


def test_peers_that_are_absent_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On torch's CPU tensors, for which it has the int8 op too: others are not installed, or not for the CPU."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)

    class OnCpu(bench.Arrays):
        def __init__(self) -> None:
            self.torch = torch

        def put(self, x: np.ndarray, dtype: str) -> torch.Tensor:
            return torch.from_numpy(x).to(getattr(torch, dtype))

    def broken(torch: object, w: object, gigabytes: float) -> bench.Case:
        return bench.fp16_case(torch, -w, gigabytes)

    def absent(torch: object, w: object, gigabytes: float) -> bench.Case:
        import absent_package  # noqa: F401

    monkeypatch.setattr(bench, "PEERS", [bench.torch_int8, broken, absent])
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal((rows, 128)).astype(np.float32) for rows in (64, 3))
    cases = list(bench.peer_cases(OnCpu(), w, x, 0))
    assert [case.name for case in cases] == ["torch fp16", "torch int8"]
    out = capsys.readouterr().out
    assert "left out: broken: AssertionError" in out and "left out: absent: ModuleNotFoundError" in out
