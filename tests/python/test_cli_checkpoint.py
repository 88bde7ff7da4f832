"""`narrowgauge checkpoint`: what each command says, its JSON, and its exit code."""

import json
import sys
from pathlib import Path
from typing import Any

import narrowgauge as ng
import pytest
import torch
from narrowgauge import cli
from safetensors.torch import load_file

pytest.importorskip("typer")
pytest.importorskip("rich")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["narrowgauge", "checkpoint", *map(str, arguments)])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def state(step: int) -> dict[str, Any]:
    model = {"embed.weight": torch.full((300, 4), float(step)), "tied": torch.ones(3), "bias": torch.ones(5)}
    return {"model": model, "step": step, "rng": b"\x00\x01", "names": ["a", ("b", None)]}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with ng.Checkpointer(tmp_path / "run") as ck:
        for step in (1, 2, 3, 4):
            ck.save(step, state(step))
    return tmp_path / "run"


def test_ls(run: Any, directory: Path) -> None:
    (directory / "step-00000009.tmp-0123456789abcdef").mkdir()
    (directory / "step-00000002" / "manifest.json").write_text("{}")
    code, out, _ = run("ls", directory)
    assert code == 0 and "1 not committed" in out and "committed" in out
    listed = json.loads(run("ls", directory, "--json")[1])
    assert [row["step"] for row in listed["steps"]] == [1, 2, 3, 4]
    assert [row["problem"] is None for row in listed["steps"]] == [True, False, True, True]
    assert listed["steps"][0]["tensors"] == 3


def test_show(run: Any, directory: Path) -> None:
    shown = json.loads(run("show", directory, "--json")[1])
    assert shown["step"] == 4
    assert {t["name"]: t["shape"] for t in shown["tensors"]}["model.embed.weight"] == [300, 4]
    assert shown["values"]["state['step']"] == "4"
    assert shown["values"]["state['names'][1][0]"] == "'b'"
    code, out, _ = run("show", directory, "--step", 1)
    assert code == 0 and "model.embed.weight" in out and "F32" in out
    code, _, err = run("show", directory, "--step", 7)
    assert code == 1 and "its steps are 1, 2, 3, 4" in err


def test_verify(run: Any, directory: Path) -> None:
    assert run("verify", directory)[0] == 0
    assert json.loads(run("verify", directory, "--all", "--json")[1])["checkpoints"][3]["problem"] is None
    shard = directory / "step-00000003" / "model-00000-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    code, out, _ = run("verify", directory, "--all")
    assert code == 1 and "chunk 0" in out
    assert run("verify", directory, "--step", 3)[0] == 1
    assert run("verify", directory)[0] == 0


def test_diff(run: Any, directory: Path, tmp_path: Path) -> None:
    code, out, _ = run("diff", directory, directory, "--first-step", 1, "--second-step", 2)
    assert code == 1 and "bytes differ" in out and "model.embed.weight" in out and "state['step']" in out
    assert "model.bias" not in out
    with ng.Checkpointer(tmp_path / "other") as ck:
        ck.save(1, state(4))
    code, out, _ = run("diff", directory, tmp_path / "other")
    assert code == 0 and "same tensors and values" in out
    with ng.Checkpointer(tmp_path / "third") as ck:
        ck.save(1, {"model": {"bias": torch.ones(5, dtype=torch.float64), "new": torch.ones(1)}, "step": 4})
    found = json.loads(run("diff", directory, tmp_path / "third", "--json")[1])["differences"]
    assert ["model.bias", "F32 [5]", "F64 [5]"] in found
    assert ["model.new", "absent", "F32 [1]"] in found


def test_export(run: Any, directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    code, out, _ = run("export", directory, file, "--map", "model.*", "--strip", "model.")
    assert code == 0 and "3 tensors" in out
    exported = load_file(file)
    assert set(exported) == {"embed.weight", "tied", "bias"}
    assert torch.equal(exported["embed.weight"], torch.full((300, 4), 4.0))
    code, _, err = run("export", directory, file)
    assert code == 1 and "--overwrite" in err
    assert run("export", directory, file, "--overwrite")[0] == 0

    folder = tmp_path / "sharded"
    code, out, _ = run("export", directory, folder, "--max-shard", 0.000001)
    assert code == 0
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == (1200 + 3 + 5) * 4
    for name, shard in index["weight_map"].items():
        assert name in load_file(folder / shard)
    code, _, err = run("export", directory, tmp_path / "x.safetensors", "--map", "nothing")
    assert code == 1 and "matches" in err


def test_prune(run: Any, directory: Path) -> None:
    planned = json.loads(run("prune", directory, "--keep", 1, "--keep-every", 2, "--dry-run", "--json")[1])
    assert planned["removed"] == [1, 3] and ng.checkpoint.steps(directory) == [1, 2, 3, 4]
    code, out, _ = run("prune", directory, "--keep", 1, "--keep-every", 2)
    assert code == 0 and "removed 1, 3" in out
    assert ng.checkpoint.steps(directory) == [2, 4]
    with ng.Checkpointer(directory):
        code, _, err = run("prune", directory, "--keep", 1)
        assert code == 1 and "another Checkpointer" in err
    assert run("prune", directory, "--keep", 0)[0] == 2
