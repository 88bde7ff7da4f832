"""Declared runs of kernels: small inputs, a launch, a check of the result. What the commands of __main__.py work on.

A file of cases is a Python file with functions such as

    @simgpu.case("scale.cu", "scale", elements=1000)
    def scale(program: simgpu.Program) -> simgpu.Launch:
        ...
        launch = program.launch("scale", 4, 256, [x, y, 1000], device).clean()
        np.testing.assert_array_equal(y.get(), 2 * values)
        return launch
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .launch import Launch
from .program import Program, compile, load

Run = Callable[[Program], Launch]


@dataclass(frozen=True)
class Case:
    source: Path  # .cu or .ptx
    kernel: str
    elements: int  # that instructions are counted for
    arch: str
    flags: tuple[str, ...]
    run: Run  # launches, and raises SimError or AssertionError if anything is wrong

    def program(self) -> Program:
        return _program(self.source, self.arch, self.flags)


@cache
def _program(source: Path, arch: str, flags: tuple[str, ...]) -> Program:
    return load(source) if source.suffix == ".ptx" else compile(source, arch, flags)


def case(
    source: str, kernel: str, *, elements: int, arch: str = "sm_80", flags: Sequence[str] = ()
) -> Callable[[Run], Case]:
    """Makes a case of a function. `source` is relative to the function's file."""

    def declare(run: Run) -> Case:
        return Case(Path(inspect.getfile(run)).resolve().parent / source, kernel, elements, arch, tuple(flags), run)

    return declare


def load_cases(path: str | Path) -> list[Case]:
    """Those of a Python file, alone or in lists, in its order."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = (value if isinstance(value, list) else [value] for value in vars(module).values())
    return [each for value in values for each in value if isinstance(each, Case)]
