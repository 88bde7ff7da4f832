"""Every example runs as it stands."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    result = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def test_training_that_is_killed_resumes_bit_for_bit(tmp_path: Path) -> None:
    command = [sys.executable, next(path for path in EXAMPLES if path.stem == "resume")]
    whole = subprocess.run([*command, tmp_path / "whole", "60"], capture_output=True, text=True, check=True).stdout
    lines: list[str] = []
    for steps in (15, 35):
        child = subprocess.Popen([*command, tmp_path / "killed", "60"], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        while len(lines) < steps:
            lines.append(child.stdout.readline())
        child.kill()
        child.wait()
        lines += child.stdout.read().splitlines(keepends=True)
    last = subprocess.run([*command, tmp_path / "killed", "60"], capture_output=True, text=True, check=True).stdout
    # A step may have run again after a kill; each time with the same loss.
    assert set(lines) | set(last.splitlines(keepends=True)) == set(whole.splitlines(keepends=True))
    assert len(last.splitlines()) < 60


def test_there_are_examples() -> None:
    assert EXAMPLES
