"""Tensor Core products with narrow weights: within the bound of linear.hpp, free of hazards, and what they cost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simgpu
from fpx import BF16, NF4, Element, Matrix, Result, errors, random_matrix, run

ROOT = Path(__file__).parents[3]
FLAGS = ["-std=c++20", "-O3", f"-I{ROOT}/cpp/src", f"-I{ROOT}/cuda"]
Multiply = Callable[..., Result]


@pytest.fixture(scope="session")
def images() -> Callable[[str], simgpu.Program]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    programs: dict[str, simgpu.Program] = {}

    def get(name: str) -> simgpu.Program:
        if name not in programs:
            programs[name] = simgpu.compile(ROOT / f"cuda/kernels/sm80_fpx_linear_{name}.cu", "sm_80", FLAGS)
        return programs[name]

    return get


@pytest.fixture
def multiply(images: Callable[[str], simgpu.Program]) -> Multiply:
    def call(matrix: Matrix, x: np.ndarray, tile: int, **options: object) -> Result:
        e, name = matrix.element, "bf16" if x.dtype == BF16 else "f16"
        kind = "int" if e.kind == "uint" else e.kind
        image = "nf4" if kind == "nf4" else f"{kind}_{'bf16' if e.is_wide() else name}"
        kernel = f"fpx_linear_{name}{'_wide' * (e.is_wide() and name == 'f16')}_{kind}{'' if kind == 'nf4' else e.bits}"
        return run(images(image), f"{kernel}_m{tile}", matrix, x, tile, **options)

    return call


def activations(rng: np.random.Generator, m: int, k: int, dtype: type) -> np.ndarray:
    return rng.standard_normal((m, k)).astype(dtype)


def check(matrix: Matrix, x: np.ndarray, result: Result, bias: np.ndarray | None = None) -> None:
    for launch in result.launches:
        launch.clean()
    worst = errors(matrix, x, result.y, bias).max()
    assert worst <= 1, worst


ELEMENTS = [f"fp{bits}_e{e}m{bits - 1 - e}" for bits in range(3, 9) for e in range(1, bits)]
ELEMENTS += [f"{kind}{bits}" for bits in range(2, 9) for kind in ("int", "uint")] + ["nf4"]


@pytest.mark.parametrize("dtype", [np.float16, BF16], ids=["f16", "bf16"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_elements(multiply: Multiply, element: str, dtype: type) -> None:
    """Every element with 8 rows of x, ragged rows and columns, in fp32 so that no rounding of y hides an error."""
    rng = np.random.default_rng(ELEMENTS.index(element))
    for group, kind, (m, n, k) in ((48, "fp16", (7, 70, 200)), (0, "row", (8, 64, 136))):
        matrix, x = random_matrix(rng, element, group, kind, n, k), activations(rng, m, k, dtype)
        result = multiply(matrix, x, 8, y_type=np.float32)
        check(matrix, x, result)


SHAPES = [(1, 192, 576, 8), (2, 257, 129, 8), (8, 64, 1024, 8), (9, 70, 136, 64), (17, 257, 129, 64)]
SHAPES += [(64, 256, 192, 64), (65, 130, 144, 128), (129, 192, 80, 128)]


@pytest.mark.parametrize("dtype", [np.float16, BF16], ids=["f16", "bf16"])
@pytest.mark.parametrize(
    "element, group, kind", [("fp6_e2m3", 128, "fp16"), ("fp4_e2m1", 32, "e8m0"), ("fp4_e2m1", 16, "e4m3")]
    + [("uint4", 64, "bf16"), ("int8", 0, "row"), ("nf4", 64, "fp32"), ("fp8_e4m3", 0, "row"), ("uint3", 0, "row")]
)  # fmt: skip
def test_shapes(multiply: Multiply, element: str, group: int, kind: str, dtype: type) -> None:
    rng = np.random.default_rng(len(element) + group)
    for m, n, k, tile in SHAPES:
        matrix, x = random_matrix(rng, element, group, kind, n, k), activations(rng, m, k, dtype)
        check(matrix, x, multiply(matrix, x, tile))
