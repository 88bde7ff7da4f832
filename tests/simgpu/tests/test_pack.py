"""The library's pack and unpack kernels: what the packed layout of GPUs is in numpy (fpx.py), whole sectors on both
sides, no bank conflicts. Every element and ragged shape is packed through the library (cuda_pack_test.cpp).
"""

from __future__ import annotations

import ctypes
import shutil
from ctypes import c_int32, c_int64, c_uint8, c_uint32

import numpy as np
import pytest
import simgpu
from fpx import SCALES, pack_codes, pack_records, random_matrix
from shipped import image
from test_quantize import Arrays, structure

SCALE_TYPES = ("fp32", "fp16", "bf16", "e8m0", "e4m3")

# The struct of cuda/kernels/pack_args.hpp.
PackArgs = structure(
    "PackArgs",
    canonical=Arrays,
    **dict.fromkeys(("codes", "records", "row_scales", "specials"), c_int64),
    **dict.fromkeys(("rows", "cols", "row_bytes", "groups", "stages", "tiles"), c_int64),
    **dict.fromkeys(("record_bytes", "record_zeros"), c_int32),
    scale=c_uint8,
    base=c_int32,
    flip=c_uint32,
    special=c_uint32,
)


@pytest.fixture(scope="module")
def program() -> simgpu.Program:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    return image("sm80_pack")


class PackCase:
    """A matrix on a device, canonical and packed."""

    def __init__(self, element: str, group: int, kind: str, rows: int, cols: int) -> None:
        self.matrix = m = random_matrix(np.random.default_rng(rows), element, group, kind, rows, cols)
        self.device, e = simgpu.Device(), m.element
        bits = (m.codes[:, :, None] >> np.arange(e.bits) & 1).astype(np.uint8).reshape(rows, -1)
        self.codes = np.packbits(bits, axis=1, bitorder="little")
        self.packed_codes, self.packed_records = pack_codes(m), pack_records(m).ravel()
        self.args = PackArgs(
            rows=rows,
            cols=cols,
            row_bytes=self.codes.shape[1],
            groups=m.scales.shape[1],
            stages=-(-cols // 64),
            tiles=-(-rows // 64),
            record_zeros=64 * m.scales.itemsize if group else 0,
            scale=SCALE_TYPES.index("fp32" if kind == "row" else kind),
            base=10 - e.mantissa if e.kind == "fp" else 0,
            flip=(1 << e.bits - 1) * 0x01010101 if e.kind == "int" else 0,
            special=256,
        )
        self.args.record_bytes = self.args.record_zeros + (64 if m.zeros is not None else 0)
        self.suffix = "nf4" if e.kind == "nf4" else str(e.bits)

    def kernel(self, name: str) -> str:
        return f"{name}_{self.suffix}" if "codes" in name else name

    def launch(
        self, program: simgpu.Program, name: str, arrays: list[np.ndarray | None], sections: list[np.ndarray | None]
    ) -> tuple[simgpu.Launch, list[simgpu.Buffer | None]]:
        """The canonical arrays and the sections of the packed block, on the device; empty ones are to be written."""

        def put(array: np.ndarray | None) -> simgpu.Buffer | None:
            return None if array is None or not array.size else self.device.array(array)

        buffers = [put(array) for array in [*arrays, *sections]]
        pointers = [buffer.ptr if buffer else 0 for buffer in buffers]
        self.args.canonical = Arrays(*pointers[:3], 0)
        self.args.codes, self.args.records = pointers[3:]
        assert program.find(name).params[0].size == ctypes.sizeof(self.args)
        along = -(-self.args.groups // 32) if "records" in name else -(-self.args.cols // 1024)
        count = self.args.tiles * (1 if "records" in name else 4)
        return program.launch(name, (along, count), 256, [bytes(self.args)], self.device).clean(), buffers

    def run(self, program: simgpu.Program, name: str) -> simgpu.Launch:
        """One of pack_codes, unpack_codes, pack_records, unpack_records, with its result compared."""
        m = self.matrix
        canonical, packed = [self.codes, m.scales, m.zeros], [self.packed_codes, self.packed_records]
        written = slice(0, 1) if "codes" in name else slice(1, None)  # of each
        pack = name.startswith("pack")
        target = packed if pack else canonical
        expected = target[written]
        target[written] = [None if array is None else np.zeros_like(array) for array in expected]
        launch, buffers = self.launch(program, self.kernel(name), canonical, packed)
        for array, buffer in zip(expected, (buffers[3:] if pack else buffers[:3])[written], strict=True):
            assert array is None or np.array_equal(buffer.get().reshape(array.shape), array)
        return launch


def check(launch: simgpu.Launch, moved: int, elements: int, instructions: float) -> None:
    counters = launch.counters
    assert counters.hot_conflicts() == []
    for seen in counters.global_accesses.values():
        assert seen.sector_use == 1, seen.ins.text
    assert 32 * sum(seen.sectors for seen in counters.global_accesses.values()) == moved
    per_element = launch.totals["thread_instructions"] / elements
    print(f"{launch.kernel.name}: {per_element:.1f} instructions an element")
    assert per_element <= instructions


ELEMENTS = ["int2", "fp3_e1m1", "uint4", "nf4", "fp5_e2m2", "fp6_e2m3", "int7", "int8"]


@pytest.mark.parametrize("element", ELEMENTS)
def test_codes(program: simgpu.Program, element: str) -> None:
    case = PackCase(element, 64, "fp16", 64, 2048)
    moved, elements = case.codes.size + case.packed_codes.size, case.matrix.codes.size
    check(case.run(program, "pack_codes"), moved, elements, instructions=17)
    check(case.run(program, "unpack_codes"), moved, elements, instructions=17)


@pytest.mark.parametrize("kind", SCALES[1:])
@pytest.mark.parametrize("element", ["fp4_e2m1", "uint4"])
def test_records(program: simgpu.Program, element: str, kind: str) -> None:
    case = PackCase(element, 32, kind, 128, 2048)
    m = case.matrix
    moved = m.scales.nbytes + case.packed_records.size + (m.zeros.size if m.zeros is not None else 0)
    elements = 2 * m.scales.size
    check(case.run(program, "pack_records"), moved, elements, instructions=44)
    check(case.run(program, "unpack_records"), moved, elements, instructions=44)


@pytest.mark.parametrize("name", ["pack_codes", "unpack_codes", "pack_records", "unpack_records"])
def test_every_synchronisation_is_needed(program: simgpu.Program, name: str) -> None:
    """Dropping any barrier of a kernel is noticed."""
    case = PackCase("fp6_e2m3", 32, "fp16", 16, 2100)
    kept, seen = [], 0
    for copies, mutant in simgpu.sync_mutants(program.module, program.find(case.kernel(name))):
        seen += 1
        try:
            case.run(simgpu.Program(mutant), name)
        except (simgpu.SimError, AssertionError):
            continue
        kept.append((copies[0].text, copies[0].source))
    assert seen >= 1
    assert not kept, kept
