"""Number formats: codes and values agree with the published extremes, and converting back is exact."""

from __future__ import annotations

import numpy as np
import pytest
from simgpu import numerics


@pytest.mark.parametrize(
    "kind, largest, largest_value, smallest", [("e4m3", 0x7E, 448, 2.0**-9), ("e5m2", 0x7B, 57344, 2.0**-16)]
)
def test_fp8(kind: str, largest: int, largest_value: float, smallest: float) -> None:
    values = numerics.FP8[kind]
    assert values[largest] == largest_value and values[1] == smallest
    codes = np.arange(256, dtype=np.uint8)
    finite = np.isfinite(values)
    assert (numerics.f32_to_fp8(values[finite], kind) == codes[finite]).all()
    assert numerics.f32_to_fp8(np.array([1e9], np.float32), kind)[0] == largest
