"""bench/gpu_model.py: the formula, what it gives for published kernels, and that it is silent where it is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for _extra in ("typer", "rich", "ml_dtypes"):
    pytest.importorskip(_extra)
sys.path.append(str(Path(__file__).parents[2] / "bench"))

import gpu_counts  # noqa: E402
import gpu_model  # noqa: E402
from gpu_counts import Counts, Linear  # noqa: E402
from narrowgauge.cli.roofline import Gpu, Work, dense, estimate  # noqa: E402

GPU = Gpu("test", 10, 1e9, 100e9, 1000e9, 1024, 1024, latency=1e-6)


def work(**changes: float) -> Work:
    """Waits for DRAM, 10 us of it, after a microsecond of latency."""
    one = Work(blocks=10, resident=1, dram_bytes=1e6, l2_bytes=1e5, bytes_in_flight=1e5, mma=0)
    return one._replace(**changes)


@pytest.mark.parametrize(
    "changes, seconds, limit",
    [
        ({}, 11e-6, "DRAM"),
        ({"bytes_in_flight": 5e3}, 21e-6, "DRAM"),  # 50 GB/s
        ({"blocks": 5}, 11e-6, "DRAM"),
        ({"l2_bytes": 4e6}, 41e-6, "L2"),
        ({"mma": 10_000}, 21e-6, "Tensor Cores"),  # of 2048 multiply-adds
        ({"mma": 10_000, "blocks": 11}, 41e-6, "Tensor Cores"),  # two waves
        ({"mma": 10_000, "blocks": 11, "resident": 2}, 41e-6, "Tensor Cores"),  # or two on one multiprocessor
        ({"instructions": 80_000}, 21e-6, "issue slots"),
        ({"wavefronts": 20_000}, 21e-6, "shared memory"),
        ({"workspace_bytes": 1e6}, 14e-6, "DRAM"),
    ],
)
def test_estimate(changes: dict[str, float], seconds: float, limit: str) -> None:
    found = estimate(GPU, work(**changes))
    assert found.seconds == pytest.approx(seconds) and found.limit == limit


def test_dense() -> None:
    assert dense(GPU, 1, 1000, 1000) == pytest.approx(1e-6 + 2 * 1_002_000 / 100e9)
    assert dense(GPU, 1024, 1000, 10_000) == pytest.approx(1e-6 + 1e-3)


def test_published_ratios_are_reproduced() -> None:
    checks = gpu_model.published()
    assert all(check.reproduced for check in checks), checks
    assert gpu_model.trusted_rows(checks) == 32


def test_a_wrong_model_tells_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        tile: Linear(kernel.fixed, kernel.stage._replace(instructions=3 * kernel.stage.instructions))
        for tile, kernel in gpu_model.FP6_LLM.items()
    }
    monkeypatch.setattr(gpu_model, "FP6_LLM", wrong)
    assert gpu_model.trusted_rows(gpu_model.published()) == 0


def test_counts_that_are_not_on_a_line_are_refused() -> None:
    assert gpu_counts.per_stage(lambda k: Counts(100 + k, 0, k, 0), 128) == Linear(
        Counts(100, 0, 0, 0), Counts(64, 0, 64, 0)
    )
    with pytest.raises(ValueError, match="128 columns"):
        gpu_counts.per_stage(lambda k: Counts(k * k, 0, 0, 0), 128)


def test_all_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The tables and the chart, from the peers' counts in place of ours, which take minutes to count."""
    pytest.importorskip("matplotlib")
    counts = {**gpu_model.FP6_LLM, 128: gpu_model.FP6_LLM[64]}
    monkeypatch.setattr(gpu_model, "measure", lambda: dict.fromkeys(gpu_model.FORMATS, counts))
    png, json = tmp_path / "model.png", tmp_path / "model.json"
    monkeypatch.setattr(sys, "argv", ["gpu_model.py", "--png", str(png), "--json", str(json)])
    gpu_model.main()
    out = capsys.readouterr().out
    assert "MODEL, not measured: A100" in out and "no times beyond" in out and "M=64 " in out
    assert png.read_bytes().startswith(b"\x89PNG") and '"over_peer"' in json.read_text()
    monkeypatch.setattr(gpu_model, "trusted_rows", lambda checks: 0)
    gpu_model.main()
    out = capsys.readouterr().out
    assert "no times are printed" in out and "MODEL" not in out


def test_ours_are_counted(kernels: None) -> None:
    """What the README says of fp6 and few rows of x."""
    kernel = gpu_counts.ours("fp6_e2m3:g128:fp16", 8)
    assert kernel.stage.mma == 16  # 64 x 64 weights, 8 rows of x
    assert kernel.stage.l2_bytes == 64 * 64 * 6 / 8 + 64 * 2 / 2 + 8 * 64 * 2  # codes, half a group's scales, x
    per_weight = gpu_model.loop_instructions({8: kernel}, lambda tile: 64, 1)
    assert per_weight == pytest.approx(3.54, abs=0.005)


def test_kernels_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match="no kernel fpx_linear_f16_fp9_m8"):
        gpu_counts.shipped("fpx_linear_f16_fp9_m8")
