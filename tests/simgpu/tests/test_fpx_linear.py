"""Tensor Core products with narrow weights: within the bound of linear.hpp, free of hazards, and what they cost."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import shipped
import simgpu
import simgpu.static
from fpx import BF16, TILES, Matrix, Result, encode_scales, errors, random_matrix, run

X_TYPES = {"f16": "F16", "bf16": "Bf16", "f16_wide": "F16Wide"}


def program(name: str) -> simgpu.Program:
    """The kernel of that name, alone: an image of all takes minutes."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    include = '#include "kernels/fpx_instances.cuh"\n'
    if name == "fpx_reduce":
        return shipped.kernel("sm80_fpx_linear_nf4", name, f"{include}NG_FPX_REDUCE()")
    x, kind, bits, rows = re.fullmatch(r"fpx_linear_(\w+)_(fp|int|nf)(\d)_m(\d+)", name).groups()
    decoder = {"fp": f"DecodeFp<ng::cuda::{X_TYPES[x]}, {bits}>", "int": f"DecodeInt<ng::cuda::{X_TYPES[x]}, {bits}>"}
    decoder["nf"] = f"DecodeCodebook<ng::cuda::{X_TYPES[x]}>"
    half = "f16" if x == "f16" else "bf16"
    image = f"sm80_fpx_linear_{'nf4' if kind == 'nf' else f'{kind}_{half}'}"
    text = f"NG_FPX_KERNEL({X_TYPES[x]}, {x}, {kind}{bits}, {list(TILES).index(int(rows))}, {rows}, {decoder[kind]})"
    return shipped.kernel(image, name, include + text)


def kernel_name(matrix: Matrix, x: np.ndarray, tile: int) -> str:
    e, name = matrix.element, "bf16" if x.dtype == BF16 else "f16"
    wide = "_wide" if e.is_wide() and name == "f16" else ""
    kind = {"uint": "int", "nf4": "nf"}.get(e.kind, e.kind)
    return f"fpx_linear_{name}{wide}_{kind}{e.bits}_m{tile}"


def multiply(matrix: Matrix, x: np.ndarray, tile: int, **options: object) -> Result:
    reducer = program("fpx_reduce") if options.get("splits", 1) != 1 else None
    name = kernel_name(matrix, x, tile)
    return run(program(name), name, matrix, x, tile, reducer=reducer, **options)


def activations(rng: np.random.Generator, m: int, k: int, dtype: type) -> np.ndarray:
    return rng.standard_normal((m, k)).astype(dtype)


def check(matrix: Matrix, x: np.ndarray, result: Result, *added: np.ndarray) -> None:
    """added: bias and residual, where there were."""
    for launch in result.launches:
        launch.clean()
    worst = errors(matrix, x, result.y, *added).max()
    assert worst <= 1, worst


ELEMENTS = [f"fp{bits}_e{e}m{bits - 1 - e}" for bits in range(3, 9) for e in range(1, bits)]
ELEMENTS += [f"{kind}{bits}" for bits in range(2, 9) for kind in ("int", "uint")] + ["nf4"]


