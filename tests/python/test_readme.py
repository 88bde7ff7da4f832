"""What the README shows works: its Python runs as it stands, and its C++ compiles against the installed headers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import narrowgauge as ng
import pytest

torch = pytest.importorskip("torch")

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)[0]


def model(device: str) -> "torch.nn.Module":
    with torch.device(device):
        return torch.nn.ModuleDict({"body": torch.nn.Linear(64, 96), "lm_head": torch.nn.Linear(96, 32)})


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"model": model("cpu"), "fresh_model": model("meta")}
    exec(compile(block("python"), "README.md", "exec"), names)
    assert names["y"].shape == (1, 4096)
    assert isinstance(names["fresh_model"]["body"], ng.nn.Linear)
    assert type(names["fresh_model"]["lm_head"]) is torch.nn.Linear


def test_cpp_compiles(tmp_path: Path) -> None:
    source = tmp_path / "readme.cpp"
    source.write_text(
        '#include "narrowgauge/linear.hpp"\n'
        f"void run(const ng::TensorView& x, const ng::TensorView& y) {{\n{block('cpp')}}}\n"
    )
    include = subprocess.run([sys.executable, "-m", "narrowgauge", "--include-dir"], check=True, capture_output=True)
    compiler = os.environ.get("CXX", "c++")
    command = [
        compiler,
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-Werror",
        f"-I{include.stdout.decode().strip()}",
        source,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_formats_are_as_the_table_says() -> None:
    rows = re.findall(r"^\| \**(\w+)\** \| (\w+:\w+:\w+) \| ([\d.]+) \|", README, flags=re.MULTILINE)
    assert len(rows) > 5
    for alias, full, bits in rows:
        assert str(ng.Format(alias)) == full
        assert ng.Format(alias).bits_per_weight() == float(bits), alias
