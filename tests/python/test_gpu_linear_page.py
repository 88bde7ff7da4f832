"""docs/gpu-linear.md is current: its drawings are those of the constants, its files and names exist."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))

import gpu_linear  # noqa: E402


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_drawings_are_current(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_linear.py", "--check"])
    assert gpu_linear.main() == 0, "run python docs/gpu_linear.py"
    changed = tmp_path / "page.md"
    changed.write_text(gpu_linear.PAGE.read_text().replace("12.3 12.2", "12.4 12.2"))
    monkeypatch.setattr(gpu_linear, "PAGE", changed)
    assert gpu_linear.main() == 1
    monkeypatch.setattr(sys, "argv", ["gpu_linear.py"])
    assert gpu_linear.main() == 0
    assert changed.read_text() == (ROOT / "docs" / "gpu-linear.md").read_text()


def test_a_drawing_without_a_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected"):
        gpu_linear.redraw("<!-- drawn: words 6 -->\n<!-- end -->\n", {"words 6": "a", "tiles": "b"})


def test_names_exist() -> None:
    """Files that the page names, and functions and constants of those that it tells people to change."""
    page = (ROOT / "docs" / "gpu-linear.md").read_text()
    for path in re.findall(r"`((?:cpp|cuda|tests)/[\w/.*]+)`", page):
        assert list(ROOT.glob(path)), path
    sources = "".join(
        each.read_text()
        for folder in ("cpp/src/quantize", "cpp/include/narrowgauge", "cuda/kernels", "tests/simgpu/tests")
        for each in (ROOT / folder).rglob("*.*")
        if each.suffix in (".hpp", ".cpp", ".cuh", ".cu", ".inl", ".py")
    )
    adding = page[page.index("## Adding a Format") :]
    for name in re.findall(r"`(?:\w+::)*(\w+)(?:<\w+>)?`", adding):
        assert re.search(rf"\b{name}\b", sources), name