@pytest.mark.parametrize("dtype", [np.float16, BF16], ids=["f16", "bf16"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_elements(element: str, dtype: type) -> None:
    """Every element with 8 rows of x, ragged rows and columns, in fp32 so that no rounding of y hides an error."""
    rng = np.random.default_rng(ELEMENTS.index(element))
    for group, kind, (m, n, k) in ((48, "fp16", (7, 70, 200)), (0, "row", (8, 64, 136))):
        matrix, x = random_matrix(rng, element, group, kind, n, k), activations(rng, m, k, dtype)
        result = multiply(matrix, x, 8, y_type=np.float32)
        check(matrix, x, result)


SHAPES = [(1, 192, 576, 8), (2, 257, 129, 8), (8, 64, 1024, 8), (16, 70, 136, 16), (9, 64, 640, 16)]
SHAPES += [(17, 257, 129, 32), (32, 130, 200, 32), (29, 64, 640, 32), (33, 257, 129, 64), (64, 256, 192, 64)]
SHAPES += [(65, 130, 144, 128), (129, 192, 80, 128)]


FORMATS = [
    ("fp6_e2m3", 128, "fp16", np.float16), ("fp6_e3m2", 32, "e8m0", BF16), ("fp4_e2m1", 16, "e4m3", np.float16),
    ("uint4", 64, "bf16", BF16), ("int8", 0, "row", np.float16), ("nf4", 64, "fp32", BF16), ("uint3", 0, "row", BF16),
]  # fmt: skip


def has_tile(matrix: Matrix, dtype: type, tile: int) -> bool:
    """As fpx_has_tile of fpx_plan.cpp."""
    if matrix.element.is_wide() and dtype == np.float16:
        return tile not in (16, 128)
    return tile != 32 or matrix.element.kind != "nf4" or dtype == np.float16


def check_shapes(element: str, group: int, kind: str, dtype: type, shapes: list[tuple[int, ...]]) -> None:
    rng = np.random.default_rng(len(element) + group)
    for m, n, k, tile in shapes:
        matrix, x = random_matrix(rng, element, group, kind, n, k), activations(rng, m, k, dtype)
        if has_tile(matrix, dtype, tile):
            check(matrix, x, multiply(matrix, x, tile))


@pytest.mark.parametrize("number", range(len(FORMATS)))
def test_shapes(number: int) -> None:
    """Every format with every tile, and every shape with two formats at least."""
    of_tiles = [[shape for shape in SHAPES if shape[3] == tile] for tile in TILES]
    check_shapes(*FORMATS[number], [shapes[number % len(shapes)] for shapes in of_tiles])


@pytest.mark.nightly
@pytest.mark.parametrize("element, group, kind, dtype", FORMATS)
def test_all_shapes(element: str, group: int, kind: str, dtype: type) -> None:
    check_shapes(element, group, kind, dtype, SHAPES)


@pytest.mark.parametrize("element, group, kind", [("fp6_e2m3", 128, "fp16"), ("uint4", 48, "bf16"), ("int8", 0, "row")])
@pytest.mark.parametrize("m, tile", [(3, 8), (20, 32), (40, 64)])
def test_splits(element: str, group: int, kind: str, m: int, tile: int) -> None:
    """Ranges of columns that start where groups do, more of them than there are stages, bias and residual."""
    rng = np.random.default_rng(m)
    matrix, x = random_matrix(rng, element, group, kind, 70, 456), activations(rng, m, 456, np.float16)
    bias, residual = rng.standard_normal(70).astype(np.float32), activations(rng, m, 70, BF16)
    for splits in (1, 2, 5):
        result = multiply(matrix, x, tile, splits=splits, bias=bias, residual=residual, cross_block=splits > 1)
        check(matrix, x, result, bias, residual)


@pytest.mark.parametrize("dtype", [np.float16, BF16], ids=["f16", "bf16"])
def test_extremes(dtype: type) -> None:
    """Scales from the smallest subnormal to the largest that results in fp32 can have, and subnormal activations."""
    rng = np.random.default_rng(3)
    for element, kind, exponents in (
        ("fp6_e2m3", "fp16", (-24, 15)),
        ("fp6_e3m2", "e8m0", (-120, 90)),
        ("uint4", "bf16", (-120, 80)),
        ("fp8_e4m3", "fp32", (-120, 60)),
        ("nf4", "row", (-110, 100)),
    ):
        matrix = random_matrix(rng, element, 0 if kind == "row" else 32, kind, 64, 128)
        scales = np.exp2(rng.integers(*exponents, matrix.scales.shape).astype(float))
        scales[0], scales[1] = 2.0 ** exponents[0], 2.0 ** exponents[1]
        matrix.scales = encode_scales(scales, kind)
        x = activations(rng, 5, 128, dtype)
        x[0] = (x[0].astype(float) * 2.0**-20).astype(dtype)
        x[1] = 0
        check(matrix, x, multiply(matrix, x, 8, y_type=np.float32))


def test_ranges_of_fp16() -> None:
    """Activations of fp16's whole range with elements that fp16 cannot hold."""
    rng = np.random.default_rng(4)
    for element in ("fp8_e6m1", "fp8_e7m0", "fp7_e5m1", "fp6_e5m0", "fp8_e5m2"):
        matrix = random_matrix(rng, element, 32, "e8m0", 64, 128)
        x = (activations(rng, 8, 128, np.float64) * np.exp2(rng.integers(-24, 12, (8, 128)))).astype(np.float16)
        check(matrix, x, multiply(matrix, x, 8, y_type=np.float32))


def test_planted_faults() -> None:
    """The bound notices one wrong code, the last column, two scales that are exchanged, a zero point that is off."""
    rng = np.random.default_rng(5)
    matrix, x = random_matrix(rng, "uint4", 64, "fp16", 70, 200), activations(rng, 4, 200, np.float16)
    y = multiply(matrix, x, 8, y_type=np.float32).y
    assert errors(matrix, x, y).max() <= 1
    for fault in ("code", "column", "scales", "zero"):
        wrong = Matrix(**{**vars(matrix), "codes": matrix.codes.copy(), "scales": matrix.scales.copy()})
        if fault == "code":
            wrong.codes[69, 77] ^= 1
        elif fault == "column":
            wrong.codes[:, 199] ^= 1
        elif fault == "scales":
            wrong.scales[3, [0, 1]] = wrong.scales[3, [1, 0]]
        else:
            wrong.zeros = matrix.zeros.copy()
            wrong.zeros[5, 2] ^= 1
        assert errors(wrong, x, y).max() > 1, fault


@pytest.mark.parametrize("element, group, kind", [("fp6_e2m3", 128, "fp16"), ("uint4", 64, "fp16"), ("nf4", 0, "row")])
@pytest.mark.parametrize(
    "m, tile, dtype", [(8, 8, np.float16), (8, 8, BF16), (32, 32, np.float16), (64, 64, np.float16), (128, 128, BF16)]
)
def test_cost(element: str, group: int, kind: str, dtype: type, m: int, tile: int) -> None:
    """Packed bytes are read once, in full sectors; no bank conflicts; no multiplication in vain; few instructions."""
    rng = np.random.default_rng(6)
    rows, (blocks, warps, _, _) = 256, TILES[tile]
    counts = []
    for k in (512, 768):  # the difference is what the loop costs
        matrix, x = random_matrix(rng, element, group, kind, rows, k), activations(rng, m, k, dtype)
        result = multiply(matrix, x, tile, race=False)
        launch, weights = result.launches[0], rows * k
        copies = launch.totals["global"]["cp.async"]
        x_bytes = m * k * 2 * (rows // (16 * blocks * warps))
        assert copies["bytes"] == result.code_bytes + result.record_bytes + x_bytes
        assert copies["sector_use"] == 1
        assert sum(kind["conflicts"] for kind in launch.totals["shared"].values()) == 0
        terms = 1 if element != "nf4" else 3 if dtype == BF16 else 2
        assert launch.totals["mma"] == terms * weights // 256 * (tile // 8)
        counts.append(launch.totals["thread_instructions"])
    per_weight = (counts[1] - counts[0]) / (rows * 256)
    print(f"\n{element}:{group}:{kind} {np.dtype(dtype).name} m{tile}: {per_weight:.2f} PTX instructions a weight")
    assert per_weight < LIMITS[element, tile][dtype == BF16]


# PTX instructions a weight in the loop, all that is not decoding included; bf16 takes the second.
LIMITS = {
    ("fp6_e2m3", 8): (3.7, 4.5), ("fp6_e2m3", 32): (4.8, 0), ("fp6_e2m3", 64): (7.0, 0), ("fp6_e2m3", 128): (0, 13.2),
    ("uint4", 8): (3.6, 3.7), ("uint4", 32): (5.0, 0), ("uint4", 64): (8.1, 0), ("uint4", 128): (0, 15.2),
    ("nf4", 8): (9.0, 12.3), ("nf4", 32): (10.2, 0), ("nf4", 64): (13.0, 0), ("nf4", 128): (0, 25.1),
}  # fmt: skip


def test_misaligned_activations() -> None:
    """Rows of x that start anywhere are read element by element, and give the same bits."""
    rng = np.random.default_rng(7)
    matrix, x = random_matrix(rng, "fp5_e2m2", 64, "fp16", 64, 192), activations(rng, 20, 192, np.float16)
    for tile in (8, 32, 64):
        aligned = multiply(matrix, x, tile, y_type=np.float32)
        skewed = multiply(matrix, x, tile, y_type=np.float32, x_skew=1)
        check(matrix, x, skewed)
        assert np.array_equal(aligned.y, skewed.y)


def test_images() -> None:
    """Few kernels and small images: at most 150, and 20 MB of PTX and cubins."""
    folder = shipped.ROOT / "build/release/cpp/images"
    texts = [path for path in folder.glob("sm80_fpx_linear_*.ptx") if not path.name.endswith(".lines.ptx")]
    if not texts:
        pytest.skip("build/release has no kernels")
    kernels = sum(path.read_text().count(".visible .entry fpx_linear_") for path in texts)
    total = sum(path.stat().st_size for path in [*texts, *folder.glob("sm80_fpx_linear_*.fatbin")])
    print(f"{kernels} kernels, {total / 1e6:.1f} MB")
    assert 0 < kernels <= 150
    assert total <= 20e6


@pytest.mark.parametrize("x, element", [("f16", "fp6"), ("bf16", "int8"), ("bf16", "nf4"), ("f16_wide", "fp8")])
@pytest.mark.parametrize("tile", TILES)
def test_registers(tmp_path: Path, tile: int, x: str, element: str) -> None:
    """No spills, no local memory, and room for as many blocks as fpx_args.hpp says."""
    if shutil.which("ptxas") is None:
        pytest.skip("ptxas is not installed")
    if (x, tile) in (("f16_wide", 16), ("f16_wide", 128)) or (x, element, tile) == ("bf16", "nf4", 32):
        pytest.skip("there is no such kernel")
    name = f"fpx_linear_{x}_{element}_m{tile}"
    path = tmp_path / "kernel.ptx"
    path.write_text(re.sub(r"^\s*\.loc.*$", "", program(name).module.text, flags=re.MULTILINE))
    used = simgpu.static.resources(path)[name]
    assert (used.spill_stores, used.spill_loads, used.stack) == (0, 0, 0)
    threads = TILES[tile][1] * TILES[tile][2] * 32
    resident = {8: 3, 16: 2, 32: 4, 64: 1, 128: 1}[tile]
    if element == "nf4" and tile <= 16:
        resident = 1 if tile == 16 and x == "bf16" else 2
    assert simgpu.static.occupancy("sm_80", threads, used.registers, used.shared).blocks >= resident


@pytest.mark.parametrize("tile", [8, *(pytest.param(tile, marks=pytest.mark.nightly) for tile in (16, 32, 64, 128))])
def test_every_synchronisation_is_needed(tile: int) -> None:
    """Dropping any barrier or wait of a kernel is noticed."""
    rng = np.random.default_rng(8)
    # 25 stages: the last one lies where the sums of a tile of 32 rows go.
    matrix, x = random_matrix(rng, "uint4", 32, "fp16", 64, 1600), activations(rng, 8, 1600, np.float16)
    name = kernel_name(matrix, x, tile)
    whole, kept, seen = program(name), [], 0
    for copies, mutant in simgpu.sync_mutants(whole.module, whole.find(name)):
        seen += 1
        try:
            result = run(simgpu.Program(mutant), name, matrix, x, tile)
        except simgpu.SimError:
            continue
        if not result.launches[0].hazards:
            kept.append((copies[0].text, copies[0].source))
    assert seen >= 3
    assert not kept, kept
