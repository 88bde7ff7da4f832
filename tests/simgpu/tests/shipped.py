"""The library's kernels: of the PTX in build/release where it is newer than every source, else compiled here."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import simgpu

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "cuda/kernels"
# As cuda/images.cmake has them.
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", f"-I{ROOT}/cpp/src", f"-I{ROOT}/cuda"]


@functools.cache
def _built(image: str) -> str | None:
    """The PTX in build/release of cuda/kernels/IMAGE.cu, with the source's lines; None if a source is newer."""
    ptx = ROOT / "build/release/cpp/images" / f"{image}.lines.ptx"
    sources = [*KERNELS.iterdir(), *(ROOT / "cpp/src/quantize").glob("*.hpp")]
    if not ptx.exists() or ptx.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        return None
    return ptx.read_text()


@functools.cache
def image(name: str) -> simgpu.Program:
    """All kernels of cuda/kernels/NAME.cu."""
    text = _built(name)
    return simgpu.Program(text) if text else simgpu.compile(KERNELS / f"{name}.cu", flags=FLAGS)


@functools.cache
def kernel(image: str, name: str, source: str) -> simgpu.Program:
    """One kernel of an image of many; `source` makes it alone."""
    text = _built(image)
    if text is None:
        return simgpu.compile_text(source, flags=FLAGS)
    declarations = text[: text.index(".visible .entry")]
    start = text.index(f".visible .entry {name}(")
    files = "\n".join(re.findall(r"^\t\.file.*$", text, re.MULTILINE))
    return simgpu.Program(declarations + text[start : text.index("\n}\n", start) + 3] + files + "\n")
