"""Formats: the grammar and the tables of values, against exact rationals and ml_dtypes."""

import math

import ml_dtypes
import narrowgauge as ng
import numpy as np
import oracle
import pytest

ML_DTYPES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "int4": ml_dtypes.int4,
    "int2": ml_dtypes.int2,
    "uint4": ml_dtypes.uint4,
    "uint2": ml_dtypes.uint2,
    "int8": np.int8,
    "uint8": np.uint8,
}


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


@pytest.mark.parametrize("element", oracle.ELEMENTS)
def test_every_value_of_every_element(element: str) -> None:
    format = ng.Format(f"{element}:row:fp32")
    values, expected = format.values(), oracle.values(element)
    assert len(values) == 2**format.bits
    assert all(map(same, values, expected))
    finite = [value for value in expected if math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    assert format.max == oracle.largest(element)
    assert format.min_subnormal == min(positive)
    if format.kind == "fp":
        assert format.min_normal == expected[2**format.mantissa_bits]
        assert format.exponent_bits + format.mantissa_bits + 1 == format.bits


@pytest.mark.parametrize("element", ML_DTYPES)
def test_values_agree_with_ml_dtypes(element: str) -> None:
    format = ng.Format(f"{element}:row")
    codes = np.arange(2**format.bits, dtype=np.uint8)
    if element in ("int2", "uint2", "int4", "uint4"):  # ml_dtypes reads these sign-extended
        signed = codes.astype(np.int8)
        signed[(codes >= 2 ** (format.bits - 1)) & element.startswith("int")] -= 2**format.bits
        theirs = signed.astype(ML_DTYPES[element]).astype(np.float32)
    else:
        theirs = codes.view(ML_DTYPES[element]).astype(np.float32)
    assert all(map(same, format.values(), theirs.tolist()))


@pytest.mark.parametrize("element", oracle.ELEMENTS)
@pytest.mark.parametrize("scale", oracle.SCALES)
def test_parse_and_print(element: str, scale: str) -> None:
    for group in ("row", "g16", "g48", "g128", "g1024"):
        format = ng.Format(f"{element}:{group}:{scale}")
        assert str(format) == f"{element}:{group}:{scale}"
        assert ng.Format(str(format)) == format
        assert (format.element, format.scale) == (element, scale)
        assert format.group == (0 if group == "row" else int(group[1:]))
        assert format.has_zero_point == element.startswith("uint")
        assert format.has_global_scale == (scale == "e4m3")


def test_defaults_and_aliases() -> None:
    assert str(ng.Format("fp6_e2m3")) == "fp6_e2m3:row:fp32"
    assert str(ng.Format("fp6_e2m3:g64")) == "fp6_e2m3:g64:bf16"
    assert str(ng.Format("int4:row")) == "int4:row:fp32"
    assert ng.format_aliases() == {
        "fp8": "fp8_e4m3:row:fp32",
        "fp6": "fp6_e2m3:g128:fp16",
        "fp5": "fp5_e2m2:g64:fp16",
        "fp4": "fp4_e2m1:g64:fp16",
        "int8": "int8:row:fp32",
        "int4": "int4:g64:fp16",
        "nf4": "nf4:g64:fp16",
        "mxfp8": "fp8_e4m3:g32:e8m0",
        "mxfp6": "fp6_e2m3:g32:e8m0",
        "mxfp4": "fp4_e2m1:g32:e8m0",
        "nvfp4": "fp4_e2m1:g16:e4m3",
    }
    for alias, full in ng.format_aliases().items():
        assert str(ng.Format(alias)) == full


@pytest.mark.parametrize(
    ("text", "bad", "choices"),
    [
        ("", "''", "fpN_eXmY"),
        ("fp7", "'fp7'", "N = 1 + X + Y"),
        ("fp6_e3m3", "'fp6_e3m3'", "N = 1 + X + Y"),
        ("fp9_e4m4", "'fp9_e4m4'", "3 <= N <= 8"),
        ("fp8_e0m7", "'fp8_e0m7'", "X >= 1"),
        ("int1", "'int1'", "int2..int8"),
        ("int08", "'int08'", "int2..int8"),
        ("uint9", "'uint9'", "uint2..uint8"),
        ("INT8", "'INT8'", "int2..int8"),
        ("int8 ", "'int8 '", "int2..int8"),
        ("int4:64", "'64'", "gN"),
        ("int4:g0", "'g0'", "16 <= N <= 1024"),
        ("int4:g24", "'g24'", "multiple of 16"),
        ("int4:g1040", "'g1040'", "16 <= N <= 1024"),
        ("int4:", "''", "row or gN"),
        ("int4:g64:fp8", "'fp8'", "fp32, fp16, bf16, e8m0 or e4m3"),
        ("int4:g64:", "''", "fp32, fp16, bf16, e8m0 or e4m3"),
        ("int4:g64:fp16:e4m3", "':e4m3'", "element[:group[:scale]]"),
        ("fp6:g64", "'fp6'", "aliases"),
    ],
)
def test_errors_name_the_bad_part_and_the_choices(text: str, bad: str, choices: str) -> None:
    with pytest.raises(ValueError) as caught:
        ng.Format(text)
    assert bad in str(caught.value)
    assert choices in str(caught.value)


def test_bits_per_weight() -> None:
    assert ng.fp6.bits_per_weight() == 6.125
    assert ng.int4.bits_per_weight() == 4.25
    assert ng.nvfp4.bits_per_weight() == 4.5
    assert ng.Format("uint4:g64:fp16").bits_per_weight() == 4.375
    assert ng.int8.bits_per_weight() == 8
    assert ng.int8.bits_per_weight(64) == 8.5
    assert ng.fp6.bits_per_weight(576) == 6 + 5 * 16 / 576
    assert ng.Format("fp3_e1m1").bits_per_weight(3) == (16 + 32) / 3
