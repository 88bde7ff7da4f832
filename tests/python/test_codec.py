"""quantize and dequantize against exact rationals and ml_dtypes, and their properties, on every instruction set."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import ml_dtypes
import narrowgauge as ng
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from narrowgauge import _native
from narrowgauge.qtensor import Canonical
from test_format import ML_DTYPES

SCALE_DTYPES = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "e4m3": ml_dtypes.float8_e4m3fn,
}


def codes_of(q: ng.QTensor) -> np.ndarray:
    return oracle.unpack(np.asarray(q.codes), q.format.bits, q.cols)


def scales_of(q: ng.QTensor) -> list[list[Fraction]]:
    stored = np.ascontiguousarray(q.scales).view(SCALE_DTYPES[q.format.scale]).astype(np.float64)
    return [[Fraction(value) for value in row] for row in stored.reshape(q.rows, -1).tolist()]


@pytest.fixture(params=_native.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with forced(request.param):
        yield


@contextlib.contextmanager
def forced(isa: str) -> Iterator[None]:
    before = _native.isa()
    _native.force_isa(isa)
    try:
        yield
    finally:
        _native.force_isa(before)


def expect_oracle(w: np.ndarray, text: str, **options: bool) -> None:
    element, group, scale = text.split(":")
    codes, scales, zeros, global_scale = oracle.quantize(
        w, element, 0 if group == "row" else int(group[1:]), scale, **options
    )
    for isa in _native.supported_isas():
        with forced(isa):
            q = ng.quantize(w, text, **options)
        assert scales_of(q) == scales, (text, isa)
        if q.zeros is not None:
            assert q.zeros.tolist() == zeros, (text, isa)
        if q.global_scale is not None:
            assert Fraction(float(q.global_scale[0])) == global_scale, (text, isa)
        assert (codes_of(q) == codes).all(), (text, isa)


def matrix_of_codes(element: str) -> ng.QTensor:
    """All codes of an element in one row, at scale 1."""
    bits = oracle.bits_of(element)
    number = sum(code << (bits * code) for code in range(2**bits))
    codes = np.frombuffer(number.to_bytes((bits * 2**bits + 7) // 8, "little"), np.uint8)[None].copy()
    zeros = np.zeros((1, 1), np.uint8) if element.startswith("uint") else None
    return ng.QTensor.from_canonical(
        f"{element}:row:fp32", (1, 2**bits), Canonical(codes, np.ones((1, 1), np.float32), zeros)
    )


@pytest.mark.parametrize("element", oracle.ELEMENTS)
def test_every_code_decodes_to_its_value_and_back(isa: None, element: str) -> None:
    q = matrix_of_codes(element)
    expected = np.array(oracle.values(element), np.float32)
    for dtype in ("float32", "float16"):
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(q.dequantize(dtype)[0], expected.astype(dtype))
    usable = np.isfinite(expected) & (np.abs(expected) <= float(oracle.largest(element)))
    again = ng.quantize(expected[usable][None], f"{element}:row:fp32")
    assert (codes_of(again)[0] == np.arange(len(expected))[usable]).all()


@pytest.mark.parametrize("element", oracle.ELEMENTS)
def test_every_rounding_tie(element: str) -> None:
    finite = sorted({Fraction(value) for value in oracle.values(element) if math.isfinite(value)})
    most = oracle.largest(element)
    row = [float(most)]
    for low, high in itertools.pairwise(finite):
        middle = np.float32(float((low + high) / 2))
        row += [float(x) for x in (middle, np.nextafter(middle, -np.inf, dtype=np.float32))]
        row.append(float(np.nextafter(middle, np.inf, dtype=np.float32)))
    w = np.array([[x for x in row if abs(x) <= most]], np.float32)
    expect_oracle(w, f"{element}:row:fp32")
    expect_oracle(w * np.float32(2**-7), f"{element}:row:bf16")


@pytest.mark.parametrize("element", ["fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1"])
def test_rounding_agrees_with_ml_dtypes(isa: None, element: str) -> None:
    most = float(oracle.largest(element))
    w = np.random.default_rng(1).normal(0, most / 4, (1, 5000)).astype(np.float32).clip(-most, most)
    w[0, :2000] *= np.float32(1e-3)
    w[0, 0] = most  # so that the scale is 1
    q = ng.quantize(w, f"{element}:row:fp32")
    assert (codes_of(q) == w.astype(ML_DTYPES[element]).view(np.uint8)).all()


@pytest.mark.parametrize("scale", oracle.SCALES)
@pytest.mark.parametrize("element", oracle.ELEMENTS)
def test_random_matrices(element: str, scale: str) -> None:
    rng = np.random.default_rng(2)
    for group, cols in (("row", 37), ("g16", 50), ("g32", 32), ("g48", 101)):
        w = rng.normal(0, 0.02, (2, cols)).astype(np.float32)
        w[1] *= np.exp2(rng.integers(-40, 40, cols)).astype(np.float32)
        expect_oracle(w, f"{element}:{group}:{scale}")
    expect_oracle(w, f"{element}:g32:{scale}", e8m0_ceil=True)
    expect_oracle(w, f"{element}:g32:{scale}", full_range=True)


FORMATS = st.builds(
    "{}:{}:{}".format,
    st.sampled_from(oracle.ELEMENTS),
    st.sampled_from(["row", "g16", "g32", "g48", "g64"]),
    st.sampled_from(oracle.SCALES),
)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 70))
ANY = npst.arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
# Weights of ordinary size, where scales are normal numbers of every type.
USUAL = npst.arrays(
    np.float32,
    SHAPES,
    elements=st.floats(2**-10, 8, width=32).flatmap(lambda x: st.sampled_from([x, -x])) | st.just(0.0),
)


@settings(deadline=None, max_examples=150)
@given(w=ANY, text=FORMATS)
def test_matches_the_oracle_everywhere(w: np.ndarray, text: str) -> None:
    expect_oracle(w, text)


@settings(deadline=None, max_examples=150)
@given(w=USUAL, text=FORMATS)
def test_error_is_bounded_in_every_group(w: np.ndarray, text: str) -> None:
    q = ng.quantize(w, text)
    format, group = q.format, q.format.group or q.cols
    values = sorted(value for value in format.values() if math.isfinite(value) and abs(value) <= format.max)
    gap = max(high - low for low, high in itertools.pairwise(values))
    back = q.dequantize("float32").astype(np.float64)
    steps = np.array(scales_of(q), np.float64) * (1 if q.global_scale is None else float(q.global_scale[0]))
    for g in range(format.groups(q.cols)):
        part = slice(g * group, (g + 1) * group)
        x, step = w[:, part].astype(np.float64), steps[:, g, None]
        if format.has_zero_point:
            # Half a step for the code and half for the zero point; what a scale rounded down leaves out saturates.
            width = np.maximum(x.max(1), 0) - np.minimum(x.min(1), 0)
            beyond = np.maximum(width[:, None] - step * format.max, 0)
            bound = step + beyond
        else:
            beyond = np.maximum(np.abs(x).max(1)[:, None] - step * format.max, 0)
            bound = step * gap / 2 + beyond
        assert (np.abs(x - back[:, part]) <= bound * (1 + 2**-20)).all(), text


@settings(deadline=None, max_examples=150)
@given(w=USUAL, text=FORMATS)
def test_order_is_preserved_in_every_group(w: np.ndarray, text: str) -> None:
    q = ng.quantize(w, text)
    group = q.format.group or q.cols
    back = q.dequantize("float32")
    for begin in range(0, q.cols, group):
        for row in range(q.rows):
            order = np.argsort(w[row, begin : begin + group], kind="stable")
            assert (np.diff(back[row, begin : begin + group][order]) >= 0).all(), text


@settings(deadline=None, max_examples=150)
@given(w=USUAL, text=FORMATS.filter(lambda text: not text.startswith("uint") and not text.endswith("e4m3")))
def test_quantizing_again_changes_nothing(w: np.ndarray, text: str) -> None:
    q = ng.quantize(w, text)
    if np.asarray(scales_of(q), np.float64).min() < 2**-14 and q.format.scale == "fp16":
        return  # a subnormal scale is too coarse for the largest element to keep the largest code
    back = q.dequantize("float32")
    again = ng.quantize(back, text)
    assert (codes_of(again) == codes_of(q)).all(), text
    np.testing.assert_allclose(again.dequantize("float32"), back, rtol=2**-22)


@pytest.mark.parametrize("text", ["fp8", "fp6", "int4", "uint4:g32", "nf4", "mxfp4", "nvfp4", "int3:g48:bf16"])
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_instruction_sets_agree(text: str, search: str) -> None:
    w = np.random.default_rng(3).standard_t(5, (7, 1111)).astype(np.float32)
    results = []
    for isa in _native.supported_isas():
        with forced(isa):
            q = ng.quantize(w, text, search=search)
            parts = [part.tobytes() for part in q.canonical() if part is not None]
            results.append([*parts, q.dequantize("float32").tobytes(), q.dequantize("float16").tobytes()])
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("element", ["fp6_e2m3", "int4", "int8", "fp8_e5m2"])
def test_stochastic_rounding(isa: None, element: str) -> None:
    seed = 2**63 + 12345
    w = np.random.default_rng(4).normal(0, 1, (3, 41)).astype(np.float32)
    q = ng.quantize(w, f"{element}:g16:fp32", stochastic=True, seed=seed)
    values = [Fraction(value) if math.isfinite(value) else None for value in oracle.values(element)]
    magnitudes = sorted({abs(value) for value in values if value is not None and abs(value) <= oracle.largest(element)})
    for (row, col), code in np.ndenumerate(codes_of(q)):
        index = row * q.cols + col
        step = scales_of(q)[row][col // 16]
        quotient = abs(oracle.f32(Fraction(float(w[row, col])) / step))
        below = max(value for value in magnitudes if value <= quotient)
        above = min((value for value in magnitudes if value > quotient), default=below)
        fraction = (quotient - below) / (above - below) if above > below else Fraction(0)
        word = oracle.philox(index >> 2, seed)[index & 3]
        expected = above if Fraction(word, 2**32) < fraction else below
        assert abs(values[code]) == expected
        assert expected == 0 or (values[code] < 0) == (w[row, col] < 0)


@pytest.mark.parametrize("text", ["fp6", "fp4", "int4", "uint4:g64:fp16", "nf4", "mxfp4", "nvfp4", "int8"])
def test_search_never_raises_a_groups_error(text: str) -> None:
    w = np.random.default_rng(5).standard_t(5, (16, 1000)).astype(np.float32)
    group = ng.Format(text).group or w.shape[1]
    errors = []
    for search in ("absmax", "mse"):
        square = (w.astype(np.float64) - ng.quantize(w, text, search=search).dequantize("float32")) ** 2
        errors.append(np.add.reduceat(square, range(0, w.shape[1], group), axis=1))
    assert (errors[1] <= errors[0] * (1 + 1e-12)).all()
    assert errors[1].sum() < errors[0].sum()


def test_not_finite_weights() -> None:
    w = np.ones((3, 40), np.float32)
    w[1, 7], w[2, 0] = np.inf, np.nan
    for text in ("int8", "fp6", "nvfp4", "uint4:g16"):
        with pytest.raises(ValueError, match=r"weights\[1, 7\] \(element 47\) is inf"):
            ng.quantize(w, text)
        saturated = w.copy()
        saturated[1, 7], saturated[2, 0] = np.finfo(np.float32).max, 0
        q, expected = ng.quantize(w, text, nan="saturate"), ng.quantize(saturated, text)
        assert (codes_of(q) == codes_of(expected)).all()
        assert scales_of(q) == scales_of(expected)
        group = q.format.group or 40
        expected = ng.quantize(np.where(np.isfinite(w), w, 0), text).dequantize("float32")
        for row, col in ((1, 7), (2, 0)):
            expected[row, col // group * group : (col // group + 1) * group] = np.nan
        np.testing.assert_array_equal(ng.quantize(w, text, nan="keep").dequantize("float32"), expected)


@pytest.mark.parametrize("text", ["int8", "fp6", "uint4:g32", "nvfp4", "nf4"])
def test_zeros_and_empty_matrices(text: str) -> None:
    w = np.zeros((2, 70), np.float32)
    w[1] = -0.0
    q = ng.quantize(w, text)
    assert (codes_of(q) == 0).all()
    assert all(value == 0 for row in scales_of(q) for value in row)
    assert (q.dequantize("float32") == 0).all()
    for shape in ((0, 16), (16, 0), (0, 0)):
        assert ng.quantize(np.empty(shape, np.float32), text).dequantize("float32").shape == shape
