"""docs/formats.md keeps its word: its decoder reads what narrowgauge writes, and its tables are the library's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import narrowgauge as ng
import numpy as np
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "format",
    [
        "fp8_e4m3", "fp8_e5m2:g32:fp16", "fp7_e3m3", "fp6_e2m3:g128:fp16", "fp6_e3m2", "fp5_e2m2:g64:fp16", "fp5_e4m0",
        "fp4_e2m1:g64:fp16", "fp3_e1m1:g16:fp32", "int8", "int4:g64:fp16", "int3:g16:fp16", "int2",
    ],
)  # fmt: skip
def test_the_page_decodes_our_files(tmp_path: Path, format: str) -> None:
    pytest.importorskip("safetensors")
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    weights = np.random.default_rng(0).standard_normal((3, 5, 83)).astype(np.float32)
    q = ng.quantize(weights, format)
    q.save(tmp_path / "x.safetensors", "layer.weight")
    decoded = names["read_narrow"](tmp_path / "x.safetensors", "layer.weight")
    np.testing.assert_array_equal(decoded, q.dequantize("float32"), strict=True)


def test_the_table_of_aliases_is_the_library_s() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+:\w+:\w+)` \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert {alias: full for alias, full, _ in rows} == dict(ng.format_aliases())
    for alias, full, bits in rows:
        assert str(ng.Format(alias)) == full
        assert ng.Format(alias).bits_per_weight() == float(bits)


def test_the_table_of_values_is_the_library_s() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.^-]+) \| ([\d.^-]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 9

    def number(text: str) -> float:
        return 2.0 ** int(text[2:]) if text.startswith("2^") else float(text)

    for element, *expected in rows:
        format = ng.Format(element)
        seen = [format.max, format.min_normal, format.min_subnormal]
        assert seen == pytest.approx([number(text) for text in expected], rel=1e-3)
